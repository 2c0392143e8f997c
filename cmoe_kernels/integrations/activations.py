"""The names by which our ops know the activation modules of torch and transformers."""

from typing import Any

from torch import nn
from torch.nn import functional as F
from transformers import activations

_NAMES: dict[type, str] = {
    nn.SiLU: "silu",
    activations.SiLUActivation: "silu",
    nn.ReLU: "relu",
    activations.ReLUSquaredActivation: "relu2",
    activations.GELUActivation: "gelu",
    activations.GELUTanh: "gelu_tanh",
    activations.NewGELUActivation: "gelu_tanh",
    activations.FastGELUActivation: "gelu_tanh",
    activations.AccurateGELUActivation: "gelu_tanh",
}


def activation_name(act_fn: Any) -> str | None:
    """Which of our activations a module or function is; None where it is none. A look-up, so that torch.compile traces it."""
    if type(act_fn) is nn.GELU:
        return "gelu" if act_fn.approximate == "none" else "gelu_tanh"
    return "silu" if act_fn is F.silu else _NAMES.get(type(act_fn))
