"""What we compare with: the same mathematics by others, over the same weights.

Each peer is a function that gives a ``Step`` or raises ``Skipped`` with the reason why it does not run here. Formulas take the weights from
a ``Leaves``, so that the same line is the peer in the tested dtype and, with ``Exact``, the reference in fp64.
"""

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import cmoe_kernels as cmoe
from benchmarks.steps import Leaves, Skipped, Step
from cmoe_kernels.ops.activation import activate
from cmoe_kernels.ops.int8.quantise import quantise_weight

VLLM_VARIABLE = "CMOE_BENCH_VLLM"
# A peer that copies more weights than this for one call is skipped: it would swap, not compute.
MOST_COPIED = 2 * 2**30


# --- the connector ---------------------------------------------------------------------------------------------------------
def released_loop(connector: cmoe.CMoEConnector, x: Tensor, leaves: Leaves) -> Callable[[], Tensor]:
    """As the release does: the task token beside each image token, each expert in turn, a stack, gates times stack, a sum."""
    linear, router, experts = leaves.linear, connector.router, connector.experts
    tasks = leaves.vector("router.task_tokens", router.task_tokens)
    rw1, rb1 = leaves.weight("router.w1", router.w1), leaves.vector("router.b1", router.b1)
    rw2, rb2 = leaves.weight("router.w2", router.w2), leaves.vector("router.b2", router.b2)
    each = expert_weights(leaves, "experts.", experts.w1, experts.b1, experts.w2, experts.b2)

    def forward() -> Tensor:
        both = torch.cat([tasks[:1].expand(x.shape[0], -1), x], -1)
        scores = linear(F.gelu(linear(both, rw1, rb1)), rw2, rb2).sigmoid()
        gates = scores / scores.sum(-1, keepdim=True)
        outputs = torch.stack([linear(F.gelu(linear(x, w1, b1)), w2, b2) for w1, b1, w2, b2 in each], 1)
        return (gates[:, :, None] * outputs).sum(1)

    return forward


def fused_torch(connector: cmoe.CMoEConnector, x: Tensor, leaves: Leaves) -> Callable[[], Tensor]:
    """Our algebra in plain torch: split router, one product for all first layers, the sum over experts in an accumulator."""
    router, experts = connector.router, connector.experts
    tasks = leaves.vector("router.task_tokens", router.task_tokens)
    w_task, w_image = leaves.columns("router.w1", router.w1, tasks.shape[1])
    rb1 = leaves.vector("router.b1", router.b1)
    rw2, rb2 = leaves.weight("router.w2", router.w2), leaves.vector("router.b2", router.b2)
    mix = _fused_experts(x, experts.w1, experts.b1, experts.w2, experts.b2, leaves, "experts.")

    def forward() -> Tensor:
        bias = F.linear(tasks[:1], w_task, rb1)
        scores = F.linear(F.gelu(F.linear(x, w_image, bias[0])), rw2, rb2).sigmoid()
        return mix(scores / scores.sum(-1, keepdim=True))

    return forward


def fused_int8(connector: cmoe.CMoEConnector, x: Tensor, linear: Callable[[Tensor], Callable[[Tensor], Tensor]]) -> Callable[[], Step]:
    """fused_torch with its large weights in int8: ``linear`` makes a layer of a weight [out, in]."""

    @torch.no_grad()
    def build() -> Step:
        router, experts = connector.router, connector.experts
        task, width = router.task_tokens[:1], router.task_tokens.shape[1]
        bias = F.linear(task, router.w1[:, :width], router.b1)[0]
        image, first = linear(router.w1[:, width:].contiguous()), linear(experts.w1.flatten(0, 1))
        second = [linear(w) for w in experts.w2]

        def forward() -> Tensor:
            scores = F.linear(F.gelu(image(x) + bias), router.w2, router.b2).sigmoid()
            gates = scores / scores.sum(-1, keepdim=True)
            h = F.gelu(first(x) + experts.b1.view(-1)).unflatten(-1, experts.b1.shape) * gates[:, :, None]
            y = gates @ experts.b2
            for e, layer in enumerate(second):
                y = y + layer(h[:, e].contiguous())
            return y

        return Step(forward)

    return build


