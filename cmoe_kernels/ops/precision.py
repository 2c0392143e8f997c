"""The precision policy, written once.

Products accumulate in fp32 (fp64 for fp64). Logits, gates, weights and losses are fp32 (fp64). Matrix products run in the dtype
of ``x``: wider weights are rounded to it, as under autocast, and get their gradients in their own dtype.
"""

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which ``x`` enters a matrix product: autocast's, where it is on and would cast; else its own."""
    if x.dtype != torch.float64 and autocast_is_on(x):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def autocast_is_on(x: Tensor) -> bool:
    # To ask about meta, which autocast does not know, is an error; and torch 2.11 can't trace is_autocast_available.
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)
