"""A module's weights in int8, in place of its floating-point ones; for inference."""

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from cmoe_kernels.ops import int8
from cmoe_kernels.ops.int8.quantise import layout, pack, quantise_weight, unpack


class Int8Linear(nn.Module):
    """Linear layers [.., out, in] as int8 with a scale per output, and an fp32 bias: half the memory of bf16.

    In memory ``panels`` holds the weights in the order in which this machine's kernels read them. A state dict has ``weight`` [.., out, in]
    int8, ``scale`` [.., out] and ``bias`` fp32, the same on every machine. No cast changes them.
    """

    panels: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, name: str, q: Tensor, scale: Tensor, bias: Tensor | None, parts: int = 1) -> None:
        super().__init__()
        self.shape, self.parts = q.shape, parts
        if q.shape[-1] > int8.MOST_INPUTS:
            raise ValueError(f"{name} has {q.shape[-1]} inputs; int8 weights take at most {int8.MOST_INPUTS}")
        self.register_buffer("panels", None, persistent=False)
        self.set_weight(q)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)
        self.training = False

    @classmethod
    def of(cls, name: str, weight: Tensor, bias: Tensor | None, parts: int = 1) -> "Int8Linear":
        """The int8 form of a weight; ``name`` is for messages, ``parts`` for ``quantise.pack``."""
        return cls(name, *quantise_weight(name, weight), None if bias is None else bias.detach().float().clone(), parts)

    @classmethod
    def empty(cls, name: str, shape: tuple[int, ...], bias: tuple[int, ...] | None, device: torch.device) -> "Int8Linear":
        """Zeros, for a state dict to be loaded."""
        zeros = None if bias is None else torch.zeros(bias, device=device)
        return cls(name, torch.zeros(shape, dtype=torch.int8, device=device), torch.zeros(shape[:-1], device=device), zeros)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.buffers())

    def weight(self) -> Tensor:
        """The int8 values [.., out, in]."""
        return unpack(self.panels, self.shape[-2], self.shape[-1], self.parts).reshape(self.shape)

    def set_weight(self, q: Tensor) -> None:
        self.panels = pack(q, layout(q.device, self.shape[-1]), self.parts)

    def train(self, mode: bool = True) -> "Int8Linear":
        if mode:
            raise RuntimeError("int8 weights cannot be trained: load the floating-point weights into a new model, and train that")
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Int8Linear":
        # A move is followed; a cast is not.
        def moved(t: Tensor) -> Tensor:
            new = fn(t)
            return new if new.dtype == t.dtype else t.to(new.device)

        self.set_weight(moved(self.weight()))
        self.scale = moved(self.scale)
        self.bias = None if self.bias is None else moved(self.bias)
        return self

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.weight()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Tensor],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        wanted = {"weight": (self.shape, torch.int8), "scale": (self.scale.shape, torch.float32)}
        if self.bias is not None:
            wanted["bias"] = (self.bias.shape, torch.float32)
        found = {}
        for name, (shape, dtype) in wanted.items():
            value = state_dict.get(prefix + name)
            if value is None:
                missing_keys.append(prefix + name)
            elif value.shape != shape or value.dtype != dtype:
                error_msgs.append(f"{prefix}{name} is {value.dtype} {tuple(value.shape)}, must be {dtype} {tuple(shape)}")
            else:
                found[name] = value
        unexpected_keys.extend(key for key in state_dict if key.startswith(prefix) and key.removeprefix(prefix) not in wanted)
        device = next((value.device for value in found.values()), None) if self.scale.is_meta else self.scale.device
        if len(found) == len(wanted):
            self.set_weight(found["weight"].to(device))
            self.scale = found["scale"].to(device, copy=True)
            self.bias = None if self.bias is None else found["bias"].to(device, copy=True)

    def __getstate__(self) -> dict[str, Any]:
        # A copy may be read by another machine.
        return {**self.__dict__, "_buffers": {**self._buffers, "panels": self.weight()}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.set_weight(self.panels)

    def extra_repr(self) -> str:
        return f"{list(self.shape)}"


def int8_experts(
    x: Tensor,
    weights: Tensor | None,
    indices: Tensor | None,
    first: Int8Linear,
    last: Int8Linear | None,
    group_ids: Tensor | None,
    activation: str,
    gated: bool = False,
) -> Tensor:
    """``ops.int8.experts`` on layers; ``last`` None: single linear experts."""
    w2, scale2, b2 = (None, None, None) if last is None else (last.panels, last.scale, last.bias)
    return int8.experts(x, weights, indices, first.panels, first.scale, first.bias, w2, scale2, b2, group_ids, activation, gated)


def replace(owner: nn.Module, name: str, bias: str, by: Int8Linear) -> None:
    """Put int8 weights in the place of a parameter and of its bias."""
    delattr(owner, name)
    setattr(owner, name, by)
    setattr(owner, bias, None)


def holds_int8(state_dict: dict[str, Any], prefix: str, name: str) -> bool:
    """Whether a state dict has the int8 form of a module's parameter."""
    return f"{prefix}{name}.scale" in state_dict


def refuse_floats(state_dict: dict[str, Any], prefix: str, name: str) -> None:
    """One line where a state dict has the floating-point form of what is int8 in the module that loads it."""
    if f"{prefix}{name}" in state_dict:
        raise RuntimeError(f"{prefix}{name} is floating-point and the module's weights are int8: load it into a new module, then prepack()")


def refuse_saving(*_: Any, **__: Any) -> NoReturn:
    """``save_pretrained`` of a transformers model with int8 weights, which ``from_pretrained`` cannot read."""
    raise RuntimeError("save_pretrained() cannot write int8 weights: torch.save model.state_dict(), for a model made int8 alike")
