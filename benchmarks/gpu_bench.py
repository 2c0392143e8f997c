"""Ours and the peers found here, on a GPU: checked, then timed alternately in one process.

    python -m benchmarks.gpu_bench --shape mixtral --tokens 1024 [--device cuda] [--write FILE]

Dense experts and the task router stand beside the released loop; sparse experts also beside torch's grouped_mm, ScatterMoE, SonicMoE, Liger
and MegaBlocks where these are installed. All run on the same values in bf16. Result and gradients of everybody are first held against the
loop's formula in fp32: a peer that is further off than four times the loop in bf16, or that raises, is reported and not timed; ours must
be within twice, or the whole benchmark fails. A peer was called as its sources say, on a machine without a GPU: never yet run.
"""

import argparse
import contextlib
import functools
import importlib.util
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

import cmoe_kernels as cmoe
from benchmarks.compare import errors
from benchmarks.inspection import roofline
from benchmarks.shapes import SHAPES, Shape
from benchmarks.timer import alternate, ratio
from cmoe_kernels import backends

PACKAGES = ("scattermoe", "sonicmoe", "liger_kernel", "megablocks")
AT = [(shape, tokens) for shape in roofline.NAMES for tokens in roofline.TOKENS]
DRY = [("tiny", 16), ("tiny_gated", 16)]
Arguments = dict[str, Any]


class Skipped(Exception):
    """A peer cannot take part, and why."""


