"""What the ops would launch on a GPU that is not here, ours and the unfused torch sequence: FLOPs, bytes and bounds of each launch.

Counted on meta tensors. tests/triton/test_roofline.py holds the counts against what the kernels' loops multiply, load and store.
"""

import contextlib
import importlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import KernelInterface

import cmoe_kernels as cmoe
from benchmarks.inspection.aot import TARGETS
from benchmarks.shapes import Shape
from tests.ops import naive


@dataclass(frozen=True)
class Gpu:
    """What Triton calls it, and its published peaks: FLOP/s of matrix products by unit, without sparsity, and bytes per second of HBM."""

    target: GPUTarget
    flops: dict[str, float]
    bandwidth: float
    source: str


GPUS = {
    "A100": Gpu(TARGETS["sm_80"], {"bf16": 312e12, "tf32": 156e12, "fp32": 19.5e12}, 2.039e12, "NVIDIA A100 data sheet, A100 80GB SXM"),
    "H100": Gpu(
        TARGETS["sm_90"],
        {"bf16": 989e12, "tf32": 494e12, "fp32": 67e12},
        3.35e12,
        "NVIDIA H100 data sheet, H100 SXM; half of its figures with sparsity",
    ),
    "B200": Gpu(
        TARGETS["sm_100"],
        {"bf16": 2250e12, "tf32": 1100e12, "fp32": 80e12},
        8e12,
        "NVIDIA Blackwell architecture technical brief, HGX B200, dense",
    ),
    "MI300X": Gpu(TARGETS["gfx942"], {"bf16": 1307.4e12, "tf32": 653.7e12, "fp32": 163.4e12}, 5.3e12, "AMD Instinct MI300X data sheet"),
}
DTYPES = {"bf16": torch.bfloat16, "tf32": torch.float32, "fp32": torch.float32}


@dataclass(frozen=True)
class Step:
    """One launch."""

    name: str
    flops: float
    bytes: float
    unit: str = "fp32"

    def seconds(self, gpu: Gpu) -> float:
        return max(self.flops / gpu.flops[self.unit], self.bytes / gpu.bandwidth)


# --- counting -------------------------------------------------------------------------------------------------------------
# Kernels with matrix products, by how their names begin: the operands that each row is multiplied with. Longest first.
PRODUCTS = {
    "task_router_fwd_kernel": ("w1", "w2"),
    "grouped_gemm_sum_fwd": ("w",),
    "grouped_gemm_fwd": ("w",),
    "dact_gemm_bwd": ("w",),
    "dense_dgrad_bwd": ("w",),
    "wgrad_bwd": ("dw",),
    "column_sums": ("out",),
}


def of_launch(kernel: Any, args: tuple[Any, ...], settings: dict[str, Any], used: float = 1.0) -> Step:
    """What a launch of a Triton kernel will do, from its arguments; ``used``: the share of experts that have a row."""
    values = dict(zip(kernel.arg_names, args, strict=False)) | settings
    tensors = {name: tensor for name, value in values.items() if (tensor := _tensor(value)) is not None}
    if kernel.__name__.startswith("routing_weight_bwd") and "b" not in tensors:
        tensors.pop("dy")  # is there for its product with b
    if kernel.__name__.startswith("balance_loss_bwd") and values["KIND"] != "z":
        tensors.pop("scores")  # the other kinds are linear in them
    grouped = "offsets" in tensors
    flops = size = 0.0
    # One tensor can stand for several arguments, and twice for one: by pointer and in a descriptor.
    for name, tensor in {memory(t): (n, t) for n, t in tensors.items()}.values():
        size += span(tensor) * (used if grouped and name in ("w", "b") else 1.0)
    operands = next((names for stem, names in PRODUCTS.items() if kernel.__name__.startswith(stem)), ())
    for operand in (tensors[name] for name in operands if name in tensors):
        rows = values["rows"] if "rows" in values else values["tokens"]
        # Each row meets one expert where rows are grouped by expert, and all of them where they are not.
        flops += 2.0 * rows * operand.numel() / (operand.shape[0] if grouped else 1)
    operand_type = str(values.get("OPERAND", values.get("ROUND", "fp32")))
    unit = "bf16" if operand_type in ("bf16", "fp16") else "tf32" if values.get("PRECISION") == "tf32" else "fp32"
    return Step(kernel.__name__, flops, size, unit)


