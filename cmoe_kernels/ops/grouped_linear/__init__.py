"""One linear layer per expert, over rows that lie sorted by expert: the primitive under sparse experts.

y[scatter_idx[i]] = act(w[e] @ x[gather_idx[i] // k] + b[e])    for offsets[e] <= i < offsets[e + 1]
"""

import torch
from torch import Tensor

from cmoe_kernels import backends
from cmoe_kernels.ops.accumulate import run_backward
from cmoe_kernels.ops.activation import ACTIVATIONS, Activation
from cmoe_kernels.ops.arguments import require_choice, require_float, require_index, require_integer, require_size, require_weight
from cmoe_kernels.ops.grouped_linear import reference
from cmoe_kernels.ops.precision import autocast_dtype
from cmoe_kernels.ops.registration import empty_placeholder, fake_grads, operator, refuse_double_backward, wants_grad


def grouped_linear(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    offsets: Tensor,
    gather_idx: Tensor | None = None,
    k: int = 1,
    scatter_idx: Tensor | None = None,
    activation: Activation | None = None,
) -> Tensor:
    """A linear layer per expert on its rows, with gather on load and scatter on store.

    Args:
        x: [T, D].
        w: [E, O, D], any strides: weights stored as [E, D, O] are passed as ``w.transpose(1, 2)`` and never copied whole.
        b: [E, O] or None.
        offsets: [E + 1] int32, exclusive, from 0; rows offsets[e]:offsets[e + 1] belong to expert e. The ``offs`` of
            torch.nn.functional.grouped_mm are offsets[1:].
        gather_idx: [T * k] int64, a permutation of range(T * k): row i reads x[gather_idx[i] // k]. None: row i reads x[i // k].
        k: how many rows each token has.
        scatter_idx: [T * k] int64, a permutation: row i is stored at y[scatter_idx[i]]. None: at y[i].
        activation: None, "gelu" (erf), "gelu_tanh", "silu", "relu" or "relu2" (its square).

    Returns:
        y [T * k, O] in the dtype of x (autocast's under autocast). Rows past offsets[E] are zeros.

    Saves its inputs and, with an activation, the pre-activation [T * k, O] in row order. Gradients of x, w, b; those of an expert without
    rows are zeros. Deterministic: a token's k rows are added in their order.

    Raises:
        TypeError, ValueError: wrong dtype or shape; on the CPU also offsets out of order and indices that are no permutation.

    Example::

        x, w = torch.randn(6, 8), torch.randn(3, 5, 8)
        offsets = torch.tensor([0, 2, 2, 6], dtype=torch.int32)  # the second expert has no row
        y = grouped_linear(x, w, None, offsets)  # [6, 5]
    """
    require_float("x", x, "TD")
    dtype = autocast_dtype(x)
    x = x.to(dtype)
    w = require_weight("w", w, "EOD", x, dtype)
    require_size("w", w, 2, x.shape[1], "width of x")
    if b is not None:
        b = require_weight("b", b, "EO", x, dtype)
        require_size("b", b, 0, w.shape[0], "experts in w")
        require_size("b", b, 1, w.shape[1], "output width of w")
    require_index("offsets", offsets, "E", x, torch.int32)
    require_size("offsets", offsets, 0, w.shape[0] + 1, "experts in w, plus one")
    require_integer("k", k)
    if k < 1:
        raise ValueError(f"k is {k}, must be at least 1")
    for name, index in (("gather_idx", gather_idx), ("scatter_idx", scatter_idx)):
        if index is not None:
            require_index(name, index, "I", x)
            require_size(name, index, 0, x.shape[0] * k, "rows: tokens times k")
    if activation is not None:
        require_choice("activation", activation, ACTIVATIONS)
    save = activation is not None and wants_grad(x, w, b)
    backend = backends.choose("grouped_linear", x.device.type, x.dtype, x.shape[0])
    return _grouped_linear(x, w, b, offsets, gather_idx, k, scatter_idx, activation, save, backend)[0]


@operator("grouped_linear")
def _grouped_linear(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    offsets: Tensor,
    gather_idx: Tensor | None,
    k: int,
    scatter_idx: Tensor | None,
    activation: str | None,
    save: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return backends.run("grouped_linear", backend, x.device, x, w, b, offsets, gather_idx, k, scatter_idx, activation, save)


@_grouped_linear.register_fake
def _(x, w, b, offsets, gather_idx, k, scatter_idx, activation, save, backend):
    shape = (x.shape[0] * k, w.shape[1])
    return x.new_empty(shape), x.new_empty(shape) if save else empty_placeholder(x)


@operator("grouped_linear_backward")
def _grouped_linear_backward(
    dy: Tensor,
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    offsets: Tensor,
    gather_idx: Tensor | None,
    scatter_idx: Tensor | None,
    u: Tensor,
    k: int,
    activation: str | None,
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return backends.run(
        "grouped_linear_backward", backend, x.device, dy, x, w, b, offsets, gather_idx, scatter_idx, u, k, activation, needs
    )


@_grouped_linear_backward.register_fake
def _(dy, x, w, b, offsets, gather_idx, scatter_idx, u, k, activation, needs, backend):
    return fake_grads((x, w, b), needs, x)


def _setup_context(ctx, inputs, output):
    x, w, b, offsets, gather_idx, ctx.k, scatter_idx, ctx.activation, ctx.saved, ctx.backend = inputs
    _, u = output
    ctx.mark_non_differentiable(u)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, w, b, offsets, gather_idx, scatter_idx, u)


def _backward(ctx, dy, _du):
    if dy is None:
        return (None,) * 10
    needs = list(ctx.needs_input_grad[:3])
    *tensors, u = ctx.saved_tensors
    x, w, b, offsets, gather_idx, _ = tensors
    if ctx.activation is not None and not ctx.saved:  # an exported program, and vmap: gradients appeared after `save` was decided
        u = _grouped_linear(x, w, b, offsets, gather_idx, ctx.k, None, None, False, ctx.backend)[0]
    grads = run_backward(_grouped_linear_backward, ctx, (dy, *tensors, u, ctx.k, ctx.activation), needs, (w, b))
    return *grads, *(None,) * 7


_grouped_linear.register_autograd(_backward, setup_context=_setup_context)
refuse_double_backward(_grouped_linear_backward)
_grouped_linear_backward.adds_to("w", "b")
backends.register("grouped_linear", "reference", reference.grouped_linear)
backends.register("grouped_linear_backward", "reference", reference.grouped_linear_backward)
backends.register_triton("grouped_linear")
