"""The layers of a connector: the weights of E experts, and the learned router with the task tokens it reads.

Weights that were made int8 (CMoEConnector.prepack) are ``Int8Linear`` in place of parameters, biases included.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cmoe_kernels.nn.config import CMoEConfig
from cmoe_kernels.nn.int8 import Int8Linear, holds_int8, int8_experts, refuse_floats, replace
from cmoe_kernels.nn.packing import PackedExperts, PackedRouter
from cmoe_kernels.ops import int8
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
        self.w1: nn.Parameter | Int8Linear = parameter(first, width)
        self.b1 = parameter(first) if config.expert_bias else None
        self.w2: nn.Parameter | Int8Linear | None = parameter(config.out_features, first) if config.expert == "mlp" else None
        self.b2 = parameter(config.out_features) if config.expert == "mlp" and config.expert_bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Each expert as torch.nn.Linear initialises itself, independently of the others."""
        _init(self)

    def forward(
        self,
        x: Tensor,
        gates: Tensor | None = None,
        weights: Tensor | None = None,
        indices: Tensor | None = None,
        group_ids: Tensor | None = None,
    ) -> Tensor:
        """All experts, weighted by ``gates``; or those named by ``indices``, weighted by ``weights``."""
        if isinstance(self.w1, Int8Linear):
            return self._int8(self.w1, x, gates if gates is not None else weights, indices, group_ids)
        assert not isinstance(self.w2, Int8Linear)
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

    def _int8(self, first: Int8Linear, x: Tensor, weights: Tensor | None, indices: Tensor | None, group_ids: Tensor | None) -> Tensor:
        last = self.w2
        assert not isinstance(last, nn.Parameter)
        return int8_experts(x, weights, indices, first, last, group_ids, self.activation)

    def quantised(self) -> list[Int8Linear]:
        """The int8 form of what is floating-point."""
        if isinstance(self.w1, Int8Linear):
            return []
        assert not isinstance(self.w2, Int8Linear)
        first = Int8Linear.of("experts.w1", self.w1, self.b1)
        return [first] if self.w2 is None else [first, Int8Linear.of("experts.w2", self.w2, self.b2)]

    def become_int8(self, *layers: Int8Linear) -> None:
        """Put int8 weights in the place of the parameters."""
        for name, bias, layer in zip(("w1", "w2"), ("b1", "b2"), layers, strict=False):
            replace(self, name, bias, layer)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        if isinstance(self.w1, Int8Linear):
            refuse_floats(state_dict, prefix, "w1")
        elif holds_int8(state_dict, prefix, "w1"):

            def empty(name: str, w: nn.Parameter, b: nn.Parameter | None) -> Int8Linear:
                return Int8Linear.empty(prefix + name, w.shape, None if b is None else b.shape, w.device)

            assert not isinstance(self.w2, Int8Linear)
            first = empty("w1", self.w1, self.b1)
            self.become_int8(*([first] if self.w2 is None else [first, empty("w2", self.w2, self.b2)]))
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def pack(self, dtype: torch.dtype | None) -> PackedExperts:
        """Copies of the weights for inference on a CPU; see CMoEConnector.prepack."""
        assert isinstance(self.w1, Tensor)
        assert not isinstance(self.w2, Int8Linear)
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
        self.w1: nn.Parameter | Int8Linear = parameter(first, config.router_in)
        self.b1 = parameter(first) if config.router_bias else None
        self.w2 = parameter(config.num_experts, first) if config.router_layers == 2 else None
        self.b2 = parameter(config.num_experts) if config.router_layers == 2 and config.router_bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Layers as torch.nn.Linear initialises itself, task tokens from N(0, 0.02^2)."""
        _init(self)
        if self.task_tokens is not None:
            nn.init.normal_(self.task_tokens, std=0.02)

    def forward(self, x: Tensor, group: int | None, group_ids: Tensor | None) -> Tensor:
        """Logits [T, E]; with inputs="task" [G, E], or [1, E] where all tokens belong to one group."""
        if isinstance(self.w1, Int8Linear):
            return self._int8(self.w1, x, group, group_ids)
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

    def _int8(self, first: Int8Linear, x: Tensor, group: int | None, group_ids: Tensor | None) -> Tensor:
        bias, own = first.bias, slice(None) if group is None else slice(group, group + 1)
        assert bias is not None
        assert self.w2 is not None
        if self.inputs == "task":
            assert self.task_tokens is not None
            x, group_ids = self.task_tokens[own].detach().to(x.dtype), None
        elif self.inputs == "task_token":
            bias = bias[own]
        return int8.router(
            x, first.panels, first.scale[None], bias, self.w2, self.b2, group_ids if bias.shape[0] > 1 else None, self.activation
        )

    def _logits(self, x: Tensor | None, task: Tensor | None, group_ids: Tensor | None) -> Tensor:
        assert isinstance(self.w1, Tensor)  # FSDP 1 has views of its own flat parameter here
        return task_router(x, task, self.w1, self.b1, self.w2, self.b2, group_ids, self.inputs, self.activation, self.recompute)

    def quantised(self) -> list[Int8Linear]:
        """The int8 form of the first of two layers, its task columns as a bias row per task. A single layer stays floating-point."""
        if isinstance(self.w1, Int8Linear) or self.w2 is None:
            return []
        w, bias = self.w1.detach(), self.w1.new_zeros(self.w1.shape[0]) if self.b1 is None else self.b1.detach()
        if self.inputs == "task_token":
            assert self.task_tokens is not None
            width = self.task_tokens.shape[1]
            bias = F.linear(self.task_tokens.detach().float(), w[:, :width].float(), bias.float())
            w = w[:, width:]
        return [Int8Linear.of("router.w1", w, bias.reshape(-1, w.shape[0]))]

    def become_int8(self, *layers: Int8Linear) -> None:
        """Put int8 weights in the place of the first layer's."""
        for first in layers:
            replace(self, "w1", "b1", first)
            if self.inputs == "task_token":
                self.task_tokens = None

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        if isinstance(self.w1, Int8Linear):
            refuse_floats(state_dict, prefix, "w1")
        elif holds_int8(state_dict, prefix, "w1"):
            rows, columns = self.w1.shape
            groups, width = 1, 0
            if self.inputs == "task_token":
                assert self.task_tokens is not None
                groups, width = self.task_tokens.shape
            self.become_int8(Int8Linear.empty(f"{prefix}w1", (rows, columns - width), (groups, rows), self.w1.device))
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def pack(self, dtype: torch.dtype | None) -> PackedRouter:
        """Copies of the weights for inference on a CPU; see CMoEConnector.prepack."""
        assert isinstance(self.w1, Tensor)
        return PackedRouter(self, self.task_tokens, self.w1, self.b1, self.w2, self.b2, self.inputs, self.activation, dtype)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={list(p.shape)}" for name, p in self.named_parameters(recurse=False))


def _init(layers: Experts | TaskRouter) -> None:
    for weight, bias in ((layers.w1, layers.b1), (layers.w2, layers.b2)):
        if isinstance(weight, Int8Linear):
            raise RuntimeError("int8 weights cannot be initialised anew: build a new module")
        if weight is not None:
            linear_init_(weight, bias)


def linear_init_(weight: Tensor, bias: Tensor | None) -> None:
    """torch.nn.Linear's initialisation, U(-1/sqrt(in), 1/sqrt(in)), for one matrix or a stack."""
    bound = weight.shape[-1] ** -0.5
    for tensor in (weight, bias):
        if tensor is not None:
            nn.init.uniform_(tensor, -bound, bound)
