"""Gradients of weights that are added where they are to be, without a tensor of their own."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.utils.hooks import RemovableHandle

from cmoe_kernels.ops.arguments import require_choice
from cmoe_kernels.ops.registration import Operator, needed

Into = Literal["grad", "main_grad"]
_MARK = "_cmoe_mark"
_marked = False  # whether a parameter was ever marked: nothing else is looked at before


@dataclass(frozen=True)
class _Mark:
    """Of a parameter. A copy of the parameter, pickled or not, has none."""

    into: Into
    hook: RemovableHandle | None

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()


def accumulate_grads(parameters: Module | Iterable[Parameter], into: Into | None = "grad") -> None:
    """Let backward passes of our ops add the gradients of these parameters to those that are there, in the product that makes them.

    dW += dy^T x, in place of a new dW that autograd adds to ``p.grad``. A micro-batch needs no memory for dW:
    dW is read once and written once. Opt-in, as Megatron's ``gradient_accumulation_fusion``.

    Args:
        parameters: a module, for all of its parameters, or parameters.
        into: "grad", ``p.grad`` from the second backward pass after ``zero_grad()`` on (the first one makes it, at no cost); "main_grad",
            an fp32 tensor ``p.main_grad`` of the parameter's shape, made of zeros where it is missing: ``p.grad`` stays None, and the
            optimizer is to read ``p.main_grad``. Gradients that come the ordinary way are added to it, too. None ends it.

    The CPU kernels add. Sums are made in fp32 (fp64) and rounded once to the dtype of the gradient, so bits differ from autograd's, which
    rounds dW first.

    Other backends, ``torch.autograd.grad``, ``backward(inputs=...)`` without the parameter, ``create_graph=True``, ``torch.compile``, a
    weight that is computed from a parameter, and a ``p.grad`` that is not contiguous or of another dtype than the parameter get the
    ordinary gradient. A graph that is kept (``retain_graph=True``) adds at every pass, as autograd does. A parameter may be frozen and
    unfrozen. A copy of it (deepcopy, pickle, torch.save) is not marked.

    Raises:
        TypeError: something is no plain parameter (DTensor, as FSDP2 makes them).
        RuntimeError: in the backward pass, where the parameter has hooks of its gradient (``register_hook``; with main_grad also
            ``register_post_accumulate_grad_hook``), which would not see it; where ``p.main_grad`` is not a contiguous fp32 tensor of its
            shape.

    Example::

        connector = CMoEConnector(CMoEConfig(in_features=8, out_features=16))
        accumulate_grads(connector)
        for x in torch.randn(4, 1, 16, 8):  # micro-batches
            connector(x, "vqa").embeddings.sum().backward()

    Source: Megatron-LM's gradient_accumulation_fusion.
    """
    global _marked
    if into is not None:
        require_choice("into", into, ("grad", "main_grad"))
    chosen = list(parameters.parameters() if isinstance(parameters, Module) else parameters)
    for parameter in chosen:
        if type(parameter) is not Parameter:
            raise TypeError(f"accumulate_grads: {type(parameter).__name__} is no plain torch.nn.Parameter: its gradient is not one tensor")
    for parameter in chosen:
        if (mark := parameter.__dict__.pop(_MARK, None)) is not None and mark.hook is not None:
            mark.hook.remove()
        if into is None:
            continue
        hook = None
        if into == "main_grad" and parameter.is_floating_point():
            if getattr(parameter, "main_grad", None) is None:
                zeros = torch.zeros_like(parameter, dtype=torch.float32, memory_format=torch.contiguous_format)
                parameter.main_grad = zeros  # type: ignore[attr-defined]
            hook = _hook(parameter)
        setattr(parameter, _MARK, _Mark(into, hook))
        _marked = True


def _hook(parameter: Parameter) -> RemovableHandle:
    learns = parameter.requires_grad
    parameter.requires_grad_()  # torch refuses a hook of a frozen parameter, which may learn later
    handle = parameter.register_post_accumulate_grad_hook(_to_main_grad)
    parameter.requires_grad_(learns)
    return handle


def _to_main_grad(parameter: Tensor) -> None:
    """For a gradient that came the ordinary way. torch also calls it where an op has added one."""
    if parameter.grad is not None:
        _main_grad(parameter).add_(parameter.grad)
        parameter.grad = None


def _main_grad(parameter: Tensor) -> Tensor:
    target: Any = getattr(parameter, "main_grad", None)
    if target is None or target.dtype != torch.float32 or target.shape != parameter.shape or not target.is_contiguous():
        found = None if target is None else f"{target.dtype} {tuple(target.shape)}"
        raise RuntimeError(f"{_named(parameter)} has a main_grad of {found}, must be contiguous fp32 of its own shape")
    return target


def _named(parameter: Tensor) -> str:
    return f"accumulate_grads: a parameter of shape {tuple(parameter.shape)}"


def run_backward(
    op: Operator, ctx: Any, arguments: tuple[Any, ...], needs: list[bool], weights: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """The gradients that are needed; those of the weights, the last ones, are None where they were added to their targets."""
    into = _targets(ctx, weights, needs[-len(weights) :]) if _marked else None
    if into is None:
        return needed(op(*arguments, needs, ctx.backend), needs)
    grads = op.native_into(*arguments, needs, *into)
    others = len(needs) - len(weights)
    return needed(grads, [need and not (i >= others and into[i - others] is not None) for i, need in enumerate(needs)])


def _targets(ctx: Any, weights: Sequence[Tensor | None], needs: Sequence[bool]) -> list[Tensor | None] | None:
    """What the gradients of weights are to be added to; None where all of them go the ordinary way."""
    if ctx.backend != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    leaves = [node for node, _ in ctx.next_functions if hasattr(node, "variable")]
    found = [_target(weight, leaves) if need else None for weight, need in zip(weights, needs, strict=True)]
    return found if any(target is not None for target in found) else None


def _target(weight: Tensor | None, leaves: Sequence[Any]) -> Tensor | None:
    mark: _Mark | None = getattr(weight, _MARK, None)
    leaf = next((node for node in leaves if node.variable is weight), None)
    if mark is None or leaf is None or weight is None or not _accumulates(leaf):
        return None
    into, target = mark.into, weight.grad
    if into == "grad" and (target is None or target.dtype != weight.dtype or not target.is_contiguous()):
        return None
    if weight._backward_hooks or (into == "main_grad" and len(weight._post_accumulate_grad_hooks or ()) > 1):
        why = "has hooks of its gradient, which would not see it: remove them, or accumulate_grads(..., into=None)"
        raise RuntimeError(f"{_named(weight)} {why}")
    return _main_grad(weight) if into == "main_grad" else target


def _accumulates(leaf: Any) -> bool:
    """Whether this backward pass ends at the leaf: it does not in torch.autograd.grad, which torch answers with an error here."""
    try:
        return torch._C._will_engine_execute_node(leaf)
    except RuntimeError:
        return False
