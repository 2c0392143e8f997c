"""A roofline of every op on GPUs that are not here: it predicts from counts and published peaks, and measures nothing.

    python -m benchmarks.inspection.roofline [--write]        writes benchmarks/results/roofline.json; `make docs` writes its page and plot

Nothing is computed: the ops run forward and backward on meta tensors, and what they would launch is counted. Ours are the launches of the
Triton wrappers and the torch operations between them, at the sizes that the table gives. Beside them stands the unfused torch sequence: the
formulas as released, each torch operation one launch. For each launch

    FLOPs   of its matrix products, two per multiply-add, without the padding of tiles; arithmetic on elements is not counted
    bytes   of every distinct element that it reads or writes, once: caches serve what tiles read again; an idle expert is not read
    time    the larger of FLOPs / peak and bytes / bandwidth; launches one after another, a launch itself costs nothing

so times are lower bounds, and of both sides alike. Routing is taken to be even. tests/triton/test_roofline.py holds the FLOPs and bytes
of every launch against what the kernels' loops multiply, load and store in the interpreter.
"""

import argparse
import contextlib
import itertools
import json
import types
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from triton.runtime.driver import driver

from benchmarks.inspection.launch_counts import DTYPES, GPUS, SOFT, Gpu, Step, calls, steps
from benchmarks.shapes import SHAPES

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results/roofline.json"


SHOWN = "H100"  # in the page's counts and in its plot
NAMES = ("released", "cumo", "mixtral")
TOKENS = (1, 64, 256, 1024, 8192)


@dataclass(frozen=True)
class Row:
    """One op, or "layer" for the sum of a layer's ops, at one size."""

    shape: str
    tokens: int
    dtype: str
    backward: bool
    op: str
    ours: dict[str, list[Step]]  # by GPU: how a loop is split follows the device
    torch: list[Step]

    def record(self) -> dict[str, Any]:
        times = {
            name: {
                side: float(f"{1e3 * seconds(launched, gpu):.4g}") for side, launched in (("ours", self.ours[name]), ("torch", self.torch))
            }
            for name, gpu in GPUS.items()
        }
        head = {"shape": self.shape, "tokens": self.tokens, "dtype": self.dtype, "pass": self.passes, "op": self.op}
        return {**head, "ours": {name: counts(s) for name, s in self.ours.items()}, "torch": counts(self.torch), "predicted_ms": times}

    @property
    def passes(self) -> str:
        return "forward+backward" if self.backward else "forward"


def counts(launched: list[Step]) -> dict[str, Any]:
    flops = {unit: sum(s.flops for s in launched if s.unit == unit) for unit in DTYPES}
    return {"flops": {u: n for u, n in flops.items() if n}, "bytes": sum(s.bytes for s in launched), "launches": len(launched)}


def seconds(launched: list[Step], gpu: Gpu) -> float:
    return sum(step.seconds(gpu) for step in launched)


@contextlib.contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    before, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def predict(names: Iterable[str] = NAMES, tokens: Iterable[int] = TOKENS, dtypes: Iterable[str] = tuple(DTYPES)) -> list[Row]:
    rows = []
    for name, count, dtype, backward in itertools.product(names, tokens, dtypes, (False, True)):
        with _tf32(dtype == "tf32"):
            made = calls(SHAPES[name], count, DTYPES[dtype])
            theirs = {op: steps(op, arguments, False, backward) for op, arguments in made.items()}
            ours: dict[str, dict[str, list[Step]]] = {op: {} for op in made}
            for gpu in GPUS:
                with compiled_for(gpu):
                    for op, arguments in made.items():
                        ours[op][gpu] = steps(op, arguments, True, backward)
        rows += [Row(name, count, dtype, backward, op, ours[op], theirs[op]) for op in made]
        layer = {gpu: [step for op in made for step in ours[op][gpu]] for gpu in GPUS}
        rows.append(Row(name, count, dtype, backward, "layer", layer, [step for op in made for step in theirs[op]]))
    return rows


@contextlib.contextmanager
def compiled_for(gpu: str) -> Iterator[None]:
    """Inside, the wrappers take this GPU for the one that is there."""
    with mock.patch.object(driver, "_active", types.SimpleNamespace(get_current_target=lambda: GPUS[gpu].target)):
        yield


# --- the page -------------------------------------------------------------------------------------------------------------
PAGE_TEXT = """\
This page predicts; nothing on it was measured, and no kernel here has been timed on a GPU.

# Roofline

`make roofline` counts what the ops launch, ours beside the unfused torch sequence (the released loop over experts), and asks what a GPU
with its published peaks needs at least: each launch takes the larger of FLOPs / peak and bytes / bandwidth, one after another, and a
launch itself costs nothing. FLOPs are those of matrix products, without the padding of tiles. Bytes count every distinct element once:
caches serve what tiles read again. Routing is even. So times are lower bounds on both sides, and a ratio says what the counts alone are
worth, not how near either side comes to its bound. What the host needs for its launches is left out, and so is the loop's search for the
rows of an expert, which waits for the device. FLOPs and bytes of every launch of ours are held against what the kernels' own loops
multiply, load and store in Triton's interpreter (tests/triton/test_roofline.py).

{peaks}

{shapes}

## A layer, bf16

Router, gates, experts and (not in released) the switch loss. Counts of ours are as for H100: how a loop is split follows the GPU. Times
are ours in predicted ms; in brackets, how many times as long the torch sequence takes. Below one we lose: with one token, our gradients
of stacked weights write zeros for the experts that it did not choose, where the loop's modules have none.

![roofline](roofline.png)

{layers}

## By op, bf16, T = 1024

{ops}

TF32 and fp32, and every op at every T: benchmarks/results/roofline.json. What a GPU really takes is for `make gpu-check` to say.
"""


