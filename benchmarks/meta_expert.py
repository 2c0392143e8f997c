"""Med-MoE's FFN on the CPU: the layer as it runs (`MoEFFN.mix`) against other forms of it.

    beside      a dense FFN of its own beside the sparse call; the layer has the meta expert as one more expert of that call
    loop        a loop over experts
    einsum      products with masks of tokens, experts and places, capacity 4
    grouped_mm  torch's grouped products over rows sorted by expert, and a dense FFN

    python -m benchmarks.meta_expert --out table.md         Phi-2's and StableLM-2's widths, 4 experts, top 1, fp32 and bf16, all forms
    python -m benchmarks.meta_expert --forms grouped_mm --tokens 64 --dtypes float32 --steps forward

All have the same weights and get the same routing. Output and gradients are compared before anything is timed; all take turns. A form whose
first call takes longer than --once-above seconds is timed once. One that would take longer than --longest, by its time at fewer tokens, is
left out: torch's bf16 products on processors without bf16 instructions take minutes.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import machine, record, timer
from cmoe_kernels import sparse_experts
from cmoe_kernels.ops.activation import activate
from unimed.models.medmoe.config import MoESettings
from unimed.models.medmoe.forms import einsum, loop
from unimed.models.medmoe.layers import FFN, MoEFFN

# D, H, gated, activation, biases
WIDTHS = {"phi-2": (2560, 10240, False, "gelu_tanh", True), "stablelm-2": (2048, 5632, True, "silu", False)}
EXPERTS = 4
BOUND = 16  # tokens from which a call takes time by their number; below, it reads weights
FORMS = ("beside", "loop", "einsum", "grouped_mm")

Call = Callable[[], list[Tensor]]


def sides(
    width: tuple[int, int, bool, str, bool], tokens: int, dtype: torch.dtype, train: bool, forms: Sequence[str] = FORMS
) -> tuple[Call, ...]:
    """One step of the layer and of each form: output, then in training the gradients of x, of the routing weights and of the parameters."""
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

    layer = _layer(one, activation, gated)

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

    def step(form: Callable[[], Tensor], parameters: list[Tensor | None]) -> Call:
        def call() -> list[Tensor]:
            with torch.set_grad_enabled(train):
                y = form()
            leaves = [x, weights, *(p for p in parameters if p is not None)]
            return [y.detach(), *(torch.autograd.grad(y, leaves, dy) if train else ())]

        return call

    separate = [*experts, *meta]
    of = {"beside": (apart, separate), "grouped_mm": (grouped, separate)}
    of |= {form.__name__: (lambda form=form: form(layer, x, weights, indices), one) for form in (loop, einsum)}  # type: ignore[misc]
    return step(lambda: layer.mix(x, weights, indices), one), *(step(*of[name]) for name in forms)


def _layer(parameters: Sequence[Tensor | None], activation: str, gated: bool) -> MoEFFN:
    w1, b1, w2, b2 = (None if p is None else p[0].to("meta") for p in parameters)
    assert w1 is not None
    assert w2 is not None
    layer = MoEFFN(MoESettings(layers=(0,), num_experts=EXPERTS), FFN(w1, b1, w2, b2, activation, gated))
    for name, tensor in zip(("w1", "b1", "w2", "b2"), parameters, strict=True):
        delattr(layer, name)
        setattr(layer, name, tensor)
    return layer


def check(ours: Call, *others: Call) -> float:
    """The largest relative RMS error of output, dx and routing weights' gradient of the other forms.

    Raises:
        ValueError: it is above 2 %, far beyond what bf16 rounding makes.
    """
    mine = ours()[:3]
    pairs = [pair for other in others for pair in zip(mine, other()[:3], strict=True)]
    worst = max((float((o - e).float().norm() / e.float().norm()) for o, e in pairs), default=0.0)
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
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS), help="what the layer is timed against (default: all)")
    parser.add_argument("--once-above", type=float, default=5, help="seconds of a call above which a form is timed once (default: 5)")
    parser.add_argument("--longest", type=float, default=60, help="seconds of a call above which a form is left out (default: 60)")
    parser.add_argument("--cpu-time", action="store_true", help="the process's CPU time, not wall time: for one thread on a busy machine")
    parser.add_argument("--out", type=Path, help="write the table into this Markdown file, too")
    options = parser.parse_args()
    threads = record.set_threads(options.threads)
    about = machine.describe()
    if options.cpu_time and threads > 1:
        parser.error("--cpu-time: adds up the threads' times; give --threads 1")
    kind = "Milliseconds of CPU time" if options.cpu_time else "Milliseconds"
    told = f"{about['cpu']}, {threads} threads, torch {torch.__version__}. {kind}: p50 (p20, p80). Ratio above 1: ours is faster."
    lines = [told, ""]
    names = ["widths", "step", "dtype", "T", "ours", *(f"{form}{kind}" for form in options.forms for kind in ("", ", ratio"))]
    lines += [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    print("\n".join(lines))
    for name in options.models:
        for step in options.steps:
            for dtype in options.dtypes:
                for cells in rows(name, step, dtype, sorted(options.tokens), options):
                    lines.append(f"| {' | '.join([name, step, dtype, *cells])} |")
                    print(lines[-1], flush=True)
                    if options.out:  # after each row: what was measured is kept
                        options.out.write_text("\n".join(lines) + "\n")


def rows(name: str, step: str, dtype: str, tokens: Sequence[int], options: argparse.Namespace) -> Iterator[list[str]]:
    """T, our times, then times and ratio of each form; "–" for one that was left out."""
    clock = time.process_time if options.cpu_time else time.perf_counter
    reach: dict[str, float] = {}  # seconds a token, of the largest T so far
    for count in tokens:
        forms = [form for form in options.forms if count * reach.get(form, 0) <= options.longest]
        calls = sides(WIDTHS[name], count, getattr(torch, dtype), step == "train", forms)
        check(*calls)
        ours, *theirs = timer.in_turn(calls, options.seconds, least=3, clock=clock, once_above=options.once_above)
        times = dict(zip(forms, theirs, strict=True))
        if count >= BOUND:
            reach |= {form: one.quantile(0.5) / count for form, one in times.items()}
        pairs = [(_cell(times[form]), f"{timer.ratio(ours, times[form]):.2f}") if form in times else ("–", "–") for form in options.forms]
        yield [str(count), _cell(ours), *(cell for pair in pairs for cell in pair)]


def _cell(times: timer.Times) -> str:
    p20, p50, p80 = (f"{1e3 * times.quantile(q):.1f}" for q in (0.2, 0.5, 0.8))
    return p50 if len(times.seconds) == 1 else f"{p50} ({p20}, {p80})"


if __name__ == "__main__":
    main()
