"""transformers' MoE layers on our ops: experts_implementation="cmoe", and routers and their loss on topk_gate and balance_loss.

transformers routes the experts of a model through a table of functions (``integrations/moe.py`` there). Ours calls ``sparse_experts``
on the module's own parameters: a transposed layout is a view, so no weight is copied. Experts that ``sparse_experts`` cannot express
run as the model wrote them, after one warning.
"""

import ast
import functools
import importlib
import inspect
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.integrations import moe

from cmoe_kernels.integrations.activations import activation_name
from cmoe_kernels.nn.int8 import Int8Linear, int8_experts, refuse_saving, replace
from cmoe_kernels.ops.activation import ACTIVATIONS
from cmoe_kernels.ops.balance_loss import balance_loss
from cmoe_kernels.ops.sparse_experts import sparse_experts
from cmoe_kernels.ops.topk_gate import Score, topk_gate


def experts_forward(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The forward of an experts module of transformers, as ``ALL_EXPERTS_FUNCTIONS["cmoe"]``.

    Args:
        self: a module decorated with transformers' ``use_experts_implementation``.
        hidden_states: [T, D].
        top_k_index: [T, K]; -1, E and above mean no expert (expert parallelism marks the experts of other ranks so).
        top_k_weights: [T, K].

    Returns:
        [T, D]: y[t] = sum_i top_k_weights[t, i] * expert(top_k_index[t, i])(hidden_states[t]).

    Experts that ``sparse_experts`` cannot express run by the module's own forward, with one warning per class that says why.
    """
    reason = why_eager(self)
    if reason is not None:
        _warn_once(type(self).__name__, reason)
        return type(self).forward.__wrapped__(self, hidden_states, top_k_index, top_k_weights)  # type: ignore[attr-defined]
    up = "gate_up_proj" if self.has_gate else "up_proj"
    w1, w2 = getattr(self, up), self.down_proj
    # What lies past the last expert differs between transformers' own routers and its dispatch to ranks: E is our word for both.
    indices = top_k_index.long().clamp(max=w1.shape[0])
    if isinstance(w1, Int8Linear):
        name = activation_name(self.act_fn)
        assert isinstance(w2, Int8Linear)
        assert name is not None  # else why_eager says so
        return int8_experts(hidden_states, top_k_weights, indices, w1, w2, None, name, bool(self.has_gate))
    if self.is_transposed:
        w1, w2 = w1.transpose(1, 2), w2.transpose(1, 2)  # type: ignore[operator]
    b1, b2 = (getattr(self, f"{up}_bias"), self.down_proj_bias) if self.has_bias else (None, None)
    return sparse_experts(
        hidden_states,
        top_k_weights,
        indices,
        w1,
        b1,
        w2,  # type: ignore[arg-type]
        b2,  # type: ignore[arg-type]
        activation=activation_name(self.act_fn),  # type: ignore[arg-type]
        gated=bool(self.has_gate),
    )


moe.ALL_EXPERTS_FUNCTIONS.register("cmoe", experts_forward)


def why_eager(experts: nn.Module) -> str | None:
    """Why ``sparse_experts`` cannot run an experts module of transformers; None where it can."""
    reason = _why_layout_eager(type(experts), experts.has_gate, experts.is_concatenated, experts.has_post_expert_norm)
    if reason is None and activation_name(experts.act_fn) is None:
        name = getattr(experts.act_fn, "__name__", type(experts.act_fn).__name__)
        reason = f"its activation {name} is none of {', '.join(ACTIVATIONS)}"
    return reason


def _why_layout_eager(cls: type, has_gate: Any, is_concatenated: Any, has_post_expert_norm: Any) -> str | None:
    if has_gate and not is_concatenated:
        return "its gate and up rows are interleaved"
    if has_post_expert_norm:
        return "it normalises the output of each expert"
    if has_gate and cls._apply_gate is not moe._default_apply_gate:  # type: ignore[attr-defined]
        return "its gate is not act(gate) * up"
    return None


@functools.cache
def _warn_once(name: str, reason: str) -> None:
    warnings.warn(
        f"experts_implementation='cmoe': {name} runs on its own eager loop, since {reason}; 'grouped_mm' is faster for it",
        stacklevel=3,
    )


# --- routers --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Routing:
    """How a router of transformers gets from logits to weights; attribute names are those of the router module.

    Attributes:
        score: "softmax" or "sigmoid", over all experts.
        renormalize: divide by the sum over the chosen; or the attribute that says so.
        exact: logits, and all after them, in fp32.
        scale: the attribute with the factor on the weights.
        bias: the attribute with the balancing bias, which ranks scores and gets no gradient; "argument": forward's second argument.
        groups: only the best ``topk_group`` of ``num_group`` groups of experts can be chosen (DeepSeek-V3).
        cast: weights in the dtype of the logits, of exact ones in that of the hidden states, rather than in fp32.
    """

    score: Score = "softmax"
    renormalize: bool | str = True
    exact: bool = False
    scale: str | None = None
    bias: str | None = None
    groups: bool = False
    cast: bool = True


_QWEN = Routing(renormalize="norm_topk_prob")
_DEEPSEEK_V3 = Routing("sigmoid", "norm_topk_prob", True, "routed_scaling_factor", "e_score_correction_bias", groups=True, cast=False)

# By the class that transformers defines. A router that is not here (another score, a cap on the logits, noise, shared experts in the
# softmax, a mask with zeros in place of -inf, autocast switched off) keeps its own forward.
ROUTERS: dict[str, Routing] = {
    **dict.fromkeys(["MixtralTopKRouter", "MiniMaxTopKRouter"], Routing(cast=False)),
    **dict.fromkeys(
        [
            "FlexOlmoTopKRouter",
            "MellumTopKRouter",
            "OlmoeTopKRouter",
            "Qwen2MoeTopKRouter",
            "Qwen3MoeTopKRouter",
            "Qwen3NextTopKRouter",
            "Qwen3OmniMoeThinkerTextTopKRouter",
            "Qwen3OmniMoeTalkerTextTopKRouter",
            "Qwen4ExpTextTopKRouter",
        ],
        _QWEN,
    ),
    **dict.fromkeys(["Qwen3_5MoeTopKRouter", "Qwen3VLMoeTextTopKRouter", "AriaTextTopKRouter"], Routing()),
    "JambaTopKRouter": Routing(renormalize=False),
    "LaraMiniTopKRouter": Routing(renormalize="norm_topk_prob", exact=True),
    **dict.fromkeys(
        [
            "AXK1TopkRouter",
            "BailingHybridTopkRouter",
            "DeepseekV3TopkRouter",
            "DeepseekV32TopkRouter",
            "Dots1TopkRouter",
            "Dots3NoteTextTopkRouter",
            "ExaoneMoeTopkRouter",
            "Glm4MoeTopkRouter",
            "Glm4MoeLiteTopkRouter",
            "Glm4vMoeTextTopkRouter",
            "Glm5NextTextTopkRouter",
            "GlmMoeDsaTopkRouter",
            "HYV4TopkRouter",
            "HYV4VLTopkRouter",
            "KimiLinearTopkRouter",
            "MiMoV2FlashTopkRouter",
            "NemotronHTopkRouter",
            "SolarOpenTopkRouter",
        ],
        _DEEPSEEK_V3,
    ),
    "BeamTopKRouter": Routing("sigmoid", "norm_topk_prob", True, None, "e_score_correction_bias", groups=True, cast=False),
    "HYV3TopKRouter": Routing("sigmoid", True, True, "router_scaling_factor", "argument", cast=False),
}


class _FusedRouter(nn.Module):
    """Logits, weights and indices as the router class that this one is mixed into, the last two by one op."""

    routing: Routing
    own: type  # the class of transformers
    weight: Tensor
    top_k: int
    num_group: int
    topk_group: int

    def forward(self, hidden_states: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        how = self.routing
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        logits = F.linear(x.float(), self.weight.float()) if how.exact else F.linear(x, self.weight)
        if how.bias is not None and how.bias != "argument":
            bias = getattr(self, how.bias)
        weights, indices, _ = topk_gate(
            logits,
            self.top_k,
            how.score,
            getattr(self, how.renormalize) if isinstance(how.renormalize, str) else how.renormalize,
            getattr(self, how.scale) if how.scale else 1.0,
            self._selection(logits, bias),
        )
        return logits, weights.to((x if how.exact else logits).dtype) if how.cast else weights, indices

    def __reduce__(self) -> tuple[Any, ...]:
        # A generated class is not found by its name, as pickle and deepcopy need.
        return _rebuilt, (self.own,), self.__dict__

    @torch.no_grad()
    def _selection(self, logits: Tensor, bias: Tensor | None) -> Tensor | None:
        grouped = self.routing.groups and self.num_group > 1
        if bias is None and not grouped:
            return None
        rank = logits.sigmoid() if self.routing.score == "sigmoid" else logits.softmax(-1, dtype=torch.float32)
        if bias is not None:
            rank = rank + bias
        if grouped:
            by_group = rank.unflatten(-1, (self.num_group, -1))
            best = by_group.topk(2, dim=-1).values.sum(-1).topk(self.topk_group, dim=-1).indices
            chosen = torch.zeros_like(by_group[..., 0], dtype=torch.bool).scatter_(1, best, True)
            rank = by_group.masked_fill(~chosen[..., None], -torch.inf).flatten(-2)
        return rank


@functools.cache
def _fused_router(cls: type) -> type[_FusedRouter]:
    # A subclass, because transformers records router logits with hooks that ask isinstance(module, its router class).
    return type(f"Fused{cls.__name__}", (_FusedRouter, cls), {"routing": ROUTERS[cls.__name__], "own": cls})


def _rebuilt(cls: type) -> _FusedRouter:
    router = _fused_router(cls)
    return router.__new__(router)


def load_balancing_loss(
    gate_logits: tuple[Tensor, ...] | None, num_experts: int | None = None, top_k: int = 2, attention_mask: Tensor | None = None
) -> Tensor | int:
    """transformers' ``load_balancing_loss_func`` on ``balance_loss``: K * E * sum_e f_e p_e over the tokens of all layers together.

    Args:
        gate_logits: one [B * N, E] per layer; None or no tuple gives 0, as there.
        num_experts: E; the logits say so too.
        top_k: K. transformers does not divide the share of selections by it.
        attention_mask: [B, N], 0 for padding. Where everything is padding the loss is 0 (there: NaN).

    Returns:
        a scalar in fp32.
    """
    if not isinstance(gate_logits, tuple):
        return 0
    device = gate_logits[0].device
    logits = torch.cat([layer.to(device) for layer in gate_logits])
    mask = None if attention_mask is None else attention_mask.to(device).reshape(-1).bool().repeat(len(gate_logits))
    indices = topk_gate(logits.detach(), top_k).indices
    return top_k * balance_loss(logits, indices, mask, from_logits=True)


_own_losses: dict[str, Any] = {}


def use_cmoe(model: PreTrainedModel, use_fused_router: bool = False, weights: Literal["int8"] | None = None) -> PreTrainedModel:
    """Run the MoE layers of a transformers model on our ops.

    Args:
        model: any model whose experts follow transformers' experts interface. Changed in place.
        use_fused_router: also let ``topk_gate`` stand for the model's routers where it gives the same weights within rounding
            (``ROUTERS``), and ``load_balancing_loss`` for its load-balancing loss. The loss is a function of the model's module, so
            every model of that family in the process then uses ours. False puts the model's own back.
        weights: "int8" puts int8 weights with a scale per output in the place of the experts' parameters, for inference: half the memory of
            bf16, and no way back. Its state dict has them as ``weight`` [E, out, in], ``scale`` and ``bias``; it loads into a model that
            ``use_cmoe(model, weights="int8")`` has prepared. train() and save_pretrained() raise, and so does a call that would need a
            gradient.

    Returns:
        the model.

    ``model.set_experts_implementation("cmoe")`` does the same for the experts alone, and so does
    ``from_pretrained(..., experts_implementation="cmoe")``.

    Raises:
        ValueError: the model has no experts that the interface knows; or ``weights`` is given, and they run on the model's own loop.
    """
    experts = {name: module for name, module in model.named_modules() if _is_experts(module)}
    if not experts:
        raise ValueError(f"{type(model).__name__} has no experts that follow transformers' experts interface")
    if weights is not None:
        _make_int8(weights, model, experts)
    model.set_experts_implementation("cmoe")
    fused = 0
    for module in model.modules():
        own = module.own if isinstance(module, _FusedRouter) else type(module)
        if own.__name__ in ROUTERS and own.__module__.startswith("transformers."):
            module.__class__ = _fused_router(own) if use_fused_router else own
            fused += use_fused_router
    if use_fused_router and not fused:
        warnings.warn(f"{type(model).__name__}: its routers are none that topk_gate can stand for; they stay as they are", stacklevel=2)
    for cls in {type(module) for module in model.modules() if isinstance(module, PreTrainedModel)}:
        modeling = sys.modules[cls.__module__]
        loss = getattr(modeling, "load_balancing_loss_func", None)
        if loss is not None and _same_loss(_own_losses.get(cls.__module__, loss)):
            own_loss = _own_losses.setdefault(cls.__module__, loss)
            modeling.load_balancing_loss_func = load_balancing_loss if use_fused_router else own_loss  # type: ignore[attr-defined]
    return model


def _make_int8(weights: str, model: PreTrainedModel, experts: dict[str, nn.Module]) -> None:
    if weights != "int8":
        raise ValueError(f"weights is {weights!r}, must be 'int8' or None")
    for name, module in experts.items():
        if reason := why_eager(module):
            raise ValueError(f"weights='int8': {name} runs on its own loop, since {reason}")
    made = {}
    for name, module in experts.items():
        up = "gate_up_proj" if module.has_gate else "up_proj"
        for own, parts in ((up, 2 if module.has_gate else 1), ("down_proj", 1)):
            w, b = getattr(module, own), getattr(module, f"{own}_bias") if module.has_bias else None
            if not isinstance(w, Int8Linear):
                made[module, own] = Int8Linear.of(f"{name}.{own}", w.transpose(1, 2) if module.is_transposed else w, b, parts)
    for (module, own), int8_form in made.items():
        replace(module, own, f"{own}_bias", int8_form)
    for module in {module for module, _ in made}:
        module.register_forward_pre_hook(_require_cmoe)
    for part in model.modules():
        if isinstance(part, PreTrainedModel) and any(_is_experts(module) for module in part.modules()):
            part.save_pretrained = refuse_saving  # type: ignore[method-assign]
    model.eval()


def _require_cmoe(module: nn.Module, _: Any) -> None:
    if (chosen := module.config._experts_implementation) != "cmoe":  # type: ignore[union-attr]
        raise RuntimeError(f"experts_implementation is {chosen!r}, must be 'cmoe': the experts' weights are int8")


def _is_experts(module: nn.Module) -> bool:
    return hasattr(module, "_is_expert_parallel") and hasattr(module, "has_post_expert_norm")


def _same_loss(loss: Any) -> bool:
    """Whether a model's load-balancing loss is Mixtral's, which most copy; Switch Transformers', for one, has other arguments."""
    return list(inspect.signature(loss).parameters) == ["gate_logits", "num_experts", "top_k", "attention_mask"]


# --- what the installed transformers has ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """An experts class of transformers.

    Attributes:
        name: the package under ``transformers.models``.
        experts: the class.
        layout: how it stores its weights.
        reason: why ``sparse_experts`` cannot run it, from its layout alone (its activation is the configuration's); None where it can.
        routers: its router classes that ``use_fused_router`` replaces.
    """

    name: str
    experts: type[nn.Module]
    layout: str
    reason: str | None
    routers: tuple[str, ...]


def experts_families() -> list[Family]:
    """Every experts class of the installed transformers that carries its decorator, found in the sources of its models."""
    found = []
    for path in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        source = path.read_text(encoding="utf-8")
        if "@use_experts_implementation" not in source:
            continue
        classes = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
        routers = tuple(node.name for node in classes if node.name in ROUTERS)
        modeling = importlib.import_module(f"transformers.models.{path.parent.name}.{path.stem}")
        for node in classes:
            if any(ast.unparse(d).startswith("use_experts_implementation") for d in node.decorator_list):
                found.append(_family(path.parent.name, getattr(modeling, node.name), routers))
    return found


def _family(name: str, experts: type[nn.Module], routers: tuple[str, ...]) -> Family:
    # The decorator keeps its flags in the closure of the __init__ that it made.
    flags = inspect.getclosurevars(experts.__init__).nonlocals
    layout = "up" if not flags["has_gate"] else "gate then up" if flags["is_concatenated"] else "gate and up interleaved"
    layout += ", transposed" * flags["is_transposed"] + ", biases" * flags["has_bias"] + ", norm after" * flags["has_post_expert_norm"]
    reason = _why_layout_eager(experts, flags["has_gate"], flags["is_concatenated"], flags["has_post_expert_norm"])
    return Family(name, experts, layout, reason, routers)
