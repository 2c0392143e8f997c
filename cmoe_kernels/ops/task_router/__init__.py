"""The task-aware router: one or two linear layers on [task token ; image token].

hidden[t] = w1 @ [task[group_ids[t]] ; x[t]] + b1  =  W_task @ task[group_ids[t]] + W_img @ x[t] + b1
logits[t] = w2 @ act(hidden[t]) + b2               (w2 None: logits = hidden)
"""

from typing import Literal, get_args

from torch import Tensor

from cmoe_kernels import backends
from cmoe_kernels.ops.accumulate import run_backward
from cmoe_kernels.ops.activation import ACTIVATIONS, Activation
from cmoe_kernels.ops.arguments import require_choice, require_float, require_index, require_size, require_weight
from cmoe_kernels.ops.precision import accumulate_dtype, autocast_dtype
from cmoe_kernels.ops.registration import empty_placeholder, fake_grads, operator, refuse_double_backward, wants_grad
from cmoe_kernels.ops.task_router import reference

RouterInputs = Literal["task_token", "token", "task"]
ROUTER_INPUTS: tuple[RouterInputs, ...] = get_args(RouterInputs)


def task_router(
    x: Tensor | None,
    task: Tensor | None,
    w1: Tensor,
    b1: Tensor | None = None,
    w2: Tensor | None = None,
    b2: Tensor | None = None,
    group_ids: Tensor | None = None,
    inputs: RouterInputs = "task_token",
    activation: Activation = "gelu",
    recompute: bool = False,
) -> Tensor:
    """Router logits from image tokens, task tokens or both (Uni-Med's router_task_token, router_token, router_task).

    Args:
        x: image tokens [T, D]; None with inputs="task".
        task: task tokens [G, S]; None with inputs="token".
        w1: [R, S + D] with the task columns first; [R, D] with "token", [R, S] with "task".
        b1: [R] or None.
        w2: [E, R], or None for a single linear layer (then R = E).
        b2: [E] or None.
        group_ids: [T] int64, the row of ``task`` that each token belongs to; None where G == 1.
        inputs: "task_token", "token" or "task".
        activation: "gelu" (erf), "gelu_tanh", "silu", "relu" or "relu2" (its square).
        recompute: save nothing of size [T, R] for backward; the hidden layer is computed again.

    Returns:
        logits [T, E], or [G, E] with inputs="task"; fp32 (fp64 for fp64).

    Products run in the dtype of x (autocast's under autocast) and accumulate in fp32; fp32 weights are rounded to it and get fp32
    gradients. Saves the inputs and the pre-activation [T, R] for backward. The concatenation is never built; the task columns see one
    row per task, forward and backward; no gradient for a frozen x is computed. Deterministic.

    Raises:
        TypeError, ValueError: wrong dtype, shape or combination of arguments; on the CPU also a group id outside 0..G-1.

    Example::

        x, task = torch.randn(6, 8), torch.randn(1, 3)
        logits = task_router(x, task, w1=torch.randn(16, 3 + 8), w2=torch.randn(4, 16))  # [6, 4]
    """
    require_choice("inputs", inputs, ROUTER_INPUTS)
    require_choice("activation", activation, ACTIVATIONS)
    for name, value, wanted in (("x", x, inputs != "task"), ("task", task, inputs != "token")):
        if (value is not None) != wanted:
            raise ValueError(f"{name} must be {'given' if wanted else 'None'} with inputs={inputs!r}")
        if value is not None:
            require_float(name, value, "TD" if name == "x" else "GS")
    rows = task if x is None else x
    assert rows is not None
    dtype = autocast_dtype(rows)
    if x is not None:
        x = x.to(dtype)
        if task is not None:
            task = require_weight("task", task, "GS", x, dtype)
    else:
        task = rows.to(dtype)
    rows = task if x is None else x
    assert rows is not None
    w1 = require_weight("w1", w1, "RI", rows, dtype)
    width = sum(t.shape[1] for t in (task, x) if t is not None)
    require_size("w1", w1, 1, width, f"the width of the router's input with inputs={inputs!r}")
    if b1 is not None:
        b1 = require_weight("b1", b1, "R", rows, dtype)
        require_size("b1", b1, 0, w1.shape[0], "rows of w1")
    if w2 is None:
        if b2 is not None:
            raise ValueError("b2 is given without w2")
    else:
        w2 = require_weight("w2", w2, "ER", rows, dtype)
        require_size("w2", w2, 1, w1.shape[0], "rows of w1")
        if b2 is not None:
            b2 = require_weight("b2", b2, "E", rows, dtype)
            require_size("b2", b2, 0, w2.shape[0], "rows of w2")
    if inputs == "task_token":
        assert x is not None
        assert task is not None
        if group_ids is not None:
            require_index("group_ids", group_ids, "T", x)
            require_size("group_ids", group_ids, 0, x.shape[0], "tokens in x")
        elif task.shape[0] != 1:
            raise ValueError(f"group_ids is None, must be given where task has more than one row ({task.shape[0]})")
    elif group_ids is not None:
        raise ValueError(f"group_ids must be None with inputs={inputs!r}")
    save = not recompute and wants_grad(x, task, w1, b1, w2, b2)
    backend = backends.choose("task_router", rows.device.type, rows.dtype, rows.shape[0])
    return _task_router(x, task, w1, b1, w2, b2, group_ids, activation, save, backend)[0]


@operator("task_router")
def _task_router(
    x: Tensor | None,
    task: Tensor | None,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor | None,
    b2: Tensor | None,
    group_ids: Tensor | None,
    activation: str,
    save: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return backends.run("task_router", backend, w1.device, x, task, w1, b1, w2, b2, group_ids, activation, save)


@_task_router.register_fake
def _(x, task, w1, b1, w2, b2, group_ids, activation, save, backend):
    rows = task if x is None else x
    logits = rows.new_empty(rows.shape[0], (w1 if w2 is None else w2).shape[0], dtype=accumulate_dtype(rows.dtype))
    return logits, rows.new_empty(rows.shape[0], w1.shape[0]) if save and w2 is not None else empty_placeholder(rows)


@operator("task_router_backward")
def _task_router_backward(
    dlogits: Tensor,
    x: Tensor | None,
    task: Tensor | None,
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
    return backends.run("task_router_backward", backend, w1.device, dlogits, x, task, w1, b1, w2, b2, group_ids, u, activation, needs)


@_task_router_backward.register_fake
def _(dlogits, x, task, w1, b1, w2, b2, group_ids, u, activation, needs, backend):
    return fake_grads((x, task, w1, b1, w2, b2), needs, w1 if x is None else x)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.activation, _, ctx.backend = inputs
    _, u = output
    ctx.mark_non_differentiable(u)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, u)


def _backward(ctx, dlogits, _du):
    if dlogits is None:
        return (None,) * 10
    needs = list(ctx.needs_input_grad[:6])
    saved = ctx.saved_tensors
    grads = run_backward(_task_router_backward, ctx, (dlogits, *saved, ctx.activation), needs, saved[2:6])
    return *grads, None, None, None, None


_task_router.register_autograd(_backward, setup_context=_setup_context)
refuse_double_backward(_task_router_backward)
_task_router_backward.adds_to("w1", "b1", "w2", "b2")
backends.register("task_router", "reference", reference.task_router)
backends.register("task_router_backward", "reference", reference.task_router_backward)
backends.register_triton("task_router")
