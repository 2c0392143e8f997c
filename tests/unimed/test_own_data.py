"""Own data from end to end: five commands, what validation finds, several sets in one recipe."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import SMALL
from PIL import Image
from typer.testing import CliRunner

from unimed.cli import app as cli
from unimed.datasets.validate import check
from unimed.errors import UserError
from unimed.records import jsonl
from unimed.records.record import Record
from unimed.train import recipe as recipes
from unimed.train.folder import Run
from unimed.train.run import items
from unimed.train.sampler import by_set

ROOT = Path(__file__).resolve().parents[2]
TINY = [text for text in SMALL.split() if not text.startswith(("name=", "evaluate.limit"))]
pytestmark = pytest.mark.usefixtures("without_java")


def run(line, *more):
    return CliRunner().invoke(cli.app, [*line.split(), *more], env={"COLUMNS": "200", "TERM": "dumb"})


def picture(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (24, 32, 3), np.uint8)).save(path)


def rows(folder, count=24):
    """A folder of images and a LLaVA-style JSON, as a new user has them."""
    made = []
    for i in range(count):
        picture(folder / "imgs" / f"{i}.png", i)
        said = (("human", "<image>\nWhich plane is shown?"), ("gpt", ("axial", "coronal")[i % 2]))
        made.append({"id": f"r{i}", "image": f"{i}.png", "conversations": [{"from": who, "value": text} for who, text in said]})
    (folder / "data.json").write_text(json.dumps(made))
    return made


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    """The five commands of docs/unimed/own_data.md, at tiny size: the folder and the output of each."""
    folder = tmp_path_factory.mktemp("own")
    rows(folder)
    page = (ROOT / "docs" / "unimed" / "own_data.md").read_text()
    lines = [line.strip() for line in page.splitlines() if line.startswith("    unimed ")][:5]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        (folder / "imgs" / "x.png").write_bytes((folder / "imgs" / "3.png").read_bytes())
        shown = {}
        for line in lines:
            given = re.findall(r'"[^"]*"|\S+', line.partition("#")[0].removeprefix("unimed "))
            extra = TINY if given[0] == "train" else []
            result = CliRunner().invoke(cli.app, [*(text.strip('"') for text in given), *extra], env={"COLUMNS": "200", "TERM": "dumb"})
            assert result.exit_code == 0, result.output
            shown[" ".join(given[:2])] = result.output
    return folder, shown


def test_names_that_look_like_markup_are_shown_as_they_are(tmp_path):
    """rich took them for styles: text was gone, or the command ended in a traceback."""
    root = tmp_path / "a [old] [b"
    record = {"id": "r", "dataset": "mine [v2]", "source": "ward [/b]", "split": "train", "images": [{"path": "x.png"}]}
    record["annotations"] = [{"kind": "qa", "question": "Which plane?", "answer": "axial"}]
    jsonl.write(root, jsonl.DatasetInfo(name="mine [v2]"), [Record.model_validate_json(json.dumps(record))])
    picture(root / "x.png", 0)
    for command in ("validate", "stats"):
        result = run(f"data {command}", str(root))
        assert result.exit_code == 0, result.output
        assert "mine [v2]" in result.output
        assert "a [old] [b" in " ".join(result.output.split())
    assert "ward [/b]" in result.output


def test_own_data_in_five_commands(walked):
    folder, shown = walked
    assert list(shown) == ["data import", "data validate", "train tiny", "evaluate mine", "predict imgs/x.png"]
    assert "24 records with 24 qa" in shown["data import"]
    assert "splits by image (24 groups, seed 0): train 20, val 2, test 2" in shown["data import"]
    assert "mine: no findings" in shown["data validate"]
    assert "trained: runs/mine/model" in shown["train tiny"]
    assert "validation split" in shown["evaluate mine"]
    assert "32 x 24 pixels shown to the model runs/mine" in shown["predict imgs/x.png"]
    result = json.loads((folder / "runs" / "mine" / "metrics.json").read_text())
    assert result["data"] == {"root": "mine (mine)", "sample": False, "protocol": "released"}
    assert {split: part["counts"] for split, part in result["splits"].items()} == {"slab": {"vqa": 2}, "subject": {"vqa": 2}}


def test_its_report_and_its_recipe(walked, tmp_path, monkeypatch):
    folder, _ = walked
    shutil.copytree(folder, tmp_path / "own")
    monkeypatch.chdir(tmp_path / "own")
    shown = run("report mine")
    assert shown.exit_code == 0, shown.output
    assert "mine (mine)" in Path("runs/mine/report.html").read_text()
    stored = yaml.safe_load(Path("runs/mine/recipe.yaml").read_text())
    assert (stored["data"]["root"], stored["data"]["sets"]["mine"]["root"]) == ("", "mine")
    Path("mine").rename("elsewhere")
    moved = run("evaluate mine data.sets.mine.root=elsewhere evaluate.splits=[val] evaluate.limit=1")
    assert moved.exit_code == 0, moved.output
    gone = run("evaluate mine")
    assert gone.exit_code == 2
    assert gone.output.strip() == "error: data.sets.mine.root=mine: no such folder"


def test_tasks_without_data_lose_their_ratio_with_one_line(tmp_path, monkeypatch, caplog):
    from unimed.train.sampler import group

    rows(tmp_path, 4)
    monkeypatch.chdir(tmp_path)
    assert run("data import llava data.json --images imgs --out mine --val 0 --test 0").exit_code == 0
    recipe = recipes.load("tiny", ["data.sets.mine.root=mine"])
    group(items(recipe, "train"), recipe.sampler.ratios)
    (line,) = [one.getMessage() for one in caplog.records if one.name == "unimed.train"]
    assert line == "sampler.ratios: no training item of refer, identify, caption, cls, qa; the other sources share what it had"


@pytest.mark.each
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("data import lava data.json --images imgs --out x", "'lava': no such form of rows; one of llava, swift, messages"),
        ("data import llava nothing.json --images imgs --out x", "nothing.json: no such file"),
        ("data import llava data.json --images pics --out x", "--images pics: no such folder"),
        ("data import llava data.json --images imgs --out imgs", "--out imgs: exists already"),
        ("data import llava data.json --images imgs --out x --val 1", "--val 1.0: must be a share"),
        ("data import llava data.json --images imgs --out x --val 0.6 --test 0.4", "together they must be below 1"),
        ("data import llava data.json --images imgs --out x --task refer", "--task refer: must be one of vqa, caption, cls, qa"),
        ("data import llava data.json --images imgs --out x --patient who", "without a patient"),
        ("data import swift data.json --images imgs --out x", "no row can be used as swift"),
        ("data import llava broken.json --images imgs --out x", "broken.json: not valid JSON"),
        ("data import llava empty.json --images imgs --out x", "no row can be used as llava: it has none"),
        ("data validate imgs", "imgs: no folder of records"),
        ("data stats nowhere", "nowhere: no such folder"),
        ("demo data.sets.mine.root=imgs", "trains on the built-in sample; for own data: unimed train tiny"),
        ("train tiny data.sets.mine.root=nowhere", "data.sets.mine.root=nowhere: no such folder"),
        ("train tiny data.sets.mine.root=imgs", "not a folder of the layout records (dataset.json, records-*.jsonl)"),
        (
            "train tiny data.sets.mine.root=imgs data.sets.mine.layout=song",
            "layout='song': no such layout; known are records",
        ),
        ("train tiny data.sets.mine.rot=imgs", "nearest valid keys: data.sets.mine.root"),
        ("train tiny data.sets.mine.ratio=2", "data.sets.mine.root: which folder?"),
        ("train tiny data.sets.mine.ratio=-1 data.sets.mine.root=x", "data.sets.mine.ratio=-1: must be zero or more"),
        ("train tiny data.sets.mi/ne.root=x", "write data.sets.NAME.root=FOLDER"),
        ("train tiny data.sets=3", "data.sets=3"),
        ("train tiny data.root=''", "data: no data; name a folder"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(tmp_path, monkeypatch, line, message):
    rows(tmp_path, 2)
    (tmp_path / "broken.json").write_text('[{"id": 1},')
    (tmp_path / "empty.json").write_text("")
    before = sorted(path.name for path in tmp_path.iterdir())
    monkeypatch.chdir(tmp_path)
    shown = run(line)
    assert shown.exit_code == 2, shown.output
    (only,) = shown.output.strip().splitlines()
    assert only.startswith("error: ")
    assert message in only
    assert sorted(path.name for path in tmp_path.iterdir()) == before


# Validation


def made(id, split="train", image="images:0.png", patient="", licence="", **annotation):
    one = {"kind": "qa", "question": "Which plane?", "answer": "axial", **annotation}
    told = {"id": id, "dataset": "mine", "split": split, "patient": patient, "licence": licence}
    return Record.model_validate({**told, "images": [{"path": image}], "annotations": [one]})


@pytest.fixture
def faulty(tmp_path, monkeypatch):
    """A data set with one fault of every kind."""
    for i in range(3):
        picture(tmp_path / "imgs" / f"{i}.png", i)
    shutil.copy(tmp_path / "imgs" / "0.png", tmp_path / "imgs" / "copy.png")
    (tmp_path / "imgs" / "cut.png").write_bytes((tmp_path / "imgs" / "0.png").read_bytes()[:200])
    box = {"kind": "box", "name": "liver", "question": None, "answer": None}
    box = {key: value for key, value in box.items() if value}
    faults = [
        made("a", licence="CC-BY-4.0", patient="p1"),
        made("b", "test", "images:copy.png"),
        made("c", "test", "images:1.png", patient="p1"),
        made("c", image="images:2.png"),
        made("d", image="images:missing.png"),
        made("e", image="images:cut.png"),
        made("h", answer="oblique", options=["axial", "coronal"]),
        made("j", task="song"),
    ]
    plain = [made("k").model_dump(mode="json") for _ in range(3)]
    plain[0]["annotations"] = [{**box, "xyxy": [100, 100, 120, 110]}]
    plain[1] = {**plain[1], "id": "l", "annotations": [{**box, "xyxy": [-2, 0, 20, 10]}]}
    plain[2] = {**plain[2], "id": "m", "annotations": [{"kind": "label", "set": "plane", "value": "oblique"}]}
    faults += [Record.model_validate(one) for one in plain]
    info = jsonl.DatasetInfo(name="mine", roots={"images": "../imgs"}, classes={"plane": ["axial", "coronal"]})
    jsonl.write(tmp_path / "mine", info, faults)
    with (tmp_path / "mine" / "records-00000.jsonl").open("a") as file:
        file.write("{\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "mine"


def test_validation_finds_every_fault_and_says_where_it_is_first(faulty):
    shown = run("data validate mine --json found.json")
    assert shown.exit_code == 1, shown.output
    for line in (
        "1 lines that are not valid JSON (first: records-00000.jsonl:12: not valid JSON",
        "1 ids given twice (first: records-00000.jsonl:4: id 'c' is that of ",
        "1 images that are missing (first: ",
        "1 images that cannot be read (first: records-00000.jsonl:6: ",
        "1 boxes outside their image (first: records-00000.jsonl:9: annotations.0: the box of 'liver' is [100.0, 100.0, 120.0, 110.0]",
        "1 boxes partly outside their image (first: records-00000.jsonl:10",
        "1 answers outside their options (first: records-00000.jsonl:7: annotations.0: 'oblique' is none of ['axial', 'coronal']",
        "1 labels outside their classes (first: records-00000.jsonl:11: annotations.0: 'oblique' is no class of 'plane'",
        "1 annotations with an unknown task (first: records-00000.jsonl:8: annotations.0: task 'song' of a qa",
        "1 patients in several splits (first: train 'p1': records-00000.jsonl:1; test 'p1': records-00000.jsonl:3)",
        "1 images in several splits (first: train: records-00000.jsonl:1: images:0.png; test: records-00000.jsonl:2: ",
        "licences: not given (10 records), CC-BY-4.0 (1 records)",
    ):
        assert line in shown.output
    found = json.loads(Path("found.json").read_text())
    assert found["fine"] is False
    assert found["records"] == {"train": 9, "val": 0, "test": 2}
    assert found["words"]["question"] == {"p50": 2, "p90": 2, "p99": 2, "p100": 2}
    assert len(found["findings"]) == 11


def test_strict_validation_stops_at_the_first_finding(faulty):
    shown = run("data validate mine --strict")
    assert shown.exit_code == 1
    assert "mine: stopped at the first finding" in shown.output
    assert len(check(faulty, strict=True).findings) == 1


def test_statistics_open_no_image_and_have_no_findings_but_bad_lines(faulty, monkeypatch):
    monkeypatch.setattr("unimed.records.image.whole_image", None)
    shown = run("data stats mine --json numbers.json")
    assert shown.exit_code == 0, shown.output
    assert "1 lines that are not valid JSON" in shown.output
    assert json.loads(Path("numbers.json").read_text())["annotations"]["train"] == {"qa": 6, "box": 2, "label": 1}
    assert run("data stats mine --strict").exit_code == 1


# Several sets in one recipe


@pytest.fixture
def two_sets(tmp_path, monkeypatch):
    rows(tmp_path, 6)
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two"):
        assert run(f"data import llava data.json --images imgs --out {name} --val 0 --test 0.2").exit_code == 0
    return ["data.sets.one.root=one", "data.sets.two.root=two"]


def test_sets_carry_their_own_names_splits_and_shares(two_sets):
    recipe = recipes.load("tiny", [*two_sets, "data.sets.two.ratio=3", "data.sets.two.splits.train=test"])
    assert (recipe.data.root, recipe.data.where) == ("", "one (one), two (two)")
    found = items(recipe, "train")
    assert {name: sum(one.dataset == name for one in found) for name in ("one", "two")} == {"one": 5, "two": 1}
    divided = by_set({"vqa": 8, "qa": 1}, found, {"one": 1.0, "two": 3.0})
    assert divided == {"one/vqa": 2, "two/vqa": 6, "qa": 1}
    assert by_set({"vqa": 8, "one/vqa": 5}, found, {"one": 1.0, "two": 3.0}) == {"two/vqa": 8, "one/vqa": 5}
    assert by_set({"vqa": 8}, found, {"one": 0.0, "two": 0.0}) == {"vqa": 8}
    assert by_set({"vqa": 8}, found, {"one": 1.0}) == {"vqa": 8}
    assert by_set({"vqa": 8}, found, {}) == {"vqa": 8}


def test_data_that_is_named_takes_the_place_of_the_recipes_own(two_sets, tmp_path):
    stored = tmp_path / "recipe.yaml"
    stored.write_text(recipes.dump(recipes.load("tiny", [*two_sets, "data.sets.two.ratio=3"])))
    assert set(recipes.load(stored).data.sets) == {"one", "two"}
    assert recipes.load(stored).data.root == ""
    only = recipes.load(stored, ["data.sets.two.root=elsewhere"]).data
    assert (set(only.sets), only.sets["two"].ratio, only.root) == ({"two"}, 3, "")
    other = recipes.load(stored, ["data.root=other"]).data
    assert (other.sets, other.root) == ({}, "other")
    both = recipes.load("tiny", [*two_sets, "data.root=other"]).data
    assert (set(both.sets), both.root) == ({"one", "two"}, "other")
    (tmp_path / "mine.yaml").write_text("data: {sets: {one: {root: one}}}")
    assert recipes.load(tmp_path / "mine.yaml").data.root == ""
    (tmp_path / "mine.yaml").write_text("data: {sets: {one: 3}}")
    with pytest.raises(UserError, match=r"data\.sets"):
        recipes.load(tmp_path / "mine.yaml")


def test_a_run_may_go_on_where_its_data_has_moved(two_sets, tmp_path):
    (tmp_path / "recipe.yaml").write_text(recipes.dump(recipes.load("tiny", two_sets)))
    start = {"processes": 1, "examples": 10, "examples_sha256": "x"}
    moved = recipes.load("tiny", ["data.sets.one.root=elsewhere", "data.sets.two.root=two"])
    Run(tmp_path).resume(moved, start)
    with pytest.raises(UserError, match=r"cannot resume with data\.sets"):
        Run(tmp_path).resume(recipes.load("tiny", [*two_sets, "data.sets.one.ratio=2"]), start)
