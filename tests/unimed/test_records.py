"""Records: what they refuse, their files, rows of other projects, and items made from them."""

import json
import random
import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from dicom_samples import attempt, dicom_file
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from unimed.datasets import DATASETS, load_items
from unimed.datasets.items import read_items
from unimed.errors import UserError
from unimed.records import convert, jsonl
from unimed.records.imports import import_rows, splits
from unimed.records.policy import BadRecord, Rules, Tally
from unimed.records.record import QA, BoxOf, ImageRef, Record, Report, parse

QUESTION = {"kind": "qa", "question": "Which plane?", "answer": "axial"}
BOX = {"kind": "box", "name": "liver", "xyxy": [1, 2, 6, 5]}
ONE = {"id": "a", "dataset": "mine", "split": "train", "images": [{"path": "a.png"}], "annotations": [QUESTION, BOX]}
INFO = jsonl.DatasetInfo(name="mine")
STANDARD = Rules(protocol="standard")


def record(**changes):
    return parse(json.dumps({**ONE, **changes}), "here")


def picture(path, seed=0, size=(8, 6)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), np.uint8)).save(path)


def folder_of(root, lines, **info):
    """A data set whose lines may be wrong."""
    jsonl.write(root, jsonl.DatasetInfo(**{"name": "mine", **info}), [])
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (root / "records-00000.jsonl").write_text("".join(text + "\n" for text in texts), encoding="utf-8")
    return root


def told(caplog):
    lines = [one.getMessage() for one in caplog.records if one.name == "unimed.records"]
    caplog.clear()
    return lines


