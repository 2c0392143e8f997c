"""Values of index tensors, read once before a kernel of any backend; ``backends.run`` calls it.

Backward reuses indices that forward validated; soft_gate and topk_gate take none. The cpu backend validates inside its kernels.
On a GPU, where reading waits for the device, nothing is read without CMOE_CHECK=1; an index out of range is then no expert.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from cmoe_kernels.ops.arguments import may_read, require_offsets, require_permutation, require_range


def task_router(x: Any, task: Tensor | None, w1: Any, b1: Any, w2: Any, b2: Any, group_ids: Tensor | None, *_: Any) -> None:
    if group_ids is not None and task is not None:
        require_range("group_ids", group_ids, task.shape[0], "rows of task")


def grouped_linear(
    x: Tensor, w: Any, b: Any, offsets: Tensor, gather_idx: Tensor | None, k: int, scatter_idx: Tensor | None, *_: Any
) -> None:
    for name, index in (("gather_idx", gather_idx), ("scatter_idx", scatter_idx)):
        if index is not None:
            require_permutation(name, index)
    if may_read(offsets):
        require_offsets(offsets, x.shape[0] * k)


def soft_experts(x: Any, gates: Tensor, w1: Any, b1: Any, w2: Any, b2: Any, group_ids: Tensor | None, *_: Any) -> None:
    if group_ids is not None:
        require_range("group_ids", group_ids, gates.shape[0], "rows of gates")


def sparse_experts(x: Any, weights: Any, indices: Tensor, w1: Tensor, b1: Any, w2: Any, b2: Any, group_ids: Tensor | None, *_: Any) -> None:
    _require_experts(indices, w1.shape[0])
    if group_ids is not None:
        require_range("group_ids", group_ids, indices.shape[0], "rows of indices")


def int8_experts(x: Any, weights: Tensor | None, indices: Tensor | None, w1: Tensor, *rest: Any) -> None:
    if indices is not None:
        _require_experts(indices, w1.shape[0])
    table = weights if indices is None else indices
    if (group_ids := rest[5]) is not None and table is not None:
        require_range("group_ids", group_ids, table.shape[0], "rows of weights")


def int8_router(x: Any, w1: Any, scale1: Any, bias: Tensor, w2: Any, b2: Any, group_ids: Tensor | None, *_: Any) -> None:
    if group_ids is not None:
        require_range("group_ids", group_ids, bias.shape[0], "rows of the router's bias")


def balance_loss(scores: Tensor, indices: Tensor | None, *_: Any) -> None:
    if indices is not None:
        _require_experts(indices, scores.shape[1])


def _require_experts(indices: Tensor, experts: int) -> None:
    require_range("indices", indices, experts + 1, f"{experts} experts; -1 and {experts} mean no expert", least=-1)


# {op: the check of its arguments}
CHECKS: dict[str, Callable[..., None]] = {
    f.__name__: f for f in (task_router, grouped_linear, soft_experts, sparse_experts, int8_experts, int8_router, balance_loss)
}
