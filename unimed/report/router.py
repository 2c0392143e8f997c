"""Router telemetry: how each task mixes the experts, over training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


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
