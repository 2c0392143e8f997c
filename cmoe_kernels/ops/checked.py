"""CMOE_CHECK=1 for kernels that read no values on the host: their index tensors are read here, before the call."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from cmoe_kernels.ops.arguments import require_range
from cmoe_kernels.ops.grouped_linear.reference import require_layout


def task_router(x: Tensor, task: Tensor | None, w1: Tensor, b1: Any, w2: Any, b2: Any, group_ids: Tensor | None, *_: Any) -> None:
    if group_ids is not None and task is not None:
        require_range("group_ids", group_ids, task.shape[0], "rows of task")


def grouped_linear(x: Tensor, w: Tensor, b: Any, offsets: Tensor, gather: Tensor | None, k: int, scatter: Tensor | None, *_: Any) -> None:
    require_layout(offsets, x.shape[0] * k, gather, scatter)


def soft_experts(x: Tensor, gates: Tensor, w1: Any, b1: Any, w2: Any, b2: Any, group_ids: Tensor | None, *_: Any) -> None:
    if group_ids is not None:
        require_range("group_ids", group_ids, gates.shape[0], "rows of gates")


def sparse_experts(
    x: Tensor, weights: Any, indices: Tensor, w1: Tensor, b1: Any, w2: Any, b2: Any, group_ids: Tensor | None, *_: Any
) -> None:
    require_range("indices", indices, w1.shape[0] + 1, f"{w1.shape[0]} experts, and {w1.shape[0]} for no expert")
    if group_ids is not None:
        require_range("group_ids", group_ids, indices.shape[0], "rows of indices")


def balance_loss(scores: Tensor, indices: Tensor | None, *_: Any) -> None:
    if indices is not None:
        experts = scores.shape[1]
        require_range("indices", indices, experts + 1, f"{experts} experts, and {experts} for no expert")


# Gates have no index among their arguments, and a backward pass has those of its forward pass.
CHECKS: dict[str, Callable[..., None]] = {f.__name__: f for f in (task_router, grouped_linear, soft_experts, sparse_experts, balance_loss)}


def run(op: str, kernel: Callable[..., Any], *arguments: Any) -> Any:
    if op in CHECKS:
        CHECKS[op](*arguments)
    return kernel(*arguments)
