"""How the tasks pull at the weights that they share, at points of training: `train.probe_every`.

At a point, each task of the probe gives the gradients of two halves of its samples, one half after the other. The samples are fixed, and a
half is one batch. The probe keeps one vector of each half and layer, and forgets the gradients. A layer is a block, the embeddings or an
expert; its module is connector (the experts), router (with the task tokens), lora, language or vision. RUN/probe.jsonl has a line a point:

    modules  direction: cosine of the gradients of two tasks. halves: the mean of its four values for a half of one and a half of the other
             magnitude: 2 |a| |b| / (|a|^2 + |b|^2) of the gradients of two tasks
             split: both of the two halves of one task, which is what noise leaves of them where nothing differs
             interference: of a pair (1 - halves / sqrt(r_a r_b)) / 2, with r the direction of a task's two halves. 0: the tasks agree as
             well as each one with itself. 1/2: they have nothing to do with each other. 1: one undoes the other. A pair with a task whose
             halves hardly agree (r below LEAST) has none. Of a module: the mean over its pairs
             statistics: sum_t served_t / sum_t |served_t|, the mean over layers by their squared change. 1: what changed serves every task.
             0: it harms as much as it serves. -1: it harms all
    layers   change: |w - w'| / |w'| since the point before. served: by task, the cosine of that change and the step that lowers the loss
    gates    mean gates, entropy and load of the experts by task, as `telemetry.describe` gives them
    loss     of each task's samples

Interference and statistics are our definitions: those of Uni-Med (NeurIPS 2024, section 3) are not public. The model is in evaluation mode,
without dropout. Of a module with more than EXACT parameters, random projections of its layers are kept (SKETCH numbers each). Their largest
relative error of a squared norm is measured, and written as `error`; norms are exact.
"""

from __future__ import annotations

import math
import random
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from unimed import io
from unimed.train.telemetry import describe

HALF = 12  # samples of half a task
EXACT, SKETCH = 10**7, 2**16
LEAST = 0.1  # the least agreement of a task's two halves for which interference is told

Batch = Mapping[str, Any]


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, and afterwards the modes and random states of before: a run with a probe has the bits of one without."""
    modes = [(module, module.training) for module in model.modules()]
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=devices):
        model.eval()
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode


# Layers


@dataclass
class Layer:
    """A layer of a module. pieces: which parameter, which expert of it (None: all of it), and the number of elements."""

    name: str
    module: str
    pieces: list[tuple[int, int | None, int]] = field(default_factory=list)

    @property
    def size(self) -> int:
        return sum(size for *_, size in self.pieces)


MODULES = {"connector": "connector", "language_model": "language", "vision_tower": "vision"}


def module_of(name: str) -> str:
    """The module of a parameter, by its name."""
    if "lora_" in name:
        return "lora"
    if re.search(r"\bconnector\b.*\brouter\b", name):
        return "router"
    return next((to for part, to in MODULES.items() if re.search(rf"\b{part}\b", name)), name.partition(".")[0])


def layers_of(named: Sequence[tuple[str, Tensor]]) -> list[Layer]:
    """The layers of these parameters. A name ends after its first number, or after two words; each expert of a connector is one."""
    found: dict[tuple[str, str], Layer] = {}
    for place, (name, parameter) in enumerate(named):
        module = module_of(name)
        words = re.sub(r"\b(base_model\.model|modules_to_save\.default|original_module|base_layer)\.", "", name).split(".")
        end = next((at for at, word in enumerate(words) if word.isdigit()), 1)
        title = ".".join(words[: end + 1])
        stacked = module == "connector" and title.endswith(".experts")  # [E, ...]
        for expert in range(parameter.shape[0]) if stacked else (None,):
            one = title if expert is None else f"{title}.{expert}"
            size = parameter.numel() if expert is None else parameter[0].numel()
            found.setdefault((module, one), Layer(one, module)).pieces.append((place, expert, size))
    return list(found.values())


def sketch(piece: Tensor, seed: str, out: Tensor) -> None:
    """Adds a random projection of a vector to ``out`` [m]: a linear map, the same for the same seed, that keeps inner products on average.

    Part after part of m elements is multiplied by random signs, turned by a random number of places, and added.
    """
    width = len(out)
    for number, part in enumerate(piece.split(width)):
        dice = random.Random(f"{seed}/{number}")
        generator = torch.Generator(device=piece.device).manual_seed(dice.getrandbits(62))
        signs = torch.randint(0, 2, (len(part),), generator=generator, device=piece.device, dtype=torch.int8)
        signed = part.float() * (2 * signs - 1)
        turn = dice.randrange(width)
        head = min(len(part), width - turn)
        out[turn : turn + head] += signed[:head]
        out[: len(part) - head] += signed[head:]


class Keeper:
    """What is kept of a list of tensors, layer by layer: all elements, or a sketch of them where their module is large."""

    def __init__(self, named: Sequence[tuple[str, Tensor]], exact: int = EXACT, width: int = SKETCH) -> None:
        self.layers, self.width = layers_of(named), width
        self.sizes: dict[str, int] = {}  # by module
        for layer in self.layers:
            self.sizes[layer.module] = self.sizes.get(layer.module, 0) + layer.size
        self.sketched = {module for module, size in self.sizes.items() if size > exact}

    def keep(self, tensors: Sequence[Tensor | None]) -> tuple[list[Tensor], list[float]]:
        """Of each layer a vector in fp32 on the CPU, and its exact squared norm. None is zero."""
        kept, norms = [], []
        for layer in self.layers:
            pieces = [(place, expert, _piece(tensors[place], expert, size)) for place, expert, size in layer.pieces]
            norms.append(sum(float(piece.double().square().sum()) for *_, piece in pieces))
            if layer.module in self.sketched:
                out = torch.zeros(min(self.width, layer.size), device=pieces[0][2].device)
                for place, expert, piece in pieces:
                    sketch(piece.to(out.device), f"{place}/{expert}", out)
            else:
                out = torch.cat([piece.float().cpu() for *_, piece in pieces])
            kept.append(out.cpu())
        return kept, norms


def _piece(tensor: Tensor | None, expert: int | None, size: int) -> Tensor:
    if tensor is None:
        return torch.zeros(size)
    return (tensor if expert is None else tensor[expert]).detach().reshape(-1)


# Measures


def number(value: float) -> float | None:
    """For JSON, which has no NaN: six digits, None where it is not finite."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _cosine(dot: float, aa: float, bb: float) -> float:
    return min(max(dot / math.sqrt(aa * bb), -1.0), 1.0) if aa > 0 and bb > 0 else math.nan


