"""The FFN of a transformer layer as a mixture of experts beside a meta expert.

y = sum_i G_i E_i(x) + meta(x),   G over the top-k of a router's softmax   (Med-MoE, arXiv 2404.10237, eq. 4)
"""

import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization
from transformers.activations import QuickGELUActivation

from cmoe_kernels import sparse_experts, topk_gate
from cmoe_kernels.integrations.activations import activation_name
from cmoe_kernels.ops.activation import ACTIVATIONS, activate
from unimed.errors import UserError
from unimed.models.medmoe.config import MoESettings

# Linear layers of an FFN by their names: first those that read x (the gate before up), last the one that writes.
LAYOUTS = (
    (("gate_proj", "up_proj"), "down_proj"),  # Llama, Mistral, Qwen2, Qwen3, Gemma, StableLM-2
    (("gate_up_proj",), "down_proj"),  # Phi-3
    (("fc1",), "fc2"),  # Phi-2, CLIP
    (("up_proj",), "down_proj"),  # Nemotron
    (("dense_h_to_4h",), "dense_4h_to_h"),  # GPT-NeoX
)
QUICK = 1.702  # quick_gelu(u) = u sigmoid(1.702 u) = silu(1.702 u) / 1.702


class FFN(NamedTuple):
    """A trained FFN in our layout: w1 [H, D] (gated: [2H, D], the gate's rows first), b1, w2 [D, H], b2."""

    w1: Tensor
    b1: Tensor | None
    w2: Tensor
    b2: Tensor | None
    activation: str
    gated: bool


@torch.no_grad()
def read_ffn(module: nn.Module, where: str) -> FFN:
    """The weights of an FFN whose layout is known.

    Raises:
        UserError: the layout, the activation or a layer's kind is unknown, or the module computes something else with them.
    """
    children = dict(module.named_children())
    linear = {name for name, child in children.items() if any(True for _ in child.parameters())}
    found = next(((first, last) for first, last in LAYOUTS if linear == {*first, last}), None)
    if found is None:
        known = "; ".join(", ".join((*first, last)) for first, last in LAYOUTS)
        raise UserError(f"{where}: {type(module).__name__} has the layers {', '.join(sorted(linear)) or 'none'}; an FFN must have {known}")
    names, last = found
    layers = [children[name] for name in (*names, last)]
    for name, layer in zip((*names, last), layers, strict=True):
        if not isinstance(layer, nn.Linear) or not layer.weight.is_floating_point():
            raise UserError(f"{where}.{name} is a {type(layer).__name__}, must be an unquantised Linear")
    others = [child for name, child in children.items() if name not in linear]
    act = others[0] if len(others) == 1 else getattr(module, "act_fn", None)
    activation = "quick_gelu" if isinstance(act, QuickGELUActivation) else activation_name(act)
    gated = len(names) == 2 or names == ("gate_up_proj",)
    if activation is None or (gated and activation == "quick_gelu"):
        raise UserError(f"{where}: the activation is {type(act).__name__}, must be one of {', '.join(ACTIVATIONS)} (not gated: quick_gelu)")
    first: Any = layers[:-1]
    biases = [layer.bias for layer in first if layer.bias is not None]
    if biases and len(biases) < len(first):
        raise UserError(f"{where}: one of {', '.join(names)} has a bias, must be all or none")
    w1, b1 = torch.cat([layer.weight for layer in first]), torch.cat(biases) if biases else None
    ffn = FFN(w1, b1, layers[-1].weight, layers[-1].bias, activation, gated)  # type: ignore[arg-type]
    _require_same(module, ffn, where)
    return ffn


def _require_same(module: nn.Module, ffn: FFN, where: str) -> None:
    """The module computes what its layers' names say: it is run on two random rows. Nothing is on the meta device."""
    if ffn.w1.device.type == "meta":
        return
    x = torch.randn(2, ffn.w1.shape[1], generator=torch.Generator().manual_seed(0)).to(ffn.w1)
    training = module.training
    module.eval()
    try:
        expected = module(x)
        same = torch.allclose(expected, dense(x, *ffn), rtol=0.02, atol=0.02 * float(expected.float().abs().max()))
    except (TypeError, ValueError, RuntimeError):
        same = False
    finally:
        module.train(training)
    if not same:
        raise UserError(f"{where}: {type(module).__name__} is no plain FFN: it computes something else than its layers by turns")


def dense(x: Tensor, w1: Any, b1: Any, w2: Any, b2: Any, activation: str, gated: bool) -> Tensor:
    """The FFN itself."""
    u = F.linear(x, w1, b1)
    h = u * torch.sigmoid(QUICK * u) if activation == "quick_gelu" else activate(activation, u, gated)
    return F.linear(h, w2, b2)


