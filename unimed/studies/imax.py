"""Do tasks that share their images teach more? `unimed study imax`, on the built-in CT and MR slices.

    pool     all training slices (every slice of each plane), with all seven tasks
    imax     every eighth block of four neighbours of the pool, with all tasks: aligned, few images
    dmax     one task an image, drawn from the whole pool, as many entries of every task as imax: not aligned, many images
    less     the images of imax with one task each: not aligned, few images, a seventh of the entries
    staged   dmax in three stages: a model trained on it labels the tasks that its images lack (pseudo-IMAX), one is trained on both, and
             is tuned on dmax by itself. Answers are kept that two views of an image agree on, and that the model finds likely. The steps of
             all stages together are those of one run of the other arms

each with two models: the tiny one with a CMoE connector of five experts, and the same with one MLP. All arms but staged have a third, the
tiny Med-MoE. Its three stages share the steps as the demo's do, and its domains are CT and MR. One test set for all: the held-out subject.
The draw of dmax and less, and the training, differ by seed.

An eighth, not a quarter: seven tasks of one image need seven images with one task each. `cls` is none of the seven tasks.

Every run measures the empirical Fisher information at the connector (`studies.fisher`) on samples of its own data. The paper's strategy is
known from its abstract only: the filters, the shares of the steps and the rates of learning are ours.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from unimed import io
from unimed.errors import UserError
from unimed.records import jsonl
from unimed.records.record import QA, Annotation, BoxOf, Label, Labels, Number, Record, Report
from unimed.studies.run import Job, Study

TASKS = ("vqa", "refer", "identify", "caption", "severity", "findings", "calculation")
RATIOS = {"vqa": 5, "refer": 8, "identify": 5, "caption": 1, "severity": 2, "findings": 2, "calculation": 3}
ARMS = {
    "imax": "an eighth of the training images, all tasks of each",
    "dmax": "one task an image, the same entries of every task",
    "less": "the images of imax, one task each",
    "staged": "dmax in three stages with pseudo labels",
}
MEDMOE = "medmoe"
# Overrides of the recipe tiny; of medmoe-1, whose parts the next stages take over.
MODELS = {
    "cmoe": [],
    "mlp": ["connector.num_experts=1", "connector.router=constant"],
    MEDMOE: ["medmoe.domains={CT: ['*/ct*/*'], MR: ['*/mr*/*']}"],
}
MEDMOE_STAGES = (300 / 2400, 1400 / 2400, 700 / 2400)  # of the steps
ROWS = {f"{arm}-{model}": (arm, model) for model in MODELS for arm in ARMS if (arm, model) != ("staged", MEDMOE)}
EIGHTH = 8
STAGES = (0.4, 0.4, 0.2)  # of the steps: training, joint training with pseudo labels, tuning
LIKELY = 0.5  # the least confidence of a pseudo label
QUESTIONS = {"Which modality is this image?": "vqa/modality", "Which plane is this image?": "vqa/plane"}
DATA_SEEDS = 5  # draws of dmax that are tried for a seed
SAVES = 4  # checkpoints of a run


def prepare(data: Path, seeds: Sequence[int]) -> None:
    """pool/, imax/, dmax-SEED/, less-SEED/."""
    from unimed.sample.imax import block_of, build_imax_sample

    build_imax_sample(data / "pool", step=1)
    info = jsonl.read_info(data / "pool")
    train = [one for _, one in jsonl.read_records(data / "pool", split="train")]
    blocks = sorted({block_of(one) for one in train})
    kept = set(blocks[::EIGHTH])
    image_centric = [one for one in train if block_of(one) in kept]
    _write(data / "imax", info, image_centric)
    _write(data / "train", info, train)
    for seed in seeds:
        _twin(data, seed)
        _write(data / f"less-{seed}", info, _one_task_each(image_centric, seed))


def _write(folder: Path, info: jsonl.DatasetInfo, records: Iterable[Record]) -> None:
    """Records whose images stay in the pool's folder."""
    rooted = (
        one.model_copy(update={"images": tuple(ref.model_copy(update={"path": f"pool:{ref.path}"}) for ref in one.images)})
        for one in records
    )
    jsonl.write(folder, info.model_copy(update={"name": folder.name, "roots": {"pool": "../pool"}}), rooted)