def _dequantised(w: Tensor) -> Callable[[Tensor], Tensor]:
    q, scale = quantise_weight("w", w)
    return lambda x: F.linear(x, q.to(x.dtype) * scale.to(x.dtype)[:, None])


def _int8_packed(w: Tensor) -> Callable[[Tensor], Tensor]:
    """The kernel that torch has for int8 weights on CPUs, by which Inductor serves torchao's layers."""
    q, scale = quantise_weight("w", w)
    scale = scale.to(w.dtype)
    return lambda x: torch.ops.aten._weight_int8pack_mm(x, q, scale)


def _torchao(dynamic: bool) -> Callable[[Tensor], Callable[[Tensor], Tensor]]:
    def linear(w: Tensor) -> Callable[[Tensor], Tensor]:
        if importlib.util.find_spec("torchao") is None:
            raise Skipped("torchao is not installed")
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_

        layer = torch.nn.Sequential(torch.nn.Linear(w.shape[1], w.shape[0], bias=False, device="meta"))
        layer[0].weight = torch.nn.Parameter(w.clone(), requires_grad=False)
        quantize_(layer, Int8DynamicActivationInt8WeightConfig() if dynamic else Int8WeightOnlyConfig())
        return layer

    return linear


INT8_LINEARS = {
    "dequantised": _dequantised,
    "_weight_int8pack_mm": _int8_packed,
    "torchao weights": _torchao(dynamic=False),
    "torchao weights and activations": _torchao(dynamic=True),
}


def _fused_experts(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, leaves: Leaves, prefix: str) -> Callable[[Tensor], Tensor]:
    experts, hidden, width = w1.shape
    first, first_bias = leaves.weight(f"{prefix}w1", w1), leaves.vector(f"{prefix}b1", b1)
    # One matrix per expert: slices of one stack would each pay for a gradient of the whole.
    second, second_bias = leaves.weights(f"{prefix}w2", w2), leaves.vector(f"{prefix}b2", b2)

    def mix(gates: Tensor) -> Tensor:
        gates = gates.to(x.dtype)
        h = F.gelu(F.linear(x, first.view(experts * hidden, width), first_bias.view(-1))).view(-1, experts, hidden) * gates[:, :, None]
        y = gates @ second_bias
        for e, w in enumerate(second):
            y = torch.addmm(y, h[:, e], w.T)
        return y

    return mix


def expert_weights(leaves: Leaves, prefix: str, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None) -> list[tuple[Any, ...]]:
    """(w1, b1, w2, b2) of each expert."""
    experts = w1.shape[0]
    columns = (
        leaves.weights(f"{prefix}w1", w1),
        leaves.vectors(f"{prefix}b1", b1, experts),
        leaves.weights(f"{prefix}w2", w2),
        leaves.vectors(f"{prefix}b2", b2, experts),
    )
    return list(zip(*columns, strict=True))


def compiled(make: Callable[[], Step]) -> Callable[[], Step]:
    """The same step with its forward (and so its backward) through torch.compile."""

    def build() -> Step:
        if importlib.util.find_spec("torch._inductor") is None:
            raise Skipped("torch has no inductor here")
        torch._dynamo.reset()
        step = make()
        step.forward = torch.compile(step.forward)
        try:
            step()
        except Exception as error:
            raise Skipped(f"torch.compile: {type(error).__name__}: {str(error).strip().splitlines()[0][:160]}") from None
        return step

    return build


