"""Med-MoE's FFN on the CPU: the meta expert as one more expert of the sparse call, against other forms of the same layer.

    beside      a dense FFN of its own beside the sparse call
    loop        a loop over experts
    einsum      products with masks of tokens, experts and places, capacity 4
    grouped_mm  torch's grouped products over rows sorted by expert, and a dense FFN

    python -m benchmarks.meta_expert                               Phi-2's and StableLM-2's widths, 4 experts, top 1, fp32 and bf16
    python -m benchmarks.meta_expert --tokens 64 --dtypes float32 --steps forward
    python -m benchmarks.meta_expert --forms beside loop einsum grouped_mm --dtypes bfloat16 --out table.md     the table of all forms

All have the same weights and get the same routing. Output and gradients are compared before anything is timed; all take turns.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import machine, record, timer
from cmoe_kernels import sparse_experts
from cmoe_kernels.ops.activation import activate

# D, H, gated, activation, biases
WIDTHS = {"phi-2": (2560, 10240, False, "gelu_tanh", True), "stablelm-2": (2048, 5632, True, "silu", False)}
EXPERTS = 4
FORMS = ("beside", "loop", "einsum", "grouped_mm")

Call = Callable[[], list[Tensor]]


def sides(
    width: tuple[int, int, bool, str, bool], tokens: int, dtype: torch.dtype, train: bool, forms: Sequence[str] = ("beside",)
) -> tuple[Call, ...]:
    """One step of one call and of each form: output, then in training the gradients of x, of the routing weights and of the parameters."""
    d, h, gated, activation, biases = width
    draw = torch.Generator().manual_seed(0)

    def tensor(*shape: int, scale: float) -> Tensor:
        return (torch.randn(shape, generator=draw) * scale).to(dtype).requires_grad_(train)

    rows = 2 * h if gated else h
    one = [tensor(EXPERTS + 1, rows, d, scale=d**-0.5), tensor(EXPERTS + 1, d, h, scale=h**-0.5)]
    one[1:1] = [tensor(EXPERTS + 1, rows, scale=0.1)] if biases else [None]
    one.append(tensor(EXPERTS + 1, d, scale=0.1) if biases else None)
    experts, meta = ([None if p is None else p.detach()[of].clone().requires_grad_(train) for p in one] for of in (slice(1, None), 0))
    x, dy = tensor(tokens, d, scale=1.0), tensor(tokens, d, scale=1.0).detach()
    weights = torch.rand(tokens, 1, generator=draw).requires_grad_(train)
    indices = torch.randint(EXPERTS, (tokens, 1), generator=draw)

    def together() -> Tensor:
        chosen = torch.cat([torch.zeros_like(indices), indices + 1], 1)
        mixed = torch.cat([torch.ones_like(weights), weights], 1)
        return sparse_experts(x, mixed, chosen, *one, activation=activation, gated=gated)

    def dense() -> Tensor:
        w1, b1, w2, b2 = meta
        return F.linear(activate(activation, F.linear(x, w1, b1), gated), w2, b2)

    def apart() -> Tensor:
        return dense() + sparse_experts(x, weights, indices, *experts, activation=activation, gated=gated)

    def grouped() -> Tensor:
        w1, b1, w2, b2 = experts
        order = indices[:, 0].argsort(stable=True)
        expert, ends = indices[order, 0], torch.bincount(indices[:, 0], minlength=EXPERTS).cumsum(0).to(torch.int32)
        u = F.grouped_mm(x[order], w1.transpose(1, 2), offs=ends)
        h = activate(activation, u if b1 is None else u + b1[expert], gated)
        out = F.grouped_mm(h, w2.transpose(1, 2), offs=ends)
        out = weights[order].to(dtype) * (out if b2 is None else out + b2[expert])
        return dense() + torch.zeros_like(x).index_copy(0, order, out)

    def other(name: str) -> Callable[[], Tensor]:
        from unimed.models.medmoe import forms as of_layer

        layer: Any = SimpleNamespace(activation=activation, gated=gated, settings=SimpleNamespace(num_experts=EXPERTS, meta=True))
        layer.w1, layer.b1, layer.w2, layer.b2 = one
        return lambda: getattr(of_layer, name)(layer, x, weights, indices)

    def step(form: Callable[[], Tensor], parameters: list[Tensor | None]) -> Call:
        def call() -> list[Tensor]:
            with torch.set_grad_enabled(train):
                y = form()
            leaves = [x, weights, *(p for p in parameters if p is not None)]
            return [y.detach(), *(torch.autograd.grad(y, leaves, dy) if train else ())]

        return call

    calls = [step(together, one)]
    for name in forms:
        if name in ("loop", "einsum"):
            calls.append(step(other(name), one))
        else:
            calls.append(step(apart if name == "beside" else grouped, [*experts, *meta]))
    return tuple(calls)


def check(together: Call, *others: Call) -> float:
    """The largest relative RMS error of output, dx and routing weights' gradient of the other forms.

    Raises:
        ValueError: it is above 2 %, far beyond what bf16 rounding makes.
    """
    ours = together()[:3]
    pairs = [pair for other in others for pair in zip(ours, other()[:3], strict=True)]
    worst = max(float((o - e).float().norm() / e.float().norm()) for o, e in pairs)
    if not worst < 0.02:
        raise ValueError(f"the forms differ by {worst:.1%}")
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.meta_expert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 64, 256, 1024])
    parser.add_argument("--steps", nargs="+", choices=["forward", "train"], default=["forward", "train"])
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--models", nargs="+", choices=list(WIDTHS), default=list(WIDTHS))
    parser.add_argument("--threads", type=int)
    parser.add_argument("--seconds", type=float, default=4, help="time for each row, but at least three calls of each side (default: 4)")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=["beside"], help="what one call is timed against (default: beside)")
    parser.add_argument("--out", type=Path, help="write the table into this Markdown file, too")
    options = parser.parse_args()
    threads = record.set_threads(options.threads)
    lines = [f"{machine.describe()['cpu']}, {threads} threads, torch {torch.__version__}", ""]
    names = [
        "widths",
        "step",
        "dtype",
        "T",
        "one call, ms",
        *(f"{form}, ms" for form in options.forms),
        *(f"{form}, ratio" for form in options.forms),
    ]
    lines += [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    print("\n".join(lines))
    for name in options.models:
        for step in options.steps:
            for dtype in options.dtypes:
                for tokens in options.tokens:
                    calls = sides(WIDTHS[name], tokens, getattr(torch, dtype), step == "train", options.forms)
                    check(*calls)
                    ours, *theirs = timer.in_turn(calls, options.seconds, least=3)
                    p50 = [f"{1e3 * times.quantile(0.5):.1f}" for times in (ours, *theirs)]
                    ratios = [f"{timer.ratio(ours, one):.2f}" for one in theirs]
                    lines.append(f"| {' | '.join([name, step, dtype, str(tokens), *p50, *ratios])} |")
                    print(lines[-1], flush=True)
                    if options.out:  # after each row: what was measured is kept
                        options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