def page(rows: list[Row]) -> str:
    """The page."""
    rows = [row for row in rows if row.dtype == "bf16"]
    peaks = [[n, *(f"{g.flops[u] / 1e12:g}" for u in DTYPES), f"{g.bandwidth / 1e12:g}", g.source] for n, g in GPUS.items()]
    shapes = []
    for s in (SHAPES[name] for name in NAMES):
        own = ["all", s.R] if s.name in SOFT else [s.K, "one Linear"]
        shapes.append([s.name, s.D, s.H, s.O, s.E, *own, s.source])
    layers = [[r.shape, r.tokens, r.passes, *_numbers(r)] for r in rows if r.op == "layer"]
    ops = [[r.shape, r.op, r.passes, *_numbers(r)] for r in rows if r.op != "layer" and r.tokens == 1024]
    numbers = ["GFLOP ours", "torch", "MB ours", "torch", "launches ours", "torch", *GPUS]
    return PAGE_TEXT.format(
        peaks=_table(["", *(f"{unit}, TFLOP/s" for unit in DTYPES), "HBM, TB/s", "source"], peaks),
        shapes=_table(["shape", "D", "H", "O", "E", "K", "router R", "what"], shapes),
        layers=_table(["shape", "T", "pass", *numbers], layers),
        ops=_table(["shape", "op", "pass", *numbers], ops),
    )


def _numbers(row: Row) -> list[Any]:
    sides = (row.ours[SHOWN], row.torch)
    flops, size = (
        [f"{sum(getattr(s, what) for s in side) / unit:.4g}" for side in sides] for what, unit in (("flops", 1e9), ("bytes", 1e6))
    )
    times = []
    for name, gpu in GPUS.items():
        ours, theirs = seconds(row.ours[name], gpu), seconds(row.torch, gpu)
        times.append(f"{1e3 * ours:.3g} ({theirs / ours:.2f})")
    return [*flops, *size, *map(len, sides), *times]


def _table(head: list[str], rows: list[list[Any]]) -> str:
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in [head, ["---"] * len(head), *rows])


def plot(rows: list[Row], path: Path) -> None:
    """The layers under the roofs of one GPU: FLOPs per byte against FLOPs per predicted second."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    gpu = GPUS[SHOWN]
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2), sharey=True, layout="constrained")
    for panel, backward in zip(axes, (False, True), strict=True):
        x = [2**i for i in range(-2, 15)]
        panel.loglog(
            x, [min(gpu.flops["bf16"], gpu.bandwidth * i) / 1e12 for i in x], color="black", label=f"{SHOWN}, bf16: published peaks"
        )
        for color, shape in zip(("tab:blue", "tab:orange", "tab:green"), NAMES, strict=True):
            mine = [r for r in rows if (r.shape, r.dtype, r.op, r.backward) == (shape, "bf16", "layer", backward)]
            for side, style in (("ours", "o-"), ("torch", "x--")):
                sides = [row.ours[SHOWN] if side == "ours" else row.torch for row in mine]
                flops, size = ([sum(getattr(s, what) for s in launched) for launched in sides] for what in ("flops", "bytes"))
                intensity = [f / b for f, b in zip(flops, size, strict=True)]
                rate = [f / seconds(launched, gpu) / 1e12 for f, launched in zip(flops, sides, strict=True)]
                panel.plot(intensity, rate, style, color=color, label=f"{shape}, {side}")
        panel.set(title="forward + backward" if backward else "forward", xlabel="FLOPs per byte")
        panel.grid(alpha=0.3, which="both")
    axes[0].set_ylabel("TFLOP per predicted second")
    axes[1].legend(fontsize=7)
    figure.suptitle(f"Predicted, not measured: a layer at T = {', '.join(map(str, TOKENS))}", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def text(rows: list[Row]) -> str:
    """What the file holds."""
    document = {
        "what": "predictions from counts and published peaks; nothing was measured",
        "gpus": {name: {"flops": gpu.flops, "bandwidth": gpu.bandwidth, "source": gpu.source} for name, gpu in GPUS.items()},
        "shapes": {name: vars(SHAPES[name]) for name in NAMES},
    }
    records = ",\n".join("  " + json.dumps(row.record()) for row in rows)
    return json.dumps(document, indent=1).removesuffix("\n}") + f',\n "rows": [\n{records}\n ]\n}}\n'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.relative_to(ROOT)}")
    options = parser.parse_args()
    rows = predict()
    print(page(rows))
    if options.write:
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(text(rows))


if __name__ == "__main__":
    main()
