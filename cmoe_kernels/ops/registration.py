"""What every op's autograd registration shares."""

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch as functorch
from torch.autograd import forward_ad

from cmoe_kernels import backends, native

_library = torch.library.Library("cmoe", "FRAGMENT")
_native_library = torch.library.Library("cmoe_native", "FRAGMENT")


class Operator:
    """An op of torch's dispatcher, made from a function by ``operator``; called as the function is.

    In eager mode a call goes to the kernel past the dispatcher, with the graph node that the op would make (``eager`` says when). Most of
    the time of a call on a few tokens was the dispatcher's.

    ``cmoe_native::<name>`` has the same schema without ``backend``: the native library's kernels, which become the op's backends.
    """

    def __init__(self, name: str, kernel: Callable[..., Any]) -> None:
        self.qualname = f"cmoe::{name}"
        self._kernel = kernel
        self._apply: Callable[..., Any] | None = None
        schema = torch.library.infer_schema(kernel, mutates_args=())
        _library.define(name + schema, tags=torch.Tag.pt2_compliant_tag)
        _library.impl(name, kernel, "CompositeExplicitAutograd")
        self._call = getattr(torch.ops.cmoe, name).default
        without_backend = schema.replace(", str backend)", ")")
        self._native = name + without_backend.replace("SymInt", "int")
        if not native.stale:
            _native_library.define(self._native)
        # An op that takes no backend calls its kernel itself (packed.py).
        for backend in native.operations().get(name, ()) if without_backend != schema else ():
            backends.register(name, backend, getattr(torch.ops.cmoe_native, name).default)

    def __call__(self, *arguments: Any) -> Any:
        # torch.compile traces the op: it evaluates this condition while it traces.
        if not torch.compiler.is_compiling():
            needs_grad = eager(arguments)
            if needs_grad is False:
                return self._kernel(*arguments)
            if needs_grad and self._apply is not None:
                return self._apply(*arguments)
        if forward_ad._current_level >= 0 and any(map(_has_tangent, arguments)):
            raise RuntimeError(f"{self.qualname} has no forward-mode derivative (torch.func.jvp, jacfwd): use backward()")
        try:
            return self._call(*arguments)
        except RuntimeError as error:
            if "functorch transforms" not in str(error):
                raise
            raise RuntimeError(
                f"{self.qualname} has no rule for torch.func.grad, vjp or jacrev: use backward() or torch.autograd.grad"
            ) from None

    def register_fake(self, fake: Callable[..., Any]) -> None:
        torch.library.register_fake(self.qualname, fake, lib=_library)

    def adds_to(self, *weights: str) -> None:
        """Define ``cmoe_native::<name>_into``: a backward op that adds the gradients of these to tensors that are given for them."""
        name = self._native.partition("(")[0] + "_into"
        targets = "".join(f", Tensor({chr(ord('a') + i)}!)? into_{weight}" for i, weight in enumerate(weights))
        if not native.stale:
            _native_library.define(self._native.replace(name.removesuffix("_into"), name, 1).replace(") ->", f"{targets}) ->"))
            self.native_into = getattr(torch.ops.cmoe_native, name).default

    def register_autograd(self, backward: Callable[..., Any], setup_context: Callable[..., Any] | None = None) -> None:
        torch.library.register_autograd(self.qualname, backward, setup_context=setup_context, lib=_library)
        if setup_context is not None:
            self._apply = _apply(self.qualname, self._kernel, backward, setup_context)


def _apply(
    qualname: str, kernel: Callable[..., Any], backward: Callable[..., Any], setup_context: Callable[..., Any]
) -> Callable[..., Any]:
    """Calls a kernel and makes the graph node that the dispatcher would make of the same formula and context."""

    def forward(ctx: Any, *arguments: Any) -> Any:
        output = kernel(*arguments)
        setup_context(ctx, arguments, output)
        return output

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function = types.new_class(qualname.replace("::", "_"), (torch.autograd.Function,), exec_body=lambda body: body.update(methods))
    # Function.apply itself is for torch.func, which does not come here.
    return super(torch.autograd.Function, function).apply  # type: ignore[misc]


_VALUES = frozenset({bool, int, float, str, type(None)})


def eager(arguments: tuple[Any, ...]) -> bool | None:
    """Whether a gradient can follow; None where the dispatcher would do more for these arguments than find the kernel.

    It does for tensor subclasses (fake tensors, DTensor, FSDP), the meta device, proxies, torch.func, forward AD, jit.trace, modes of
    torch_function and torch_dispatch (FLOP counters, selective checkpointing), and the profiler, which shows an op by its name.
    """
    grad = False
    for argument in arguments:
        kind = type(argument)
        if kind is Tensor or kind is torch.nn.Parameter:
            if argument.is_meta or functorch.is_functorch_wrapped_tensor(argument):
                return None
            grad = grad or argument.requires_grad
        elif kind not in _VALUES and (kind is not list or any(type(item) is not bool for item in argument)):
            return None
    if (
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or forward_ad._current_level >= 0
        or functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or torch._C._autograd._profiler_enabled()
    ):
        return None
    return grad and torch.is_grad_enabled()


def _has_tangent(argument: Any) -> bool:
    if not isinstance(argument, Tensor) or not argument.is_floating_point():
        return False
    while functorch.is_batchedtensor(argument):
        argument = functorch.get_unwrapped(argument)
    return forward_ad.unpack_dual(argument).tangent is not None


def operator(name: str) -> Callable[[Callable[..., Any]], Operator]:
    """Make ``cmoe::<name>`` of a function that mutates nothing; the schema comes from its annotations.

    It is what ``torch.library.custom_op`` gives, without the two wrappers that it puts around each call (no tracing inside, no output
    that is an input: the ops' tests see to that). Those two wrappers cost about as much as `soft_gate` on a few hundred tokens.
    """
    return lambda kernel: Operator(name, kernel)


def refuse_double_backward(backward_op: Operator) -> None:
    """Give a backward op an autograd formula that says that there is none, in one line."""

    def refuse(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(f"{backward_op.qualname} has no second derivative: call backward() without create_graph=True")

    backward_op.register_autograd(refuse)


def wants_grad(*tensors: Tensor | None) -> bool:
    """Whether a backward pass can follow, so that the forward pass must return what it needs."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def empty_placeholder(like: Tensor) -> Tensor:
    """Empty placeholder for a gradient that was not requested or a tensor that was not saved (``backends.run`` makes it)."""
    return like.new_empty(0, dtype=torch.float32)


def fake_grads(tensors: tuple[Tensor | None, ...], needs: list[bool], like: Tensor) -> tuple[Tensor, ...]:
    """What a backward op returns: one gradient per tensor that needs it."""
    return tuple(
        t.new_empty(t.shape) if need and t is not None else empty_placeholder(like) for t, need in zip(tensors, needs, strict=True)
    )


def needed(grads: tuple[Tensor, ...], needs: list[bool]) -> tuple[Tensor | None, ...]:
    return tuple(g if need else None for g, need in zip(grads, needs, strict=True))
