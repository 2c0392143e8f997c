"""The index of a data set: the same items as a scan gives, kept as long as nothing that they are made from changes."""

import dataclasses
import json
import logging
import pickle
import subprocess
import sys
import weakref

import data_samples as samples
import numpy as np
import pytest

from unimed import TASKS
from unimed.datasets import index
from unimed.datasets.load import find_items, load_items, load_set, set_items
from unimed.errors import UserError
from unimed.records import image, jsonl, policy
from unimed.records.pixels import View
from unimed.records.policy import Rules
from unimed.records.record import ImageRef
from unimed.tasks.item import digest
from unimed.train.sampler import group

QUESTION = {"kind": "qa", "question": "Is it “normal”?", "answer": "yes"}
BOX = {"kind": "box", "name": "liver", "xyxy": [1, 2, 30.25, 15]}


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """The folder of the indexes."""
    monkeypatch.setenv("UNIMED_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(policy, "_printed", set())
    return tmp_path / "cache" / "index"


@pytest.fixture
def scans(monkeypatch):
    """The splits that were scanned."""
    found, real = [], index.each_item
    monkeypatch.setattr(index, "each_item", lambda spec, source: found.append(source.split) or real(spec, source))
    return found


def folder_of(root, records, **info):
    root.mkdir(parents=True, exist_ok=True)
    lines = [one if isinstance(one, str) else json.dumps({"dataset": "mine", "split": "train", **one}) for one in records]
    (root / "records-00000.jsonl").write_text("".join(f"{line}\n" for line in lines))
    (root / "dataset.json").write_text(json.dumps({"name": "mine", **info}))
    return root


def mine(tmp_path):
    """Images beside the folder and in it, a question without one, a page of a file, an id twice, two bad records."""
    for path in ("imgs/p1/a.png", "imgs/p2/b.png", "mine/c.png"):
        samples.picture(tmp_path / path)
    here = [{"path": "pics:p1/a.png"}]
    records = [
        {"id": "1", "images": here, "annotations": [QUESTION, BOX], "patient": "p"},
        {"id": "2", "images": [{"path": "pics:p2/b.png", "frame": 0, "window": [0, 200.5]}], "annotations": [BOX, BOX]},
        {"id": "3", "annotations": [QUESTION]},
        "{",
        {"id": "4", "images": [{"path": "pics:p2/missing.png"}], "annotations": [QUESTION]},
        {"id": "5", "images": [{"path": "c.png"}], "annotations": [{"kind": "report", "text": "w " * 60}]},
        {"id": "1", "images": here, "annotations": [QUESTION]},
        {"id": "6", "split": "test", "annotations": [QUESTION]},
    ]
    return folder_of(tmp_path / "mine", records, roots={"pics": "../imgs"})


def read(root, split="train", **rules):
    return set_items("mine", root, "records", split, None, Rules(**rules))


def told(caplog):
    lines = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    caplog.clear()
    return lines


LAYOUTS = (samples.slake, samples.published_slake, samples.sa_med2d, samples.path_vqa, samples.reports, samples.medpix, samples.medqa)


@pytest.mark.parametrize("make", [*LAYOUTS, samples.pubmedqa], ids=lambda make: make.__name__)
def test_an_index_gives_what_a_scan_gives(tmp_path, scans, make):
    make(tmp_path / "data")
    first, again = (find_items(tmp_path / "data", "train") for _ in range(2))
    wanted = load_items(tmp_path / "data", "train")
    assert list(first) == list(again) == wanted
    assert scans == ["train"]
    assert digest(first) == digest(again) == digest(wanted)


def test_every_field_comes_back(tmp_path, scans):
    root = mine(tmp_path)
    read(root)
    found, wanted = read(root), load_set("mine", root, "records", "train")
    assert scans == ["train"]
    assert [repr(one) for one in found] == [repr(one) for one in wanted]
    assert {type(one.image) for one in found} == {type(tmp_path), View, type(None)}
    assert [one.id for one in found] == [one.id for one in wanted]
    assert "mine/1/vqa0#2" in [one.id for one in found]  # an id that came before
    assert found[-1] == wanted[-1] == list(found)[len(found) - 1]
    assert list(found[1:6:2]) == wanted[1:6:2] == list(found.take(np.array([5, 3, 1])))[::-1]
    assert list(pickle.loads(pickle.dumps(found))) == wanted
    with pytest.raises(IndexError):
        found[len(wanted)]


def test_tasks_are_chosen_and_counted_without_making_items(tmp_path, monkeypatch):
    root = mine(tmp_path)
    whole = read(root)
    monkeypatch.setattr(index, "_item", None)
    found = set_items("mine", root, "records", "train", ["refer", "qa"])
    assert len(found) == 4 < len(whole)
    (refer, qa), shares = group(found, {"refer": 1, "qa": 3})
    assert (refer.tolist(), qa.tolist(), shares.tolist()) == ([0, 1, 2], [3], [0.25, 0.75])


def grow(root):
    samples.picture(root.parent / "imgs/p1/a.png", (80, 20))


def fill(root):
    samples.picture(root.parent / "imgs/p2/missing.png")


def more(root):
    (root / "records-00001.jsonl").write_text(
        json.dumps({"id": "7", "dataset": "mine", "split": "train", "annotations": [QUESTION]}) + "\n"
    )


def lose(root):
    (root / "c.png").unlink()


@pytest.mark.parametrize("change", [grow, fill, more, lose])
def test_a_file_that_changes_is_seen(tmp_path, scans, change):
    root = mine(tmp_path)
    before = list(read(root))
    change(root)
    after = list(read(root))
    assert after == load_set("mine", root, "records", "train") != before
    assert list(read(root)) == after
    assert scans == ["train", "train"]


def test_options_and_code_are_seen(tmp_path, scans, monkeypatch):
    root = mine(tmp_path)
    released, standard = (list(read(root, protocol=protocol)) for protocol in ("released", "standard"))
    assert [max(len(one.answer.split()) for one in some) for some in (released, standard)] == [50, 60]
    assert list(read(root)) == released
    assert len(read(root, "test")) == 1
    assert scans == ["train", "train", "test"]
    monkeypatch.setattr(index, "code", lambda: "changed")
    assert list(read(root)) == released
    assert scans == ["train", "train", "test", "train"]


def cut(path):
    path.write_bytes(path.read_bytes()[:-700])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def garble(path):
    path.with_suffix(".json").write_text("[1, 2")


def empty(path):
    path.with_suffix(".json").write_text("[]")


def forget(path):
    path.unlink()


@pytest.mark.parametrize("damage", [cut, flip, garble, empty, forget])
def test_a_damaged_index_is_made_again_with_one_line(tmp_path, place, scans, caplog, damage):
    root = mine(tmp_path)
    wanted = list(read(root))
    told(caplog)
    (path,) = place.glob("*.arrow")
    damage(path)
    assert list(read(root)) == wanted
    assert told(caplog) == [f"{path}: damaged; the data set is scanned again"]
    assert list(read(root)) == wanted
    assert told(caplog) == []
    assert scans == ["train", "train"]


def test_what_was_left_out_is_told_at_every_start(tmp_path, scans, caplog, monkeypatch):
    root = mine(tmp_path)
    lines = []
    for _ in range(2):
        monkeypatch.setattr(policy, "_printed", set())  # another start
        read(root)
        lines.append(told(caplog))
    assert lines[0] == lines[1]
    assert lines[0][0].startswith("mine (train): 2 of 7 records left out: 1 that are not valid JSON (first: records-00000.jsonl:4: ")
    assert "texts cut to 50 words: 1" in lines[0][0]
    assert scans == ["train"]
    bad = folder_of(tmp_path / "bad", ["{"])
    for _ in range(2):
        with pytest.raises(UserError, match=r"bad: no record can be used: .*records-00000\.jsonl:1"):
            read(bad)


def test_strict_stops_and_keeps_nothing(tmp_path, place, scans):
    root = mine(tmp_path)
    read(root)
    for _ in range(2):
        with pytest.raises(UserError, match=r"records-00000\.jsonl:4: .*strict"):
            read(root, strict=True)
    assert len(list(place.glob("*.arrow"))) == 1
    assert scans == ["train", "train", "train"]


def test_two_processes_scan_once(tmp_path, place):
    root = mine(tmp_path)
    code = (
        "import logging, sys; logging.basicConfig(level=logging.INFO, stream=sys.stdout)\n"
        "from pathlib import Path; from unimed.datasets.load import set_items\n"
        "print(len(set_items('mine', Path(sys.argv[1]), 'records', 'train')))"
    )
    started = [subprocess.Popen([sys.executable, "-c", code, str(root)], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    told = [process.communicate(timeout=120)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0]
    assert [text.splitlines()[-1] for text in told] == [str(len(read(root)))] * 2
    assert sum("an index of" in text for text in told) == 1
    assert sorted(path.suffix for path in place.iterdir()) == [".arrow", ".json", ".lock"]


def test_an_index_is_made_in_bounded_memory(tmp_path, monkeypatch):
    """Kind: records and items live until their batch is written, however many there are; looked at images are forgotten in time."""
    samples.picture(tmp_path / "mine" / "a.png")
    here = [{"path": "a.png"}]
    root = folder_of(tmp_path / "mine", ({"id": str(number), "images": here, "annotations": [QUESTION, BOX]} for number in range(100)))
    made, alive = [], []
    parse, row = jsonl.parse, index._row

    def parsed(text, where):
        made.append(weakref.ref(record := parse(text, where)))
        return record

    def rowed(item):
        made.append(weakref.ref(item))
        alive.append(sum(one() is not None for one in made))
        return row(item)

    monkeypatch.setattr(index, "ROWS", 16)
    monkeypatch.setattr(jsonl, "parse", parsed)
    monkeypatch.setattr(index, "_row", rowed)
    found = read(root)
    assert len(made) == 100 + 300 == 100 + len(found)
    assert max(alive) <= 2 * 16
    assert [chunk.num_rows for chunk in found.parts[0].table.to_batches()] == [16] * 18 + [12]
    assert list(found) == load_set("mine", root, "records", "train")
    monkeypatch.setattr(image, "MOST_SEEN", 3)
    looked = image.Images(tmp_path / "mine", {})
    for number in range(10):
        samples.picture(tmp_path / "mine" / f"{number}.png")
        looked.look(ImageRef(path=f"{number}.png"), "here")
        assert len(looked._seen) <= 3


def test_what_others_made_or_hold_in_memory_is_read_anew(tmp_path, place, scans, monkeypatch):
    labels = np.zeros((3, 1), np.uint8)
    samples.picture(tmp_path / "x" / "a.png")
    (tmp_path / "arrays").mkdir()
    np.savez(tmp_path / "arrays" / "breastmnist.npz", train_images=np.zeros((3, 8, 8), np.uint8), train_labels=labels)
    found = find_items(tmp_path / "arrays", "train")
    assert list(found) == load_items(tmp_path / "arrays", "train")
    assert isinstance(found[0].image, np.ndarray)
    own = dataclasses.replace(TASKS["qa"], tag="own", makes={"qa": lambda asked: asked.item("own", "?", "!", "own")})
    monkeypatch.setitem(TASKS, "own", own)
    assert {one.task for one in read(mine(tmp_path))} >= {"own"}
    assert scans == []
    assert not place.exists()


def test_a_folder_that_cannot_be_written_to_is_one_line(tmp_path, place, caplog):
    root = mine(tmp_path)
    place.parent.write_text("a file")
    assert list(read(root)) == load_set("mine", root, "records", "train")
    assert told(caplog)[0].startswith(f"{place}: the index cannot be kept there (")


def test_indexes_of_folders_that_are_gone_are_removed(tmp_path, place):
    gone = folder_of(tmp_path / "gone", [{"id": "1", "annotations": [QUESTION]}])
    read(gone)
    (gone / "records-00000.jsonl").unlink()
    (gone / "dataset.json").unlink()
    gone.rmdir()
    read(mine(tmp_path))
    assert {path.name.split("-")[0] for path in place.iterdir()} == {"mine"}


def test_links_that_lead_round_in_a_circle_end(tmp_path, scans):
    root = mine(tmp_path)
    (root / "round").symlink_to(tmp_path, target_is_directory=True)
    (root / "lost").symlink_to(tmp_path / "nowhere")
    for _ in range(2):
        read(root)
    assert scans == ["train"]


def test_a_record_is_read_with_its_own_split_only(tmp_path, monkeypatch):
    """Kind: three splits read a data set once, not three times. A line that is no JSON is looked at for each, since it may be of any."""
    said = {"kind": "qa", "question": 'Is it "split": "test"?', "answer": "no"}
    records = [{"id": f"{split}{at}", "split": split, "annotations": [said]} for at in range(4) for split in ("train", "val", "test")]
    root = folder_of(tmp_path / "mine", [*records, "{", json.dumps({"id": 7, "dataset": "mine", "split": "test"})])
    parsed, real = [], jsonl.parse
    monkeypatch.setattr(jsonl, "parse", lambda text, where: parsed.append(where.rpartition(":")[2]) or real(text, where))
    found = [one.id for split in ("train", "val", "test") for one in read(root, split)]
    assert found == [f"mine/{split}{at}/qa0" for split in ("train", "val", "test") for at in range(4)]
    assert sorted(parsed, key=int) == [*map(str, range(1, 13)), "13", "13", "13", "14"]
