"""Symmetric int8: weights with a scale per output, activations with a scale per row; and the order in which kernels read such weights.

``q = round(w / scale)`` to nearest, ties to even, ``scale = max |w| / 127``. A row of zeros has scale 0.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from cmoe_kernels import native

LARGEST = 127


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 values of the shape of ``x`` and their scales [.., 1 less], fp32. A row that is not finite becomes zeros with scale NaN."""
    x = x.float()
    largest = x.abs().amax(-1)
    scale = largest / LARGEST
    finite = largest.isfinite()
    divisor = torch.where(finite & (scale > 0), scale, 1)
    q = (x / divisor[..., None]).round().clamp(-LARGEST, LARGEST)
    return torch.where(finite[..., None], q, 0).to(torch.int8), torch.where(finite, scale, torch.nan)


def quantise_weight(name: str, w: Tensor) -> tuple[Tensor, Tensor]:
    """A weight [.., out, in] as int8, with fp32 scales [.., out]. Scratch: one matrix of it in fp32."""
    stack = w.detach().reshape(-1, *w.shape[-2:])
    q = torch.empty(stack.shape, dtype=torch.int8, device=w.device)
    scale = torch.empty(stack.shape[:-1], dtype=torch.float32, device=w.device)
    for e in range(stack.shape[0]):
        q[e], scale[e] = quantise_rows(stack[e])
    if scale.isnan().any():
        raise ValueError(f"{name} holds values that are not finite; int8 weights need finite ones")
    return q.reshape(w.shape), scale.reshape(w.shape[:-1])


class Layout(NamedTuple):
    """Panels of ``lanes`` outputs; in each, ``step`` inputs of a lane lie together. Inputs are padded to a multiple of ``depth``."""

    lanes: int
    step: int
    depth: int


def layout(device: torch.device, inputs: int) -> Layout:
    """The order of the kernels that serve a device; without such kernels a weight stays as it is."""
    found = native.int8_kernels()
    return Layout(found.lanes, found.step, found.depth) if found and device.type == "cpu" else Layout(1, max(1, inputs), max(1, inputs))


def pack(q: Tensor, to: Layout, parts: int = 1) -> Tensor:
    """[.., out, in] as [experts, panels, in / step, lanes, step]; what pads a panel is zeros.

    Each of ``parts`` equal ranges of outputs begins a panel: the gate rows and the up rows of a gated layer.
    """
    outputs, inputs = q.shape[-2:]
    experts = q.numel() // max(1, outputs * inputs)
    q = F.pad(q.reshape(experts * parts, outputs // parts, inputs), (0, -inputs % to.depth, 0, -(outputs // parts) % to.lanes))
    panels, steps = q.shape[1] // to.lanes, q.shape[2] // to.step
    return q.reshape(experts, parts * panels, to.lanes, steps, to.step).transpose(2, 3).contiguous()


def unpack(panels: Tensor, outputs: int, inputs: int, parts: int = 1) -> Tensor:
    """[experts, outputs, inputs] again."""
    experts, count, steps, lanes, step = panels.shape
    rows = panels.transpose(2, 3).reshape(experts, parts, count // parts * lanes, steps * step)
    return rows[:, :, : outputs // parts, :inputs].reshape(experts, outputs, inputs)
