"""The connector: image tokens of an encoder to tokens of a language model, by a mixture of projection experts."""

import math
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cmoe_kernels.nn.config import CMoEConfig
from cmoe_kernels.nn.int8 import Int8Linear, holds_int8
from cmoe_kernels.nn.layers import Experts, TaskRouter
from cmoe_kernels.ops.arguments import require_float, require_index, require_range, require_size
from cmoe_kernels.ops.balance_loss import balance_loss
from cmoe_kernels.ops.groups import per_token
from cmoe_kernels.ops.precision import accumulate_dtype
from cmoe_kernels.ops.soft_gate import soft_gate
from cmoe_kernels.ops.topk_gate import topk_gate


class ConnectorOutput(NamedTuple):
    """``embeddings`` [B, N, O] or packed [T, O]; ``gates`` [B, N, E] or [T, E], fp32, attached to the graph (detach them before keeping
    them); ``aux_loss``, the weighted fp32 sum; ``aux_losses``, its unweighted parts by name."""

    embeddings: Tensor
    gates: Tensor
    aux_loss: Tensor
    aux_losses: dict[str, Tensor]


class _Routing(NamedTuple):
    embeddings: Tensor  # [T, O]
    gates: Tensor  # [T, E]
    logits: Tensor | None  # [T, E]
    indices: Tensor | None  # [T, K]


