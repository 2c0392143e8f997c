"""Med-MoE's FFN on the CPU: the meta expert as one more expert of the sparse call, against a dense FFN of its own beside the call.

    python -m benchmarks.meta_expert                               Phi-2's and StableLM-2's widths, 4 experts, top 1, fp32 and bf16
    python -m benchmarks.meta_expert --tokens 64 --dtypes float32 --steps forward

Both have the same weights and get the same routing. Output and gradients are compared before anything is timed; the two take turns.
"""

import argparse
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import machine, record, timer
from cmoe_kernels import sparse_experts
from cmoe_kernels.ops.activation import activate

# D, H, gated, activation, biases
WIDTHS = {"phi-2": (2560, 10240, False, "gelu_tanh", True), "stablelm-2": (2048, 5632, True, "silu", False)}
EXPERTS = 4

Call = Callable[[], list[Tensor]]


def sides(width: tuple[int, int, bool, str, bool], tokens: int, dtype: torch.dtype, train: bool) -> tuple[Call, Call]:
    """One step of each form: output, then in training the gradients of x, of the routing weights and of the parameters."""
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

    def apart() -> Tensor:
        w1, b1, w2, b2 = meta
        dense = F.linear(activate(activation, F.linear(x, w1, b1), gated), w2, b2)
        return dense + sparse_experts(x, weights, indices, *experts, activation=activation, gated=gated)

    def step(form: Callable[[], Tensor], parameters: list[Tensor | None]) -> Call:
        def call() -> list[Tensor]:
            with torch.set_grad_enabled(train):
                y = form()
            leaves = [x, weights, *(p for p in parameters if p is not None)]
            return [y.detach(), *(torch.autograd.grad(y, leaves, dy) if train else ())]

        return call

    return step(together, one), step(apart, [*experts, *meta])


def check(together: Call, apart: Call) -> float:
    """The largest relative RMS error of output, dx and routing weights' gradient.

    Raises:
        ValueError: it is above 2 %, far beyond what bf16 rounding makes.
    """
    pairs = list(zip(together()[:3], apart()[:3], strict=True))
    worst = max(float((o - e).float().norm() / e.float().norm()) for o, e in pairs)
    if not worst < 0.02:
        raise ValueError(f"the two forms differ by {worst:.1%}")
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
    options = parser.parse_args()
    threads = record.set_threads(options.threads)
    print(f"{machine.describe()['cpu']}, {threads} threads, torch {torch.__version__}")
    print("| widths | step | dtype | T | one call, ms | dense FFN beside it, ms | ratio |\n|---|---|---|---|---|---|---|")
    for name in options.models:
        for step in options.steps:
            for dtype in options.dtypes:
                for tokens in options.tokens:
                    together, apart = sides(WIDTHS[name], tokens, getattr(torch, dtype), step == "train")
                    check(together, apart)
                    ours, theirs = timer.in_turn((together, apart), options.seconds, least=3)
                    p50 = [f"{1e3 * times.quantile(0.5):.1f}" for times in (ours, theirs)]
                    row = [name, step, dtype, str(tokens), *p50, f"{timer.ratio(ours, theirs):.2f}"]
                    print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
