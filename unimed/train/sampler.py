"""Batches drawn from several sources by ratio, the same for the same seed, from any step on.

The source of step `s` depends on (seed, s) alone; within a source, items come in a fresh permutation every pass.
A batch sampler that starts again and skips `n` batches therefore gives exactly what an uninterrupted one gives.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from unimed.datasets.index import kinds
from unimed.errors import UserError

log = logging.getLogger("unimed.train")

Draw = tuple[int, int]  # index of the item, seed of its prompt and augmentation


def group(items: Sequence, ratios: dict[str, float]) -> tuple[list[np.ndarray], np.ndarray]:
    """Indices and probability of every source that has a ratio above zero and at least one item.

    A ratio without items and items without a ratio are named in a warning each.
    """
    pairs, of = kinds(items)
    available = dict(zip(pairs, np.bincount(of, minlength=len(pairs)).tolist(), strict=True))
    members: list[np.ndarray] = []
    weights: list[float] = []
    empty: list[str] = []
    for key, ratio in ratios.items():
        dataset, _, task = key.rpartition("/")
        found = np.flatnonzero(np.isin(of, [place for place, pair in enumerate(pairs) if pair == (dataset or pair[0], task)]))
        if ratio > 0 and not len(found) and dataset:
            has = ", ".join(sorted({name for name, of_task in pairs if of_task == task})) or "none"
            raise UserError(f"sampler.ratios.{key}: no training item of task {task!r} in dataset {dataset!r}; datasets that have: {has}")
        if ratio > 0 and len(found):
            members.append(found)
            weights.append(ratio)
        elif ratio > 0:
            empty.append(key)
    if not members:
        raise UserError("sampler.ratios: none of the tasks with a ratio above zero has a training item")
    if empty:
        log.warning("sampler.ratios: no training item of %s; the other sources share what it had", ", ".join(empty))
    unused = sorted(
        (f"{dataset}/{task}", count) for (dataset, task), count in available.items() if not {task, f"{dataset}/{task}"} & set(ratios)
    )
    if unused:
        listed = ", ".join(f"{name} ({count:,} items)" for name, count in unused)
        log.warning("sampler.ratios: no ratio for %s; they are not used in training", listed)
    return members, np.array(weights) / sum(weights)


def by_set(ratios: dict[str, float], items: Sequence, sets: dict[str, float]) -> dict[str, float]:
    """The ratios with each task's divided among the data sets that have it, by the ratios of `sets` (1 for a set that is not named)."""
    if not sets or (len(sets) == 1 and set(sets.values()) == {1.0}):
        return ratios
    there: dict[str, dict[str, float]] = {}
    for dataset, task in kinds(items)[0]:
        named = max((name for name in sets if dataset == name or dataset.startswith(f"{name}-")), key=len, default="")
        there.setdefault(task, {})[dataset] = sets.get(named, 1.0)
    divided: dict[str, float] = {}
    for key, ratio in ratios.items():
        shares = {name: share for name, share in there.get(key, {}).items() if f"{name}/{key}" not in ratios}
        if not any(shares.values()):
            divided[key] = ratio
        divided |= {f"{name}/{key}": ratio * share / sum(shares.values()) for name, share in shares.items() if any(shares.values())}
    return divided


class TaskRatioSampler(Sampler[list[Draw]]):
    """Yields `num_batches` lists of `batch_size` draws."""

    drop_last = True  # read by accelerate when it shards batches over processes

    def __init__(
        self,
        members: Sequence[Sequence[int] | np.ndarray],
        probabilities: np.ndarray,
        batch_size: int,
        num_batches: int,
        seed: int,
        mode: str = "homogeneous",
    ):
        if mode not in ("homogeneous", "mixed"):
            raise ValueError(f"mode must be 'homogeneous' or 'mixed', it is {mode!r}")
        self.members, self.probabilities = members, probabilities
        self.batch_size, self.num_batches, self.seed, self.mode = batch_size, num_batches, seed, mode

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[list[Draw]]:
        taken = [0] * len(self.members)
        orders = [np.empty(0, int)] * len(self.members)
        for step in range(self.num_batches):
            rng = np.random.default_rng([self.seed, step])
            sources = rng.choice(len(self.members), size=1 if self.mode == "homogeneous" else self.batch_size, p=self.probabilities)
            seeds = rng.integers(2**62, size=self.batch_size)
            batch = []
            for position in range(self.batch_size):
                source = int(sources[position % len(sources)])
                size = len(self.members[source])
                turn, place = divmod(taken[source], size)
                if place == 0:
                    orders[source] = np.random.default_rng([self.seed, 1 + source, turn, 1]).permutation(size)
                taken[source] += 1
                batch.append((int(self.members[source][orders[source][place]]), int(seeds[position])))
            yield batch