def _tensor(value: Any) -> Tensor | None:
    value = getattr(value, "base", value)  # of a descriptor
    return value if isinstance(value, Tensor) and value.numel() else None


def memory(tensor: Tensor) -> tuple[int, ...]:
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), span(tensor)


def span(tensor: Tensor) -> int:
    """Bytes of the distinct elements; an expanded dimension repeats the same ones."""
    return math.prod(n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride) * tensor.element_size()


Launch = Callable[[Any, Any, tuple[Any, ...], dict[str, Any]], None]


@contextlib.contextmanager
def intercepted(launch: Launch) -> Iterator[None]:
    """Inside, a launch of a Triton kernel is handed to ``launch(kernel, grid, args, settings)`` instead."""

    def getitem(kernel: Any, grid: Any) -> Any:
        return lambda *args, **settings: launch(kernel, grid, args, settings)

    with mock.patch.object(KernelInterface, "__getitem__", getitem):
        yield


class Counter(TorchDispatchMode):
    """The launches inside a ``with``; ops of ours are served by their Triton kernels, which are counted and not run."""

    def __init__(self, used: float = 1.0) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self.used = used

    def launch(self, kernel: Any, grid: Any, args: tuple[Any, ...], settings: dict[str, Any]) -> None:
        self.steps.append(of_launch(kernel, args, settings, self.used))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "cmoe":
            name = func._schema.name.removeprefix("cmoe::")
            module = importlib.import_module(f"cmoe_kernels.ops.{name.removesuffix('_backward')}.triton")
            with self, intercepted(self.launch):
                result = getattr(module, name)(*args[:-1])  # the last one is the backend
                if isinstance(result, Tensor):
                    return result.contiguous()
                return tuple(args[0].new_empty(0) if t is None else t.contiguous() for t in result)
        result = func(*args, **(kwargs or {}))
        if func.namespace == "aten" and not _is_free(func):
            inputs = [t for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            outputs = [t for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, Tensor)]
            size = sum(span(t) for t in {id(t): t for t in [*inputs, *outputs]}.values())
            count = flop_registry.get(func._overloadpacket)
            flops = count(*args, **(kwargs or {}), out_val=result) if count else 0
            unit = "fp32"
            if inputs and inputs[0].dtype != torch.float32:
                unit = "bf16"
            elif torch.backends.cuda.matmul.allow_tf32:
                unit = "tf32"
            self.steps.append(Step(func._schema.name, flops, size, unit))
        return result


def _is_free(func: Any) -> bool:
    """Views and allocations launch nothing."""
    returns = func._schema.returns
    view = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
    return view or func._schema.name in ("aten::_unsafe_view", "aten::empty", "aten::new_empty", "aten::empty_like", "aten::empty_strided")


# --- the unfused torch sequence -------------------------------------------------------------------------------------------
# As the models have it: each expert a module with parameters of its own, so weights come as lists. Gates are in the dtype of x.
def soft_experts(x, gates, w1, b1, w2, b2):
    outputs = [_mlp(x, e, w1, b1, w2, b2) for e in range(len(w1))]
    return (gates.to(x.dtype).T[:, :, None] * torch.stack(outputs)).sum(0)


