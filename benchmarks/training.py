"""Whole training steps of unimed: images and tokens a second with plain PyTorch in the connector, and with our kernels.

    python -m benchmarks.training                        the demo's model: 1.4 M parameters, 16 samples, fp32
    python -m benchmarks.training --width full           Uni-Med's widths: tower of 39 layers and connector whole, two layers of Llama-2-7B
    python -m benchmarks.training --width full --most-gb 20 --batch 1

A step is forward, backward, clipping and AdamW on a batch that lies in memory. Nothing differs between the sides but the backend
(`use_backend`): "reference" is the same formulas in plain PyTorch. Loss and gradients are compared before anything is timed; the sides take
turns. Tokens are the places of the language model's sequence, of images and of text. Weights are random. At full width the frozen tower
and language model are bf16, with LoRA on the latter, and steps run under bf16 autocast. Nothing is begun where too little memory is free.
"""

import argparse
import os
import re
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import machine, record, timer
from cmoe_kernels import backends, use_backend

TEXT = 48  # tokens of text in a sample
AT_ONCE = 2**24  # elements of a gradient that are compared in fp64: half a billion at once would need as much memory as the model
SUITE = "training"
REFERENCE = "reference"
_FULL = """
vision.image_size=224 vision.patch_size=14 vision.width=1408 vision.layers=39 vision.heads=16 vision.config.intermediate_size=6144
vision.freeze=true vision.dtype=bf16 connector.hidden_features=4096 connector.router_features=45056 connector.task_features=5632
language.width=4096 language.layers=2 language.heads=32 language.mlp_width=11008 language.dtype=bf16 language.lora.r=8
train.precision=bf16
"""
WIDTHS = {"small": ("", 16), "full": (_FULL, 1)}  # overrides of the recipe tiny, samples a step
TITLES = {"small": "the demo's model, fp32", "full": "Uni-Med's widths, two layers of Llama, bf16"}


def texts() -> list[str]:
    """What the tokenizer is made from; the batch has random tokens."""
    return ["[INST] <Img><ImageHere></Img> [vqa] which organ is in the image? [/INST] liver", "[INST] [qa] is aspirin a drug? [/INST] yes"]


def needed_gb(recipe: Any) -> float:
    """The larger of a step and of twice the weights: bf16 ones are made in fp32."""
    from unimed.estimate import step_memory

    found = step_memory(recipe, TEXT)
    return max(found.total, 2 * found.parameters) / 1e9


def free_gb() -> float:
    """Memory that can be had without swapping."""
    found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    assert found is not None
    return int(found[1]) * 1024 / 1e9


def require_memory(width: str, recipe: Any, most_gb: float) -> None:
    """Ends the program with one line where a step does not fit."""
    needed = needed_gb(recipe)
    if needed > min(most_gb, free_gb()):
        raise SystemExit(f"--width {width}: needs {needed:.1f} GB; {free_gb():.1f} GB are free, and --most-gb is {most_gb:g}")


def prepare(recipe: Any, batch: int) -> tuple[torch.nn.Module, dict[str, Tensor]]:
    """The model of a recipe with its trainable parts, and a batch with one image a sample, tasks in turn."""
    from unimed.models.build import adapt, build

    model, _ = build(recipe, texts(), seed=0)
    config = model.config
    with tempfile.TemporaryDirectory() as folder:
        model = adapt(model, recipe, Path(folder) / "base")
    model.train()
    images, side = config.num_image_tokens, config.vision_config.image_size
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(5, config.text_config.vocab_size - 1, (batch, images + TEXT), generator=draw)
    ids[:, 2 : 2 + images] = config.image_token_index
    labels = ids.clone()
    labels[:, : 2 + images] = -100
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    inputs["task_ids"] = torch.arange(batch) % len(config.connector["tasks"])
    return model, inputs | {"pixel_values": torch.randn(batch, 3, side, side, generator=draw)}


