"""Weights of a connector in the order in which the native CPU kernels read them: see CMoEConnector.prepack.

The operations are forward only. Which order it is depends on the instruction set, so copies live in this process alone and are no part
of a state dict.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from cmoe_kernels import backends
from cmoe_kernels.ops.precision import accumulate_dtype, autocast_dtype
from cmoe_kernels.ops.registration import operator

if TYPE_CHECKING:
    from cmoe_kernels.nn.experts import Experts
    from cmoe_kernels.nn.router import TaskRouter


class Packed:
    """Copies of a module's weights, and how to see that these have changed since. A copy of the module, pickled or not, has none."""

    def __init__(self, module: nn.Module, dtype: torch.dtype | None) -> None:
        parameters = dict(module.named_parameters(recurse=False))
        self.module, self.dtype = module, dtype or next(iter(parameters.values())).dtype
        self.stamps = {name: _stamp(p) for name, p in parameters.items()}

    def serves(self, module: nn.Module, x: Tensor) -> bool:
        """Whether this call can use the copies: of the module that was packed, in their dtype, on a CPU, with no gradient to record."""
        if (
            module is not self.module  # a shallow copy, or a replica of DataParallel
            or x.device.type != "cpu"
            or autocast_dtype(x) != self.dtype
            or torch.is_grad_enabled()
            or backends.selected() not in ("auto", "cpu")
        ):
            return False
        for name, stamp in self.stamps.items():
            if not torch.compiler.is_compiling() and _stamp(getattr(module, name)) != stamp:
                raise RuntimeError(f"{name} has changed since prepack(): call prepack() again, or unpack()")
        return True

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in vars(self).values() if isinstance(t, Tensor))


class PackedExperts(Packed):
    def __init__(self, experts: "Experts", dtype: torch.dtype | None) -> None:
        super().__init__(experts, dtype)
        self.activation, self.experts = experts.activation, experts.w1.shape[0]
        last = experts.w1 if experts.w2 is None else experts.w2
        self.hidden, self.outputs = experts.w1.shape[1], last.shape[1]
        self.w1 = _pack(experts.w1, self.dtype)
        self.w2 = None if experts.w2 is None else _pack(experts.w2, self.dtype)
        self.b1, self.b2 = (None if b is None else b.detach().clone() for b in (experts.b1, experts.b2))

    def mix(self, x: Tensor, gates: Tensor, group_ids: Tensor | None) -> Tensor:
        gates = gates.to(accumulate_dtype(self.dtype))
        return _soft_experts(
            x.to(self.dtype), gates, self.w1, self.b1, self.w2, self.b2, group_ids, self.activation, self.hidden, self.outputs
        )

    def select(self, x: Tensor, weights: Tensor | None, indices: Tensor, group_ids: Tensor | None) -> Tensor:
        weights = None if weights is None else weights.to(accumulate_dtype(self.dtype))
        if group_ids is None and indices.shape[0] != x.shape[0]:
            indices = indices.expand(x.shape[0], -1)
            weights = None if weights is None else weights.expand(x.shape[0], -1)
        sizes = self.experts, self.hidden, self.outputs
        return _sparse_experts(x.to(self.dtype), weights, indices, self.w1, self.b1, self.w2, self.b2, group_ids, self.activation, *sizes)


class PackedRouter(Packed):
    def __init__(self, router: "TaskRouter", dtype: torch.dtype | None) -> None:
        super().__init__(router, dtype)
        self.activation, self.logits = router.activation, None
        split = 0 if router.task_tokens is None else router.task_tokens.shape[1]
        with torch.no_grad():
            if router.inputs == "task":
                self.logits = router(router.w1.new_empty(1, 1, dtype=self.dtype), None, None)
                return
            w1, exact = router.w1.detach(), accumulate_dtype(self.dtype)
            if router.task_tokens is None:
                b1 = w1.new_zeros(w1.shape[0]) if router.b1 is None else router.b1.detach()
                self.bias = b1[None].to(exact, copy=True)
            else:
                task = router.task_tokens.detach().to(self.dtype)
                self.bias = torch.ops.cmoe_native.packed_router_bias(task, w1[:, :split], router.b1)
            self.w1 = _pack(w1[:, split:], self.dtype)
            self.w2, self.b2 = (None if t is None else t.detach().clone() for t in (router.w2, router.b2))

    def __call__(self, x: Tensor, group: int | None, group_ids: Tensor | None) -> Tensor:
        if self.logits is not None:
            return self.logits.clone() if group is None else self.logits[group : group + 1].clone()
        bias = self.bias if group is None else self.bias[group : group + 1]
        return _router(x.to(self.dtype), bias, self.w1, self.w2, self.b2, group_ids if bias.shape[0] > 1 else None, self.activation)


def pack_experts(experts: "Experts", dtype: torch.dtype | None) -> PackedExperts:
    _require_native(experts)
    return PackedExperts(experts, dtype)


def pack_router(router: "TaskRouter", dtype: torch.dtype | None) -> PackedRouter:
    _require_native(router)
    return PackedRouter(router, dtype)


def _require_native(module: nn.Module) -> None:
    device = next(module.parameters()).device
    if device.type != "cpu":
        raise RuntimeError(f"prepack() is for the native CPU kernels; the parameters are on {device}")
    if backends.choose("soft_experts", "cpu") != "cpu":
        raise RuntimeError(f"prepack() needs the native CPU kernels: {backends.native_error or 'another backend is selected'}")


def _stamp(parameter: Tensor) -> tuple[int, int, torch.dtype]:
    # Tensors made under torch.inference_mode() count no versions.
    return parameter.data_ptr(), 0 if parameter.is_inference() else parameter._version, parameter.dtype


def _pack(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.ops.cmoe_native.prepack(weight.detach(), weight.new_empty(0, dtype=dtype))


# The fakes say what the native operations return, so that a connector with packed weights compiles.
@operator("packed_soft_experts")
def _soft_experts(
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


@_soft_experts.register_fake
def _(x, gates, w1, b1, w2, b2, group_ids, activation, hidden, outputs):
    return x.new_empty(x.shape[0], outputs)


@operator("packed_sparse_experts")
def _sparse_experts(
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


@_sparse_experts.register_fake
def _(x, weights, indices, w1, b1, w2, b2, group_ids, activation, experts, hidden, outputs):
    return x.new_empty(x.shape[0], outputs)


@operator("packed_router")
def _router(x: Tensor, bias: Tensor, w1: Tensor, w2: Tensor | None, b2: Tensor | None, group_ids: Tensor | None, activation: str) -> Tensor:
    return torch.ops.cmoe_native.packed_router(x, bias, w1, w2, b2, group_ids, activation)


@_router.register_fake
def _(x, bias, w1, w2, b2, group_ids, activation):
    return x.new_empty(x.shape[0], (bias.shape[1] if w2 is None else w2.shape[0]), dtype=accumulate_dtype(x.dtype))
