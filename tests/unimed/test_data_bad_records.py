"""Bad records are left out, counted and named; nothing is lost without a count."""

import hashlib
import json
import re
import tempfile
from pathlib import Path

import data_samples
import numpy as np
import pytest
from data_samples import MEDQA, QUESTIONS, REPORTS, medmnist, medpix, medqa, picture, published_slake, reports, slake, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from unimed.datasets import DATASETS, load_items
from unimed.datasets.items import read_items
from unimed.errors import UserError
from unimed.io import inside
from unimed.records.box import clip
from unimed.records.policy import Rules, Tally
from unimed.tasks.item import Item

STRICT, STANDARD = Rules(strict=True), Rules(protocol="standard")


def told(caplog):
    """The lines that were printed, and no more of them."""
    lines = [record.getMessage() for record in caplog.records if record.name == "unimed.records"]
    caplog.clear()
    return lines


# Lines and quotes


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85", "\v", "\f", "\x1c", "\x1e"])
def test_only_line_ends_end_a_line(tmp_path, mark):
    """Kind: text is cut at line feeds and carriage returns only, not wherever str.splitlines does."""
    row = {**MEDQA[0], "question": f"one{mark}two"}
    medqa(tmp_path / "qa", [row, MEDQA[1]])
    assert [item.question for item in load_items(tmp_path / "qa", "train", rules=STRICT)] == ["one two", "Which bone?"]
    medpix(tmp_path / "pix", f"name,context,type\r\na.png,one{mark}two,caption\r\nb.png,three,caption\r\n")
    assert [item.answer for item in load_items(tmp_path / "pix", "train", rules=STRICT)] == ["one two", "three"]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ('a.png,"Never closed,caption', "a quote opens and never closes"),
        ('a.png,"Never closed, caption\n', "a quote opens and never closes"),
        ('a.png,"' + "long " * 30_000 + ",caption", "field larger than field limit"),
        ("a.png,too,many,caption", "4 cells, expected 3"),
        ("a.png", "1 cells, expected 3"),
    ],
)
def test_a_broken_row_of_a_csv_costs_that_row_only(tmp_path, caplog, row, words):
    medpix(tmp_path, f'name,context,type\nb.png,First,caption\n{row}\na.png,"A mass, in the liver",caption\nb.png,"Nice",caption\n')
    assert [item.answer for item in load_items(tmp_path, "train")] == ["First", "A mass, in the liver", "Nice"]
    (line,) = told(caplog)
    assert line.startswith("medpix (train): 1 of 4 records left out: 1 with ")
    assert words in line
    assert "MedPix_single_train.csv:3" in line
    with pytest.raises(UserError, match=r"MedPix_single_train\.csv:3"):
        load_items(tmp_path, "train", rules=STRICT)


def test_a_quote_left_open_in_the_last_row_and_in_the_header(tmp_path):
    medpix(tmp_path, 'name,context,type\nb.png,First,caption\na.png,b,"caption')
    assert [item.answer for item in load_items(tmp_path, "train")] == ["First"]
    medpix(tmp_path, 'name,"context,type\nb.png,First,caption\n')
    with pytest.raises(UserError, match=r"train\.csv:1: a quote opens and never closes"):
        load_items(tmp_path, "train")


def test_cells_that_pandas_reads_as_missing_are_left_out(tmp_path, caplog):
    cells = ["NA", "nan", "N/A", "null", '"NaN"', "", "None"]
    rows = "".join(f"a.png,{cell},caption\n" for cell in cells)
    medpix(tmp_path, f"name,context,type\n{rows}a.png,na,caption\na.png,NAD,caption\nb.png,x,vqa\n")
    assert [item.answer for item in load_items(tmp_path, "train")] == ["na", "NAD"]
    assert told(caplog) == [
        "medpix (train): 7 of 10 records left out: 7 with a missing cell (first: MedPix_single_train.csv:2: column 'context' is 'NA'); "
        "1 of 10 records left out by choice: 1 of type 'vqa'"
    ]


def test_bytes_that_are_no_text_cost_their_record_only(tmp_path, caplog):
    medqa(tmp_path)
    path = tmp_path / "questions" / "US" / "train.jsonl"
    path.write_bytes(path.read_bytes().replace(b"helps", b"h\xe9lps"))
    assert [item.question for item in load_items(tmp_path, "train")] == ["Which bone?"]
    assert "1 with text that is not Unicode (first: questions/US/train.jsonl:1" in told(caplog)[0]


