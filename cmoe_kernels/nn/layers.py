"""The layers of a connector: the weights of E experts, and the learned router with the task tokens it reads."""

import torch
from torch import Tensor, nn

from cmoe_kernels.nn.config import CMoEConfig
from cmoe_kernels.nn.packing import PackedExperts, PackedRouter
from cmoe_kernels.ops.soft_experts import soft_experts
from cmoe_kernels.ops.sparse_experts import sparse_experts
from cmoe_kernels.ops.task_router import task_router


class Experts(nn.Module):
    """E independent experts, stacked: ``w1`` [E, H, D], ``b1`` [E, H], ``w2`` [E, O, H], ``b2`` [E, O].

    Linear experts have ``w1`` [E, O, D] and ``b1`` [E, O] only.
    """

    def __init__(self, config: CMoEConfig, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.activation, self.recompute = config.activation, config.recompute
        self.packed: PackedExperts | None = None
        experts, width = config.num_experts, config.features

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(experts, *shape, device=device, dtype=dtype))

        first = config.hidden if config.expert == "mlp" else config.out_features
        self.w1 = parameter(first, width)
        self.b1 = parameter(first) if config.expert_bias else None
        self.w2 = parameter(config.out_features, first) if config.expert == "mlp" else None
        self.b2 = parameter(config.out_features) if config.expert == "mlp" and config.expert_bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Each expert as torch.nn.Linear initialises itself, independently of the others."""
        for weight, bias in ((self.w1, self.b1), (self.w2, self.b2)):
            if weight is not None:
                linear_init_(weight, bias)

    def forward(
        self,
        x: Tensor,
        gates: Tensor | None = None,
        weights: Tensor | None = None,
        indices: Tensor | None = None,
        group_ids: Tensor | None = None,
    ) -> Tensor:
        """All experts, weighted by ``gates``; or those named by ``indices``, weighted by ``weights``."""
        packed = self.packed if self.packed is not None and self.packed.serves(self, x) else None
        if gates is not None:
            # Single linear experts with fewer rows of gates than tokens merge, which saves more than packing.
            if packed is not None and (self.w2 is not None or gates.shape[0] >= x.shape[0]):
                return packed.mix(x, gates, group_ids)
            return soft_experts(x, gates, self.w1, self.b1, self.w2, self.b2, self.activation, group_ids, self.recompute)
        assert indices is not None
        if packed is not None:
            return packed.select(x, weights, indices, group_ids)
        return sparse_experts(
            x, weights, indices, self.w1, self.b1, self.w2, self.b2, self.activation, group_ids=group_ids, recompute=self.recompute
        )

    def pack(self, dtype: torch.dtype | None) -> PackedExperts:
        """Copies of the weights for inference on a CPU; see CMoEConnector.prepack."""
        return PackedExperts(self, self.w1, self.b1, self.w2, self.b2, self.activation, dtype)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={list(p.shape)}" for name, p in self.named_parameters(recurse=False))


class TaskRouter(nn.Module):
    """Logits of the experts from image tokens, task tokens or both.

    ``w1`` [R, S + D] (task columns first), ``b1`` [R], ``w2`` [E, R], ``b2`` [E]; a single layer has w1 [E, S + D] and b1 only.
    ``task_tokens`` [G, S] is None where the router reads only the image token.
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

    def pack(self, dtype: torch.dtype | None) -> PackedRouter:
        """Copies of the weights for inference on a CPU; see CMoEConnector.prepack."""
        return PackedRouter(self, self.task_tokens, self.w1, self.b1, self.w2, self.b2, self.inputs, self.activation, dtype)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={list(p.shape)}" for name, p in self.named_parameters(recurse=False))


def linear_init_(weight: Tensor, bias: Tensor | None) -> None:
    """torch.nn.Linear's initialisation, U(-1/sqrt(in), 1/sqrt(in)), for one matrix or a stack."""
    bound = weight.shape[-1] ** -0.5
    for tensor in (weight, bias):
        if tensor is not None:
            nn.init.uniform_(tensor, -bound, bound)