def steps(model: torch.nn.Module, inputs: dict[str, Tensor], bf16: bool) -> tuple[Callable[[str], float], Callable[[str], list[Tensor]]]:
    """A training step by backend, which gives its loss; and the gradients of one without an update."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-6)

    def backward(backend: str) -> float:
        autocast = torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext()
        with nullcontext() if backend == "auto" else use_backend(backend):
            with autocast:
                loss = model(**inputs).loss
            loss.backward()
        return float(loss.detach())

    def step(backend: str) -> float:
        loss = backward(backend)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        return loss

    def gradients(backend: str) -> list[Tensor]:
        backward(backend)
        found = [torch.zeros(()) if p.grad is None else p.grad for p in trained]
        optimiser.zero_grad(set_to_none=True)
        return found

    return step, gradients


def check(ours: list[Tensor], theirs: list[Tensor], bf16: bool) -> float:
    """The relative RMS distance of all gradients together.

    Raises:
        ValueError: it is beyond what rounding makes.
    """
    pairs = [pair for two in zip(ours, theirs, strict=True) for pair in zip(*(one.flatten().split(AT_ONCE) for one in two), strict=True)]
    apart = sum(float((a.double() - b.double()).square().sum()) for a, b in pairs)
    worst = (apart / max(sum(float(b.double().square().sum()) for _, b in pairs), 1e-300)) ** 0.5
    if not worst < (5e-2 if bf16 else 1e-4):
        raise ValueError(f"the gradients of the two backends differ by {worst:.2e}")
    return worst


def measure(width: str, batch: int, seconds: float, overrides: list[str], most_gb: float, cpu_time: bool = False) -> dict[str, Any]:
    from unimed.train import recipe as recipes

    recipe = recipes.load("tiny", [*WIDTHS[width][0].split(), f"train.batch_size={batch}", *overrides])
    require_memory(width, recipe, most_gb)
    model, inputs = prepare(recipe, batch)
    bf16 = recipe.train.precision == "bf16"
    step, gradients = steps(model, inputs, bf16)
    apart = check(gradients("auto"), gradients(REFERENCE), bf16)
    ours, theirs = timer.alternate(
        lambda: step("auto"), lambda: step(REFERENCE), seconds, least=3, clock=time.process_time if cpu_time else time.perf_counter
    )
    tokens = inputs["input_ids"].numel()
    sides = {}
    for name, times in (("kernels", ours), (REFERENCE, theirs)):
        rates = {"images_per_second": batch / times.quantile(0.5), "tokens_per_second": tokens / times.quantile(0.5)}
        sides[name] = {**times.summary(), **{rate: round(value, 3) for rate, value in rates.items()}}
    return {
        "title": TITLES[width],
        "clock": "CPU time" if cpu_time else "time",
        "samples": batch,
        "tokens": tokens,
        "parameters": sum(p.numel() for p in model.parameters()),
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "gradients_apart": float(f"{apart:.2e}"),
        "served_by": backends.choose("soft_experts", "cpu", torch.bfloat16 if bf16 else torch.float32),
        "sides": sides,
        "ratio": round(timer.ratio(ours, theirs), 3),
    }


def _threads(count: int) -> str:
    return f"{count} thread{'s' * (count > 1)}"


def row(document: dict[str, Any]) -> str:
    """README's lines of what was measured at both widths."""
    cases = [document["cases"][width] for width in WIDTHS]
    images, tokens = (
        [" / ".join(_digits(one["sides"][side][f"{what}_per_second"]) for side in ("kernels", REFERENCE)) for one in cases]
        for what in ("images", "tokens")
    )
    clocks = " and ".join(sorted({one["clock"] for one in cases} - {"time"}))
    cpu = " ".join(re.sub(r"\([^)]*\)|Processor|@", " ", document["machine"]["cpu"]).split())
    measured = [cpu, _threads(document["threads"]), clocks, cases[-1]["run"]["date"][:10]]
    return (
        "Whole training steps (`python -m benchmarks.training`), with our kernels / with plain PyTorch in the connector: "
        f"{images[0]} images/s and\n{tokens[0]} tokens/s for {cases[0]['title']}; {images[1]} and {tokens[1]} for {cases[1]['title']}\n"
        f"({', '.join(filter(None, measured))})."
    )


def _digits(rate: float) -> str:
    """Two digits of what is small, no decimals of what is large."""
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:#.2g}"


def arguments(name: str, doc: str | None, least: str) -> argparse.ArgumentParser:
    """The options that benchmarks of the whole model share. least: what is timed at least, however long it takes."""
    parser = argparse.ArgumentParser(f"python -m benchmarks.{name}", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", choices=list(WIDTHS), default="small")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--seconds", type=float, default=30, help=f"time for all sides, but at least {least} (default: 30)")
    parser.add_argument("--cpu-time", action="store_true", help="seconds of the process, with --threads 1: on a machine that others use")
    parser.add_argument("--most-gb", type=float, default=20, help="memory that it may take (default: 20)")
    parser.add_argument("--out", type=Path, help="results file (default: by machine and threads, in benchmarks/results/)")
    parser.add_argument("overrides", nargs="*", help="of the recipe, as in unimed train: connector.router=sparse")
    return parser


def run(
    parser: argparse.ArgumentParser, options: argparse.Namespace, suite: str, measured: Callable[[], dict[str, Any]]
) -> tuple[Any, Path]:
    """Measures, and puts the result into its file: both."""
    if options.cpu_time and options.threads != 1:
        parser.error("--cpu-time: needs --threads 1; seconds of several threads add up")
    threads = record.set_threads(options.threads)
    described = machine.describe()
    out = options.out or record.RESULTS / f"{suite}-{machine.slug(described, threads)}.json"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    found = measured()
    found["run"] = machine.run_info(threads)
    record.merge(out, described, " ".join([options.width, *options.overrides]), found, suite)
    return found, out


def main() -> None:
    parser = arguments(SUITE, __doc__, "three steps of each")
    parser.add_argument("--batch", type=int, help="samples a step (default: 16, at full width 1)")
    options = parser.parse_args()
    batch = options.batch or WIDTHS[options.width][1]
    found, out = run(
        parser,
        options,
        SUITE,
        lambda: measure(options.width, batch, options.seconds, options.overrides, options.most_gb, options.cpu_time),
    )
    for side, one in found["sides"].items():
        times = " / ".join(f"{one[f'p{q}_ms']:.0f}" for q in (20, 50, 80))
        rates = f"{one['images_per_second']:.2f} images/s, {one['tokens_per_second']:.0f} tokens/s"
        print(f"{side}: p20/p50/p80 {times} ms, {rates}, {one['calls']} steps")
    print(f"{found['ratio']:.2f} times as fast with kernels; {out}")


if __name__ == "__main__":
    main()
