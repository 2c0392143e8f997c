"""Is a mixture of projection experts a better connector than one MLP? `unimed study connectors`, on the built-in CT and MR slices.

The ablation of Uni-Med (NeurIPS 2024, Table 2) in miniature, one factor at a time: connector and router, number of experts, the router's
inputs, the resampler. Two rows that the paper lacks have one MLP, widened to the parameters and to the multiply-adds of the CMoE. A CMoE is
compared with the MLP of the same resampler.

Everything else is that of the tiny recipe. The learning rate is chosen on the MLP, with a seed of its own, by the held-out slabs, and is
the same for all rows. The table is on the held-out subject.
"""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from unimed import io
from unimed.studies import run as runner
from unimed.studies.run import CHOICE_SEED, Job, Study

MLP = ("connector.num_experts=1", "connector.router=constant")
AVERAGE, MAXIMUM = "connector.resample=avgpool", "connector.resample=maxpool"
PARAMETERS, OPERATIONS = "mlp-parameters", "mlp-flops"  # their width is computed
SETTINGS: dict[str, tuple[str, Sequence[str]]] = {
    "mlp": ("one MLP; four neighbours of a row side by side (projection)", MLP),
    "mlp-avgpool": ("one MLP; average pooling", (*MLP, AVERAGE)),
    "mlp-maxpool": ("one MLP; maximum pooling", (*MLP, MAXIMUM)),
    "cmoe-soft": ("CMoE as in the paper: 5 experts, soft router that reads task and token, projection", ()),
    "cmoe-sparse": ("CMoE, sparse router: 2 of 5 experts", ("connector.router=sparse",)),
    "cmoe-hard": ("CMoE, hard router: an expert a task", ("connector.router=hard",)),
    "cmoe-constant": ("CMoE, constant router: the mean of 5 experts", ("connector.router=constant",)),
    "cmoe-3": ("CMoE, soft router, 3 experts", ("connector.num_experts=3",)),
    "cmoe-avgpool": ("CMoE, soft router; average pooling", (AVERAGE,)),
    "cmoe-maxpool": ("CMoE, soft router; maximum pooling", (MAXIMUM,)),
    "cmoe-token": ("CMoE, soft router that reads the token only", ("connector.router_inputs=token",)),
    "cmoe-task": ("CMoE, soft router that reads the task only", ("connector.router_inputs=task",)),
    PARAMETERS: ("one MLP with as many parameters as cmoe-soft", MLP),
    OPERATIONS: ("one MLP with as many multiply-adds a token as cmoe-soft", MLP),
}
RATES = (5e-4, 1e-3, 2e-3)
CHOICES = {f"rate-{rate:g}": f"mlp with the learning rate {rate:g}" for rate in RATES}
# The metric of each task, in the paper's order; strict, so that repeated words and several answers gain nothing.
COLUMNS = {
    "vqa": ("vqa BLEU-1", "bleu1_strict"),
    "refer": ("refer IoU", "miou_strict"),
    "identify": ("identify accuracy", "accuracy_strict"),
    "caption": ("caption BLEU-1", "bleu1_strict"),
    "cls": ("cls accuracy", "accuracy_strict"),
    "qa": ("qa accuracy", "accuracy"),  # has the strict form only
}
APART = (COLUMNS["qa"][0],)  # text questions meet no connector
KEPT = ("mlp", "cmoe-soft")  # rows whose models `unimed study interference` reads
LORA_RANKS = (4, 8, 16)  # the paper's ablation of the language model's LoRA
SAVES, POINTS = 4, 8  # checkpoints of a run, and points of its probe


def prepare(data: Path, seeds: Sequence[int]) -> None:
    """sample/; its index is made here, before several runs want it at one time."""
    from unimed.sample.build import build_sample
    from unimed.train import run as training

    build_sample(data / "sample")
    for split in ("train", "slab", "subject"):
        training.items(_load([f"data.root={data / 'sample'}"]), split)


def _load(given: Sequence[str]) -> Any:
    from unimed.train import recipe as recipes

    return recipes.load("tiny", list(given))


# Sizes


def parameters(config: Any) -> int:
    """Of a connector: experts, router and task tokens."""
    from cmoe_kernels import CMoEConnector

    return sum(p.numel() for p in CMoEConnector(config, device="meta").parameters())


