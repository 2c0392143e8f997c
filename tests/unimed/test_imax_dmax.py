"""Counting entries as IMAX's paper does, and the decentralised twin of a set."""

import json
import random
import re

import pytest
from PIL import Image
from typer.testing import CliRunner

from unimed.cli import app as cli
from unimed.datasets import dmax
from unimed.datasets.dmax import build_dmax
from unimed.datasets.entries import PAPER, count, entries, variation
from unimed.errors import UserError
from unimed.records import jsonl
from unimed.records.image import Images
from unimed.records.record import QA, BoxOf, ImageRef, Label, Labels, Number, Record, Report
from unimed.sample.imax import GRADES, SEVERITY, block_of, build_imax_sample, terciles

ONE = {
    "calculation": lambda i: Number(name="ratio", value=0.5),
    "caption": lambda i: Report(text="A report."),
    "severity": lambda i: Label(set="grade", value="abc"[i % 3], task="severity"),
    "findings": lambda i: Labels(present=("x",) if i % 2 else (), absent=("y",)),
    "refer": lambda i: BoxOf(name=("heart", "lung")[i % 2], xyxy=(0, 0, 5, 5), task="refer"),
    "identify": lambda i: BoxOf(name=("heart", "lung")[i % 2], xyxy=(0, 0, 5, 5), task="identify"),
    "vqa": lambda i: QA(question="Is it?", answer=("yes", "no")[i % 2]),
}


def record(i, tasks, more=0, split="train"):
    some = [ONE[task](i) for task in tasks] + [ONE["vqa"](i + n) for n in range(more)]
    image = ImageRef(path=f"{i}.png")
    return Record(id=f"r{i}", dataset="d", split=split, patient=f"p{i}", images=(image,), annotations=tuple(some), source="synthetic")


def as_in_the_paper():
    """50 images: 205 tasks and 373 entries are 4.10 and 7.46 an image."""
    names = list(ONE)
    made = []
    for i in range(50):
        tasks = [*(names[(i + n) % 6] for n in range(3 + (i < 5))), "vqa"]
        made.append(record(i, tasks, more=4 if i < 18 else 3))
    return made


def write(root, records):
    jsonl.write(root, jsonl.DatasetInfo(name="d", classes={"grade": ["a", "b", "c"]}), records)
    return root


def test_a_set_with_the_numbers_of_the_paper(tmp_path):
    root = write(tmp_path / "set", as_in_the_paper())
    run = CliRunner().invoke(cli.app, ["data", "stats", str(root), "--json", str(tmp_path / "x.json"), "--plot", str(tmp_path / "x.png")])
    assert run.exit_code == 0, run.output
    found = json.loads((tmp_path / "x.json").read_text())["entries"]
    assert (found["images"], found["entries"], found["tasks"]) == (50, 373, PAPER["tasks"])
    assert (found["tasks per image"], found["entries per image"]) == (PAPER["tasks per image"], PAPER["entries per image"])
    assert sum(found["entries by task"].values()) == 373
    assert found["entries by source and task"] == {"synthetic": found["entries by task"]}
    assert found["images by number of tasks"] == {"4": 45, "5": 5}
    assert re.search(r"tasks per image +4.10 +4.10\n", run.output)
    assert (tmp_path / "x.png").stat().st_size > 10_000
    wrong = CliRunner().invoke(cli.app, ["data", "stats", str(root), "--plot", str(tmp_path / "x.txt")])
    assert (wrong.exit_code, "must end in .png or .svg" in wrong.output) == (2, True)


def test_a_box_is_two_entries_and_what_is_uncertain_is_none():
    made = record(0, []).model_copy(
        update={"annotations": (BoxOf(name="a", xyxy=(0, 0, 1, 1)), Labels(uncertain=("x",)), Label(set="s", value="v"))}
    )
    assert [one.task for one in entries(made)] == ["refer", "identify", "cls"]
    text = Record(id="t", dataset="d", split="train", annotations=(QA(question="a?", answer="b"),))
    assert (count([made, text]).entries, count([made, text]).text, count([made, text]).images) == (3, 1, 1)


@pytest.mark.parametrize("tasks_per_image", [1, 2])
def test_the_twin_has_the_volume_of_every_task(tmp_path, tasks_per_image):
    ours = [record(i, list(ONE), more=2) for i in range(40)]
    pool = write(tmp_path / "pool", [record(i, list(ONE), more=2) for i in range(400)])
    imax = write(tmp_path / "imax", ours)
    done = build_dmax(imax, tmp_path / "dmax", pool, tasks_per_image, seed=3)
    found = [one for _, one in jsonl.read_records(done.out)]
    assert count(found).tasks == count(ours).tasks
    for task, labels in count(ours).labels.items():
        assert variation(labels, count(found).labels[task]) == done.variation["train"][task] <= 0.05
    assert max(len({entry.task for entry in entries(one)}) for one in found) == tasks_per_image
    assert count(found).tasks_per_image == pytest.approx(tasks_per_image, rel=0.05)
    assert done.images["dmax"] == len({one.images for one in found}) > done.images["imax"]
    assert done.leaks == {"patients in several splits": 0, "images in several splits": 0}
    # The same seed gives the same bytes, another one other images.
    again = build_dmax(imax, tmp_path / "again", pool, tasks_per_image, seed=3)
    other = build_dmax(imax, tmp_path / "other", pool, tasks_per_image, seed=4)
    lines = [(one.out / "records-00000.jsonl").read_bytes() for one in (done, again, other)]
    assert lines[0] == lines[1] != lines[2]
    assert found[0].images[0].path.startswith("pool:")