# SLAKE and boxes


def test_slake_as_published(tmp_path, caplog):
    published_slake(tmp_path / "Slake1.0")
    found = load_items(tmp_path, "train", rules=STRICT)
    assert [(item.task, item.dataset) for item in found] == [("vqa", "slake")] * 2 + [
        ("refer", "slake"),
        ("identify", "slake"),
    ] * 2
    assert [item.id for item in found[:2]] == ["slake/xmlab0/q0", "slake/xmlab0/q1"]
    assert {item.subject for item in found} == {"xmlab0"}
    assert found[0].open().size == (40, 20)
    assert told(caplog) == ["slake (train): 1 of 5 records left out by choice: 1 with q_lang 'zh' (data.languages=['en'])"]
    assert [item.id for item in load_items(tmp_path, "test")] == ["slake/xmlab1/q9"]
    assert load_items(tmp_path, "val") == []
    chinese = load_items(tmp_path, "train", ["vqa"], Rules(languages=("en", "zh")))
    assert [item.answer for item in chinese] == ["MRI", "No", "没有"]


def test_a_line_is_printed_once_for_each_data_set(tmp_path, caplog):
    published_slake(tmp_path)
    for _ in range(3):
        load_items(tmp_path, "train")
    assert len(told(caplog)) == 1


def test_one_bad_record_of_each_kind_stops_nothing(tmp_path, caplog):
    boxes = [
        {"Liver": [4, 5, 10, 10]},
        {"Spleen": [30, 2, 14, 8]},  # four pixels outside
        {"Lung": [41, 2, 8, 8]},  # wholly outside
        {"Heart": [float("nan"), 2, 8, 8]},
        {"Colon": [1, 2, float("inf"), 8]},
        {"Bladder": [-3, -2, 13, 12]},
    ]
    slake(tmp_path, detections=boxes, cases="xmlab0 xmlab1 xmlab2")
    picture(tmp_path / "imgs" / "xmlab1" / "source.jpg", (400, 300))
    write(tmp_path / "imgs" / "xmlab1" / "question.json", [{**QUESTIONS[0], "img_name": "xmlab1/source.jpg"}])
    whole = (tmp_path / "imgs" / "xmlab1" / "source.jpg").read_bytes()
    (tmp_path / "imgs" / "xmlab1" / "source.jpg").write_bytes(whole[: len(whole) // 2])
    found = load_items(tmp_path, "train")
    assert {item.question: item.box for item in found if item.task == "refer"} == {
        "Liver": (4, 5, 14, 15), "Spleen": (30, 2, 40, 10), "Bladder": (0, 0, 10, 10),
    }  # fmt: skip
    assert len([item for item in found if item.task == "vqa"]) == 2
    (line,) = told(caplog)
    assert line.startswith(
        "slake (train): 5 of 11 records left out: 2 with a wrong box (first: imgs/xmlab0/detection.json[3]: the box of 'Heart'"
    )
    for words in (
        "1 with a box outside the image (first: imgs/xmlab0/detection.json[2]",
        "1 with an unreadable image (first: imgs/xmlab1/question.json[0]: imgs/xmlab1/source.jpg: ",
        "1 with a missing folder (first: train.txt: names case 'xmlab2'",
        "1 of 11 records left out by choice: 1 with q_lang 'zh'",
        "2 of 11 records changed: 2 with a box clipped to the image (first: imgs/xmlab0/detection.json[1]: the box of 'Spleen'",
    ):
        assert words in line
    assert "\n" not in line


@settings(deadline=None)
@given(st.tuples(*[st.floats(-1e3, 1e3)] * 2), st.tuples(*[st.floats(1e-3, 1e3)] * 2), st.tuples(*[st.integers(1, 500)] * 2))
def test_a_clipped_box_lies_in_the_image_and_is_at_least_half_of_the_box(corner, sides, size):
    box = (*corner, corner[0] + sides[0], corner[1] + sides[1])
    inner = clip(box, size)
    if inner is not None:
        assert 0 <= inner[0] < inner[2] <= size[0]
        assert 0 <= inner[1] < inner[3] <= size[1]
        area = (inner[2] - inner[0]) * (inner[3] - inner[1])
        assert area >= 0.4999 * (box[2] - box[0]) * (box[3] - box[1])
    elif box[0] >= 0 and box[1] >= 0:
        assert box[2] > size[0] or box[3] > size[1]


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif"])
@pytest.mark.parametrize("share", [0, 0.05, 0.5, 0.98])
def test_an_image_that_was_cut_off_is_found_before_training(tmp_path, suffix, share, caplog):
    """Kind: what would stop training in the middle is left out at the start, in every layout."""
    path = tmp_path / "files" / f"cut{suffix}"
    reports(tmp_path, [REPORTS[0], {**REPORTS[1], "image_path": [path.name]}])
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (240, 320, 3), np.uint8)).save(path)
    assert len(load_items(tmp_path, "train", rules=STRICT)) == 2
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    assert [item.id for item in load_items(tmp_path, "train")] == ["mimic-cxr/a"]
    assert "1 with an unreadable image (first: annotation.json: train[1]" in told(caplog)[0]


