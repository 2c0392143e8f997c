"""Scores by data set, modality and organ, and where these come from."""

from pathlib import Path

import pytest
from data_samples import VQA_RAD, medmnist, path_vqa, picture, reports, sa_med2d, slake, vqa_rad

from unimed.datasets import load_items
from unimed.evaluate import evaluate, groups
from unimed.records import jsonl
from unimed.records.record import QA, BoxOf, ImageRef, Label, Record, Report
from unimed.tasks.item import Item

ORGANS = [{**row, "image_organ": organ} for row, organ in zip(VQA_RAD, ("HEAD", "HEAD", "ABD"), strict=True)]


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (slake, {("vqa", "MRI", "abdomen"), ("refer", "MRI", "liver"), ("refer", "MRI", "spleen")}),
        (sa_med2d, {("refer", "ct_00", "left kidney"), ("refer", "ct_00", "spleen")}),
        (path_vqa, {("vqa", "pathology", "")}),
        (reports, {("caption", "X-ray", "chest")}),
        (medmnist, {("cls", "CT", "left kidney"), ("cls", "CT", "right kidney"), ("cls", "CT", "spleen")}),
        (lambda root: vqa_rad(root, ORGANS), {("vqa", "", "head"), ("vqa", "", "abdomen")}),
    ],
)
def test_published_layouts_name_modality_and_organ(tmp_path, make, expected):
    make(tmp_path)
    items = [item for split in ("train", "val", "test") for item in load_items(tmp_path, split)]
    assert {(item.task, item.modality, item.organ) for item in items if item.task != "identify"} == expected


def test_an_annotation_says_more_than_its_record(tmp_path):
    image = tmp_path / "images" / "a.png"
    picture(image, (40, 50))
    annotations = (
        QA(question="Which plane?", answer="axial"),
        QA(question="Where?", answer="there", organ="Pelvis", modality="MR"),
        BoxOf(name="Liver", xyxy=(1, 2, 30, 40)),
        BoxOf(name="mass", xyxy=(1, 2, 30, 40), organ="spleen"),
        Label(set="organ", value="heart"),
        Label(set="plane", value="axial"),
        Report(text="Nothing."),
    )
    record = Record(id="a", dataset="mine", split="test", images=(ImageRef(path=f"images:{image.name}"),), annotations=annotations)
    classes = {"organ": ["heart", "liver"], "plane": ["axial", "coronal"]}
    info = jsonl.DatasetInfo(name="mine", roots={"images": str(image.parent)}, classes=classes)
    jsonl.write(tmp_path / "mine", info, [record.model_copy(update={"modality": "ct", "organ": "abdomen"})])
    for _ in range(2):  # from a scan, then from its index
        items = load_items(tmp_path / "mine", "test")
        found = [(item.modality, item.organ) for item in items if item.task != "identify"]
        assert found == [
            ("ct", "abdomen"), ("MR", "pelvis"), ("ct", "liver"), ("ct", "spleen"), ("ct", "heart"), ("ct", "abdomen"), ("ct", "abdomen"),
        ]  # fmt: skip


def item(at, task="cls", image="a.png", **about):
    return Item(str(at), task, about.pop("dataset", "d"), "Which: a, b?", "a", image and Path(image), **about)


def test_every_item_is_in_one_group_of_each_kind():
    items = [
        item(0, modality="ct"), item(1, modality="CT", organ="Left_Kidney", dataset="e"), item(2, modality="MR", organ="left kidney"),
        item(3, modality=" t2 "), item(4), item(5, task="qa", image=None),
    ]  # fmt: skip
    texts = ["a", "b", "a", "b", "a", "a"]
    given = {"trained": texts, "majority answer": ["a"] * 6}
    rows = {row: {"predictions": some, "metrics": evaluate.score(items, some)} for row, some in given.items()}
    scored = {row: groups.Scored(items, one["predictions"], one["metrics"]) for row, one in rows.items()}
    found = groups.tables(items, scored, "trained")
    counts = {kind: {name: sum(one["count"] for one in tasks.values()) for name, tasks in of.items()} for kind, of in found.items()}
    assert counts == {
        "dataset": {"d": 5, "e": 1},
        "modality": {"CT": 2, "MRI": 1, "t2": 1, "unknown": 1, "no image": 1},
        "organ": {"left kidney": 2, "unknown": 3, "no image": 1},
    }
    assert list(found["organ"]) == ["left kidney", "unknown", "no image"]  # the groups without a name come last
    one = found["modality"]["CT"]["cls"]
    assert one["rows"] == {
        "trained": {"accuracy": 0.5, "accuracy_strict": 0.5},
        "majority answer": {"accuracy": 1, "accuracy_strict": 1},
    }
    assert one["drawn"] == "images"
    assert set(one["intervals"]) == {"accuracy", "accuracy_strict"}
    for of in found.values():  # the groups of a table weigh up to the score of all
        parts = [tasks["cls"] for tasks in of.values() if "cls" in tasks]
        mean = sum(part["count"] * part["rows"]["trained"]["accuracy"] for part in parts) / 5
        assert mean == pytest.approx(rows["trained"]["metrics"]["cls"]["accuracy"])


def test_a_score_that_is_no_mean_is_computed_for_each_group(monkeypatch):
    items = [item(0, modality="CT"), item(1, modality="CT"), item(2)]
    texts = ["a", "b", "b"]
    whole = evaluate.score(items, texts)
    monkeypatch.setattr(groups.intervals, "singles", lambda *given: None)
    found = groups.tables(items, {"trained": groups.Scored(items, texts, whole)}, "trained")["modality"]["CT"]["cls"]
    assert found["rows"]["trained"] == {"accuracy": 0.5, "accuracy_strict": 0.5}
    assert found["intervals"] == {}


def test_answers_that_are_missing_give_no_score():
    items = [item(0, modality="CT"), item(1)]
    found = groups.tables(items, {"majority answer": groups.Scored(items, ["a", None], {"cls": {}})}, "trained")["modality"]
    assert found["unknown"]["cls"]["rows"] == {}
    assert found["CT"]["cls"]["rows"] == {"majority answer": {"accuracy": 1, "accuracy_strict": 1}}