# The record and its files


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"split": "dev"}, "split: input should be 'train', 'val' or 'test', it is 'dev'"),
        ({"images": [{"path": "../a.png"}]}, "images.0.path: a path must stay inside"),
        ({"images": [{"path": "/etc/passwd"}]}, "no absolute path, it is '/etc/passwd'"),
        ({"images": [{"path": "root:../a.png"}]}, "images.0.path: a path must stay inside"),
        ({"images": [{"path": "a.nii", "window": [5, 5]}]}, "images.0.window: a window must be [lowest, highest]"),
        ({"images": [{"path": "a.nii", "slice": 1, "frame": 2}]}, "not both"),
        ({"images": [{"path": "a.nii", "slice": -1}]}, "images.0.slice"),
        ({"images": []}, "annotations.1: a box needs an image, the record has none"),
        ({"annotations": [{**QUESTION, "image": 1}]}, "annotations.0 is about image 1, the record has 1"),
        ({"annotations": [{**BOX, "xyxy": [3, 2, 1, 4]}]}, "annotations.0.box.xyxy: a box must be [x1, y1, x2, y2] with x1 < x2"),
        ({"annotations": [{**BOX, "xyxy": [0, 0, float("nan"), 4]}]}, "annotations.0.box.xyxy"),
        ({"annotations": [{**BOX, "xyxy": ["1", 0, 2, 4]}]}, "annotations.0.box.xyxy.0"),
        ({"annotations": [{"kind": "labels", "present": ["a"], "absent": ["a"]}]}, "the finding 'a' is listed twice"),
        ({"annotations": [{"kind": "qa", "question": " ", "answer": "y"}]}, "annotations.0.qa.question: must hold some text"),
        ({"annotations": [{"kind": "qa", "question": "x"}]}, "annotations.0.qa.answer: field required"),
        ({"annotations": [{"kind": "song"}]}, "annotations.0"),
        ({"colour": "red"}, "colour: extra inputs are not permitted, it is 'red'"),
        ({"annotations": [{"kind": "number", "name": "ctr", "value": float("inf")}]}, "annotations.0.number.value"),
        ({"id": 7}, "id: input should be a valid string, it is 7"),
    ],
)
def test_a_wrong_record_is_one_line(change, message):
    with pytest.raises(BadRecord) as error:
        parse(json.dumps({**ONE, **change}), "records-00000.jsonl:7")
    assert message in str(error.value)
    assert str(error.value).startswith("records-00000.jsonl:7: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"id": "\\ud800"}', "\udcff", "[" * 100_000, '{"id": ' + "9" * 9000 + "}"])
def test_a_line_that_is_no_json_is_one_line(text):
    with pytest.raises(BadRecord) as error:
        parse(text, "file:1")
    assert str(error.value).startswith("file:1: ")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300


def test_a_line_gives_the_record_back():
    whole = [
        QUESTION, BOX, {"kind": "label", "set": "plane", "value": "axial"}, {"kind": "labels", "present": ["a"], "uncertain": ["b"]},
        {"kind": "report", "text": "Clear.\u2028Well."}, {"kind": "number", "name": "ctr", "value": 0.48, "unit": "1"},
    ]  # fmt: skip
    one = record(annotations=whole, images=[{"path": "v.nii", "plane": "axial", "slice": 3, "window": [-160, 240]}])
    line = jsonl.line(one)
    assert line.count("\n") == 1
    assert parse(line, "here") == one
    assert hash(one) == hash(parse(line, "there"))
    assert json.loads(line)["annotations"][0] == QUESTION


def test_the_public_names():
    import unimed

    assert unimed.Record is Record
    assert unimed.Box(1, 2, 3, 4) == (1, 2, 3, 4)
    with pytest.raises(AttributeError, match="'Song'"):
        _ = unimed.Song


def test_a_folder_of_shards(tmp_path):
    records = [record(id=str(i), split=("train", "test")[i % 2]) for i in range(25)]
    assert jsonl.write(tmp_path / "d", INFO, records, shard=10) == {"train": 13, "test": 12}
    assert [path.name for path in sorted((tmp_path / "d").glob("*.jsonl"))] == [f"records-0000{i}.jsonl" for i in range(3)]
    assert [one for _, one in jsonl.read_records(tmp_path / "d")] == records
    assert [one.id for _, one in jsonl.read_records(tmp_path / "d", split="test")] == [str(i) for i in range(1, 25, 2)]
    assert jsonl.read_info(tmp_path / "d") == INFO


def test_a_data_set_is_written_whole_or_not_at_all(tmp_path):
    def breaks():
        yield record()
        raise KeyboardInterrupt

    jsonl.write(tmp_path / "d", INFO, [record(id="old")])
    with pytest.raises(KeyboardInterrupt):
        jsonl.write(tmp_path / "d", INFO, breaks(), shard=1)
    assert [one.id for _, one in jsonl.read_records(tmp_path / "d")] == ["old"]
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "dataset.json: "),
        ('{"licence": "x"}', "name: field required"),
        ('{"name": "x", "colour": 1}', "colour"),
        ('{"name": "x", "roots": {"a:b": "c"}}', "roots"),
        (b"\xff", "UTF-8"),
    ],
)
def test_a_wrong_dataset_json_is_one_line(tmp_path, text, message):
    folder_of(tmp_path / "d", [ONE])
    (tmp_path / "d" / "dataset.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as error:
        load_items(tmp_path / "d", "train")
    assert "dataset.json" in str(error.value)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


# Items


def test_a_record_becomes_the_questions_of_its_tasks(tmp_path, caplog):
    picture(tmp_path / "d" / "a.png")
    annotations = [
        QUESTION, BOX, {"kind": "label", "set": "plane", "value": "axial"}, {"kind": "report", "text": "Clear lungs."},
        {"kind": "number", "name": "ctr", "value": 0.48}, {**QUESTION, "task": "cls"}, {**QUESTION, "answer": "Yes"},
        {**QUESTION, "options": ["axial", "coronal"]}, {**BOX, "task": "refer"}, {**QUESTION, "task": "song"},
    ]  # fmt: skip
    root = folder_of(tmp_path / "set", [{**ONE, "patient": "p1", "annotations": annotations, "images": [{"path": "here:a.png"}]}],
                     classes={"plane": ["axial", "coronal", "sagittal"]}, roots={"here": "../d"})  # fmt: skip
    found = load_items(root, "train")
    assert [(one.task, one.question, one.answer, one.answer_type) for one in found] == [
        ("vqa", "Which plane?", "axial", "OPEN"),
        ("refer", "liver", "{<12><33><75><83>}", None),
        ("identify", "{<12><33><75><83>}", "liver", None),
        ("cls", "Which plane is in the image: axial, coronal, sagittal?", "axial", None),
        ("caption", "", "Clear lungs.", None),
        ("calculation", "What is the ctr?", "0.48", None),
        ("cls", "Which plane?", "axial", None),
        ("vqa", "Which plane?", "Yes", "CLOSED"),
        ("vqa", "Which plane? (A) axial (B) coronal", "axial", "CLOSED"),
        ("refer", "liver", "{<12><33><75><83>}", None),
    ]
    assert {(one.dataset, one.subject, one.layout, one.size) for one in found} == {("mine", "p1", "records", (8, 6))}
    assert len({one.id for one in found}) == len(found)
    assert found[0].open().size == (8, 6)
    assert told(caplog) == ["mine (train): no task asks annotations of kind 'qa' with task 'song' (1)"]
    assert load_items(root, "test") == []


def test_a_question_without_an_image_is_text_qa(tmp_path):
    root = folder_of(tmp_path / "set", [{**ONE, "images": [], "annotations": [QUESTION]}])
    (only,) = load_items(root, "train")
    assert (only.task, only.image) == ("qa", None)


def test_long_texts_are_cut_by_the_released_protocol_and_a_line_says_so(tmp_path, caplog):
    text = " ".join(str(i) for i in range(60))
    picture(tmp_path / "set" / "a.png")
    root = tmp_path / "set"
    (root / "records-00000.jsonl").write_text(json.dumps({**ONE, "annotations": [{"kind": "report", "text": text}]}) + "\n")
    (root / "dataset.json").write_text('{"name": "mine"}')
    assert len(load_items(root, "train")[0].answer.split()) == 50
    assert told(caplog) == ["mine (train): texts cut to 50 words: 1 (data.protocol=standard keeps them whole)"]
    assert load_items(root, "train", rules=STANDARD)[0].answer == text


def test_bad_lines_and_annotations_are_counted_or_stop(tmp_path, caplog):
    picture(tmp_path / "pics" / "a.png")
    here = [{"path": "pics:a.png"}]
    lines = [
        {**ONE, "images": here},
        {**ONE, "split": "nowhere"},
        "{",
        {**ONE, "images": [{"path": "pics:missing.png"}]},
        {**ONE, "images": [{"path": "films:a.png"}]},
        {**ONE, "images": here, "annotations": [QUESTION, {**BOX, "xyxy": [100, 100, 120, 110]}]},
        {**ONE, "images": here, "annotations": [{**BOX, "xyxy": [-2, 1, 6, 5]}]},
        {**ONE, "split": "test", "id": 3},  # belongs to the test split
    ]
    root = folder_of(tmp_path / "set", lines, roots={"pics": "../pics"})
    found = load_items(root, "train")
    assert [one.task for one in found] == ["vqa", "refer", "identify", "vqa", "refer", "identify"]
    assert found[-1].box == (0, 1, 6, 5)
    (line,) = told(caplog)
    assert line.startswith("mine (train): 4 of 7 records left out: ")
    for words in (
        "1 that are no records (first: records-00000.jsonl:2: split: ",
        "1 that are not valid JSON (first: records-00000.jsonl:3: ",
        "1 with a missing image (first: records-00000.jsonl:4: annotations.0: ",
        "1 with an unknown root (first: records-00000.jsonl:5: annotations.0: path 'films:a.png': dataset.json has no root 'films'",
        "2 of 7 records changed: 1 with a box outside the image (first: records-00000.jsonl:6: annotations.1: the box of 'liver' is",
        "1 with a box clipped to the image (first: records-00000.jsonl:7",
    ):
        assert words in line
    with pytest.raises(UserError, match=r"records-00000\.jsonl:2: split.*strict"):
        load_items(root, "train", rules=Rules(strict=True))


def test_a_label_outside_its_classes_is_left_out_and_classes_need_no_list(tmp_path, caplog):
    picture(tmp_path / "set" / "a.png")
    root = tmp_path / "set"
    lines = [{**ONE, "split": split, "annotations": [{"kind": "label", "set": "plane", "value": value}]}
             for split, value in (("train", "axial"), ("train", "coronal"), ("test", "sagittal"))]  # fmt: skip
    (root / "records-00000.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (root / "dataset.json").write_text('{"name": "mine"}')
    found = load_items(root, "train")
    assert {one.question for one in found} == {"Which plane is in the image: axial, coronal, sagittal?"}
    (root / "dataset.json").write_text('{"name": "mine", "classes": {"plane": ["axial", "sagittal"]}}')
    assert [one.answer for one in load_items(root, "train")] == ["axial"]
    assert "1 with a label outside its classes (first: records-00000.jsonl:2: annotations.0: 'coronal' is no class" in told(caplog)[0]


def test_slices_of_volumes_and_dicom_files_are_training_images(tmp_path):
    """Kind: an image of a record is any image that unimed opens, and a box in pixels of its file lies where it is shown."""
    data = np.zeros((12, 10, 4), np.float32)
    data[2:6, 1:4, 2] = 100
    nib.save(nib.Nifti1Image(data, np.diag([1.5, 1.5, 3, 1])), tmp_path / "v.nii.gz")
    pixels = np.zeros((10, 12), np.uint16)
    pixels[1:4, 2:6] = 1000
    (tmp_path / "IM0001").write_bytes(dicom_file(pixels, ImageOrientationPatient=[-1, 0, 0, 0, 1, 0]))
    box = {"kind": "box", "name": "bright", "xyxy": [2, 1, 6, 4]}
    lines = [
        {**ONE, "id": "n", "images": [{"path": "v.nii.gz", "slice": 2, "window": [0, 100]}], "annotations": [box]},
        {**ONE, "id": "o", "images": [{"path": "v.nii.gz", "plane": "axial", "slice": 9}], "annotations": [box]},
        {**ONE, "id": "d", "images": [{"path": "IM0001"}], "annotations": [box]},
    ]
    (tmp_path / "records-00000.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "dataset.json").write_text('{"name": "mine"}')
    found = [one for one in load_items(tmp_path, "train") if one.task == "refer"]
    assert [one.id for one in found] == ["mine/n/refer0", "mine/d/refer0"]
    for one in found:
        shown = np.asarray(one.open())[..., 0] > 127
        rows, columns = np.nonzero(shown)
        assert one.box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1), one.id
        assert one.size == shown.shape[::-1]
    assert found[0].box == (6, 6, 10, 9)  # the patient's right is on the left: x and y run against the voxels


# Rows of other projects

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


# Import


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


# Mutations

JUNK = st.one_of(st.none(), st.booleans(), st.integers(-(10**400), 10**400), st.floats(), st.text(max_size=5), st.just([]), st.just({}))
SAID = [{"role": "user", "content": "<image>Which plane?"}, {"role": "assistant", "content": "axial"}]
ROWS = {"llava": LLAVA, "messages": {"messages": SAID, "images": ["a.png"]}, "swift": SWIFT}


def _mutated(value, draw):
    """A JSON value with one place replaced or deleted."""
    places = []

    def walk(node):
        for key in node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
            places.append((node, key))
            walk(node[key])

    value = json.loads(json.dumps(value))
    walk(value)
    node, key = draw(st.sampled_from(places))
    if draw(st.integers(0, 4)) == 0:
        del node[key]
    else:
        node[key] = draw(JUNK)
    return value


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
        text = (json.dumps(_mutated(ONE, data.draw)) + "\n" + json.dumps(ONE) + "\n").encode()
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
        lines = (json.dumps(_mutated(ROWS[form], data.draw)) + "\n").encode()
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
