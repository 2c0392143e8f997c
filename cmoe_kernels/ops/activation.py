"""Activations and their derivatives, by the names that configurations use."""

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

Activation = Literal["gelu", "gelu_tanh", "silu", "relu", "relu2"]
ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)


def activate(name: str, u: Tensor, gated: bool = False) -> Tensor:
    """act(u); gated: act of the first half of the last dimension times the second half."""
    if gated:
        gate, up = u.chunk(2, -1)
        return activate(name, gate) * up
    match name:
        case "gelu":
            return F.gelu(u)
        case "gelu_tanh":
            return F.gelu(u, approximate="tanh")
        case "silu":
            return F.silu(u)
        case "relu":
            return F.relu(u)
        case "relu2":
            return F.relu(u).square()
    raise ValueError(f"activation is {name!r}, must be one of {', '.join(ACTIVATIONS)}")


def activate_backward(name: str, dh: Tensor, u: Tensor, gated: bool = False) -> Tensor:
    """du, given dh and the pre-activation u."""
    if gated:
        gate, up = u.chunk(2, -1)
        return torch.cat([activate_backward(name, dh * up, gate), dh * activate(name, gate)], -1)
    match name:
        case "gelu":
            return torch.ops.aten.gelu_backward(dh, u)
        case "gelu_tanh":
            return torch.ops.aten.gelu_backward(dh, u, approximate="tanh")
        case "silu":
            return torch.ops.aten.silu_backward(dh, u)
        case "relu":
            return torch.ops.aten.threshold_backward(dh, u, 0)
        case "relu2":
            return dh * 2 * F.relu(u)
    raise ValueError(f"activation is {name!r}, must be one of {', '.join(ACTIVATIONS)}")
