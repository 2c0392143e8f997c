"""What a training run says about its tasks: losses, auxiliary losses and router gates, of all processes together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from unimed.tasks import TASKS
from unimed.train import processes


def describe(gates: Tensor) -> dict[str, Any]:
    """Mean gates, entropy of a token's gates in shares of log E (1: all experts alike), and how often each expert is a token's first.

    gates: [..., E], any number of tokens above zero.
    """
    gates = gates.detach().float().reshape(-1, gates.shape[-1])
    experts = gates.shape[1]
    entropy = -torch.special.xlogy(gates, gates).sum(1).mean()
    scale = torch.log(torch.tensor(float(experts))) if experts > 1 else torch.tensor(1.0)
    load = torch.bincount(gates.argmax(1), minlength=experts).float() / len(gates)
    return {"gates": gates.mean(0).tolist(), "entropy": float(entropy / scale), "load": load.tolist()}


class RouterHistory:
    """Gathers gates by task between two logs; `close` turns them into one entry of the history."""

    def __init__(self) -> None:
        self.entries: list[dict[str, Any]] = []
        self._open: dict[str, list[Tensor]] = {}

    def add(self, task: str, gates: Tensor) -> None:
        self._open.setdefault(task, []).append(gates.detach().reshape(-1, gates.shape[-1]))

    def close(self, step: int) -> dict[str, Any]:
        """The entry of the tasks seen since the last one; {} when no gate was seen."""
        tasks = {task: describe(torch.cat(parts)) for task, parts in sorted(self._open.items())}
        self._open = {}
        if tasks:
            self.entries.append({"step": step, "tasks": tasks})
        return tasks


class Telemetry:
    """Observes batches; `collect` gives what was seen since the last log, the same in every process.

    `tasks`: the image tasks as the model numbers them.
    """

    def __init__(self, tasks: Sequence[str]) -> None:
        self.tasks = list(tasks)
        self.router = RouterHistory()
        self._start()

    def _start(self) -> None:
        # By task the sum and number of the answers' losses; each batch's auxiliary losses with their weights; each batch's task_ids [I] and
        # gates [I, N, E].
        self._losses = torch.zeros(len(TASKS), 2, dtype=torch.float64)
        self._aux: dict[str, list[Tensor]] = {}
        self._gates: list[tuple[Tensor, Tensor]] = []

    @torch.no_grad()
    def observe(self, outputs: Any, inputs: dict[str, Any], sample_tasks: Tensor, images_in_step: Tensor | None) -> None:
        """A batch of the model: `sample_tasks` [B] are positions in TASKS, `images_in_step` the images of the whole optimiser step."""
        labels = inputs["labels"][:, 1:]
        learned = labels != -100
        # Only the answers' tokens: a batch is mostly prompt, image and padding.
        losses = cross_entropy(outputs.logits[:, :-1][learned].float(), labels[learned], reduction="none").double()
        of_token = one_hot(sample_tasks[:, None].expand_as(labels)[learned], len(TASKS)).double()
        self._losses = self._losses.to(losses.device) + of_token.T @ torch.stack([losses, torch.ones_like(losses)], dim=1)
        if outputs.gates is None:
            return
        task_ids = inputs["task_ids"]
        share = len(task_ids) / images_in_step if images_in_step is not None else torch.tensor(1.0)
        for name, value in (outputs.aux_losses or {}).items():
            self._aux.setdefault(name, []).append(torch.stack([value.double() * share, share.double()]))
        self._gates.append((task_ids, outputs.gates.detach().reshape(len(task_ids), -1, outputs.gates.shape[-1])))

    def collect(self, step: int) -> dict[str, float]:
        """Mean loss by task and auxiliary losses since the last log, over all processes; gates go into the router's history."""
        gates: dict[str, list[Tensor]] = {}
        for task_ids, batch in self._gates:
            for index in task_ids.unique().tolist():
                gates.setdefault(self.tasks[index], []).append(batch[task_ids == index].cpu())
        mine: dict[str, Any] = {
            "losses": self._losses.cpu(),
            "aux": {name: torch.stack(parts).sum(0).cpu() for name, parts in self._aux.items()},
            "gates": gates,
        }
        self._start()
        everyone = processes.gather(mine)
        found: dict[str, float] = {}
        sums = {f"loss/{task}": [part["losses"][index] for part in everyone] for index, task in enumerate(TASKS)}
        for name in {name for part in everyone for name in part["aux"]}:
            sums[f"aux/{name}"] = [part["aux"][name] for part in everyone if name in part["aux"]]
        for name, parts in sorted(sums.items()):
            total, weight = torch.stack(parts).sum(0).tolist()
            if weight:
                found[name] = total / weight
        for part in everyone:
            for task, seen in part["gates"].items():
                for one in seen:
                    self.router.add(task, one)
        entropies = self.router.close(step)
        return found | {f"router_entropy/{task}": entry["entropy"] for task, entry in entropies.items()}
