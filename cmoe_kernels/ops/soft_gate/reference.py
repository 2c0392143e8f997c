"""soft_gate in plain PyTorch."""

from torch import Tensor
from torch.nn.functional import logsigmoid

from cmoe_kernels.ops.precision import accumulate_dtype


def soft_gate(logits: Tensor) -> Tensor:
    # sigmoid / sum(sigmoid) is the softmax of log(sigmoid): the same value, and no 0 / 0 where every sigmoid underflows.
    return logsigmoid(logits.to(accumulate_dtype(logits.dtype))).softmax(-1)


def soft_gate_backward(dgates: Tensor, logits: Tensor) -> Tensor:
    gates = soft_gate(logits)
    # A mean lies between the values, also after rounding: where all are equal nothing remains.
    mean = (dgates * gates).sum(-1, keepdim=True).clamp(*dgates.aminmax(dim=-1, keepdim=True))
    dscores = gates * (dgates - mean)
    # d log(sigmoid(l)) / d l = 1 - sigmoid(l) = sigmoid(-l)
    return (dscores * (-logits.to(gates.dtype)).sigmoid()).to(logits.dtype)