def operations(config: Any) -> int:
    """Multiply-adds of a connector's forward for one of its tokens. The router's task columns are a row a task, not a token's."""
    wide = config.features + config.out_features if config.expert == "mlp" else 0
    one = config.hidden * wide or config.features * config.out_features
    used = {"hard": 1, "sparse": config.top_k}.get(config.router, config.num_experts)
    router = 0
    if config.learned and config.router_inputs != "task":
        width = config.router_features or 4 * config.router_in
        router = config.features * config.num_experts if config.router_layers == 1 else width * (config.features + config.num_experts)
    return used * one + router


@cache
def _sizes(given: tuple[str, ...]) -> Any:
    """The connector that the tiny recipe has with these overrides."""
    from cmoe_kernels import CMoEConfig
    from unimed.models.build import describe

    return CMoEConfig.from_dict(describe(_load(given)).connector)


def width(row: str, base: tuple[str, ...] = ()) -> int:
    """The hidden width of the one MLP whose parameters, or multiply-adds, are nearest to those of cmoe-soft."""
    paper, mlp = _sizes(base), _sizes((*base, *MLP))
    unit = mlp.features + mlp.out_features
    if row == OPERATIONS:
        return max(round(operations(paper) / unit), 1)
    return max(round((parameters(paper) - mlp.out_features) / (unit + 1)), 1)  # a bias comes with each hidden unit


def overrides(row: str, base: tuple[str, ...] = ()) -> tuple[str, ...]:
    """What the tiny recipe is changed by."""
    widened = (f"connector.hidden_features={width(row, base)}",) if row in (PARAMETERS, OPERATIONS) else ()
    return (*base, *SETTINGS[row][1], *widened)


def size(row: str, base: tuple[str, ...] = ()) -> dict[str, int]:
    """Parameters, multiply-adds a token and hidden width of a row's connector. The two widened MLPs are checked."""
    config = _sizes(overrides(row, base))
    found = {"parameters": parameters(config), "operations": operations(config), "hidden": config.hidden}
    if row in (PARAMETERS, OPERATIONS):
        what = "parameters" if row == PARAMETERS else "operations"
        wanted = {"parameters": parameters, "operations": operations}[what](_sizes(base))
        # Half a hidden unit at most is missing or too much.
        assert 2 * abs(found[what] - wanted) <= config.features + config.out_features + 1, (row, found, wanted)
    return found


# Runs


# Of every run. Tests make the models smaller, and answer fewer items of a task.
BASE: tuple[str, ...] = ()
LIMIT = 0


def run(job: Job) -> dict[str, Any]:
    """Trains and evaluates one row with one seed, or the MLP with one learning rate."""
    from unimed.evaluate.evaluate import spread
    from unimed.inference.session import load
    from unimed.studies.score import score
    from unimed.train import run as training
    from unimed.train.folder import Run

    choosing = job.row in CHOICES
    tried = {} if choosing else _tried(job)
    rate = RATES[list(CHOICES).index(job.row)] if choosing else max(tried, key=lambda one: (tried[one], -one))
    row = "mlp" if choosing else job.row
    recipe = _recipe(job, row, rate, probe=not choosing)
    place = job.folder / "run"
    folder = Run(place)
    if not folder.record.is_file():
        training.train(recipe, place, resume=folder.recipe.is_file())
    if folder.probe.is_file():
        shutil.copyfile(folder.probe, job.folder / folder.probe.name)  # beside the log: --clean leaves it
    session = load(place, "cpu")
    items = spread(training.items(recipe, "slab" if choosing else "subject"), LIMIT)
    metrics = score(session, items)
    blank = {} if choosing else score(session, items, blank=True)
    record = io.read_json(folder.record)
    return {
        "scores": _columns(metrics),
        "blank": _columns(blank),
        "metrics": metrics,
        "learning rate": rate,
        "tried": {f"{one:g}": value for one, value in tried.items()},
        "connector": size(row, BASE),
        "training seconds": record["seconds"],
        "probe seconds": record.get("probe_seconds", 0.0),
    }


