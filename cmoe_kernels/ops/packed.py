"""Forward-only operations of the native CPU kernels on weights packed in the kernels' own order; nn/packing.py holds such copies.

That order depends on the instruction set, so a packed weight is of use to this process only.
"""

import torch
from torch import Tensor

from cmoe_kernels.ops.precision import accumulate_dtype
from cmoe_kernels.ops.registration import operator


def pack(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight [.., out, in] in the kernels' order, as products of ``dtype`` read it."""
    return _prepack(weight.detach(), weight.new_empty(0, dtype=dtype))


# The fakes describe what the native operations return, so that a connector with packed weights compiles.
@operator("prepack")
def _prepack(w: Tensor, like: Tensor) -> Tensor:
    return torch.ops.cmoe_native.prepack(w, like)


@_prepack.register_fake
def _(w, like):
    return w.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.uint8)  # panels of the instruction set in use


@operator("packed_router_bias")
def router_bias(task: Tensor, w1: Tensor, b1: Tensor | None) -> Tensor:
    """The task's part of the router's first layer, a bias row per task: [G, R]."""
    return torch.ops.cmoe_native.packed_router_bias(task, w1, b1)


@router_bias.register_fake
def _(task, w1, b1):
    return task.new_empty(task.shape[0], w1.shape[0], dtype=accumulate_dtype(task.dtype))


@operator("packed_soft_experts")
def soft_experts(
    x: Tensor,
    gates: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor | None,
    b2: Tensor | None,
    group_ids: Tensor | None,
    activation: str,
    hidden: int,
    outputs: int,
) -> Tensor:
    return torch.ops.cmoe_native.packed_soft_experts(x, gates, w1, b1, w2, b2, group_ids, activation, hidden, outputs)


@soft_experts.register_fake
def _(x, gates, w1, b1, w2, b2, group_ids, activation, hidden, outputs):
    return x.new_empty(x.shape[0], outputs)


@operator("packed_sparse_experts")
def sparse_experts(
    x: Tensor,
    weights: Tensor | None,
    indices: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor | None,
    b2: Tensor | None,
    group_ids: Tensor | None,
    activation: str,
    experts: int,
    hidden: int,
    outputs: int,
) -> Tensor:
    arguments = (x, weights, indices, w1, b1, w2, b2, group_ids, activation, experts, hidden, outputs)
    return torch.ops.cmoe_native.packed_sparse_experts(*arguments)


@sparse_experts.register_fake
def _(x, weights, indices, w1, b1, w2, b2, group_ids, activation, experts, hidden, outputs):
    return x.new_empty(x.shape[0], outputs)


@operator("packed_router")
def router(x: Tensor, bias: Tensor, w1: Tensor, w2: Tensor | None, b2: Tensor | None, group_ids: Tensor | None, activation: str) -> Tensor:
    return torch.ops.cmoe_native.packed_router(x, bias, w1, w2, b2, group_ids, activation)


@router.register_fake
def _(x, bias, w1, w2, b2, group_ids, activation):
    return x.new_empty(x.shape[0], (bias.shape[1] if w2 is None else w2.shape[0]), dtype=accumulate_dtype(x.dtype))
