"""The study of image-centric data: its arms, the labels that a model gives, and one whole run of the longest arm."""

import json

import numpy as np
import pytest
from PIL import Image

from tests.unimed.conftest import SMALL
from unimed import io
from unimed.datasets.entries import count, entries
from unimed.records import jsonl
from unimed.records.record import QA, BoxOf, ImageRef, Label, Labels, Number, Record, Report
from unimed.studies import imax
from unimed.studies.run import Job
from unimed.tasks.item import Item

NAMES = ("liver", "spleen", "colon")


def item(question="", size=(200, 100)):
    return Item(id="x", task="severity", dataset="d", question=question, answer="small", size=size)


@pytest.mark.parametrize(
    ("one", "text", "expected"),
    [
        (Report(text="?"), "The liver is visible.", Report(text="The liver is visible.")),
        (Report(text="?"), " ", None),
        (QA(question="Which plane?", answer="?"), "axial", QA(question="Which plane?", answer="axial")),
        (Number(name="area", value=1), "between 12 and 14", None),
        (Number(name="area", value=1), "12.5", Number(name="area", value=12.5)),
        (BoxOf(name="liver", xyxy=(0, 0, 1, 1), task="refer"), "{<10><20><50><60>}", BoxOf(name="liver", xyxy=(20, 20, 100, 60))),
        (BoxOf(name="liver", xyxy=(0, 0, 1, 1), task="refer"), "{<50><20><10><60>}", None),
        (BoxOf(name="liver", xyxy=(0, 0, 1, 1), task="refer"), "on the left", None),
        (Labels(set="organ", absent=NAMES), "spleen, liver", Labels(set="organ", present=("liver", "spleen"), absent=("colon",))),
        (Labels(set="organ", absent=NAMES), "no finding", Labels(set="organ", absent=NAMES)),
        (Labels(set="organ", absent=NAMES), "spleen, heart", None),
        (Label(set="size", value="a", task="severity"), "small", Label(set="size", value="small", task="severity")),
        (Label(set="size", value="a", task="severity"), "huge", None),
    ],
)
def test_an_answer_becomes_a_label_only_where_it_is_one(one, text, expected):
    assert imax._answer(one, text, item("What is the grade of size: small, large?")) == expected


def record(i):
    some = (Report(text="x"), Labels(present=("liver",), absent=("colon",)))
    some += (BoxOf(name="liver", xyxy=(0, 0, 5, 5)), QA(question="q?", answer="yes"))
    return Record(id=f"r{i}", dataset="d", split="train", images=(ImageRef(path=f"{i}.png"),), annotations=some)


def test_less_has_one_task_an_image_and_all_tasks_alike():
    found = imax._one_task_each([record(i) for i in range(50)], seed=1)
    assert len({one.id for one in found}) == 50
    assert all(len({entry.task for entry in entries(one)}) == 1 for one in found)
    assert count(found).tasks == dict.fromkeys(("caption", "findings", "refer", "identify", "vqa"), 10)


def test_missing_tasks_are_asked():
    asked = imax._asked(record(0).model_copy(update={"annotations": (Report(text="x"),)}), NAMES, ("size", ["small", "large"]))
    assert [one.kind for one in asked.annotations] == ["label", "labels", "qa", "qa"]
    boxes = imax._boxes(record(0), [Labels(set="organ", present=("liver",), absent=("colon",))], NAMES)
    assert [(one.kind, one.name) for one in boxes.annotations] == [("box", "liver"), ("number", "area of the liver")]


