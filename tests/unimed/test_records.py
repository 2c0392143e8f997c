"""Records: what they refuse, their files, and items made from them."""

import json

import nibabel as nib
import numpy as np
import pytest
from dicom_samples import dicom_file
from PIL import Image

from unimed.datasets import load_items
from unimed.errors import UserError
from unimed.records import jsonl
from unimed.records.policy import BadRecord, Rules
from unimed.records.record import Record, parse

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


@pytest.mark.each
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


# Import


# Mutations