def sparse_experts(x, weights, indices, w1, b1, w2, b2, activation="gelu", gated=False):
    """The loop over experts: take the rows of each, run it, weigh, add where they came from.

    The search for an expert's rows (``torch.where``, which waits for the device) is not counted, in favour of the loop.
    """
    tokens, k = indices.shape
    used = min(len(w1), tokens * k) if indices.is_meta else len(w1)
    y = x.new_zeros(tokens, w2[0].shape[0])
    weights = weights.to(x.dtype)
    for e in range(used):
        if indices.is_meta:  # without values: spread evenly
            rows = places = indices.new_empty(tokens * k // used)
        else:
            rows, places = torch.where(indices == e)
        y = y.index_add(0, rows, _mlp(x[rows], e, w1, b1, w2, b2, activation, gated) * weights[rows, places, None])
    return y


def _mlp(x, e, w1, b1, w2, b2, activation="gelu", gated=False):
    hidden = F.linear(x, w1[e], None if b1 is None else b1[e])
    if gated:
        gate, up = hidden.chunk(2, -1)
        hidden = naive.ACT[activation](gate) * up
    else:
        hidden = naive.ACT[activation](hidden)
    return F.linear(hidden, w2[e], None if b2 is None else b2[e])


def topk_gate(logits, k):
    weights, _ = logits.softmax(-1).topk(k)
    return weights / weights.sum(-1, keepdim=True)


def balance_loss(scores, indices):
    experts = scores.shape[1]
    share = (indices[:, :, None] == torch.arange(experts, device=indices.device)).float().mean((0, 1))
    return experts * (share * scores.mean(0)).sum()


UNFUSED = {
    "task_router": naive.task_router,
    "soft_gate": naive.soft_gate,
    "soft_experts": soft_experts,
    "topk_gate": topk_gate,
    "sparse_experts": sparse_experts,
    "balance_loss": balance_loss,
}


# --- shapes ---------------------------------------------------------------------------------------------------------------
SOFT = ("released", "tiny")
Arguments = dict[str, Any]


def calls(shape: Shape, tokens: int, dtype: torch.dtype) -> dict[str, Arguments]:
    """The ops of one layer and their arguments, without values: routing by [task ; token] where the model has it, else linear, top K."""
    x = torch.empty(tokens, shape.D, dtype=dtype, device="meta")
    logits = x.new_empty(tokens, shape.E, dtype=torch.float32)
    rows = 2 * shape.H if shape.gated else shape.H
    mlp: Arguments = {
        "x": x,
        "w1": x.new_empty(shape.E, rows, shape.D),
        "w2": x.new_empty(shape.E, shape.O, shape.H),
        "b1": None,
        "b2": None,
    }
    if shape.name in SOFT:
        mlp |= {"b1": x.new_empty(shape.E, rows), "b2": x.new_empty(shape.E, shape.O), "gates": logits}
        first = {"w1": x.new_empty(shape.R, shape.S + shape.D), "b1": x.new_empty(shape.R)}
        second = {"w2": x.new_empty(shape.E, shape.R), "b2": x.new_empty(shape.E)}
        router = {"x": x, "task": x.new_empty(1, shape.S), **first, **second}
        return {"task_router": router, "soft_gate": {"logits": logits}, "soft_experts": mlp}
    indices = x.new_empty(tokens, shape.K, dtype=torch.int64)
    mlp |= {"weights": logits[:, : shape.K].clone(), "indices": indices}
    mlp |= {"gated": True, "activation": "silu"} if shape.gated else {"b1": x.new_empty(shape.E, rows), "b2": x.new_empty(shape.E, shape.O)}
    return {
        "task_router": {"x": x, "task": None, "w1": x.new_empty(shape.E, shape.D), "b1": None, "inputs": "token"},
        "topk_gate": {"logits": logits, "k": shape.K},
        "sparse_experts": mlp,
        "balance_loss": {"scores": logits, "indices": indices},
    }


# --- predictions ----------------------------------------------------------------------------------------------------------
def steps(op: str, arguments: Arguments, ours: bool, backward: bool) -> list[Step]:
    """The launches of one op; its tensors are on the meta device."""
    used = min(1.0, arguments["indices"].numel() / arguments["w1"].shape[0]) if op == "sparse_experts" else 1.0
    if not ours and op.endswith("_experts"):
        apart = {name: arguments[name].unbind() for name in ("w1", "b1", "w2", "b2") if arguments[name] is not None}
        arguments = arguments | {name: [t.detach().clone() for t in tensors] for name, tensors in apart.items()}
    leaves = [v for v in torch.utils._pytree.tree_leaves(arguments) if isinstance(v, Tensor) and v.is_floating_point()]
    for leaf in leaves:
        leaf.requires_grad_(backward)
    call = getattr(cmoe, op) if ours else UNFUSED[op]
    with cmoe.use_backend("reference"), Counter(used) as counter:
        y = call(**arguments)
        y = y[0] if isinstance(y, tuple) else y
        if backward:
            torch.autograd.grad(y, leaves, y.detach(), allow_unused=True)
    return counter.steps
