"""Images before and after the connector: how far apart the tasks lie (Uni-Med, NeurIPS 2024, Figure 5), and where each expert looks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from unimed.inference.gates import gate_map, token_gates
from unimed.inference.session import Session
from unimed.tasks.item import Item

BATCH = 32


class Features(NamedTuple):
    """Of n items the mean over an image's tokens: ``before`` [n, D], what the experts read, and ``after`` [n, O], what they give.

    ``maps``: gates by patch [rows, columns, E] of each item; None where the patches are no square.
    """

    items: list[Item]
    before: np.ndarray
    after: np.ndarray
    maps: list[np.ndarray | None]

    @property
    def tasks(self) -> list[str]:
        return [item.task for item in self.items]


def features(session: Session, items: Sequence[Item]) -> Features:
    """Of the items with an image, with their own prompts and tasks."""
    shown = [item for item in items if item.image is not None]
    before: list[np.ndarray] = []
    after: list[np.ndarray] = []
    maps: list[np.ndarray | None] = []
    connector = session.connector
    read: list[torch.Tensor] = []
    made: list[torch.Tensor] = []
    hooks = [
        connector.experts.register_forward_pre_hook(lambda module, given: read.append(given[0].detach())),
        connector.register_forward_hook(lambda module, given, out: made.append(out.embeddings.detach())),
    ]
    try:
        with token_gates(connector) as gates:
            for start in range(0, len(shown), BATCH):
                for seen in (read, made, gates):
                    seen.clear()
                session.generate(shown[start : start + BATCH], BATCH, 1)
                images, tokens = made[0].shape[:2]
                before.append(read[0].float().reshape(images, tokens, -1).mean(1).cpu().numpy())
                after.append(made[0].float().mean(1).cpu().numpy())
                maps += [gate_map(connector.config, one) for one in gates[0]]
    finally:
        for hook in hooks:
            hook.remove()
    if not shown:
        return Features([], np.zeros((0, 1), np.float32), np.zeros((0, 1), np.float32), [])
    return Features(shown, np.concatenate(before), np.concatenate(after), maps)


def silhouette(x: np.ndarray, labels: Sequence[str]) -> dict[str, float]:
    """Mean silhouette of each label's rows of x [n, p], Euclidean, and "all", of all rows.

    Of a row (b - a) / max(a, b), with a its mean distance to the other rows of its label and b that to the nearest other label; 0 for the
    one row of a label. 1: far from every other label; below 0: nearer to another one. {} with fewer than two labels.
    """
    names = sorted(set(labels))
    if len(names) < 2:
        return {}
    rows = torch.from_numpy(np.asarray(x, dtype=np.float64))
    # Differences, not inner products: rows that are alike lose no digits.
    apart = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").numpy()
    member = np.array([[label == name for label in labels] for name in names])  # [labels, n]
    totals, counts = apart @ member.T, member.sum(1)  # [n, labels]
    own = np.array([names.index(label) for label in labels])
    each = np.arange(len(labels))
    alone = counts[own] == 1
    a = totals[each, own] / np.maximum(counts[own] - 1, 1)
    others = totals / counts
    others[each, own] = np.inf
    b = others.min(1)
    largest = np.maximum(a, b)
    values = np.where(alone | (largest == 0), 0.0, (b - a) / np.where(largest == 0, 1, largest))
    return {**{name: float(values[own == at].mean()) for at, name in enumerate(names)}, "all": float(values.mean())}


def principal(x: np.ndarray, count: int = 3) -> tuple[np.ndarray, list[float]]:
    """Coordinates [n, count] along the directions of largest variance, and the share of the variance of each. Signs are fixed."""
    centred = np.asarray(x, dtype=np.float64) - np.mean(x, axis=0, dtype=np.float64)
    left, sizes, right = np.linalg.svd(centred, full_matrices=False)
    count = min(count, len(sizes))
    signs = np.sign(right[np.arange(count), np.abs(right[:count]).argmax(1)])
    total = float((sizes**2).sum())
    return left[:, :count] * sizes[:count] * signs, [float(size**2) / total if total else 0.0 for size in sizes[:count]]