# --- parts of the connector --------------------------------------------------------------------------------------------------
def concatenating_router(x: Tensor, task: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, leaves: Leaves) -> Callable[[], Tensor]:
    """[task ; token] through two layers."""
    task = leaves.vector("task", task)
    first, first_bias = leaves.weight("w1", w1), leaves.vector("b1", b1)
    second, second_bias = leaves.weight("w2", w2), leaves.vector("b2", b2)

    def forward() -> Tensor:
        both = torch.cat([task.expand(x.shape[0], -1), x], -1)
        logits = leaves.linear(F.gelu(leaves.linear(both, first, first_bias)), second, second_bias)
        return logits if logits.dtype == torch.float64 else logits.float()

    return forward


def stacked_experts(x: Tensor, gates: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, leaves: Leaves) -> Callable[[], Tensor]:
    """Each expert in turn, a stack, gates times stack, a sum."""
    gates = leaves.vector("gates", gates)
    each = expert_weights(leaves, "", w1, b1, w2, b2)

    def forward() -> Tensor:
        outputs = torch.stack([leaves.linear(F.gelu(leaves.linear(x, f, fb)), s, sb) for f, fb, s, sb in each], 1)
        return (gates[:, :, None] * outputs).sum(1).to(x.dtype)

    return forward


def fused_experts(x: Tensor, gates: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, leaves: Leaves) -> Callable[[], Tensor]:
    gates = leaves.vector("gates", gates)
    mix = _fused_experts(x, w1, b1, w2, b2, leaves, "")
    return lambda: mix(gates)


# --- sparse experts ----------------------------------------------------------------------------------------------------------
@dataclass
class Sparse:
    """The arguments of sparse experts."""

    x: Tensor
    weights: Tensor
    indices: Tensor
    w1: Tensor
    b1: Tensor | None
    w2: Tensor
    b2: Tensor | None
    gated: bool

    @property
    def activation(self) -> str:
        return "silu" if self.gated else "gelu"

    def whole(self, leaves: Leaves | None) -> "Sparse":
        """Over leaves, each weight in one piece."""
        if leaves is None:
            return self
        first, second = leaves.weight("w1", self.w1), leaves.weight("w2", self.w2)
        x, weights = leaves.vector("x", self.x), leaves.vector("weights", self.weights)
        return Sparse(x, weights, self.indices, first, leaves.vector("b1", self.b1), second, leaves.vector("b2", self.b2), self.gated)


def expert_loop(s: Sparse, leaves: Leaves) -> Callable[[], Tensor]:
    """Each expert on the rows that chose it, added where they came from."""
    x, weights = leaves.vector("x", s.x), leaves.vector("weights", s.weights)
    each = expert_weights(leaves, "", s.w1, s.b1, s.w2, s.b2)

    def forward() -> Tensor:
        y = x.new_zeros(x.shape[0], s.w2.shape[1])
        for e, (w1, b1, w2, b2) in enumerate(each):
            token, place = torch.where(s.indices == e)
            h = activate(s.activation, leaves.linear(x[token], w1, b1), s.gated)
            out = leaves.linear(h, w2, b2) * weights[token, place, None]
            y = y.index_add(0, token, out.to(y.dtype))
        return y

    return forward


