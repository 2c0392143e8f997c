"""What does each part of Med-MoE bring? `unimed study medmoe`, on the built-in sample.

    dense      the FFNs of every other layer train on as they are
    learned    upcycled; the router starts at random and trains with the experts
    modality   Med-MoE: the router that stage 2 trained on domains, frozen; one expert a token beside the meta expert
    no-meta    the same without the meta expert
    k2         the same with two experts a token

All are a third stage from one second stage, which the first run makes in OUT/start while the others wait. The seed is that of the third
stage: its order of samples and the random router. The steps of a run are those of the third stage; the first two have the demo's shares.
No loss balances the learned router, as in the release, whose coefficient is 0.
"""

from __future__ import annotations

import fcntl
import shutil
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unimed import io
from unimed.studies.run import START, Job, Study

ROWS = {
    "dense": ["medmoe.dense=true"],
    "learned": ["medmoe.router=learned"],
    "modality": [],
    "no-meta": ["medmoe.meta=false"],
    "k2": ["medmoe.top_k=2"],
}
MODEL: list[str] = []  # overrides of the first stage's parts
BEFORE = {1: 3 / 7, 2: 2.0}  # steps of stages 1 and 2, by those of stage 3
SPLITS = {"slab": "held-out slabs", "subject": "held-out subject"}
APART = ("qa",)  # text questions have no image, so no domain
SAVES = 4  # checkpoints of a run


def prepare(data: Path, seeds: Sequence[int]) -> None:
    """sample/."""
    from unimed.sample.build import build_sample

    build_sample(data / "sample")


def _train(job: Job, number: int, place: Path, steps: int, *more: str) -> Path:
    """A finished run of a stage; one that was interrupted goes on from its last checkpoint."""
    from unimed.train import recipe as recipes
    from unimed.train.folder import Run
    from unimed.train.run import train

    if not Run(place).record.is_file():
        log = max(steps // 20, 1)
        recipe = recipes.load(
            f"medmoe-{number}",
            [
                f"name={place.name}",
                f"data.root={job.data / 'sample'}",
                f"train.max_steps={steps}",
                f"train.log_every={log}",
                f"train.save_every={log * max(steps // (SAVES * log), 1)}",
                "train.keep=1",
                f"optim.warmup_steps={min(50 if number == 2 else 20, max(steps // 10, 1))}",
                *more,
            ],
        )
        train(recipe, place, resume=Run(place).recipe.is_file())
    return place


def _start(job: Job) -> Path:
    """The run of stage 2 that all rows and seeds start from. One process makes it."""
    folder = job.out / START
    folder.mkdir(exist_ok=True)
    first, second = (max(round(share * job.steps), 1) for share in BEFORE.values())
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        aligned = _train(job, 1, folder / "stage-1", first, *MODEL)
        return _train(job, 2, folder / "stage-2", second, f"from={aligned}")


def run(job: Job) -> dict[str, Any]:
    """Trains and evaluates one row with one seed."""
    from unimed.evaluate.evaluate import spread
    from unimed.evaluate.experts import routing
    from unimed.inference.session import load
    from unimed.models.medmoe import count_parameters
    from unimed.studies.score import score, strict
    from unimed.train import recipe as recipes
    from unimed.train import run as training

    start = _start(job)
    place = _train(job, 3, job.folder / "stage-3", job.steps, f"from={start}", f"train.seed={job.seed}", *ROWS[job.row])
    recipe, record = recipes.load(place / "recipe.yaml"), io.read_json(place / "run.json")
    session = load(place, "cpu")
    items = {split: spread(training.items(recipe, split), recipe.evaluate.limit) for split in SPLITS}
    metrics = {split: score(session, found) for split, found in items.items()}
    return {
        "scores": strict(metrics["slab"]),
        "blank": strict(score(session, items["slab"], blank=True)),
        "subject": strict(metrics["subject"]),
        "metrics": metrics,
        "experts": {} if job.row == "dense" else routing(place)["splits"],
        "parameters": count_parameters(session.model)._asdict() | {"trained": record["trained_parameters"]},
        "training seconds": record["seconds"],
        "router": io.read_json(start / "domains" / "domains.json"),
    }


def tidy(job: Job) -> None:
    """Deletes the checkpoints and the model: what they gave is in the result."""
    for path in (job.folder / "stage-3").iterdir():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)


def notes(results: Mapping[str, Mapping[int, dict[str, Any]]]) -> list[str]:
    """The held-out subject, whether tokens have the expert of their image's domain, sizes and times."""
    lines = [
        "The scores above are strict, on the held-out slabs. Of the held-out subject, their mean without qa:",
        "",
        "| row | held-out subject, mean and every seed | own expert, slabs: tokens / images | subject: tokens / images "
        "| parameters, M: all / a token's / trained | training, s |",
        "|---|---|---|---|---|---|",
    ]
    for row, seeds in results.items():
        each = list(seeds.values())
        means = [statistics.fmean(value for task, value in one["subject"].items() if task not in APART) for one in each]
        routed = [_own([one["experts"].get(split) for one in each]) for split in SPLITS]
        sizes = " / ".join(f"{each[0]['parameters'][name] / 1e6:.2f}" for name in ("total", "activated", "trained"))
        seconds = statistics.fmean(one["training seconds"] for one in each)
        told = f"{statistics.fmean(means):.3f} ({', '.join(f'{one:.3f}' for one in means)})"
        lines.append(f"| {row} | {told} | {routed[0]} | {routed[1]} | {sizes} | {seconds:.0f} |")
    majorities = _majorities(results)
    return [
        *lines,
        "",
        "Own expert: the share whose first choice is the expert of the image's domain; of tokens in all layers, and of images by the mean "
        f"of their tokens' logits. The most frequent domain has {majorities or 'no measured share'}. "
        "A learned router knows no domains, so its share tells how it splits them by itself.",
    ]


def _own(parts: Sequence[dict[str, Any] | None]) -> str:
    there = [one["accuracy"] for one in parts if one]
    return " / ".join(f"{statistics.fmean(one[name] for one in there):.3f}" for name in ("tokens", "samples")) if there else "–"


def _majorities(results: Mapping[str, Mapping[int, dict[str, Any]]]) -> str:
    """The share of the most frequent domain by split."""
    first: dict[str, Any] = next((one["experts"] for seeds in results.values() for one in seeds.values() if one["experts"]), {})
    return ", ".join(f"{part['accuracy']['majority']:.3f} ({SPLITS[split]})" for split, part in first.items())


STUDY = Study(
    name="medmoe",
    title="Med-MoE's parts",
    rows={
        "dense": "no experts: the FFNs train on as they are",
        "learned": "a learned router, one expert a token, meta expert",
        "modality": "the frozen router of domains, one expert a token, meta expert",
        "no-meta": "modality without the meta expert",
        "k2": "modality with two experts a token",
    },
    against={row: "dense" for row in ROWS if row != "dense"},
    steps=700,
    prepare=prepare,
    run=run,
    notes=notes,
    tidy=tidy,
    apart=APART,
)