def test_notes_correlate_over_all_runs(tmp_path):
    def one(entropy, score):
        return {
            "scores": {"vqa": score},
            "fisher": [{"entropy": entropy, "dominant_ratio": 0.5}],
            "probe seconds": 1,
            "training seconds": 20,
        }

    lines = imax.notes({"imax-cmoe": {0: one(0.2, 0.9), 1: one(0.3, 0.8)}, "dmax-cmoe": {0: one(0.4, 0.7)}})
    assert "| imax-cmoe | 0.200, 0.300 | 0.500, 0.500 | 5.0% |" in lines
    assert lines[-1] == "Correlation with the mean score over 3 runs: entropy -1.00, ratio not defined."
    path = tmp_path / "run-fisher.jsonl"
    points = [{"step": step, "module": "connector", "entropy": value} for step, value in ((1, 0.1), (2, 0.2), (2, 0.3))]
    path.write_text("".join(json.dumps(point) + "\n" for point in points))
    assert [(one["step"], one["entropy"], one["stage"]) for one in imax._points(path)] == [(1, 0.1, "run"), (2, 0.3, "run")]


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """A pool and a draw of dmax on random pictures, models of a few steps, and the run of a row."""
    overrides = [one for one in SMALL.split() if not one.startswith(("train.", "evaluate.", "name", "optim"))]
    monkeypatch.setitem(imax.MODELS, "cmoe", [*overrides, "train.batch_size=4"])
    monkeypatch.setitem(imax.MODELS, "medmoe", [*overrides, "language.layers=2", "train.batch_size=4", *imax.MODELS["medmoe"]])
    monkeypatch.setattr(imax, "LIKELY", 0.0)
    (tmp_path / "files").mkdir()
    rng = np.random.default_rng(0)
    more = (Number(name="area of the liver", value=12.5, unit="cm2"), Label(set="size", value="small", task="severity"))
    for name, split, number in (("pool", "test", 2), ("dmax-0", "train", 14)):
        made = [record(i) for i in range(number)]
        made = [
            one.model_copy(update={"split": split, "patient": ("ct", "mr")[i % 2], "annotations": (*one.annotations, *more)})
            for i, one in enumerate(made)
        ]
        made = imax._one_task_each(made, 0) if split == "train" else made
        for one in made:
            Image.fromarray(rng.integers(0, 255, (32, 32), dtype=np.uint8)).save(tmp_path / "files" / f"{one.id[1:]}.png")
        rooted = [one.model_copy(update={"images": (ImageRef(path=f"pool:{one.images[0].path}"),)}) for one in made]
        classes = {"size": ["small", "large"], "organ": list(NAMES)}
        jsonl.write(tmp_path / "data" / name, jsonl.DatasetInfo(name=name, classes=classes, roots={"pool": "../../files"}), rooted)

    def run(row):
        job = Job(tmp_path, row, 0, 10)
        job.folder.mkdir(parents=True)
        found = imax.run(job)
        assert set(found["scores"]) == set(imax.TASKS)
        assert all(0 <= value <= 1 for value in found["scores"].values())
        assert all(0 <= one["entropy"] <= 1 for one in found["fisher"])
        return job, found

    return run


@pytest.mark.full
def test_the_longest_arm_in_ten_steps(drawn):
    _, found = drawn("staged-cmoe")
    assert {one["stage"] for one in found["fisher"]} == {"stage-1", "stage-2", "stage-3"}
    assert found["pseudo"]["vqa"]["asked"] > 0


@pytest.mark.full
def test_the_third_model_has_stages_of_its_own(drawn):
    job, found = drawn("dmax-medmoe")
    assert {one["stage"] for one in found["fisher"]} == {"stage-1", "stage-2"}
    steps = [io.read_json(job.folder / f"stage-{number}" / "run.json")["steps"] for number in (1, 2, 3)]
    assert steps == [1, 6, 3]
    assert io.read_json(job.folder / "stage-2" / "domains" / "domains.json")["experts"] == ["CT", "MR"]


def test_every_row_is_an_arm_with_a_model():
    assert len(imax.STUDY.rows) == 11
    assert "staged-medmoe" not in imax.STUDY.rows
    assert imax.STUDY.against["less-medmoe"] == "dmax-medmoe"