def _alike(aa: float, bb: float) -> float:
    return 2 * math.sqrt(aa * bb) / (aa + bb) if aa > 0 or bb > 0 else math.nan


def interference(halves: float, own: float, others: float) -> float:
    """Of two tasks: ``halves``, the cosine of halves of the two; ``own`` and ``others``, those of the halves of each. NaN below LEAST."""
    if not min(own, others) >= LEAST:
        return math.nan
    return (1 - min(max(halves / math.sqrt(own * others), -1.0), 1.0)) / 2


def agreement(gram: np.ndarray, norms: Sequence[float], tasks: Sequence[str]) -> dict[str, Any]:
    """Of one module, from the inner products [2T, 2T] of the halves' gradients (two rows a task) and their exact squared norms [2T].

    Tasks without a gradient there are left out.
    """
    there = [at for at in range(len(tasks)) if norms[2 * at] > 0 and norms[2 * at + 1] > 0]
    own: dict[int, float] = {}  # squared norm of the mean of both halves, times 4
    split: dict[int, float] = {}
    pairs: list[dict[str, Any]] = []
    for at in there:
        a, b = 2 * at, 2 * at + 1
        own[at] = norms[a] + norms[b] + 2 * gram[a, b]
        split[at] = _cosine(gram[a, b], norms[a], norms[b])
    for one, other in combinations(there, 2):
        rows, columns = (2 * one, 2 * one + 1), (2 * other, 2 * other + 1)
        whole = sum(gram[a, b] for a in rows for b in columns)
        halves = statistics.fmean(_cosine(gram[a, b], norms[a], norms[b]) for a in rows for b in columns)
        pairs.append(
            {
                "tasks": [tasks[one], tasks[other]],
                "direction": number(_cosine(whole, own[one], own[other])),
                "magnitude": number(_alike(own[one], own[other])),
                "halves": number(halves),
                "interference": number(interference(halves, split[one], split[other])),
            }
        )
    told: list[float] = [pair["interference"] for pair in pairs if pair["interference"] is not None]
    return {
        "tasks": {
            tasks[at]: {
                "norm": number(math.sqrt(max(own[at], 0.0)) / 2),
                "split": {"direction": number(split[at]), "magnitude": number(_alike(norms[2 * at], norms[2 * at + 1]))},
            }
            for at in there
        },
        "pairs": pairs,
        "interference": number(statistics.fmean(told)) if told else None,
    }


