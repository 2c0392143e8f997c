"""What every op's autograd registration shares."""

from typing import Any

import torch
from torch import Tensor


def refuse_double_backward(backward_op: Any) -> None:
    """Give a backward op an autograd formula that says that there is none, in one line."""

    def refuse(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(f"{backward_op._qualname} has no second derivative: call backward() without create_graph=True")

    backward_op.register_autograd(refuse)


def wants_grad(*tensors: Tensor | None) -> bool:
    """Whether a backward pass can follow, so that the forward pass must return what it needs."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def absent(like: Tensor) -> Tensor:
    """What stands for a gradient that nobody asked for, and for a tensor that was not saved (``backends.run`` makes it)."""
    return like.new_empty(0, dtype=torch.float32)


def fake_grads(tensors: tuple[Tensor | None, ...], needs: list[bool], like: Tensor) -> tuple[Tensor, ...]:
    """What a backward op returns: one gradient per tensor that needs it."""
    return tuple(t.new_empty(t.shape) if need and t is not None else absent(like) for t, need in zip(tensors, needs, strict=True))


def needed(grads: tuple[Tensor, ...], needs: list[bool]) -> tuple[Tensor | None, ...]:
    return tuple(g if need else None for g, need in zip(grads, needs, strict=True))