def _columns(metrics: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    return {name: metrics[task][metric] for task, (name, metric) in COLUMNS.items() if task in metrics}


def _tried(job: Job) -> dict[float, float]:
    """The mean score on the held-out slabs by learning rate."""
    found = {}
    for rate, choice in zip(RATES, CHOICES, strict=True):
        scores = io.read_json(Job(job.out, choice, CHOICE_SEED, job.steps).folder / "result.json")["scores"]
        found[rate] = statistics.fmean(value for name, value in scores.items() if name not in APART)
    return found


def _recipe(job: Job, row: str, rate: float, probe: bool) -> Any:
    log = max(job.steps // 20, 1)
    return _load(
        [
            *overrides(row, BASE),
            "name=study",
            f"data.root={job.data / 'sample'}",
            f"train.max_steps={job.steps}",
            f"train.seed={job.seed}",
            f"train.log_every={log}",
            f"train.save_every={log * max(job.steps // (SAVES * log), 1)}",
            "train.keep=1",
            f"train.probe_every={max(job.steps // POINTS, 1) * probe}",
            "train.threads=1",
            f"optim.lr={rate}",
            f"optim.warmup_steps={min(50, max(job.steps // 10, 1))}",
        ]
    )


def tidy(job: Job) -> None:
    """A finished run keeps no checkpoint, and a model only where `unimed study interference` reads it."""
    place = job.folder / "run"
    for folder in (*place.glob("checkpoint-*"), *([] if job.row in KEPT else [place / "model"])):
        shutil.rmtree(folder, ignore_errors=True)


# The end of the table


def notes(results: Mapping[str, Mapping[int, dict[str, Any]]]) -> list[str]:
    """What the rows are made of, what black images score, the paper's row against equal budgets, and what was not run."""
    header = ("row", "hidden width", "parameters", "multiply-adds a token", "training, s", "probe", "mean score on black images")
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for row, seeds in results.items():
        first = next(iter(seeds.values()))["connector"]
        seconds = statistics.fmean(one["training seconds"] for one in seeds.values())
        blank = statistics.fmean(statistics.fmean(one["blank"].values()) for one in seeds.values())
        sizes = " | ".join(f"{first[name]:,}" for name in ("hidden", "parameters", "operations"))
        share = statistics.fmean(one["probe seconds"] / one["training seconds"] for one in seeds.values())
        lines.append(f"| {row} | {sizes} | {seconds:.0f} | {share:.1%} | {blank:.3f} |")
    lines += ["", "Sizes are the connector's. Probe: the share of the training time that the points of `train.probe_every` took.", ""]
    lines += _equal_budgets(results)
    some = next(iter(next(iter(results.values())).values()))
    tried = ", ".join(f"{rate}: {value:.3f}" for rate, value in some["tried"].items())
    lines += [
        f"Learning rate {some['learning rate']:g} for all rows: the best mean of the MLP on the held-out slabs, with a seed of its own "
        f"({tried}). All other choices are those of the tiny recipe. Scores are on the held-out subject.",
        "",
        "The paper's rows with other LoRA ranks were not run. They need SmolLM2 (`unimed sample fetch smollm2`): "
        + ", ".join(f"`{' '.join(command)}`" for command in lora_commands())
        + ".",
    ]
    return lines


def _equal_budgets(results: Mapping[str, Mapping[int, dict[str, Any]]]) -> list[str]:
    """cmoe-soft over the MLPs with its parameters and its multiply-adds."""
    lines = []
    for row in (PARAMETERS, OPERATIONS):
        both = sorted(set(results.get("cmoe-soft", {})) & set(results.get(row, {})))
        each = [runner.gain(STUDY, results["cmoe-soft"][seed], results[row][seed]) for seed in both]
        if each:
            lines.append(f"| cmoe-soft | {' | '.join(runner.gain_cells(row, each))} |")
    header = ["| row | against | gain, % | gain, points | up, down |", "|---|---|---|---|---|"]
    return [*header, *lines, ""] if lines else []


def lora_commands() -> list[list[str]]:
    """A training of 100 steps with SmolLM2 for each rank; the scale alpha / r is that of the recipe."""
    return [
        f"unimed train smollm2 language.lora.r={rank} language.lora.alpha={2 * rank} train.max_steps=100 --name lora-{rank}".split()
        for rank in LORA_RANKS
    ]


def _against(row: str) -> str:
    pooling = row.rpartition("-")[2]
    return f"mlp-{pooling}" if pooling in ("avgpool", "maxpool") else "mlp"


STUDY = Study(
    name="connectors",
    title="Connectors: one MLP and mixtures of projection experts",
    rows={row: what for row, (what, _) in SETTINGS.items()},
    against={row: _against(row) for row in SETTINGS if row not in ("mlp", "mlp-avgpool", "mlp-maxpool")},
    steps=1500,
    prepare=prepare,
    run=run,
    notes=notes,
    tidy=tidy,
    choices=CHOICES,
    apart=APART,
)