def served(kept: Sequence[Tensor], change: Tensor, tasks: Sequence[str]) -> dict[str, float]:
    """By task the cosine of a layer's change and of the step that lowers the loss; ``kept``: the gradients of its halves, two a task."""
    found = {}
    moved = change.double()
    for at, task in enumerate(tasks):
        whole = kept[2 * at].double() + kept[2 * at + 1].double()
        cosine = _cosine(-float(whole @ moved), float(whole @ whole), float(moved @ moved))
        if math.isfinite(cosine):
            found[task] = cosine
    return found


def score(by_task: Mapping[str, float]) -> float:
    """sum c / sum |c| of what serves the tasks."""
    total = sum(map(abs, by_task.values()))
    return sum(by_task.values()) / total if total else math.nan


# The probe


class InterferenceProbe(TrainerCallback):
    """Measures every ``every`` steps and appends a line to ``out``.

    halves: by task the batches of its two halves, or a function that makes them when training begins. seconds: what the probe took so far.
    Only the main process measures. The model must be whole there.
    """

    def __init__(
        self,
        every: int,
        halves: Mapping[str, tuple[Batch, Batch]] | Callable[[], Mapping[str, tuple[Batch, Batch]]],
        out: Path,
        exact: int = EXACT,
        width: int = SKETCH,
    ) -> None:
        self.every, self.out, self.exact, self.width = every, out, exact, width
        self.halves = halves
        self.seconds = 0.0
        self._before: tuple[int, list[Tensor], list[float]] | None = None  # step, weights of each layer, their squared norms

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **_: Any) -> None:
        if model is None or not state.is_world_process_zero or state.max_steps < self.every:
            return
        start = time.perf_counter()
        lines = io.written_lines(self.out)
        known = [line for line in lines if line["step"] <= state.global_step]
        if len(known) < len(lines):  # measured after the checkpoint that the run goes on from
            io.write_text(self.out, "".join(map(io.json_line, known)))
        if callable(self.halves):
            self.halves = self.halves()
        named, keeper = self._trained(model)
        self._before = (state.global_step, *keeper.keep([p for _, p in named]))
        self.seconds = sum(line["seconds"] for line in known) + time.perf_counter() - start

    def on_step_end(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **_: Any) -> None:
        if model is not None and state.is_world_process_zero and state.global_step % self.every == 0:
            io.append_json_line(self.out, self.measure(model, state.global_step))

    def _trained(self, model: nn.Module) -> tuple[list[tuple[str, nn.Parameter]], Keeper]:
        model = getattr(model, "module", model)  # DistributedDataParallel's: gradients are not reduced over processes here
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        return named, Keeper(named, self.exact, self.width)

    def measure(self, model: nn.Module, step: int) -> dict[str, Any]:
        """The line of this step."""
        start = time.perf_counter()
        assert not callable(self.halves)
        named, keeper = self._trained(model)
        parameters, tasks = [p for _, p in named], list(self.halves)
        gradients: list[list[Tensor]] = [[] for _ in keeper.layers]
        norms: list[list[float]] = [[] for _ in keeper.layers]
        losses: dict[str, float | None] = {}
        gates: dict[str, Any] = {}
        with undisturbed(model), torch.enable_grad():
            for task, halves in self.halves.items():
                told, seen = [], []
                for batch in halves:
                    loss, gate, grads = _gradient(getattr(model, "module", model), batch, parameters)
                    told.append(loss)
                    seen += [] if gate is None else [gate]
                    for at, (vector, norm) in enumerate(zip(*keeper.keep(grads), strict=True)):
                        gradients[at].append(vector)
                        norms[at].append(norm)
                    del grads  # one at a time
                losses[task] = number(statistics.fmean(told))
                if seen:
                    gates[task] = describe(torch.cat(seen))
        modules = self._modules(keeper, gradients, norms, tasks)
        weights, sizes = keeper.keep(parameters)
        layers = self._layers(keeper, gradients, weights, tasks)
        for module, found in modules.items():
            parts = [layer for layer in layers if layer["module"] == module and layer["statistics"] is not None]
            weight = sum(layer["moved"] ** 2 for layer in parts)
            mean = sum(layer["statistics"] * layer["moved"] ** 2 for layer in parts) / weight if weight else math.nan
            found["statistics"] = number(mean)
        since = self._before[0] if self._before else None
        self._before = (step, weights, sizes)
        seconds = time.perf_counter() - start
        self.seconds += seconds
        counts = {task: len(halves[0]["input_ids"]) if "input_ids" in halves[0] else None for task, halves in self.halves.items()}
        return {
            "step": step, "since": since, "seconds": round(seconds, 3), "half": counts, "loss": losses, "gates": gates, "modules": modules,
            "layers": layers,
        }  # fmt: skip

    def _modules(
        self, keeper: Keeper, gradients: Sequence[Sequence[Tensor]], norms: Sequence[Sequence[float]], tasks: Sequence[str]
    ) -> dict[str, Any]:
        found = {}
        for module, size in keeper.sizes.items():
            rows = [at for at, layer in enumerate(keeper.layers) if layer.module == module]
            gram = sum(_gram(gradients[at]) for at in rows)
            assert isinstance(gram, np.ndarray)
            exact = [sum(norms[at][row] for at in rows) for row in range(2 * len(tasks))]
            errors = [abs(gram[row, row] - value) / value for row, value in enumerate(exact) if value > 0]
            sketched = module in keeper.sketched
            found[module] = {
                "parameters": size,
                **({"error": number(max(errors, default=0.0))} if sketched else {}),
                **agreement(gram, exact, tasks),
            }
        return found

    def _layers(
        self, keeper: Keeper, gradients: Sequence[Sequence[Tensor]], weights: Sequence[Tensor], tasks: Sequence[str]
    ) -> list[dict[str, Any]]:
        found = []
        before = self._before[1] if self._before else weights
        sizes = self._before[2] if self._before else [math.nan] * len(weights)
        for at, layer in enumerate(keeper.layers):
            change = weights[at].double() - before[at].double()
            moved = float(change.norm())
            by_task = served(gradients[at], change, tasks)
            found.append(
                {
                    "name": layer.name, "module": layer.module, "parameters": layer.size, "moved": number(moved),
                    "change": number(moved / math.sqrt(sizes[at]) if sizes[at] > 0 else math.nan),
                    "served": {task: number(value) for task, value in by_task.items()}, "statistics": number(score(by_task)),
                }
            )  # fmt: skip
        return found