def _twin(data: Path, seed: int) -> None:
    from unimed.datasets.dmax import build_dmax

    for attempt in range(DATA_SEEDS):
        try:
            build_dmax(data / "imax", data / f"dmax-{seed}", data / "train", seed=seed + 1000 * attempt)
            return
        except UserError:
            if attempt == DATA_SEEDS - 1:
                raise


def _one_task_each(records: Sequence[Record], seed: int) -> list[Record]:
    """Each image with one of its tasks, which come equally often where that can be."""
    from unimed.datasets.dmax import part_of
    from unimed.datasets.entries import entries

    often: dict[str, int] = dict.fromkeys(TASKS, 0)
    found = []
    for place in np.random.default_rng(seed).permutation(len(records)):
        record = records[place]
        by_task: dict[str, list[int]] = defaultdict(list)
        for task, _, number in entries(record):
            by_task[task].append(number)
        task = min(by_task, key=lambda one: (often[one], one))
        often[task] += 1
        found.append(part_of(record, {task: by_task[task]}))
    return found


def _recipe(job: Job, base: str, roots: Mapping[str, Path], steps: int, *more: str) -> Any:
    from unimed.train import recipe as recipes

    ratios = "{" + ", ".join(f"{task}: {ratio}" for task, ratio in RATIOS.items()) + "}"
    log = max(steps // 20, 1)
    given = [
        "name=study",
        f"data.tasks=[{','.join(TASKS)}]",
        *(f"data.sets.{name}.root={root}" for name, root in roots.items()),
        f"sampler.ratios={ratios}",
        f"train.max_steps={steps}",
        f"train.seed={job.seed}",
        f"train.log_every={log}",
        f"train.save_every={log * max(steps // (SAVES * log), 1)}",
        "train.keep=1",
        "train.probe_every=0",  # the Fisher probe is this study's
        "train.threads=1",
        f"optim.warmup_steps={min(50, max(steps // 10, 1))}",
        *more,
    ]
    return recipes.load(base, given)


def _train(
    job: Job,
    name: str,
    roots: Mapping[str, Path],
    steps: int,
    *more: str,
    base: str = "tiny",
    initial: Path | None = None,
    probe: bool = True,
) -> Path:
    """A finished training run of this name; one that was interrupted goes on from its last checkpoint."""
    from unimed.train.folder import Run
    from unimed.train.run import train

    place = job.folder / name
    if not Run(place).record.is_file():
        recipe = _recipe(job, base, roots, steps, *more)
        callbacks = [_Probe(job.folder / f"{name}-fisher.jsonl")] if probe else []
        train(recipe, place, resume=Run(place).recipe.is_file(), callbacks=callbacks, initial=initial)
    return place


def _medmoe(job: Job, roots: Mapping[str, Path]) -> Path:
    """The tiny Med-MoE's three stages. The connector is frozen in the last."""
    first, second, third = (max(round(share * job.steps), 1) for share in MEDMOE_STAGES)
    aligned = _train(job, "stage-1", roots, first, *MODELS[MEDMOE], base="medmoe-1")
    tuned = _train(job, "stage-2", roots, second, f"from={aligned}", base="medmoe-2")
    return _train(job, "stage-3", roots, third, f"from={tuned}", base="medmoe-3", probe=False)


def run(job: Job) -> dict[str, Any]:
    """Trains and evaluates one row with one seed."""
    arm, _, model = job.row.rpartition("-")
    more: dict[str, Any] = {}
    if arm == "staged":
        place, more = _staged(job, MODELS[model])
    else:
        roots = {arm: job.data / ("imax" if arm == "imax" else f"{arm}-{job.seed}")}
        place = _medmoe(job, roots) if model == MEDMOE else _train(job, "run", roots, job.steps, *MODELS[model])
    points = [point for path in sorted(job.folder.glob("*-fisher.jsonl")) for point in _points(path)]
    scores, metrics = evaluate(place, job.data / "pool")
    trained = [io.read_json(path) for path in job.folder.glob("*/run.json")]
    return {
        "scores": scores,
        "metrics": metrics,
        "fisher": points,
        "training seconds": sum(one["seconds"] for one in trained),
        "probe seconds": sum(point["seconds"] for point in points),
        **more,
    }


def evaluate(place: Path, pool: Path) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """The strict score of every task on the held-out subject, and all metrics."""
    from unimed.datasets.load import load_set
    from unimed.inference.session import load
    from unimed.studies.score import score, strict

    metrics = score(load(place, "cpu"), list(load_set("pool", pool, "records", "test", TASKS)))
    return strict(metrics), metrics


# The strategy in three stages


def _staged(job: Job, model: Sequence[str]) -> tuple[Path, dict[str, Any]]:
    """Training on dmax, joint training with the labels that the first model gives, tuning on dmax."""
    dmax = job.data / f"dmax-{job.seed}"
    first, second, third = (max(round(share * job.steps), 1) for share in STAGES)
    teacher = _train(job, "stage-1", {"dmax": dmax}, first, *model)
    pseudo = job.folder / "pseudo"
    if not (pseudo / io.MANIFEST).is_file():
        _label(teacher / "model", dmax, pseudo, job.seed)
    joint = _train(job, "stage-2", {"dmax": dmax, "pseudo": pseudo}, second, *model, initial=teacher / "model")
    tuned = _train(job, "stage-3", {"dmax": dmax}, third, *model, "optim.lr=2e-4", initial=joint / "model")
    return tuned, {"pseudo": io.read_json(pseudo / "pseudo.json")}


def _label(teacher: Path, dmax: Path, out: Path, seed: int) -> None:
    """Writes the records of dmax with the tasks that they lack, as the teacher answers them, where two views agree and it is confident."""
    from unimed.inference.session import load

    session = load(teacher, "cpu")
    info = jsonl.read_info(dmax)
    records = [one for _, one in jsonl.read_records(dmax, split="train")]
    names = info.classes["organ"]
    grades = next((name, values) for name, values in info.classes.items() if name != "organ")
    asked = [_asked(one, names, grades) for one in records]
    answered, counts = _answers(session, dmax, info, asked, seed)
    # Boxes are asked for the organs that the first round found.
    boxes = [_boxes(record, some, names) for record, some in zip(records, answered, strict=True)]
    found, more = _answers(session, dmax, info, boxes, seed)
    told = {task: [counts.get(task, [0, 0])[i] + more.get(task, [0, 0])[i] for i in (0, 1)] for task in {**counts, **more}}
    made = [
        one.model_copy(update={"id": f"{one.id}-pseudo", "annotations": (*some, *extra), "source": "pseudo"})
        for one, some, extra in zip(records, answered, found, strict=True)
        if some or extra
    ]

    def write(place: Path) -> Iterable[Record]:
        io.write_json(place / "pseudo.json", {task: {"asked": a, "kept": k} for task, (a, k) in told.items()})
        return made

    roots = {name: str((dmax / folder).resolve()) for name, folder in info.roots.items()}
    jsonl.write(out, info.model_copy(update={"name": "pseudo", "roots": roots}), write)


def _asked(record: Record, names: Sequence[str], grades: tuple[str, list[str]]) -> Record:
    """The record with a question for every task that it lacks; the answers stand there to be replaced."""
    from unimed.datasets.entries import entries

    there = {task for task, _, _ in entries(record)}
    some: list[Annotation] = []
    if "caption" not in there:
        some.append(Report(text="?"))
    if "severity" not in there:
        some.append(Label(set=grades[0], value=grades[1][0], task="severity"))
    if "findings" not in there:
        some.append(Labels(set="organ", absent=tuple(names)))
    if "vqa" not in there:
        some += [QA(question=question, answer="?", template=template) for question, template in QUESTIONS.items()]
    return record.model_copy(update={"annotations": tuple(some)})


def _boxes(record: Record, known: Sequence[Annotation], names: Sequence[str]) -> Record:
    """The record with a question for the box and the area of every organ that the first round found."""
    present = next((one.present for one in known if isinstance(one, Labels)), ())
    some: list[Annotation] = [BoxOf(name=name, xyxy=(0, 0, 1, 1), task="refer") for name in present if name in names]
    some += [Number(name=f"area of the {name}", value=1, unit="cm2") for name in present[:1]]
    return record.model_copy(update={"annotations": tuple(some)})


def _answers(
    session: Any, dmax: Path, info: jsonl.DatasetInfo, asked: Sequence[Record], seed: int
) -> tuple[list[list[Annotation]], dict[str, list[int]]]:
    """Annotations by record in place of those that were asked, and how many of each task were asked and kept."""
    from unimed.datasets.items import items
    from unimed.records.image import Images
    from unimed.records.policy import Rules, Tally
    from unimed.records.source import Source

    source = Source(
        Tally("pseudo", dmax, "train", Rules(protocol="standard")), Images(dmax, info.roots), classes=info.classes, graded=True, own=True
    )
    places, made = [], []
    for at, record in enumerate(asked):
        for number in range(len(record.annotations)):
            one = record.model_copy(update={"annotations": (record.annotations[number],)})
            for item in items(source, one, record.id):
                places.append((at, number))
                made.append(item)
    found: list[list[Annotation]] = [[] for _ in asked]
    counts: dict[str, list[int]] = {}
    order = sorted(range(len(made)), key=lambda i: made[i].task)  # prompts of one task are about equally long
    plain = session.generate([made[i] for i in order], 64, 64, details=True)
    other = session.generate([_dimmed(made[i]) for i in order], 64, 64)
    for i, one, again in zip(order, plain, other, strict=True):
        count = counts.setdefault(made[i].task, [0, 0])
        count[0] += 1
        at, number = places[i]
        answer = _answer(asked[at].annotations[number], one.text, made[i])
        if one.text == again.text and one.confidence >= LIKELY and answer is not None:
            count[1] += 1
            found[at].append(answer)
    return found, counts


def _dimmed(item: Any) -> Any:
    """The item with another view of its image: less contrast."""
    from unimed.records.pixels import load_image

    pixels = np.asarray(load_image(item.image).convert("RGB"), dtype=np.float32)
    return replace(item, image=np.clip(pixels * 0.9 + 8, 0, 255).astype(np.uint8))


def _answer(one: Annotation, text: str, item: Any) -> Annotation | None:
    """What was asked with the model's answer in its place; None where that is no answer."""
    from unimed.records import box as boxes
    from unimed.tasks import answers
    from unimed.tasks.calculation import value
    from unimed.tasks.cls import NOTHING

    if not text.strip():
        return None
    if isinstance(one, Report):
        return one.model_copy(update={"text": text})
    if isinstance(one, QA):
        return one.model_copy(update={"answer": text})
    if isinstance(one, Number):
        number = value(text)
        return None if number is None or not math.isfinite(number) else one.model_copy(update={"value": number})
    if isinstance(one, BoxOf):
        box = boxes.from_text(text)
        if box is None or box.x1 >= box.x2 or box.y1 >= box.y2:
            return None
        return one.model_copy(update={"xyxy": tuple(boxes.to_pixels(box, item.size)), "task": ""})  # trains naming it, too
    said = {name.strip().lower() for name in text.split(",")}
    if isinstance(one, Label):
        classes = answers.options(item)
        return one.model_copy(update={"value": text.strip()}) if text.strip().lower() in classes else None
    known = set(one.absent)
    if not (said <= known or said == {NOTHING}):
        return None
    present = tuple(name for name in one.absent if name in said)
    return one.model_copy(update={"present": present, "absent": tuple(name for name in one.absent if name not in present)})


# The Fisher information


def _points(path: Path) -> list[dict[str, Any]]:
    """The points of a probe, the last one of a step: a run that was resumed has measured some again."""
    found = {(point["step"], point["module"]): point for point in io.written_lines(path)}
    return [{**point, "stage": path.name.removesuffix("-fisher.jsonl")} for point in found.values()]


def _Probe(out: Path) -> Any:
    """A FisherProbe at the connector that takes its samples from the training set once training begins."""
    from unimed.studies.fisher import FisherProbe
    from unimed.train.collate import Collator

    class Probe(FisherProbe):
        def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            data = given["train_dataloader"].dataset
            places = np.linspace(0, len(data) - 1, min(32, len(data))).astype(int)
            self.samples = [data[(int(place), 0)] for place in places]
            collator = Collator(given["processing_class"])
            self.collate = lambda samples: {name: one for name, one in collator(samples).items() if name != "sample_tasks"}

        def measure(self, model: Any, step: int = 0) -> list[dict[str, Any]]:
            before, self.out = self.seconds, None
            found = super().measure(model, step)
            kept = ("step", "module", "samples", "parameters", "entropy", "dominant_ratio", "trace")
            for point in found:
                line = {name: point[name] for name in kept}
                io.append_json_line(out, {**line, "seconds": round((self.seconds - before) / len(found), 3)})
            return found

    return Probe([None], dict, modules=("connector",))


def notes(results: Mapping[str, Mapping[int, dict[str, Any]]]) -> list[str]:
    """The Fisher information at the end of training, and how its two numbers go with the final score over all runs."""
    lines = [
        "| row | spectral entropy, every seed | dominant eigenvalue ratio, every seed | probe, share of training |",
        "|---|---|---|---|",
    ]
    pairs: list[tuple[float, float, float]] = []
    for row, seeds in results.items():
        last = [one["fisher"][-1] if one.get("fisher") else None for one in seeds.values()]
        cells = [", ".join(f"{point[name]:.3f}" if point else "–" for point in last) for name in ("entropy", "dominant_ratio")]
        shares = [one["probe seconds"] / one["training seconds"] for one in seeds.values() if one.get("training seconds")]
        lines.append(f"| {row} | {cells[0]} | {cells[1]} | {statistics.fmean(shares):.1%} |" if shares else f"| {row} | – | – | – |")
        pairs += [
            (point["entropy"], point["dominant_ratio"], statistics.fmean(one["scores"].values()))
            for point, one in zip(last, seeds.values(), strict=True)
            if point and one["scores"]
        ]
    lines += [
        "",
        "At the connector, after the last step that was measured (of medmoe in its second stage). Both are our definitions "
        "(unimed/studies/fisher.py).",
    ]
    if len(pairs) > 2:
        entropy, ratio, score = (np.array(column) for column in zip(*pairs, strict=True))
        lines.append(
            f"Correlation with the mean score over {len(pairs)} runs: entropy {_pearson(entropy, score)}, ratio {_pearson(ratio, score)}."
        )
    return lines


def _pearson(a: np.ndarray, b: np.ndarray) -> str:
    return f"{np.corrcoef(a, b)[0, 1]:+.2f}" if a.std() and b.std() else "not defined"


STUDY = Study(
    name="imax",
    title="Image-centric and decentralised data",
    rows={row: f"{ARMS[arm]}; {model}" for row, (arm, model) in ROWS.items()},
    against={row: f"dmax-{model}" for row, (arm, model) in ROWS.items() if arm != "dmax"},
    steps=1500,
    prepare=prepare,
    run=run,
    notes=notes,
)
