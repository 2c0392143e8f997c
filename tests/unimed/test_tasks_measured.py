"""severity, findings and calculation, on records made from the masks of the built-in sample."""

import json

import numpy as np
import pytest
from PIL import Image

from tests.unimed.conftest import SMALL
from unimed.datasets import load_items
from unimed.datasets.validate import check
from unimed.errors import UserError
from unimed.evaluate.run import evaluate_run
from unimed.records import jsonl
from unimed.records.record import Record
from unimed.sample.masks import ORGANS
from unimed.sample.slices import slices, subject, vendored_volume
from unimed.tasks import TASKS, answers, metrics, overlap, prompts
from unimed.tasks.baselines import MajorityAnswers
from unimed.tasks.calculation import ratios
from unimed.tasks.item import Item
from unimed.train import recipe as recipes
from unimed.train.run import train

GRADES = ["none", "small", "medium", "large"]
NAMES = ("severity", "findings", "calculation")


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Axial slices of the MR volume: which organs they show, how large the liver is, and in which of four grades."""
    root = tmp_path_factory.mktemp("measured") / "set"
    shown = [one for one in slices(subject("mr", vendored_volume("mr"))) if one.plane == "axial"]
    records, images = [], {}
    for one in shown:
        liver = one.finding("liver")
        area = liver.area_mm2 / 100 if liver else 0.0
        grade = GRADES[min(int(np.ceil(area / 80)), 3)]
        images[f"images/{one.id}.png"] = one.image
        large = {found.name for found in one.findings}
        annotations = [
            {"kind": "label", "set": "liver size", "value": grade, "task": "severity"},
            {"kind": "labels", "present": [name for name in ORGANS if name in large], "absent": [n for n in ORGANS if n not in one.present],
             "uncertain": [name for name in ORGANS if name in one.present and name not in large]},
            {"kind": "number", "name": "area of the liver", "value": area, "unit": "cm2"},
        ]  # fmt: skip
        record = {"id": one.id, "dataset": "measured", "split": "train" if one.split == "train" else "test"}
        records.append({**record, "images": [{"path": f"images/{one.id}.png"}], "annotations": annotations})
    found = [Record.model_validate_json(json.dumps(one)) for one in records]
    jsonl.write(root, jsonl.DatasetInfo(name="measured", classes={"liver size": GRADES}), found)
    for name, image in images.items():
        (root / name).parent.mkdir(exist_ok=True)
        image.save(root / name)
    return root


@pytest.mark.parametrize(
    ("given", "question", "answer"),
    [
        (
            {"set": "xr", "present": ["nodule"], "absent": ["effusion"]},
            "Which xrs are in the image: effusion, nodule, or no finding?",
            "nodule",
        ),
        ({"set": "xr", "absent": ["effusion"]}, "Which xrs are in the image: effusion, nodule, or no finding?", "no finding"),
        ({"present": ["b"], "absent": ["c", "a"]}, "Which findings are in the image: a, b, c, or no finding?", "b"),
        ({"set": "xr", "present": ["pneumonia"], "absent": ["effusion"]}, None, "with a label outside its classes"),
        ({"set": "xr", "uncertain": ["nodule"]}, None, "no finding is certain"),
    ],
)
def test_findings_as_classes(tmp_path, caplog, given, question, answer):
    """One outside the classes was no finding; without classes those that are present came first."""
    record = {"id": "r", "dataset": "d", "split": "train", "images": [{"path": "a.png"}]}
    record["annotations"] = [{"kind": "labels", "task": "cls", **given}]
    info = jsonl.DatasetInfo(name="d", classes={"xr": ["effusion", "nodule"]})
    jsonl.write(tmp_path / "set", info, [Record.model_validate_json(json.dumps(record))])
    Image.new("L", (8, 8)).save(tmp_path / "set" / "a.png")
    try:
        found = [(one.question, one.answer) for one in load_items(tmp_path / "set", "train")]
    except UserError as error:  # none is left
        found, caplog_text = [], str(error)
    else:
        caplog_text = caplog.text
    assert found == ([(question, answer)] if question else [])
    assert question or answer in caplog_text
    outside = any(kind == "labels outside their classes" for kind in check(tmp_path / "set").findings)
    assert outside == ("outside" in answer)


def test_from_masks_to_scores(measured):
    held_out, seen = load_items(measured, "test"), load_items(measured, "train")
    majority = MajorityAnswers.fit(seen)
    assert {one.task for one in held_out} == {one.task for one in seen} == set(NAMES)
    for name in NAMES:
        part = [one for one in held_out if one.task == name]
        task = TASKS[name]
        for one in part:
            assert prompts.instruction(one, None) == f"{prompts.IMAGE} [{name}] {one.question}"
            assert answers.read(one, one.answer).kind == ""
            assert metrics.is_right(one, one.answer)
        perfect = metrics.score(name, [one.answer for one in part], part)
        guessed = metrics.score(name, [majority.predict(one) for one in part], part)
        silent = metrics.score(name, [""] * len(part), part)
        assert perfect[task.headline] == 1
        assert silent[task.headline] == 0
        assert silent["empty"] == len(part)
        assert guessed[task.headline] < 1
    assert {one.question for one in held_out if one.task == "severity"} == {"What is the grade of liver size: none, small, medium, large?"}
    assert {one.question for one in held_out if one.task == "calculation"} == {"What is the area of the liver in cm2?"}


def test_a_model_learns_and_answers_them(measured, tmp_path, monkeypatch):
    monkeypatch.setattr(overlap, "has_coco", lambda: False)
    chosen = [f"data.root={measured}", f"data.tasks=[{','.join(NAMES)}]", *(f"sampler.ratios.{name}=1" for name in NAMES)]
    recipe = recipes.load("tiny", [*SMALL.split(), *chosen, "train.max_steps=4", "evaluate.splits=[test]"])
    run = train(recipe, tmp_path / "runs" / "small")
    part = evaluate_run(run)["splits"]["test"]
    assert set(part["rows"]["trained"]) == set(part["better"]) == set(NAMES)
    assert json.loads((run / "model" / "config.json").read_text())["connector"]["tasks"][-3:] == list(NAMES)


def item(task, answer, question=""):
    return Item("e", task, "d", question, answer, None, None, None, task)


def test_severity_counts_the_distance_of_grades():
    question = "What is the grade of edema: none, mild, moderate, severe?"
    asked = [item("severity", answer, question) for answer in ("none", "mild", "moderate", "severe")]
    found = metrics.score("severity", ["None.", "moderate", "severe", "none"], asked)
    assert (found["accuracy"], found["within_one"]) == (0.25, 0.75)
    # squared distances 0 1 1 9; between all pairs of the grades 0 2 3 0 and 0 1 2 3 they sum to 14 + 6 + 14 + 14
    assert found["kappa"] == pytest.approx(1 - 2.75 / 3)
    assert metrics.score("severity", ["none", "mild", "moderate", "severe"], asked)["kappa"] == 1
    odd = metrics.score("severity", ["mild or severe", "grave", "", "It is severe"], asked)
    assert [odd[kind] for kind in ("unparsable", "off_list", "empty", "chatty")] == [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("text", "share", "kind"),
    [
        ("edema, effusion", 1.0, ""),
        ("effusion and edema", 1.0, ""),
        ("edema", 2 / 3, ""),
        ("edema, mass", 0.5, ""),
        ("no finding", 0.0, ""),
        ("pneumonia", 0.0, "off_list"),
        ("I see edema", 2 / 3, "chatty"),
        ("", 0.0, "empty"),
    ],
)
def test_findings_are_compared_as_sets(text, share, kind):
    asked = item("findings", "edema, effusion", "Which findings are in the image: edema, effusion, mass, or no finding?")
    found = metrics.score("findings", [text], [asked])
    assert found["f1"] == pytest.approx(share)
    assert found["accuracy"] == float(share == 1)
    assert answers.read(asked, text).kind == kind


@pytest.mark.parametrize(
    ("text", "right", "kind"),
    [
        ("0.5", True, ""),
        ("0.55", True, ""),
        ("0.56", False, ""),
        ("0.45 or so", True, ""),
        ("CTR is 0.5.", True, "chatty"),
        ("between 0.4 and 0.5", False, "unparsable"),
        ("half", False, "unparsable"),
        ("", False, "empty"),
        ("-0.5", False, ""),
    ],
)
def test_calculation_allows_a_tenth(text, right, kind):
    asked = item("calculation", "0.5")
    assert metrics.is_right(asked, text) is right
    assert metrics.score("calculation", [text], [asked])["within_10"] == right
    assert answers.read(asked, text).kind == kind


def test_the_majority_of_numbers_is_their_median():
    fitted = MajorityAnswers.fit([item("calculation", answer) for answer in ("9", "10", "100", "0.5")])
    assert fitted.predict(item("calculation", "")) == "9"


def masks():
    heart, right, left = (np.zeros((20, 30), bool) for _ in range(3))
    heart[10:15, 10:20] = True  # 10 wide, 50 pixels
    right[2:12, 3:9] = True  # 60 pixels
    left[2:12, 21:27] = True  # 60 pixels; both from 3 to 26: 24 wide
    return heart, right, left


def test_ratios_of_known_masks():
    assert ratios(*masks()) == pytest.approx((10 / 24, 50 / 120, 10, 24))
    assert ratios(*masks(), spacing=(0.7, 0.5)) == pytest.approx((10 / 24, 50 / 120, 5, 12))  # widths along rows go by the columns
    assert ratios(*masks(), spacing=2) == pytest.approx((10 / 24, 50 / 120, 20, 48))
    assert ratios(*(255 * mask.astype(np.uint8) for mask in masks())).ctr == pytest.approx(10 / 24)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heart": np.zeros((20, 30))}, "heart is an empty mask"),
        ({"left_lung": np.ones((20, 31))}, r"left_lung has the shape \(20, 31\)"),
        ({"heart": np.ones(4)}, r"heart has the shape \(4,\)"),
        ({"spacing": 0}, "spacing 0 must be one or two positive numbers"),
        ({"spacing": (1, 2, 3)}, r"spacing \(1, 2, 3\) must be"),
    ],
)
def test_ratios_refuse_what_is_no_mask(change, message):
    given = dict(zip(("heart", "right_lung", "left_lung"), masks(), strict=True))
    with pytest.raises(UserError, match=message):
        ratios(**{**given, **change})


def test_grades_need_an_order(measured, tmp_path, caplog):
    text = (measured / "dataset.json").read_text()
    (tmp_path / "images").symlink_to(measured / "images")
    (tmp_path / "dataset.json").write_text(json.dumps({**json.loads(text), "classes": {}}))
    (tmp_path / "records-00000.jsonl").write_text((measured / "records-00000.jsonl").read_text())
    assert "severity" not in {one.task for one in load_items(tmp_path, "test")}
    assert "with grades whose order is unknown" in caplog.text


def test_a_line_says_what_a_recipe_must_name(measured, caplog):
    assert load_items(measured, "test", ["vqa", "findings"])
    assert [line for line in caplog.messages if "data.tasks" in line] == [
        "data.tasks does not name severity (5 items), calculation (5 items)"
    ]
