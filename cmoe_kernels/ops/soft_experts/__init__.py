"""Dense experts: every token sees every expert, mixed by its gates.

y[t] = sum_e gates[t, e] * (w2[e] @ act(w1[e] @ x[t] + b1[e]) + b2[e])          (w2 None: sum_e gates[t, e] * (w1[e] @ x[t] + b1[e]))
"""

from torch import Tensor

from cmoe_kernels import backends
from cmoe_kernels.ops.accumulate import run_backward
from cmoe_kernels.ops.activation import ACTIVATIONS, Activation
from cmoe_kernels.ops.arguments import require_choice, require_expert_weights, require_float, require_gates, require_index, require_size
from cmoe_kernels.ops.precision import autocast_dtype
from cmoe_kernels.ops.registration import empty_placeholder, fake_grads, operator, refuse_double_backward, wants_grad
from cmoe_kernels.ops.soft_experts import reference


def soft_experts(
    x: Tensor,
    gates: Tensor,
    w1: Tensor,
    b1: Tensor | None = None,
    w2: Tensor | None = None,
    b2: Tensor | None = None,
    activation: Activation = "gelu",
    group_ids: Tensor | None = None,
    recompute: bool = False,
) -> Tensor:
    """All experts on every token, mixed by gates (Uni-Med's soft and constant connectors).

    This is a dense mixture, not Soft MoE (Puigcerver et al. 2024), whose experts see mixtures of tokens.

    Args:
        x: [T, D].
        gates: [T, E]; or [G, E] with group_ids; or [1, E] for all tokens. fp32 (fp64 with an fp64 x).
        w1: [E, H, D]. With w2 None the experts are single linear layers and H is the output width.
        b1: [E, H] or None.
        w2: [E, O, H] or None.
        b2: [E, O] or None.
        activation: "gelu" (erf), "gelu_tanh", "silu", "relu" or "relu2" (its square); not used by single linear layers.
        group_ids: [T] int64, the row of ``gates`` that each token belongs to.
        recompute: save nothing of size [T, E, H] for backward; the hidden layer is computed again.

    Returns:
        y [T, O] in the dtype of x (autocast's under autocast).

    Products run in the dtype of x and accumulate in fp32; fp32 weights are rounded to it and get fp32 gradients. Saves the inputs and the
    pre-activations [T, E, H]; expert outputs are never stored, and only requested gradients are computed. Single linear experts
    with fewer rows of gates than tokens are merged into one linear layer per row, which is exact. Deterministic.

    Raises:
        TypeError, ValueError: wrong dtype or shape; on the CPU also a group id outside 0..G-1.

    Example::

        x, logits = torch.randn(6, 8), torch.randn(6, 4)
        y = soft_experts(x, soft_gate(logits), w1=torch.randn(4, 16, 8), w2=torch.randn(4, 8, 16))  # [6, 8]
    """
    require_choice("activation", activation, ACTIVATIONS)
    require_float("x", x, "TD")
    dtype = autocast_dtype(x)
    x = x.to(dtype)
    gates = require_gates("gates", gates, "GE", x)
    w1, b1, w2, b2 = require_expert_weights(x, dtype, w1, b1, w2, b2)
    require_size("gates", gates, 1, w1.shape[0], "experts in w1")
    if group_ids is not None:
        require_index("group_ids", group_ids, "T", x)
        require_size("group_ids", group_ids, 0, x.shape[0], "tokens in x")
    elif gates.shape[0] not in (1, x.shape[0]):
        raise ValueError(f"gates has {gates.shape[0]} rows, must have {x.shape[0]} (tokens in x) or 1; or give group_ids")
    save = not recompute and w2 is not None and wants_grad(x, gates, w1, b1, w2, b2)
    backend = backends.choose("soft_experts", x.device.type, x.dtype, x.shape[0])
    return _soft_experts(x, gates, w1, b1, w2, b2, group_ids, activation, save, backend)[0]


@operator("soft_experts")
def _soft_experts(
    x: Tensor,
    gates: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor | None,
    b2: Tensor | None,
    group_ids: Tensor | None,
    activation: str,
    save: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return backends.run("soft_experts", backend, x.device, x, gates, w1, b1, w2, b2, group_ids, activation, save)


@_soft_experts.register_fake
def _(x, gates, w1, b1, w2, b2, group_ids, activation, save, backend):
    y = x.new_empty(x.shape[0], (w1 if w2 is None else w2).shape[1])
    return y, x.new_empty(x.shape[0], w1.shape[0], w1.shape[1]) if save else empty_placeholder(x)


@operator("soft_experts_backward")
def _soft_experts_backward(
    dy: Tensor,
    x: Tensor,
    gates: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor | None,
    b2: Tensor | None,
    group_ids: Tensor | None,
    u: Tensor,
    activation: str,
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return backends.run("soft_experts_backward", backend, x.device, dy, x, gates, w1, b1, w2, b2, group_ids, u, activation, needs)


@_soft_experts_backward.register_fake
def _(dy, x, gates, w1, b1, w2, b2, group_ids, u, activation, needs, backend):
    return fake_grads((x, gates, w1, b1, w2, b2), needs, x)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.activation, _, ctx.backend = inputs
    _, u = output
    ctx.mark_non_differentiable(u)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, u)


def _backward(ctx, dy, _du):
    if dy is None:
        return (None,) * 10
    needs = list(ctx.needs_input_grad[:6])
    saved = ctx.saved_tensors
    grads = run_backward(_soft_experts_backward, ctx, (dy, *saved, ctx.activation), needs, saved[2:6])
    return *grads, None, None, None, None


_soft_experts.register_autograd(_backward, setup_context=_setup_context)
refuse_double_backward(_soft_experts_backward)
_soft_experts_backward.adds_to("w1", "b1", "w2", "b2")
backends.register("soft_experts", "reference", reference.soft_experts)
backends.register("soft_experts_backward", "reference", reference.soft_experts_backward)
backends.register_triton("soft_experts")
