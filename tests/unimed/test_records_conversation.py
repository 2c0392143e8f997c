"""Rows of LLaVA, of messages and of ms-swift become records, and records rows; imports."""

import json
import random
import tempfile
from pathlib import Path

import data_samples
import pytest
from dicom_samples import attempt
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.unimed.test_records import INFO, ONE, picture
from unimed.datasets import DATASETS, load_items
from unimed.datasets.items import read_items
from unimed.errors import UserError
from unimed.records import convert, jsonl
from unimed.records.imports import import_rows, splits
from unimed.records.policy import BadRecord, Tally
from unimed.records.record import QA, BoxOf, ImageRef, Record, Report

LLAVA = {
    "id": "7",
    "image": "a.png",
    "conversations": [
        {"from": "human", "value": "<image>\nWhich plane?"},
        {"from": "gpt", "value": "axial"},
        {"from": "human", "value": "Is the liver there?"},
        {"from": "gpt", "value": "yes"},
    ],
}

SWIFT = {
    "messages": [{"role": "user", "content": "<image>Find <ref-object>"}, {"role": "assistant", "content": "<bbox>"}],
    "images": ["a.png"],
    "objects": {"ref": ["liver"], "bbox": [[0.125, 0.5, 0.5, 1]], "bbox_type": "norm1"},
}


def made(images, annotations):
    return Record(id="7", dataset="mine", split="train", images=tuple(images), annotations=tuple(annotations))


def test_llava_rows_there_and_back():
    images, annotations = convert.from_llava(LLAVA, "data.json[0]")
    assert [image.path for image in images] == ["a.png"]
    assert [(one.question, one.answer) for one in annotations] == [("Which plane?", "axial"), ("Is the liver there?", "yes")]
    assert list(convert.to_llava(made(images, annotations))) == [LLAVA]


def test_messages_there_and_back():
    row = {
        "id": "7",
        "messages": [{"role": "user", "content": "<image>Which plane?"}, {"role": "assistant", "content": "axial"}],
        "images": [{"path": "v.nii", "slice": 3}],
    }
    images, annotations = convert.from_messages(row, "here")
    assert images == [ImageRef(path="v.nii", slice=3)]
    assert list(convert.to_messages(made(images, annotations))) == [row]
    parts = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "Which plane?"}]
    row = {"messages": [{"role": "system", "content": "You are kind."}, {"role": "user", "content": parts}, row["messages"][1]]}
    assert convert.from_messages(row, "here") == ([ImageRef(path="a.png")], [QA(question="Which plane?", answer="axial")])


def test_a_question_is_about_the_image_that_was_last_shown():
    turns = [("human", "<image>\nFirst?"), ("gpt", "a"), ("human", "And <image>\nsecond?"), ("gpt", "b"), ("human", "Third?"), ("gpt", "c")]
    row = {"image": ["a.png", "b.png"], "conversations": [{"from": who, "value": text} for who, text in turns]}
    images, annotations = convert.from_llava(row, "here")
    assert [(one.question, one.image) for one in annotations] == [("First?", 0), ("And\nsecond?", 1), ("Third?", 1)]
    again = [convert.from_llava(row, "there") for row in convert.to_llava(made(images, annotations))]
    assert [[image.path for image in images] for images, _ in again] == [["a.png"], ["b.png"]]


