"""The learned router and the task tokens it reads."""

import torch
from torch import Tensor, nn

from cmoe_kernels.nn.config import CMoEConfig
from cmoe_kernels.nn.experts import linear_init_
from cmoe_kernels.nn.packing import PackedRouter
from cmoe_kernels.ops.task_router import task_router


class TaskRouter(nn.Module):
    """Logits of the experts from image tokens, task tokens or both.

    ``w1`` [R, S + D] (task columns first), ``b1`` [R], ``w2`` [E, R], ``b2`` [E]; a single layer has w1 [E, S + D] and b1 alone.
    ``task_tokens`` [G, S] is None where the router reads the image token alone.
    """

    def __init__(self, config: CMoEConfig, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.inputs, self.activation, self.recompute = config.router_inputs, config.activation, config.recompute
        self.packed: PackedRouter | None = None

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        first = config.router_hidden if config.router_layers == 2 else config.num_experts
        self.task_tokens = parameter(len(config.tasks), config.task_width) if config.uses_task_tokens else None
        self.w1 = parameter(first, config.router_in)
        self.b1 = parameter(first) if config.router_bias else None
        self.w2 = parameter(config.num_experts, first) if config.router_layers == 2 else None
        self.b2 = parameter(config.num_experts) if config.router_layers == 2 and config.router_bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Layers as torch.nn.Linear initialises itself, task tokens from N(0, 0.02^2)."""
        for weight, bias in ((self.w1, self.b1), (self.w2, self.b2)):
            if weight is not None:
                linear_init_(weight, bias)
        if self.task_tokens is not None:
            nn.init.normal_(self.task_tokens, std=0.02)

    def forward(self, x: Tensor, group: int | None, group_ids: Tensor | None) -> Tensor:
        """Logits [T, E]; with inputs="task" [G, E], or [1, E] where all tokens belong to one group."""
        if self.packed is not None and self.packed.serves(self, x):
            return self.packed(x, group, group_ids)
        task: Tensor | None = self.task_tokens
        if task is not None and group is not None:
            task = task[group : group + 1]
        if self.inputs == "task":
            assert task is not None
            # The rows of a task router see no image token, yet their products run in its dtype, so that both routers round alike.
            return self._logits(None, task if task.dtype == torch.float64 else task.to(x.dtype), None)
        return self._logits(x, task, group_ids if self.inputs == "task_token" else None)

    def _logits(self, x: Tensor | None, task: Tensor | None, group_ids: Tensor | None) -> Tensor:
        return task_router(x, task, self.w1, self.b1, self.w2, self.b2, group_ids, self.inputs, self.activation, self.recompute)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={list(p.shape)}" for name, p in self.named_parameters(recurse=False))