def torch_grouped_mm(s: Sparse, leaves: Leaves | None) -> Callable[[], Tensor]:
    """torch.nn.functional.grouped_mm over rows sorted by expert."""
    if not hasattr(F, "grouped_mm"):
        raise Skipped(f"torch {torch.__version__} has no torch.nn.functional.grouped_mm")
    p, k, experts = s.whole(leaves), s.indices.shape[1], s.w1.shape[0]

    def forward() -> Tensor:
        flat = s.indices.flatten()
        order = flat.argsort(stable=True)
        ends = torch.bincount(flat, minlength=experts).cumsum(0).to(torch.int32)
        u = F.grouped_mm(p.x[order // k], p.w1.transpose(1, 2), offs=ends)
        # grouped_mm takes no bias.
        h = activate(s.activation, u if p.b1 is None else u + p.b1[flat[order]], s.gated)
        out = F.grouped_mm(h, p.w2.transpose(1, 2), offs=ends)
        out = (out if p.b2 is None else out + p.b2[flat[order]]) * p.weights.flatten()[order, None]
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        return out[back].view(-1, k, out.shape[1]).sum(1).to(p.x.dtype)

    return forward


def transformers_experts(s: Sparse, leaves: Leaves | None, implementation: str) -> Callable[[], Tensor]:
    """MixtralExperts of transformers, by one of its implementations."""
    try:
        from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralExperts
    except ImportError as error:
        raise Skipped(f"transformers has no MixtralExperts here: {error}") from None
    if not s.gated:
        raise Skipped("transformers' experts are gated, with an output as wide as the input")
    copied = s.indices.numel() * (s.w1[0].numel() + s.w2[0].numel()) * s.w1.element_size()
    if implementation == "batched_mm" and copied > MOST_COPIED:
        raise Skipped(f"it copies the weights of every selection: {copied / 2**30:.1f} GiB")
    config = MixtralConfig(
        hidden_size=s.x.shape[1],
        intermediate_size=s.w2.shape[2],
        num_local_experts=s.w1.shape[0],
        num_experts_per_tok=s.indices.shape[1],
        experts_implementation=implementation,
    )
    with torch.device("meta"):
        module = MixtralExperts(config)
    p = s.whole(leaves)
    for name, weight in (("gate_up_proj", p.w1), ("down_proj", p.w2)):
        del module._parameters[name]
        setattr(module, name, weight)
    return lambda: module(p.x, s.indices, p.weights)


def scattermoe(s: Sparse, leaves: Leaves | None) -> Callable[[], Tensor]:
    _gpu_package("scattermoe", s)
    from scattermoe.parallel_experts import flatten_sort_count, parallel_linear

    p, k = s.whole(leaves), s.indices.shape[1]

    def forward() -> Tensor:
        order = flatten_sort_count(s.indices, s.w1.shape[0])
        u = parallel_linear(p.x, p.w1.permute(0, 2, 1), k, *order, expert_biases=p.b1, grouped_out=True)
        h, gates = activate(s.activation, u, s.gated), p.weights.to(p.x.dtype)
        return parallel_linear(h, p.w2.permute(0, 2, 1), 1, *order, expert_biases=p.b2, grouped_in=True, gates=gates)

    return forward


def sonicmoe(s: Sparse, leaves: Leaves | None) -> Callable[[], Tensor]:
    _gpu_package("sonicmoe", s, gated=True)
    from sonicmoe.enums import ActivationType
    from sonicmoe.functional import moe_general_routing_inputs

    p, (tokens, k), experts = s.whole(leaves), s.indices.shape, s.w1.shape[0]
    rows = torch.arange(tokens, dtype=torch.int32, device=s.x.device).repeat_interleave(k)

    def forward() -> Tensor:
        # Gate and up rows take turns there, and the experts come last.
        pairs = torch.stack(p.w1.chunk(2, 1), 2).flatten(1, 2)
        y, _ = moe_general_routing_inputs(
            p.x, p.weights.flatten(), rows, s.indices.flatten().int(), pairs.permute(1, 2, 0), None, p.w2.permute(1, 2, 0), None,
            experts, torch.cuda.current_stream().cuda_stream, ActivationType.SWIGLU, not torch.is_grad_enabled(),
        )  # fmt: skip
        return y

    return forward


def liger_kernel(s: Sparse, leaves: Leaves | None) -> Callable[[], Tensor]:
    _gpu_package("liger_kernel", s, gated=True)
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

    p = s.whole(leaves)
    return lambda: LigerFusedMoEFunction.apply(p.x, p.w1, p.w2, s.indices.int(), p.weights)


def megablocks(s: Sparse, leaves: Leaves | None) -> Callable[[], Tensor]:
    _gpu_package("megablocks", s, gated=True)
    from megablocks.layers.arguments import Arguments
    from megablocks.layers.dmoe import ParallelDroplessMLP

    p, experts = s.whole(leaves), s.w1.shape[0]
    layer = ParallelDroplessMLP(
        Arguments(
            hidden_size=s.x.shape[1], ffn_hidden_size=s.w2.shape[2], moe_num_experts=experts, moe_top_k=s.indices.shape[1], mlp_type="glu",
            mlp_impl="grouped", bias=False, return_bias=False, activation_fn=F.silu, fp16=False, bf16=True, device=s.x.device,
        )
    )  # fmt: skip
    for name in ("w1", "v1", "w2"):
        del layer.mlp._parameters[name]
    scores = s.x.new_zeros(s.x.shape[0], experts)

    def forward() -> Tensor:
        # Ours flow in as they are: a parameter would be a leaf of its own.
        layer.mlp.w1, layer.mlp.v1 = (w.flatten(0, 1) for w in p.w1.chunk(2, 1))
        layer.mlp.w2 = p.w2.transpose(1, 2).flatten(0, 1)
        return layer(p.x[:, None], scores, p.weights.to(p.x.dtype), s.indices)[:, 0]

    return forward


# Called as their sources say, on a machine without a GPU: not run yet.
GPU_PEERS = {"scattermoe": scattermoe, "sonicmoe": sonicmoe, "liger_kernel": liger_kernel, "megablocks": megablocks}


def _gpu_package(name: str, s: Sparse, gated: bool = False) -> None:
    if s.x.device.type != "cuda":
        raise Skipped("it is for GPUs")
    if importlib.util.find_spec(name) is None:
        raise Skipped("not installed")
    if gated and (not s.gated or s.w2.shape[1] != s.x.shape[1]):
        raise Skipped("compared with gated experts without biases, as wide out as in")


def vllm_experts(s: Sparse, packing: bool) -> Callable[[], Tensor]:
    """vLLM's CPU operator; ``packing``: its weights are packed inside the call, as ours are."""
    if s.x.device.type != "cpu":
        raise Skipped("vLLM's operator here is for CPUs")
    load_vllm()
    ops = torch.ops._C
    if not s.gated:
        raise Skipped("vLLM's CPU experts are gated only")
    if s.w2.shape[1] != s.x.shape[1] or s.w2.shape[1] % 32 or s.w2.shape[2] % 32:
        raise Skipped("vLLM's CPU experts need an output as wide as the input, and sizes that are multiples of 32")
    isa = "vec"
    if s.x.dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported():
        torch.cpu._init_amx()
        isa = "amx"
    places, packed = s.indices.int(), [torch.empty_like(s.w1), torch.empty_like(s.w2)]

    def pack() -> None:
        for weight, into in zip((s.w1, s.w2), packed, strict=True):
            ops.prepack_moe_weight(weight, into, isa)

    def forward() -> Tensor:
        if packing:
            pack()
        out = torch.empty_like(s.x)
        ops.cpu_fused_moe(out, s.x, *packed, None, None, s.weights, places, False, s.activation, isa)
        return out

    pack()
    return forward


def load_vllm() -> None:
    """Load the operators from the library that the environment names."""
    if hasattr(torch.ops._C, "cpu_fused_moe"):
        return
    path = os.environ.get(VLLM_VARIABLE)
    if not path:
        raise Skipped(f"{VLLM_VARIABLE} (or --vllm) does not name vLLM's _C.abi3.so; --help says how to get it")
    try:
        torch.ops.load_library(path)
    except OSError as error:
        raise Skipped(f"{path} does not load: {str(error).splitlines()[0]}") from None
    if not hasattr(torch.ops._C, "cpu_fused_moe"):
        raise Skipped(f"{path} has no cpu_fused_moe")


# --- gates and losses --------------------------------------------------------------------------------------------------------
def transformers_loss(logits: Tensor, experts: int, k: int) -> Callable[[], Tensor]:
    """load_balancing_loss_func, which lets the shares sum to k: divided by k it is ours."""
    try:
        from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
    except ImportError as error:
        raise Skipped(f"transformers is not installed: {error}") from None
    return lambda: load_balancing_loss_func((logits,), experts, k) / k