@pytest.mark.parametrize(
    ("asked", "answer", "objects", "boxes"),
    [
        ("Find <ref-object>", "<bbox>", {"ref": ["liver"], "bbox": [[1, 2, 3, 4]]}, [("liver", (1, 2, 3, 4))]),
        ("Find <ref-object>", "<bbox><bbox>", {"ref": ["kidney"], "bbox": [[1, 2, 3, 4], [5, 2, 7, 4]]},
         [("kidney", (1, 2, 3, 4)), ("kidney", (5, 2, 7, 4))]),
        ("What do you see?", "<ref-object><bbox> and <ref-object><bbox>", {"ref": ["a", "b"], "bbox": [[1, 2, 3, 4], [5, 2, 7, 4]]},
         [("a", (1, 2, 3, 4)), ("b", (5, 2, 7, 4))]),
        ("What is at <bbox>?", "spleen", {"ref": [], "bbox": [[1, 2, 3, 4]]}, [("spleen", (1, 2, 3, 4))]),
        ("What is at <bbox>?", "<ref-object>", {"ref": ["spleen"], "bbox": [[1, 2, 3, 4]]}, [("spleen", (1, 2, 3, 4))]),
        ("Find it", "there", {"ref": ["liver"], "bbox": [[1, 2, 3, 4]]}, [("liver", (1, 2, 3, 4))]),
    ],
)  # fmt: skip
def test_slots_of_swift_are_filled_in_order(asked, answer, objects, boxes):
    row = {
        **SWIFT,
        "messages": [{"role": "user", "content": f"<image>{asked}"}, {"role": "assistant", "content": answer}],
        "objects": objects,
    }
    _, annotations = convert.from_swift(row, "here")
    assert [(one.name, one.xyxy) for one in annotations if isinstance(one, BoxOf)] == boxes
    assert [one.question for one in annotations if isinstance(one, QA)] == ([asked] if "<" not in asked + answer else [])


def test_swift_rows_there_and_back():
    images, annotations = convert.from_swift(SWIFT, "rows.jsonl:1", lambda ref: (200, 100))
    assert annotations == [BoxOf(name="liver", xyxy=(25.0, 50.0, 100.0, 100.0))]
    one = made(images, (*annotations, QA(question="q", answer="a"), Report(text="Clear.")))
    again = [a for row in convert.to_swift(one) for a in convert.from_swift(json.loads(json.dumps(row)), "here")[1]]
    assert sorted((a.kind, getattr(a, "xyxy", None)) for a in again) == [("box", (25.0, 50.0, 100.0, 100.0)), ("qa", None), ("qa", None)]