@pytest.mark.parametrize("value", [None, "", "  ", 3, ["Clear."], float("nan")])
def test_a_report_that_is_none_costs_its_record_only(tmp_path, value, caplog):
    reports(tmp_path, [REPORTS[0], {**REPORTS[1], "report": value}])
    assert [item.id for item in load_items(tmp_path, "train")] == ["mimic-cxr/a"]
    assert "1 of 2 records left out: 1 with" in told(caplog)[0]


# Classes


def test_an_unknown_archive_does_not_stop_the_folder(tmp_path, caplog):
    medmnist(tmp_path)
    medmnist(tmp_path, "mine")
    np.savez(tmp_path / "features.npz", x=np.zeros(3))
    assert len(load_items(tmp_path, "train")) == 3
    (line,) = told(caplog)
    assert line.startswith(
        "medmnist (train): 4 of 7 records left out: 3 in an archive without class names (first: mine.npz: class names unknown; put "
    )
    assert "1 in an archive of another form (first: features.npz: has x, expected train_images" in line
    with pytest.raises(UserError, match=r"features\.npz"):
        load_items(tmp_path, "train", rules=STRICT)


# Text questions


LONG = {"question": "A woman " + "word " * 80 + "Which drug?", "answer": "Rest", "options": {"A": "Rest", "B": "Ampicillin"}}


# Names


def test_two_folders_of_one_layout_have_names_and_ids_of_their_own(tmp_path):
    from unimed.tasks import prompts

    reports(tmp_path / "north")
    (own,) = {item.dataset for item in load_items(tmp_path, "train")}
    assert own == "mimic-cxr"
    for name in ("south", "medqa"):
        reports(tmp_path / name)
    medqa(tmp_path / "texts")
    medmnist(tmp_path / "north")
    medmnist(tmp_path / "south")
    medmnist(tmp_path / "west", "pneumoniamnist", ((0,), (1,)))
    found = load_items(tmp_path, "train")
    names = {item.dataset for item in found}
    assert names == {"north", "south", "medqa-mimic-cxr", "medqa", "north-organsmnist_28", "south-organsmnist_28", "pneumoniamnist"}
    assert len({item.id for item in found}) == len(found)
    assert all(item.id.startswith(f"{item.dataset}/") for item in found)
    captions = [item for item in found if item.task == "caption"]
    assert {prompts.instruction(item, None) for item in captions} == {
        "<Img><ImageHere></Img> [caption] Describe the findings of this chest X-ray."
    }


def test_an_id_that_comes_twice_is_made_two(tmp_path):
    reports(tmp_path, [REPORTS[0], {**REPORTS[1], "id": "a"}])
    assert [item.id for item in load_items(tmp_path, "train")] == ["mimic-cxr/a", "mimic-cxr/a#2"]


def test_items_can_be_hashed_and_compared_also_with_an_array():
    def item(image, key="a"):
        return Item(key, "cls", "d", "?", "x", image, (2, 2), None, "cls")

    zeros, ones = np.zeros((2, 2), np.uint8), np.ones((2, 2), np.uint8)
    assert item(zeros) == item(zeros.copy())
    assert item(zeros) != item(ones)
    assert item(zeros) != item(zeros.astype(bool))
    assert item(zeros) != item(None)
    assert item(Path("a")) == item(Path("a"))
    assert item(zeros) != item(zeros, "b")
    assert item(zeros) != "a"
    assert len({item(zeros), item(zeros.copy()), item(zeros, "b")}) == 2