def test_the_twin_finds_its_images_whatever_the_roots_of_the_pool_are_called(tmp_path):
    (tmp_path / "files").mkdir()
    (tmp_path / "pool").mkdir()
    for i in range(20):
        for place in ("files", "pool"):
            Image.new("L", (8, 8), i).save(tmp_path / place / f"{i}.png")
    made = [record(i, list(ONE)) for i in range(20)]
    named = [one.model_copy(update={"images": (ImageRef(path=f"pool:{i}.png"),)}) for i, one in enumerate(made[10:], 10)]
    info = jsonl.DatasetInfo(name="d", classes={"grade": ["a", "b", "c"]}, roots={"pool": "../files"})
    jsonl.write(tmp_path / "set", info, [*made[:10], *named])
    for i in range(10):
        Image.new("L", (8, 8), i).save(tmp_path / "set" / f"{i}.png")
    imax = write(tmp_path / "imax", [record(i, ["caption"]) for i in range(20)])
    done = build_dmax(imax, tmp_path / "dmax", tmp_path / "set")
    images = Images(done.out, jsonl.read_info(done.out).roots)
    paths = [images.path(ref) for _, one in jsonl.read_records(done.out) for ref in one.images]
    assert len(paths) == 20
    assert all(path.is_file() for path in paths)


def test_labels_keep_their_shares_where_the_pool_has_others(tmp_path):
    rng = random.Random(0)
    ours = [record(3 * i, ["severity", "vqa"]) for i in range(60)]  # every grade is "a"
    pool = [record(rng.randrange(3), ["severity", "vqa"]).model_copy(update={"id": f"x{i}", "patient": ""}) for i in range(600)]
    done = build_dmax(write(tmp_path / "imax", ours), tmp_path / "dmax", write(tmp_path / "pool", pool))
    grades = [one.value for _, made in jsonl.read_records(done.out) for one in made.annotations if one.kind == "label"]
    assert grades.count("a") / len(grades) >= 0.95
    assert len(grades) == 60


def test_a_pool_that_cannot_match_says_why(tmp_path):
    imax = write(tmp_path / "imax", [record(i, list(ONE)) for i in range(10)])
    with pytest.raises(UserError, match=r"build-dmax: 10 \w+ entries are wanted in the 'train' split, the pool's images give \d beside"):
        build_dmax(imax, tmp_path / "dmax")
    other = write(tmp_path / "other", [record(3 * i + 1, ["severity"]) for i in range(100)])
    few = write(tmp_path / "few", [record(3 * i, ["severity"]) for i in range(10)])
    with pytest.raises(UserError, match=r"labels of severity in the 'train' split differ by 1\.000 \(total variation\), at most 0\.05"):
        build_dmax(few, tmp_path / "dmax", other)
    with pytest.raises(UserError, match=r"the images of the 'train' split have 1\.00 tasks, 2 were asked for"):
        dmax.check([record(i, ["vqa"]) for i in range(4)], [record(i, ["vqa"]) for i in range(4)], 2, "train")
    assert not (tmp_path / "dmax").exists()
    run = CliRunner().invoke(cli.app, ["data", "build-dmax", str(imax), "--out", str(tmp_path / "dmax")])
    assert (run.exit_code, run.output.count("\n")) == (2, 1), run.output


def test_the_sample_as_image_centric_data(tmp_path):
    counts = build_imax_sample(tmp_path / "imax", names=("mr",))
    found = [one for _, one in jsonl.read_records(tmp_path / "imax")]
    assert counts == {"train": 116, "val": 21}
    told = count(found).as_json()
    assert set(told["entries by task"]) == {"vqa", "refer", "identify", "caption", "severity", "findings", "calculation"}
    grades = [one.value for made in found if made.split == "train" for one in made.annotations if one.kind == "label"]
    shares = [grades.count(name) / len(grades) for name in GRADES]
    assert max(shares) - min(shares) <= 0.02, SEVERITY
    assert terciles([1, 2, 3, 4, 5, 6, 7]) == (3.0, 5.0)
    by_block = {}
    for one in found:
        by_block.setdefault((one.split, block_of(one)), []).append(one.id)
    assert max(map(len, by_block.values())) <= 4
