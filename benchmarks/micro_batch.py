"""A micro-batch of gradient accumulation on the CPU: forward, backward and gradients added to those of the micro-batches before.

    python -m benchmarks.micro_batch                        the released connector, bf16, 64, 256 and 1024 tokens
    python -m benchmarks.micro_batch --main-grad            sums in fp32 main_grad, which autograd's side adds after its backward pass
    python -m benchmarks.micro_batch --shape cumo --dtype float32 --out table.md

Ours with accumulate_grads against ours without, and against the released loop; all take turns. Gradients are compared before. Memory: how
far one more micro-batch rises above what is resident, gradients among it.
"""

import argparse
import copy
from collections.abc import Callable
from pathlib import Path

import torch

import cmoe_kernels as cmoe
from benchmarks import machine, memory, peers, record, timer
from benchmarks.shapes import SHAPES, Shape
from benchmarks.steps import Leaves
from benchmarks.works import TASKS, soft_connector

Call = Callable[[], None]
SIDES = ("accumulate_grads", "autograd adds", "released loop")


def sides(shape: Shape, tokens: int, dtype: torch.dtype, main_grad: bool) -> tuple[dict[str, Call], list[list[torch.Tensor]]]:
    """A micro-batch of each side, and the gradients of ours and of autograd's. All have the same weights."""
    ours = soft_connector(shape, dtype)
    plain = copy.deepcopy(ours, {id(p): torch.nn.Parameter(p.detach()) for p in ours.parameters()})
    x, dy = torch.randn(tokens, shape.D).to(dtype), torch.randn(tokens, shape.O).to(dtype)
    cmoe.accumulate_grads(ours, into="main_grad" if main_grad else "grad")

    def connector(module: cmoe.CMoEConnector) -> Call:
        return lambda: module(x, task=TASKS[0]).embeddings.backward(dy)

    def added(call: Call, leaves: list[torch.Tensor]) -> Call:
        """With fp32 sums that are added to after the backward pass."""
        sums = [torch.zeros_like(leaf, dtype=torch.float32) for leaf in leaves]
        totals.append(sums)

        def step() -> None:
            call()
            for leaf, total in zip(leaves, sums, strict=True):
                if leaf.grad is not None:
                    total.add_(leaf.grad)
                leaf.grad = None

        return step

    totals: list[list[torch.Tensor]] = []
    leaves = Leaves()
    forward = peers.released_loop(plain, x, leaves)
    others = {
        "autograd adds": (connector(plain), list(plain.parameters())),
        "released loop": (lambda: forward().backward(dy), leaves.flat()),
    }
    calls = {"accumulate_grads": connector(ours)}
    calls |= {name: added(call, leaves) if main_grad else call for name, (call, leaves) in others.items()}
    for call in calls.values():
        call()
        call()
    if main_grad:
        return calls, [[p.main_grad for p in ours.parameters()], totals[0]]
    return calls, [[p.grad for p in module.parameters() if p.grad is not None] for module in (ours, plain)]


def check(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    """Raises ValueError where a gradient's relative RMS error is above 2 %, far beyond what rounding makes."""
    for one, other in zip(ours, theirs, strict=True):
        error = float((one.float() - other.float()).norm() / other.float().norm().clamp_min(1e-30))
        if not error < 0.02:
            raise ValueError(f"gradients of shape {tuple(one.shape)} differ by {error:.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.micro_batch", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=list(SHAPES), default="released")
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--main-grad", action="store_true", help="sums in fp32, beside the parameters")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--seconds", type=float, default=20, help="time for each row, but at least three calls of each side (default: 20)")
    parser.add_argument("--out", type=Path, help="write the table into this Markdown file, too")
    options = parser.parse_args()
    threads = record.set_threads(options.threads)
    shape, dtype = SHAPES[options.shape], getattr(torch, options.dtype)
    lines = [f"{machine.describe()['cpu']}, {threads} threads, torch {torch.__version__}, {shape.name}, {options.dtype}", ""]
    names = ["T", *(f"{name}, p20 / p50 / p80 ms" for name in SIDES), *(f"over {name}" for name in SIDES[1:])]
    names += [f"{name}, MB more" for name in SIDES]
    lines += [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    print("\n".join(lines))
    for tokens in options.tokens:
        calls, grads = sides(shape, tokens, dtype, options.main_grad)
        check(*grads)
        del grads
        timed = timer.in_turn(list(calls.values()), options.seconds, least=3)
        cells = [" / ".join(f"{1e3 * times.quantile(q):.1f}" for q in (0.2, 0.5, 0.8)) for times in timed]
        cells += [f"{timer.ratio(timed[0], other):.2f}" for other in timed[1:]]
        peaks = [memory.peak(call) for call in calls.values()]
        cells += ["-" if peak is None else f"{peak / 1e6:,.0f}" for peak in peaks]
        lines.append(f"| {' | '.join([str(tokens), *cells])} |")
        print(lines[-1], flush=True)
        if options.out:  # after each row: what was measured is kept
            options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