# --- peers ------------------------------------------------------------------------------------------------------------------
# Each takes the arguments of sparse_experts and gives y.
def grouped_mm(x, weights, indices, w1, b1, w2, b2, activation="gelu", gated=False):
    """torch.nn.functional.grouped_mm over rows sorted by expert."""
    if not hasattr(F, "grouped_mm"):
        raise Skipped(f"torch {torch.__version__} has no torch.nn.functional.grouped_mm")
    k, flat = indices.shape[1], indices.flatten()
    order = flat.argsort(stable=True)
    ends = torch.bincount(flat, minlength=w1.shape[0]).cumsum(0).to(torch.int32)
    h = F.grouped_mm(x[order // k], w1.transpose(1, 2), offs=ends)
    h = _activated(h if b1 is None else h + b1[flat[order]], activation, gated)
    out = F.grouped_mm(h, w2.transpose(1, 2), offs=ends)
    out = (out if b2 is None else out + b2[flat[order]]) * weights.flatten()[order, None].to(x.dtype)
    return out[order.argsort()].view(-1, k, out.shape[1]).sum(1)


def scattermoe(x, weights, indices, w1, b1, w2, b2, activation="gelu", gated=False):
    from scattermoe.parallel_experts import flatten_sort_count, parallel_linear

    k = indices.shape[1]
    order = flatten_sort_count(indices, w1.shape[0])
    h = parallel_linear(x, w1.permute(0, 2, 1), k, *order, expert_biases=b1, grouped_out=True)
    gates = weights.to(x.dtype)
    return parallel_linear(_activated(h, activation, gated), w2.permute(0, 2, 1), 1, *order, expert_biases=b2, grouped_in=True, gates=gates)


def sonicmoe(x, weights, indices, w1, b1, w2, b2, activation="gelu", gated=False):
    if not gated or w2.shape[1] != x.shape[1]:
        raise Skipped("its experts are gated, as wide out as in")
    from sonicmoe.enums import ActivationType
    from sonicmoe.functional import moe_general_routing_inputs

    experts, k = w1.shape[0], indices.shape[1]
    # Gate and up rows take turns there, and the experts come last.
    pairs = torch.stack(w1.chunk(2, 1), 2).flatten(1, 2)
    tokens = torch.arange(x.shape[0], dtype=torch.int32, device=x.device).repeat_interleave(k)
    y, _ = moe_general_routing_inputs(
        x, weights.flatten(), tokens, indices.flatten().int(), pairs.permute(1, 2, 0), None, w2.permute(1, 2, 0), None,
        experts, torch.cuda.current_stream().cuda_stream, ActivationType.SWIGLU, not torch.is_grad_enabled(),
    )  # fmt: skip
    return y


def liger_kernel(x, weights, indices, w1, b1, w2, b2, activation="gelu", gated=False):
    if not gated or w2.shape[1] != x.shape[1]:
        raise Skipped("its experts are gated, as wide out as in")
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

    return LigerFusedMoEFunction.apply(x, w1, w2, indices.int(), weights)


def megablocks(x, weights, indices, w1, b1, w2, b2, activation="gelu", gated=False):
    if not gated or w2.shape[1] != x.shape[1]:
        raise Skipped("compared with gated experts without biases, as wide out as in")
    from megablocks.layers.arguments import Arguments as Settings
    from megablocks.layers.dmoe import ParallelDroplessMLP

    experts, hidden = w1.shape[0], w2.shape[2]
    layer = ParallelDroplessMLP(
        Settings(
            hidden_size=x.shape[1], ffn_hidden_size=hidden, moe_num_experts=experts, moe_top_k=indices.shape[1], mlp_type="glu",
            mlp_impl="grouped", bias=False, return_bias=False, activation_fn=F.silu, fp16=False, bf16=True, device=x.device,
        )
    )  # fmt: skip
    gate, up = (w.flatten(0, 1) for w in w1.chunk(2, 1))
    for name, value in (("w1", gate), ("v1", up), ("w2", w2.transpose(1, 2).flatten(0, 1))):
        # Ours flow in as they are: a parameter would be a leaf of its own.
        del layer.mlp._parameters[name]
        setattr(layer.mlp, name, value)
    scores = torch.zeros(x.shape[0], experts, dtype=x.dtype, device=x.device)
    return layer(x[:, None], scores, weights.to(x.dtype), indices)[:, 0]


def _activated(u: Tensor, activation: str, gated: bool) -> Tensor:
    act = {"gelu": F.gelu, "silu": F.silu}[activation]
    if not gated:
        return act(u)
    gate, up = u.chunk(2, -1)
    return act(gate) * up


PEERS: dict[str, Callable[..., Tensor]] = {
    "torch grouped_mm": grouped_mm,
    "scattermoe": scattermoe,
    "sonicmoe": sonicmoe,
    "liger_kernel": liger_kernel,
    "megablocks": megablocks,
}
LOOP = "released loop"


# --- one op -----------------------------------------------------------------------------------------------------------------
def drawn(shape: Shape, tokens: int, device: str, dtype: torch.dtype) -> dict[str, Arguments]:
    """The ops of a layer with values: weights as torch.nn.Linear draws them, selections that are those of random logits."""
    torch.manual_seed(0)
    made = {}
    for op, arguments in roofline.calls(shape, tokens, dtype).items():
        for name, value in arguments.items():
            if isinstance(value, Tensor) and value.is_floating_point():
                scale = value.shape[-1] ** -0.5 if name in ("w1", "b1", "w2", "b2") else 1.0
                arguments[name] = (torch.randn(value.shape, device=device) * scale).to(value.dtype)
        if "gates" in arguments:
            arguments["gates"] = arguments["gates"].softmax(-1)
        if "indices" in arguments:
            weights, indices = torch.randn(tokens, shape.E, device=device).softmax(-1).topk(shape.K)
            arguments["indices"] = indices
            if "weights" in arguments:
                arguments["weights"] = weights
        if op == "balance_loss":
            arguments["scores"] = arguments["scores"].softmax(-1)
        made[op] = arguments
    return made


class Step:
    """A call over leaves of its own, giving [y, gradients ...]; ``apart``: each expert's weights are leaves by themselves."""

    def __init__(
        self, call: Callable[..., Any], arguments: Arguments, apart: bool, backward: bool, dtype: torch.dtype | None = None
    ) -> None:
        def leaf(value: Tensor) -> Tensor:
            return value.detach().to(dtype or value.dtype, copy=True).requires_grad_(backward)

        self.call, self.backward, self.given = call, backward, dict(arguments)
        self.upstream: Tensor | None = None
        for name, value in arguments.items():
            if isinstance(value, Tensor) and value.is_floating_point():
                self.given[name] = [leaf(e) for e in value] if apart and name in ("w1", "b1", "w2", "b2") else leaf(value)
        self.leaves = {n: self.given[n] for n, v in arguments.items() if isinstance(v, Tensor) and v.is_floating_point()}
        self.names = ["y", *(self.leaves if backward else [])]

    def __call__(self) -> list[Tensor]:
        with torch.set_grad_enabled(self.backward):
            y = self.call(**self.given)
            y = y[0] if isinstance(y, tuple) else y
            if not self.backward:
                return [y]
            if self.upstream is None:  # not ones: rows of gates sum to one, so that gradient is zero
                self.upstream = torch.randn(y.shape, generator=torch.Generator(y.device).manual_seed(1), device=y.device).to(y.dtype)
            return [y, *torch.autograd.grad(y, tree_leaves(list(self.leaves.values())), self.upstream, allow_unused=True)]

    def whole(self) -> list[Tensor]:
        """y and one gradient per argument, zeros for what had no influence."""
        y, *grads = self()
        parts, result = iter(grads), [y.detach()]
        for value in self.leaves.values() if self.backward else []:
            each = [torch.zeros_like(t) if (g := next(parts)) is None else g for t in (value if isinstance(value, list) else [value])]
            result.append(torch.stack(each) if isinstance(value, list) else each[0])
        return result


def too_far(ours: list[Tensor], exact: list[Tensor], baseline: list[Tensor], names: list[str], times: float) -> str | None:
    """The first of the results that is further from the fp32 formula than ``times`` the error of the baseline, and 2 eps."""
    for name, got, true, base in zip(names, ours, exact, baseline, strict=True):
        true, eps = true.double(), torch.finfo(torch.bfloat16).eps
        scales = (true.abs().max(), true.square().mean().sqrt())
        for got_error, allowed, scale in zip(errors(got, true), errors(base, true), scales, strict=True):
            limit = times * allowed + 2 * eps * float(scale)
            if not got_error <= limit:
                return f"{name}: error {got_error:.3g} above {limit:.3g}"
    return None


def measure(op: str, arguments: Arguments, backward: bool, backend: str, device: str, seconds: float) -> dict[str, Any]:
    """One row: ours against each peer, checked and timed."""
    apart = op.endswith("_experts")
    loop = Step(roofline.UNFUSED[op], arguments, apart, backward)
    exact, baseline = Step(roofline.UNFUSED[op], arguments, apart, backward, torch.float32).whole(), loop.whole()

    def on_backend(**given: Any) -> Any:
        with cmoe.use_backend(backend):
            return getattr(cmoe, op)(**given)

    ours = Step(on_backend, arguments, False, backward)
    row: dict[str, Any] = {"op": op, "pass": "forward+backward" if backward else "forward", "backend": backend, "peers": {}}
    wrong = too_far(ours.whole(), exact, baseline, ours.names, 2.0)
    if wrong:
        return row | {"wrong": wrong}
    clock = functools.partial(_clock, device)
    others: dict[str, Callable[..., Tensor]] = {LOOP: roofline.UNFUSED[op], **(PEERS if op == "sparse_experts" else {})}
    for name, peer in others.items():
        record: dict[str, Any] = {}
        try:
            if name in PACKAGES and importlib.util.find_spec(name) is None:
                raise Skipped("not installed")
            theirs = loop if name == LOOP else Step(peer, arguments, False, backward)
            wrong = None if name == LOOP else too_far(theirs.whole(), exact, baseline, ours.names, 4.0)
            if wrong:
                record["wrong"] = wrong
            else:
                a, b = alternate(ours, theirs, seconds, clock=clock)
                record = {"ours": a.summary(), "theirs": b.summary(), "ratio": round(ratio(a, b), 3)}
        except Skipped as reason:
            record["skipped"] = str(reason)
        except Exception as error:  # a peer may fail in any way; that is its result
            text = str(error).strip().splitlines() or [""]
            record["failed"] = f"{type(error).__name__}: {text[0][:200]}"
        row["peers"][name] = record
    return row


def _clock(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def line(row: dict[str, Any]) -> str:
    """A row in words."""
    head = f"{row['op']} {row['pass']} on {row['backend']}: "
    if "wrong" in row:
        return head + f"WRONG, {row['wrong']}"
    parts = []
    for name, record in row["peers"].items():
        said = [f"{name} {key}: {record[key]}" for key in ("skipped", "failed", "wrong") if key in record]
        parts += said or [f"{record['ratio']:.2f} x {name} ({record['ours']['p50_ms']:.3g} ms against {record['theirs']['p50_ms']:.3g})"]
    return head + "; ".join(parts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--backend", choices=("triton", "cuda"), help="that one alone")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each pair")
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    shape, seconds = SHAPES[options.shape], options.seconds if options.device == "cuda" else 0.01
    rows, skip_reasons = [], []
    with torch.device(options.device):
        made = drawn(shape, options.tokens, options.device, torch.bfloat16)
        for op, arguments in made.items():
            able = [b for b in backends.serving(op, options.device) if b in ("triton", "cuda") and options.backend in (None, b)]
            # Without a GPU the driver is rehearsed with what serves there.
            for backend in able or ([] if options.device == "cuda" else ["reference"]):
                for backward in (False, True):
                    try:
                        row = measure(op, arguments, backward, backend, options.device, seconds)
                    except torch.OutOfMemoryError as error:
                        skip_reasons.append(f"{op} {'forward+backward' if backward else 'forward'}: {str(error).splitlines()[0]}")
                        continue
                    finally:
                        with contextlib.suppress(RuntimeError):
                            torch.cuda.empty_cache()
                    rows.append(row | {"tokens": options.tokens})
                    print(line(row), flush=True)
    if options.write:
        options.write.write_text(json.dumps({"rows": rows, **({"skip_reasons": skip_reasons} if skip_reasons else {})}))
    return int(any("wrong" in row for row in rows) or not rows)


if __name__ == "__main__":
    sys.exit(main())
