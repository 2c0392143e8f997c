"""The connector's gates over the picture: which part of the image each expert projects."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from cmoe_kernels import CMoEConfig


@contextmanager
def token_gates(connector: Any) -> Iterator[list[np.ndarray]]:
    """Collects the gates [B, N, E] of every image that passes a model's connector meanwhile."""
    seen: list[np.ndarray] = []
    hook = connector.register_forward_hook(lambda module, given, out: seen.append(out.gates.detach().float().cpu().numpy()))
    try:
        yield seen
    finally:
        hook.remove()


def gate_map(config: CMoEConfig, gates: np.ndarray) -> np.ndarray | None:
    """Gates [N, E] of one image's tokens as [rows, columns, E] of its square grid of patches; None where the patches are no square.

    A token joins ``resample_rate`` patches: neighbours of one row (projection) or of a square (pools).
    """
    tokens, experts = gates.shape
    rate = 1 if config.resample == "none" else config.resample_rate
    side = math.isqrt(tokens * rate)
    if side * side != tokens * rate:
        return None
    if config.resample in ("none", "projection"):
        return np.repeat(gates, rate, axis=0).reshape(side, side, experts)
    stride = math.isqrt(rate)
    return gates.reshape(side // stride, side // stride, experts).repeat(stride, axis=0).repeat(stride, axis=1)


def heat(values: np.ndarray, size: tuple[int, int], colour: tuple[int, int, int]) -> Image.Image:
    """One expert's map [rows, columns] as a layer for a picture of this size: clear where its gate is lowest, strongest where highest."""
    low, high = float(values.min()), float(values.max())
    strength = (values - low) / (high - low) if high - low > 1e-6 else np.zeros_like(values)
    layer = np.empty((*values.shape, 4), np.uint8)
    layer[..., :3] = colour
    layer[..., 3] = np.rint(170 * strength)
    return Image.fromarray(layer, "RGBA").resize(size, Image.Resampling.NEAREST)