def _gradient(model: nn.Module, batch: Batch, parameters: Sequence[nn.Parameter]) -> tuple[float, Tensor | None, Sequence[Tensor | None]]:
    """Loss, gates and gradients of one batch. `torch.autograd.grad` leaves the parameters' own gradients as they are."""
    device = next(model.parameters()).device
    outputs = model(**{name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()})
    gates = getattr(outputs, "gates", None)
    grads = torch.autograd.grad(outputs.loss, list(parameters), allow_unused=True)
    return float(outputs.loss.detach()), None if gates is None else gates.detach().float().cpu().flatten(0, -2), grads


def _gram(rows: Sequence[Tensor]) -> np.ndarray:
    """Inner products, in fp64, part by part so that no whole copy is made."""
    gram = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    for start in range(0, len(rows[0]), 2**18):
        part = torch.stack([row[start : start + 2**18] for row in rows]).double()
        gram += part @ part.T
    return gram.numpy()


def halves_of(data: Any, collate: Callable[[list[Any]], Mapping[str, Any]], most: int = HALF) -> dict[str, tuple[Batch, Batch]]:
    """Two batches a task from a TrainingSet: items evenly spaced over the task's, dealt out in turn. A task of one item is left out."""
    from unimed.datasets.index import kinds
    from unimed.tasks import TASKS

    pairs, of = kinds(data.items)
    found: dict[str, tuple[Batch, Batch]] = {}
    for task in TASKS:
        places = np.flatnonzero(np.isin(of, [at for at, (_, name) in enumerate(pairs) if name == task]))
        half = min(most, len(places) // 2)
        if half:
            chosen = places[np.arange(2 * half) * len(places) // (2 * half)]
            batches = [collate([data[int(place), int(place)] for place in chosen[first::2]]) for first in (0, 1)]
            one, other = ({name: value for name, value in batch.items() if name != "sample_tasks"} for batch in batches)
            found[task] = one, other
    return found