class CMoEConnector(nn.Module):
    """Connector mixture of experts (Uni-Med, NeurIPS 2024, section 3): resample, route, project.

    Args:
        config: a :class:`CMoEConfig`.
        device: of the parameters.
        dtype: of the parameters.

    One module serves every combination of ``expert``, ``router``, ``router_inputs`` and ``resample``. A batch may mix tasks.
    """

    def __init__(self, config: CMoEConfig, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        if not isinstance(config, CMoEConfig):
            raise TypeError(f"config is a {type(config).__name__}, must be a CMoEConfig")
        self.config = config
        if config.router_never_learns:
            warnings.warn(
                "router='sparse' with top_k=1 and renormalize=True weighs every chosen expert by 1, so the router gets no gradient. "
                "Give renormalize=False (the weight is the probability) or aux_losses={'switch': 0.01}.",
                stacklevel=2,
            )
        self.router = TaskRouter(config, device, dtype) if config.learned else None
        self.experts = Experts(config, device, dtype)

    def prepack(self, dtype: torch.dtype | None = None) -> int:
        """Copy the weights into the order in which the native CPU kernels read them, for inference; or make them int8.

        Args:
            dtype: of the image tokens that will come (under autocast its dtype); default the dtype of the parameters. torch.int8: weights
                of a byte in place of the parameters, see below.

        Returns:
            the bytes of the copies, which come on top of the parameters; or, for int8, of what takes their place. The router's image
            columns and the experts are copied; its task columns become one bias row per task, and a router that sees the task alone
            becomes its logits.

        The copies serve forward passes in that dtype that record no gradient; all others use the parameters. They are dropped by train(),
        load_state_dict(), a move to another dtype or device, and unpack(). Pack again after the weights have changed in any other way
        (merging an adapter, an optimiser's step): where that can be seen (a parameter replaced or written to in place) the next forward
        pass raises; writing through ``parameter.data`` cannot be seen. A copy of the connector (deepcopy, pickle, torch.save) has none.

        With torch.int8 the experts' weights and the router's first layer become int8 with an fp32 scale per output
        (``nn.int8.Int8Linear``). The parameters are dropped: the connector takes half the memory of bf16. Image tokens may be fp32, bf16 or
        fp16; ops/int8 says how products run, docs/kernels/int8.md what they cost in accuracy. state_dict() holds the int8 values as
        [out, in], and load_state_dict() of such a state dict makes a new connector int8. There is no way back: train() raises, and so does
        a forward pass whose image tokens require a gradient. Without native kernels plain PyTorch serves.

        Raises:
            RuntimeError: the parameters are not on a CPU, or the native library is not there or not selected (not with torch.int8); the
                weights are int8 already and another dtype is given.
            TypeError, ValueError: another dtype; torch.float64 where the parameters are not, or the reverse; a weight to become int8 is not
                finite.
        """
        parts = [part for part in (self.experts, self.router) if part is not None]
        if self.int8 and dtype != torch.int8:
            raise RuntimeError("the connector's weights are int8: load the floating-point weights into a new connector, and prepack that")
        self.unpack()
        if dtype == torch.int8:
            made = [part.quantised() for part in parts]  # raises, before anything has changed
            self.eval()
            for part, layers in zip(parts, made, strict=True):
                part.become_int8(*layers)
            self._settle_int8()
            return sum(m.nbytes for m in self.modules() if isinstance(m, Int8Linear))
        router = None if self.router is None else self.router.pack(dtype)
        self.experts.packed = self.experts.pack(dtype)
        if self.router is not None:
            self.router.packed = router
        return self.experts.packed.nbytes + (0 if router is None else router.nbytes)

    @property
    def int8(self) -> bool:
        """Whether :meth:`prepack` made the weights int8."""
        return isinstance(self.experts.w1, Int8Linear)

    def unpack(self) -> None:
        """Drop what :meth:`prepack` copied; weights that it made int8 stay so."""
        for part in (self.router, self.experts):
            if part is not None:
                part.packed = None

    def train(self, mode: bool = True) -> "CMoEConnector":
        if mode:
            self.unpack()
            if isinstance(self.experts.w1, Int8Linear):
                self.experts.w1.train()  # raises, before anything has changed
        return super().train(mode)

    def _apply(self, *args, **kwargs):
        self.unpack()
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        self.unpack()
        if holds_int8(state_dict, f"{prefix}experts.", "w1"):
            self._settle_int8()
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _settle_int8(self) -> None:
        """The parameters beside int8 weights: frozen, and a router's only layer in fp32, which takes image tokens of every dtype."""
        self.requires_grad_(False)
        if self.router is not None and self.router.w2 is None:
            self.router.float()

    def reset_parameters(self) -> None:
        """Initialise anew, as the release does (torch.nn.Linear's initialisation; task tokens from N(0, 0.02^2))."""
        for part in (self.router, self.experts):
            if part is not None:
                part.reset_parameters()

    def forward(
        self,
        features: Tensor,
        task: str | Sequence[str] | Tensor | None = None,
        group_ids: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> ConnectorOutput:
        """Project image tokens.

        Args:
            features: [B, P, C], the encoder's tokens (class token dropped, after its last norm); or packed [T, C] with resample="none".
            task: the task of all samples (a name), of each sample (names), or LongTensor [B] of places in ``config.tasks``. Not needed
                for router_inputs="token" and router="constant".
            group_ids: [T] int64, the task of each token, in place of ``task``: for packed features, or with resample="none" (T = B P).
            mask: [B, N] (packed: [T]) bool, False for padding: such tokens may hold anything, NaN included. They give zeros, get and give
                no gradient, and are left out of the auxiliary losses. It counts tokens after resampling: one made of several of the
                encoder's tokens is kept or left out whole, so padding within a token that is kept must be finite.

        Returns:
            ConnectorOutput(embeddings, gates, aux_loss, aux_losses).

        Raises:
            TypeError, ValueError: wrong shape, an unknown task, a missing task; the message names it.
        """
        x, lead = self._resample(features)
        group, group_ids = self._groups(task, group_ids, features, x.shape[0])
        keep = None
        if mask is not None:
            require_index("mask", mask, "TN"[: len(lead)], x, torch.bool)
            for dim, size in enumerate(lead):
                require_size("mask", mask, dim, size, "tokens after resampling" if dim == len(lead) - 1 else "samples")
            keep = mask.reshape(-1)
            # A weight's gradient sums over all tokens, where zero times NaN or infinity is NaN.
            x = x.masked_fill(~keep[:, None], 0)
        routing = self._route(x, group, group_ids)
        embeddings, gates = routing.embeddings, routing.gates
        if keep is not None:
            embeddings, gates = (t.masked_fill(~keep[:, None], 0) for t in (embeddings, gates))
        aux_losses = self._aux_losses(routing, gates, keep, lead)
        aux_loss = gates.new_zeros(())
        for name, loss in aux_losses.items():
            aux_loss = aux_loss + self.config.aux_losses[name] * loss
        return ConnectorOutput(embeddings.unflatten(0, lead), gates.unflatten(0, lead), aux_loss, aux_losses)

    def _resample(self, features: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """Tokens [T, D], and the leading dimensions of the result."""
        c = self.config
        packed = isinstance(features, Tensor) and features.dim() == 2
        require_float("features", features, "TC" if packed else "BPC")
        require_size("features", features, -1, c.in_features, "in_features")
        if packed:
            if c.resample != "none":
                raise ValueError(f"features is packed [T, C]; that needs resample='none', not {c.resample!r}")
            return features, (features.shape[0],)
        batch, patches, width = features.shape
        if c.resample == "projection":
            if patches % c.resample_rate:
                raise ValueError(f"features has {patches} tokens per sample, must be a multiple of resample_rate={c.resample_rate}")
            features = features.reshape(batch, patches // c.resample_rate, c.features)
        elif c.resample != "none":
            side, stride = math.isqrt(patches), math.isqrt(c.resample_rate)
            if not side or side * side != patches or side % stride:
                raise ValueError(f"features has {patches} tokens per sample, must be a square grid whose side is a multiple of {stride}")
            pool = F.avg_pool2d if c.resample == "avgpool" else F.max_pool2d
            grid = features.transpose(1, 2).reshape(batch, width, side, side)
            features = pool(grid, stride).flatten(2).transpose(1, 2)
        return features.reshape(-1, c.features), (batch, features.shape[1])

    def _groups(
        self, task: str | Sequence[str] | Tensor | None, group_ids: Tensor | None, features: Tensor, tokens: int
    ) -> tuple[int | None, Tensor | None]:
        """The one task of all tokens, or the task of each token."""
        if not self.config.needs_task:
            return None, None
        packed = features.dim() == 2
        if (task is None) == (group_ids is None):
            names = ", ".join(self.config.tasks)
            raise ValueError(
                f"task is {'missing' if task is None else 'given together with group_ids'}; this router needs one of the two: a name out "
                f"of {names}, a name per sample or LongTensor [B]" + (", or group_ids [T]" if packed else "")
            )
        if group_ids is not None:
            if not packed and self.config.resample != "none":
                raise ValueError("group_ids is for packed features [T, C] or resample='none'; give task with features [B, P, C]")
            require_index("group_ids", group_ids, "T", features)
            require_size("group_ids", group_ids, 0, tokens, "tokens in features")
            self._check_tasks("group_ids", group_ids)
            return None, group_ids
        if isinstance(task, str):
            return self._task_index(task), None
        if packed:
            raise ValueError("task must be one name with packed features [T, C]; give group_ids [T] for several")
        batch = features.shape[0]
        if not isinstance(task, Tensor):
            if not isinstance(task, Iterable):
                raise TypeError(f"task is {task!r}, must be a name, a name per sample or LongTensor [B]")
            places = [self._task_index(name) for name in task]
            if len(places) == batch and len(set(places)) == 1:
                return places[0], None
            task = torch.tensor(places, dtype=torch.int64, device=features.device)
        require_index("task", task, "B", features)
        require_size("task", task, 0, batch, "samples in features")
        self._check_tasks("task", task)
        return None, task.repeat_interleave(tokens // batch if batch else 0)

    def _task_index(self, name: str) -> int:
        if name not in self.config.tasks:
            raise ValueError(f"task is {name!r}, must be one of {', '.join(self.config.tasks)}")
        return self.config.tasks.index(name)

    def _check_tasks(self, name: str, places: Tensor) -> None:
        if not torch.compiler.is_compiling():
            require_range(name, places, len(self.config.tasks), ", ".join(self.config.tasks))

    def _route(self, x: Tensor, group: int | None, group_ids: Tensor | None) -> _Routing:
        c = self.config
        tokens, exact = x.shape[0], accumulate_dtype(x.dtype)
        if c.router == "constant":
            # In fp32 for every dtype, as in the release: an fp64 connector reproduces it to the last digits.
            gates = x.new_full((1, c.num_experts), 1 / c.num_experts, dtype=torch.float32).to(exact)
            return _Routing(self.experts(x, gates), gates.expand(tokens, -1), None, None)
        if c.router == "hard":
            indices = torch.arange(len(c.tasks), device=x.device)[:, None]
            if group is not None:
                indices = indices[group : group + 1]
            gates = F.one_hot(indices[:, 0], c.num_experts).to(exact)
            return _Routing(self.experts(x, indices=indices, group_ids=group_ids), _expand(gates, group_ids, tokens), None, None)

        assert self.router is not None
        logits = self.router(x, group, group_ids)
        # A router that reads the task alone gives one row per task; gates then stay one row per task, which the experts can use.
        rows = group_ids if c.router_inputs == "task" else None
        if c.router == "soft":
            gates = soft_gate(logits)
            return _Routing(self.experts(x, gates, group_ids=rows), _expand(gates, rows, tokens), _expand(logits, rows, tokens), None)
        weights, indices, _ = topk_gate(logits, c.top_k, renormalize=c.renormalize)
        # One column more for "no expert", which a router whose logits are -inf can choose.
        gates = weights.new_zeros(weights.shape[0], c.num_experts + 1).scatter(1, indices, weights)[:, :-1]
        embeddings = self.experts(x, weights=weights, indices=indices, group_ids=rows)
        indices = (indices if rows is None else indices[rows]).expand(tokens, -1)
        return _Routing(embeddings, _expand(gates, rows, tokens), _expand(logits, rows, tokens), indices)

    def _aux_losses(self, routing: _Routing, gates: Tensor, mask: Tensor | None, lead: tuple[int, ...]) -> dict[str, Tensor]:
        losses = {}
        for name in self.config.aux_losses:
            if name == "switch":
                assert routing.logits is not None
                losses[name] = balance_loss(routing.logits, routing.indices, mask, from_logits=True)
            elif name == "sample_switch":
                assert routing.logits is not None
                assert routing.indices is not None
                if len(lead) == 1:
                    raise ValueError("features is packed [T, C]; aux_losses['sample_switch'] needs the samples of [B, P, C]")
                samples = torch.arange(lead[0], device=gates.device).repeat_interleave(lead[1])
                losses[name] = balance_loss(routing.logits, routing.indices[:, :1], mask, segments=samples, from_logits=True)
            elif name == "importance":
                losses[name] = balance_loss(gates, mask=mask, kind="importance")
            else:
                assert routing.logits is not None
                losses[name] = balance_loss(routing.logits, mask=mask, kind="z")
        return losses


def _expand(table: Tensor, group_ids: Tensor | None, tokens: int) -> Tensor:
    """One row per token, from one row per token, per group, or for all."""
    return per_token(table, group_ids).expand(tokens, -1)