class Router(nn.Module):
    """Logits of the experts in fp32, from one linear layer or two: ``w1`` [E, D], ``b1``; or ``w1`` [R, D], ``b1``, ``w2`` [E, R], ``b2``.

    The weights of a frozen router are buffers: saved and loaded with the model, and never trained, whatever is unfrozen. Those of a
    learned one are parameters, not Linear modules, so that LoRA on "all-linear" leaves it as it is.
    """

    w1: Tensor
    b1: Tensor | None
    w2: Tensor | None
    b2: Tensor | None

    def __init__(self, settings: MoESettings, width: int, device: torch.device | None = None) -> None:
        super().__init__()
        experts = settings.num_experts
        first = (settings.router_features or width) if settings.router_layers == 2 else experts
        two, bias = settings.router_layers == 2, settings.router_bias
        shapes = {"w1": (first, width), "b1": bias and (first,), "w2": two and (experts, first), "b2": two and bias and (experts,)}
        for name, shape in shapes.items():
            tensor = torch.empty(shape, device=device, dtype=torch.float32) if shape else None
            if settings.router == "frozen":
                self.register_buffer(name, tensor)
            else:
                self.register_parameter(name, None if tensor is None else nn.Parameter(tensor))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As torch.nn.Linear initialises itself."""
        for weight, bias in ((self.w1, self.b1), (self.w2, self.b2)):
            if weight is not None:
                bound = weight.shape[1] ** -0.5
                for tensor in (weight, bias):
                    if tensor is not None:
                        initialization.uniform_(tensor, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """[T, D] -> [T, E]."""
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.float(), self.w1.float(), None if self.b1 is None else self.b1.float())
            if self.w2 is not None:
                logits = F.linear(F.gelu(logits), self.w2.float(), None if self.b2 is None else self.b2.float())
        return logits

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={list(tensor.shape)}" for name, tensor in self.state_dict().items())


class Routing(NamedTuple):
    """Of one call of a MoE layer: ``logits`` [..., E] in fp32, attached to the graph; ``indices`` [..., K], best first."""

    logits: Tensor
    indices: Tensor


class MoEFFN(nn.Module):
    """E experts and a meta expert in the place of an FFN.

    ``w1`` [E', H, D] (gated: [E', 2H, D]), ``b1``, ``w2`` [E', D, H], ``b2``; E' is E + 1 with the meta expert, which comes first, else E.
    """

    w1: Tensor
    b1: Tensor | None
    w2: Tensor
    b2: Tensor | None

    def __init__(self, settings: MoESettings, ffn: FFN) -> None:
        super().__init__()
        self.settings, self.activation, self.gated = settings, ffn.activation, ffn.gated
        self.records: list[Routing] | None = None  # see record_routing
        copies = settings.num_experts + settings.meta
        for name in ("w1", "b1", "w2", "b2"):
            tensor = getattr(ffn, name)
            parameter = None if tensor is None else nn.Parameter(tensor.detach().expand(copies, *tensor.shape).clone())
            self.register_parameter(name, parameter)
        self.router = Router(settings, ffn.w1.shape[1], ffn.w1.device)

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        logits = self.router(x)
        weights, indices = self._choose(logits)
        # A recomputed call of an activation checkpoint has been recorded.
        if self.records is not None and (torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1):
            self.records.append(Routing(*(t.unflatten(0, hidden_states.shape[:-1]) for t in (logits, indices))))
            if self.training and self.settings.router == "learned" and not torch.is_grad_enabled():
                warnings.warn("recorded logits have no gradient: under no_grad, or in a checkpoint with use_reentrant=True", stacklevel=2)
        return self.mix(x, weights, indices).view(hidden_states.shape)

    def mix(self, x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        """[T, D] with the router's choice [T, K] to [T, D]."""
        one = torch.ones_like(weights[:, :1])
        if self.settings.scale == "preserve":
            total = weights.sum(1, keepdim=True) + (one if self.settings.meta else 0)
            weights, one = weights / total, one / total
        parameters = self.w1, self.b1, self.w2, self.b2
        if not self.settings.meta:
            return self._sparse(x, weights, indices, *parameters)
        # The meta expert has place 0: E, which is no expert to topk_gate, becomes E + 1, which is none here.
        indices = torch.cat([torch.zeros_like(indices[:, :1]), indices + 1], 1)
        return self._sparse(x, torch.cat([one, weights], 1), indices, *parameters)

    def _choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        k, selection = self.settings.top_k, None
        if self.settings.released and k == 2:
            # DeepSpeed's top-2 gating: the second expert is the best of the others by noisy logits, in training and evaluation.
            noisy = logits.detach() - torch.empty_like(logits).exponential_().log()
            first = logits.detach().argmax(1, keepdim=True)
            selection = noisy.scatter(1, first, noisy.amax(1, keepdim=True) + 1)
        weights, indices, _ = topk_gate(logits, k, renormalize=k > 1, selection=selection)
        return weights, indices

    def _sparse(self, x: Tensor, weights: Tensor, indices: Tensor, w1: Any, b1: Any, w2: Any, b2: Any) -> Tensor:
        activation: Any = self.activation
        if activation == "quick_gelu":
            # By silu on inputs scaled by QUICK, whose outputs are scaled back with the weights: no parameter changes.
            activation, x, weights = "silu", x * QUICK, weights / QUICK
            b1, b2 = (None if b is None else b * QUICK for b in (b1, b2))
        return sparse_experts(x, weights, indices, w1, b1, w2, b2, activation, self.gated)

    def extra_repr(self) -> str:
        shapes = [f"{name}={list(p.shape)}" for name, p in self.named_parameters(recurse=False)]
        s = self.settings
        return f"num_experts={s.num_experts}, top_k={s.top_k}, meta={s.meta}, scale={s.scale!r}, {', '.join(shapes)}"
