"""Soft gates: mix every expert, weighted by normalised sigmoids.

gates[t, e] = sigmoid(logits[t, e]) / sum_j sigmoid(logits[t, j])
"""

from torch import Tensor

from cmoe_kernels import backends
from cmoe_kernels.ops.arguments import require_float
from cmoe_kernels.ops.precision import accumulate_dtype
from cmoe_kernels.ops.registration import operator, refuse_double_backward
from cmoe_kernels.ops.soft_gate import reference


def soft_gate(logits: Tensor) -> Tensor:
    """Mixing weights of all experts (Uni-Med, the soft router: sigmoid of the router's output over its sum).

    Args:
        logits: router output, [T, E], any float dtype.

    Returns:
        gates [T, E], fp32 (fp64 for fp64); each row sums to one, also where every sigmoid underflows.

    Raises:
        TypeError, ValueError: logits is not a float tensor with two dimensions.

    Saves ``logits`` for backward. Deterministic. ``T == 0`` gives an empty result.

    Example::

        gates = soft_gate(torch.randn(6, 4))  # [6, 4], rows that sum to one
    """
    require_float("logits", logits, "TE")
    return _soft_gate(logits, backends.choose("soft_gate", logits.device.type, logits.dtype, logits.shape[0]))


@operator("soft_gate")
def _soft_gate(logits: Tensor, backend: str) -> Tensor:
    return backends.run("soft_gate", backend, logits.device, logits)


@_soft_gate.register_fake
def _(logits, backend):
    return logits.new_empty(logits.shape, dtype=accumulate_dtype(logits.dtype))


@operator("soft_gate_backward")
def _soft_gate_backward(dgates: Tensor, logits: Tensor, backend: str) -> Tensor:
    return backends.run("soft_gate_backward", backend, logits.device, dgates, logits)


@_soft_gate_backward.register_fake
def _(dgates, logits, backend):
    return logits.new_empty(logits.shape)


def _setup_context(ctx, inputs, output):
    logits, ctx.backend = inputs
    ctx.save_for_backward(logits)


def _backward(ctx, dgates):
    return _soft_gate_backward(dgates, *ctx.saved_tensors, ctx.backend), None


_soft_gate.register_autograd(_backward, setup_context=_setup_context)
refuse_double_backward(_soft_gate_backward)
backends.register("soft_gate", "reference", reference.soft_gate)
backends.register("soft_gate_backward", "reference", reference.soft_gate_backward)
backends.register_triton("soft_gate")
