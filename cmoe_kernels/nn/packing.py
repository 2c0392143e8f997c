"""Weights of a connector in the order in which the native CPU kernels read them: see CMoEConnector.prepack.

The operations on them are forward only (ops/packed.py). The order depends on the instruction set, so copies live in this process only and
are no part of a state dict.
"""

import logging

import torch
from torch import Tensor, nn

from cmoe_kernels import backends, native
from cmoe_kernels.ops import packed
from cmoe_kernels.ops.activation import Activation
from cmoe_kernels.ops.precision import FLOATS, accumulate_dtype, autocast_dtype
from cmoe_kernels.ops.task_router import RouterInputs, task_router

log = logging.getLogger(__name__)


class Packed:
    """Copies of a module's weights, and how to see that these have changed since. A copy of the module, pickled or not, has none."""

    def __init__(self, module: nn.Module, dtype: torch.dtype | None) -> None:
        _require_native(module)
        parameters = dict(module.named_parameters(recurse=False))
        self.module, self.dtype = module, dtype or next(iter(parameters.values())).dtype
        if self.dtype not in FLOATS:
            raise TypeError(f"dtype is {dtype}, must be torch.float32, bfloat16, float16, float64 or int8")
        for name, p in parameters.items():
            if (p.dtype == torch.float64) != (self.dtype == torch.float64):
                raise ValueError(f"dtype is {self.dtype} and {name} is {p.dtype}: torch.float64 is for float64 parameters, and they for it")
        self.stamps = {name: _stamp(p) for name, p in parameters.items()}

    def serves(self, module: nn.Module, x: Tensor) -> bool:
        """Whether this call can use the copies: of the module that was packed, in their dtype, on a CPU, with no gradient to record."""
        if reason := self._unused_because(module, x):
            if not torch.compiler.is_compiling():
                log.info("%s: the weights of prepack() are not used: %s", type(module).__name__, reason)
            return False
        for name, stamp in self.stamps.items():
            if not torch.compiler.is_compiling() and _stamp(getattr(module, name)) != stamp:
                raise RuntimeError(f"{name} has changed since prepack(): call prepack() again, or unpack()")
        return True

    def _unused_because(self, module: nn.Module, x: Tensor) -> str:
        if module is not self.module:
            return "they are of another module (this one is a copy or a replica)"
        if x.device.type != "cpu":
            return f"x is on {x.device}"
        if autocast_dtype(x) != self.dtype:
            return f"products would be in {autocast_dtype(x)}, the copies are {self.dtype}"
        if torch.is_grad_enabled():
            return "gradients are enabled; call it under torch.no_grad()"
        return "" if backends.selected() in ("auto", "cpu") else f"the backend is {backends.selected()}"

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in vars(self).values() if isinstance(t, Tensor))


class PackedExperts(Packed):
    def __init__(
        self,
        module: nn.Module,
        w1: Tensor,
        b1: Tensor | None,
        w2: Tensor | None,
        b2: Tensor | None,
        activation: Activation,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__(module, dtype)
        self.activation, self.experts = activation, w1.shape[0]
        self.hidden, self.outputs = w1.shape[1], (w1 if w2 is None else w2).shape[1]
        self.w1 = packed.pack(w1, self.dtype)
        self.w2 = None if w2 is None else packed.pack(w2, self.dtype)
        self.b1, self.b2 = (None if b is None else b.detach().clone() for b in (b1, b2))

    def mix(self, x: Tensor, gates: Tensor, group_ids: Tensor | None) -> Tensor:
        gates = gates.to(accumulate_dtype(self.dtype))
        return packed.soft_experts(
            x.to(self.dtype), gates, self.w1, self.b1, self.w2, self.b2, group_ids, self.activation, self.hidden, self.outputs
        )

    def select(self, x: Tensor, weights: Tensor | None, indices: Tensor, group_ids: Tensor | None) -> Tensor:
        weights = None if weights is None else weights.to(accumulate_dtype(self.dtype))
        if group_ids is None and indices.shape[0] != x.shape[0]:
            indices = indices.expand(x.shape[0], -1)
            weights = None if weights is None else weights.expand(x.shape[0], -1)
        sizes = self.experts, self.hidden, self.outputs
        return packed.sparse_experts(
            x.to(self.dtype), weights, indices, self.w1, self.b1, self.w2, self.b2, group_ids, self.activation, *sizes
        )


class PackedRouter(Packed):
    def __init__(
        self,
        module: nn.Module,
        task_tokens: Tensor | None,
        w1: Tensor,
        b1: Tensor | None,
        w2: Tensor | None,
        b2: Tensor | None,
        inputs: RouterInputs,
        activation: Activation,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__(module, dtype)
        self.activation, self.logits = activation, None
        task = None if task_tokens is None else task_tokens.detach()
        with torch.no_grad():
            if inputs == "task":
                assert task is not None
                task = task if task.dtype == torch.float64 else task.to(self.dtype)
                self.logits = task_router(None, task, w1, b1, w2, b2, None, inputs, activation)
                return
            w1 = w1.detach()
            if task is None:
                bias = w1.new_zeros(w1.shape[0]) if b1 is None else b1.detach()
                self.bias = bias[None].to(accumulate_dtype(self.dtype), copy=True)
            else:
                self.bias = packed.router_bias(task.to(self.dtype), w1[:, : task.shape[1]], b1)
                w1 = w1[:, task.shape[1] :]
            self.w1 = packed.pack(w1, self.dtype)
            self.w2, self.b2 = (None if t is None else t.detach().clone() for t in (w2, b2))

    def __call__(self, x: Tensor, group: int | None, group_ids: Tensor | None) -> Tensor:
        if self.logits is not None:
            return self.logits.clone() if group is None else self.logits[group : group + 1].clone()
        bias = self.bias if group is None else self.bias[group : group + 1]
        return packed.router(x.to(self.dtype), bias, self.w1, self.w2, self.b2, group_ids if bias.shape[0] > 1 else None, self.activation)


def _require_native(module: nn.Module) -> None:
    device = next(module.parameters()).device
    if device.type != "cpu":
        raise RuntimeError(f"prepack() is for the native CPU kernels; the parameters are on {device}")
    if backends.choose("soft_experts", "cpu") != "cpu":
        raise RuntimeError(f"prepack() needs the native CPU kernels: {native.error or 'another backend is selected'}")


def _stamp(parameter: Tensor) -> tuple[int, int, torch.dtype]:
    # Tensors made under torch.inference_mode() count no versions.
    return parameter.data_ptr(), 0 if parameter.is_inference() else parameter._version, parameter.dtype