@pytest.mark.each
@pytest.mark.parametrize(
    ("form", "row", "message"),
    [
        ("llava", 3, "expected an object with a list 'conversations'"),
        ("llava", {"conversations": []}, "conversations is \\[\\], expected a list"),
        ("llava", {**LLAVA, "conversations": LLAVA["conversations"][:3]}, "must alternate"),
        ("llava", {**LLAVA, "image": "https://host/a.png"}, "save it as a file"),
        ("llava", {**LLAVA, "image": "../a.png"}, "must stay inside"),
        ("llava", {**LLAVA, "image": "images:a.png"}, "no ':' in an image's path"),
        ("llava", {**LLAVA, "image": {"path": "a.nii", "slice": "x"}}, "image: slice: input should be a valid integer"),
        ("llava", {**LLAVA, "image": None}, "1 <image> in the questions and 0 images"),
        ("llava", {**LLAVA, "image": ["a.png", "b.png"]}, "1 <image> in the questions and 2 images"),
        ("llava", {**LLAVA, "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "x"}]}, "no text besides"),
        ("llava", {**LLAVA, "conversations": [{"from": "human", "value": "<bbox>"}, {"from": "gpt", "value": "x"}]}, "import it as swift"),
        ("messages", {"messages": [{"role": "robot", "content": "x"}]}, "expected a role: user, assistant or system"),
        ("messages", {"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "has the part"),
        ("swift", {**SWIFT, "objects": {"ref": ["x"]}}, "expected the lists 'ref' and 'bbox'"),
        ("swift", {**SWIFT, "objects": {"ref": ["x"], "bbox": [[1, 2, 3]]}}, "expected \\[x1, y1, x2, y2\\]"),
        ("swift", {**SWIFT, "objects": {"ref": ["x"], "bbox": [[3, 2, 1, 4]]}}, "x1 < x2"),
        ("swift", {**SWIFT, "objects": {"ref": ["x"], "bbox": [[1, 2, 3, 4]], "bbox_type": "norm1"}}, "expected 0 to 1"),
        ("swift", {**SWIFT, "objects": {"ref": ["x"], "bbox": [[1, 2, 3, 4]], "bbox_type": "norm1000"}}, "'real' \\(pixels\\) or 'norm1'"),
        ("swift", {**SWIFT, "objects": {"ref": ["x"], "bbox": [[1, 2, 3, 4]], "image_id": [1]}}, "is on image 1, the row has 1 images"),
        ("swift", {**SWIFT, "objects": {"ref": [], "bbox": [[1, 2, 3, 4]]}}, "1 <ref-object> and 1 <bbox>, but objects has 0 ref"),
    ],
)  # fmt: skip
def test_a_wrong_row_is_one_line(form, row, message):
    with pytest.raises(BadRecord, match=message) as error:
        convert.FORMS[form](row, "file:3")
    assert str(error.value).startswith("file:3: ")
    assert "\n" not in str(error.value)


def test_an_import_splits_by_image(tmp_path):
    rows = []
    for i in range(40):
        picture(tmp_path / "imgs" / f"{i}.png", i // 2)  # two files of each picture: a split by name would leak
        rows.append({**LLAVA, "id": f"r{i}", "image": f"{i}.png"})
    rows += [{**LLAVA, "image": "missing.png"}, {"image": "0.png"}, {**LLAVA, "id": "r1", "image": "1.png"}]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    arguments = ("llava", tmp_path / "data.json", tmp_path / "imgs")
    done = import_rows(*arguments, tmp_path / "mine")
    assert (done.grouped_by, done.groups, sum(done.records.values()), done.annotations) == ("image", 20, 41, {"qa": 82})
    assert done.left_out.startswith("mine (import): 2 of 43 records left out: 1 with a missing image (first: data.json[40]: ")
    by_picture: dict[int, set[str]] = {}
    records = [one for _, one in jsonl.read_records(tmp_path / "mine")]
    assert len({one.id for one in records}) == 41
    for one in records:
        number = int(one.images[0].path.removeprefix("images:").removesuffix(".png"))
        by_picture.setdefault(number // 2, set()).add(one.split)
    assert all(len(found) == 1 for found in by_picture.values())
    assert set().union(*by_picture.values()) == {"train", "val", "test"}
    with pytest.raises(UserError, match="exists already"):
        import_rows(*arguments, tmp_path / "mine")
    with pytest.raises(UserError, match=r"data\.json\[40\].*strict"):
        import_rows(*arguments, tmp_path / "strict", strict=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.json", "imgs", "mine"]
    assert jsonl.read_info(tmp_path / "mine").roots == {"images": "../imgs"}
    (tmp_path / "moved").mkdir()
    for name in ("mine", "imgs"):
        (tmp_path / name).rename(tmp_path / "moved" / name)
    assert len(load_items(tmp_path / "moved" / "mine", "test")) == 2 * done.records["test"]


def test_an_import_splits_by_patient_and_never_parts_one_image(tmp_path):
    for i in range(30):
        picture(tmp_path / "imgs" / f"{i}.png", i)
    rows = [{**LLAVA, "id": i, "image": f"{i}.png", "who": f"p{i % 10}"} for i in range(30)]
    rows += [{**LLAVA, "id": "shared", "image": "0.png", "who": "p1"}, {**LLAVA, "image": "2.png"}]  # p0 and p1 share an image
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    done = import_rows("llava", tmp_path / "data.jsonl", tmp_path / "imgs", tmp_path / "mine", patient="who", val=0.2, test=0.2)
    found: dict[str, set[str]] = {}
    for _, one in jsonl.read_records(tmp_path / "mine"):
        found.setdefault(one.patient, set()).add(one.split)
    assert len(found) == 10
    assert all(len(names) == 1 for names in found.values())
    assert found["p0"] == found["p1"]
    assert (done.grouped_by, done.groups) == ("patient", 9)
    assert "1 without a patient (first: data.jsonl:32: field 'who' (--patient) is None" in done.left_out


@pytest.mark.parametrize(("task", "kind", "tasks"), [("", "qa", {"vqa"}), ("caption", "report", {"caption"}), ("cls", "qa", {"cls"})])
def test_the_task_of_an_import(tmp_path, task, kind, tasks):
    picture(tmp_path / "imgs" / "a.png")
    (tmp_path / "rows.json").write_text(json.dumps([LLAVA]))
    done = import_rows("llava", tmp_path / "rows.json", tmp_path / "imgs", tmp_path / "mine", task=task)
    assert done.annotations == {kind: 2}
    assert {one.task for one in load_items(tmp_path / "mine", "train")} == tasks
    with pytest.raises(UserError, match="--task qa takes no image"):
        import_rows("llava", tmp_path / "rows.json", tmp_path / "imgs", tmp_path / "other", task="qa")


def test_boxes_in_shares_are_of_the_file_and_not_of_what_is_shown(tmp_path):
    tags = Image.Exif()
    tags[0x0112] = 6
    (tmp_path / "imgs").mkdir()
    Image.new("RGB", (40, 20)).save(tmp_path / "imgs" / "a.png", exif=tags)
    (tmp_path / "rows.jsonl").write_text(json.dumps(SWIFT))
    import_rows("swift", tmp_path / "rows.jsonl", tmp_path / "imgs", tmp_path / "mine")
    ((_, only),) = jsonl.read_records(tmp_path / "mine")
    assert only.annotations[0].xyxy == (5, 10, 20, 20)
    refer = load_items(tmp_path / "mine", "train")[0]
    assert (refer.size, refer.box) == ((20, 40), (0, 5, 10, 20))


def test_splits_do_not_depend_on_the_order():
    groups = [f"g{i}" for i in range(50)]
    assert splits(groups, 0.1, 0.1, 3) == splits(groups[::-1], 0.1, 0.1, 3)
    assert splits(groups, 0.1, 0.1, 3) != splits(groups, 0.1, 0.1, 4)
    assert splits(["only"], 0.1, 0.1, 0) == {"only": "train"}
    assert sorted(splits(groups, 0, 0.1, 0).values()).count("test") == 5
    assert "val" not in splits(groups, 0, 0.1, 0).values()


JUNK = st.one_of(st.none(), st.booleans(), st.integers(-(10**400), 10**400), st.floats(), st.text(max_size=5), st.just([]), st.just({}))

SAID = [{"role": "user", "content": "<image>Which plane?"}, {"role": "assistant", "content": "axial"}]

ROWS = {"llava": LLAVA, "messages": {"messages": SAID, "images": ["a.png"]}, "swift": SWIFT}


def _flipped(data, seed):
    """Bytes with up to three bits flipped, cut off at times."""
    rng = random.Random(seed)
    changed = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed[: rng.randrange(len(changed))] if rng.random() < 0.2 else changed)


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_mutated_records_end_in_a_count_or_in_one_line(data):
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        picture(root / "a.png")
        (root / "dataset.json").write_text(json.dumps(INFO.model_dump()))
        text = (json.dumps(data_samples.mutated(ONE, data.draw, JUNK)) + "\n" + json.dumps(ONE) + "\n").encode()
        if data.draw(st.booleans()):
            text = _flipped((json.dumps(ONE) + "\n").encode() * 2, data.draw(st.integers(0, 10**6)))
        (root / "records-00000.jsonl").write_bytes(text)
        tally = Tally("mine", root, "train")
        found, error = attempt(lambda: read_items(DATASETS["records"], tally))
        if error is not None:
            assert "\n" not in error
            return
        assert "\n" not in tally.line()
        for one in found:
            (one.id + one.question + one.answer + one.template + one.subject).encode()
            assert one.answer
            if one.image is not None:
                one.open()


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(sorted(ROWS)), st.data())
def test_mutated_rows_end_in_a_count_or_in_one_line(form, data):
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        picture(root / "imgs" / "a.png")
        lines = (json.dumps(data_samples.mutated(ROWS[form], data.draw, JUNK)) + "\n").encode()
        if data.draw(st.booleans()):
            lines = _flipped((json.dumps(ROWS[form]) + "\n").encode(), data.draw(st.integers(0, 10**6)))
        good = data.draw(st.booleans())
        (root / "rows.jsonl").write_bytes(lines + b"\n" + (json.dumps(ROWS[form]).encode() if good else b""))
        done, error = attempt(lambda: import_rows(form, root / "rows.jsonl", root / "imgs", root / "mine"))
        if error is not None:
            assert "\n" not in error
            assert not good
            assert sorted(path.name for path in root.iterdir()) == ["imgs", "rows.jsonl"]
            return
        assert "\n" not in done.left_out
        assert len([one for _, one in jsonl.read_records(root / "mine")]) == sum(done.records.values())
        load_items(root / "mine", "train")
