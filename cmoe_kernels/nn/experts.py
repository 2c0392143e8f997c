"""The weights of E experts."""

import torch
from torch import Tensor, nn

from cmoe_kernels.nn.config import CMoEConfig
from cmoe_kernels.nn.packing import PackedExperts
from cmoe_kernels.ops.soft_experts import soft_experts
from cmoe_kernels.ops.sparse_experts import sparse_experts


class Experts(nn.Module):
    """E independent experts, stacked: ``w1`` [E, H, D], ``b1`` [E, H], ``w2`` [E, O, H], ``b2`` [E, O].

    Linear experts have ``w1`` [E, O, D] and ``b1`` [E, O] alone.
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

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={list(p.shape)}" for name, p in self.named_parameters(recurse=False))


def linear_init_(weight: Tensor, bias: Tensor | None) -> None:
    """torch.nn.Linear's initialisation, U(-1/sqrt(in), 1/sqrt(in)), for one matrix or a stack."""
    bound = weight.shape[-1] ** -0.5
    for tensor in (weight, bias):
        if tensor is not None:
            nn.init.uniform_(tensor, -bound, bound)