@pytest.mark.parametrize("name", ["../a", "a/../../b", "/etc/passwd", "..", "C:/x", "C:x", "a\\..\\b", "\\\\host\\x", "a\0b", "\ud800"])
def test_a_name_in_the_data_never_leads_out(tmp_path, name):
    for links in (True, False):
        with pytest.raises(UserError):
            inside(tmp_path, name, links)
    assert inside(tmp_path, "a/./b.jpg") == tmp_path.resolve() / "a" / "b.jpg"


def test_a_recipe_reaches_the_readers(tmp_path):
    from unimed.train import recipe as recipes
    from unimed.train.run import items

    published_slake(tmp_path / "slake")
    medqa(tmp_path / "medqa", [LONG])
    chosen = recipes.load("tiny", [f"data.root={tmp_path}", "data.languages=[zh]", "data.protocol=standard", "data.tasks=[vqa,qa]"])
    qa, vqa = items(chosen, "train")
    assert (qa.question[-16:], vqa.answer) == ("t (B) Ampicillin", "没有")
    strict = recipes.load("tiny", [f"data.root={tmp_path}", "data.strict=true"])
    (tmp_path / "slake" / "imgs" / "xmlab0" / "source.jpg").unlink()
    with pytest.raises(UserError, match="no such image"):
        items(strict, "train")


# The demo's items

ITEMS = {"train": ("4,940", "9bdf9438c1650664"), "slab": ("1,139", "12045dfb965daba9"), "subject": ("1,200", "bae7267be7ccfa03")}


@pytest.mark.parametrize("split", ITEMS)
def test_the_demo_reads_the_same_items_as_ever(sample_folder, split, caplog):
    """Order, texts, boxes, prompts and pixels, as commit 298e6e7 had them."""
    import random

    from unimed.tasks import prompts

    found = load_items(sample_folder, split, rules=STRICT)
    digest = hashlib.sha256()
    for number, item in enumerate(found):
        texts = [item.task, item.question, item.answer, item.template, item.answer_type]
        forms = [prompts.chat(prompts.instruction(item, rng)) for rng in (None, random.Random(number))]
        pixels = hashlib.sha256(item.open().tobytes()).hexdigest() if item.image is not None else ""
        digest.update(json.dumps([*texts, item.subject, item.box, *forms, pixels]).encode())
    assert (f"{len(found):,}", digest.hexdigest()[:16]) == ITEMS[split]
    assert told(caplog) == []


# Mutated data

JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 3), st.just(10**400), st.floats(), st.text(max_size=4),
    st.sampled_from(["<image>", "../../x", "/etc/hostname", "a\0b", "\ud800", "x" * 5000, "NA", "\u2028", '"', "xmlab0", "[/INST]"]),
    st.just([]), st.just({}), st.lists(st.integers(0, 9), max_size=5), st.dictionaries(st.text(max_size=2), st.integers(), max_size=2),
)  # fmt: skip


@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_mutated_data_ends_in_a_count_or_in_one_line(data):
    name = data.draw(st.sampled_from(sorted(data_samples.LAYOUTS)))
    layout = next(layout for layout in DATASETS.values() if layout.name in name)
    with tempfile.TemporaryDirectory() as folder:
        root = data_samples.LAYOUTS[name](Path(folder))
        path = data.draw(st.sampled_from(sorted(path for path in root.rglob("*") if path.is_file())))
        if path.suffix == ".json" and data.draw(st.booleans()):
            path.write_text(json.dumps(data_samples.mutated(json.loads(path.read_text()), data.draw, JUNK)))
        elif path.suffix == ".jsonl" and data.draw(st.booleans()):
            rows = [data_samples.mutated(json.loads(line), data.draw, JUNK) for line in path.read_text().splitlines()]
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            whole = path.read_bytes()
            at = data.draw(st.integers(0, len(whole)))
            path.write_bytes(whole[:at] + data.draw(st.binary(max_size=3)) + whole[at + data.draw(st.integers(0, 9)) :])
        if not layout.matches(root):
            return
        tally = Tally(layout.name, root, "train")
        message, found = "", []
        try:
            found = read_items(layout, tally)
        except UserError as error:
            message = str(error)
        assert "\n" not in message
        if message:
            return
        kept = sum(item.task != "identify" for item in found)  # a box is one record and two items
        chosen = re.search(r"([\d,]+) of [\d,]+ records left out by choice", tally.line())
        assert kept + tally.left_out + (int(chosen[1]) if chosen else 0) == tally.records
        for item in found:
            json.dumps(item.id).encode()
            (item.question + item.answer + item.subject + item.template).encode()
            assert item.answer
