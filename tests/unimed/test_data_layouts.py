"""The loaders on tiny files in the layouts of the released datasets, and on damaged ones."""

import json
import os
import pickle
import re

import numpy as np
import pytest
from data_samples import PATH_VQA, picture, slake, write

from unimed.datasets import load_items, medmnist
from unimed.errors import UserError
from unimed.records import text
from unimed.records.pixels import load_image
from unimed.records.policy import Rules
from unimed.tasks.item import Item

STRICT = Rules(strict=True)


def by_task(items):
    return {task: [item for item in items if item.task == task] for task in {item.task for item in items}}


def test_slake(tmp_path):
    found = by_task(load_items(slake(tmp_path), "train"))
    assert {task: len(part) for task, part in found.items()} == {"vqa": 2, "refer": 2, "identify": 2}
    first, second = found["vqa"]
    assert (first.question, first.answer, first.answer_type) == ("What modality is used to take this image?", "MRI", "OPEN")
    assert (second.answer_type, second.template, second.subject) == ("CLOSED", "vqa/does the picture contain lung?", "xmlab0")
    assert first.open().size == first.size == (40, 20)
    liver = found["refer"][0]
    assert (liver.question, liver.answer, liver.box, liver.template) == ("Liver", "{<10><25><35><75>}", (4, 5, 14, 15), "refer/liver")
    assert (found["identify"][0].question, found["identify"][0].answer) == (liver.answer, "Liver")
    assert load_items(tmp_path, "test") == []
    assert load_items(tmp_path, "slab") == []  # no validate.txt


def test_one_folder_down_and_chosen_tasks(tmp_path):
    slake(tmp_path / "Slake1.0")
    assert [item.task for item in load_items(tmp_path, "train", ["refer"])] == ["refer", "refer"]


def test_sa_med2d(tmp_path):
    picture(tmp_path / "images_small_train" / "ct_00" / "ct_00--a--0001.png")
    write(tmp_path / "regions_small_train" / "ct_00" / "ct_00--a--0001.json", [{"left kidney": [0, 0, 20, 10]}])
    refer, identify = load_items(tmp_path, "train")
    assert (refer.dataset, refer.question, refer.answer, identify.answer) == ("sa-med2d", "left kidney", "{<0><0><50><50>}", "left kidney")
    assert load_items(tmp_path, "test") == []


@pytest.mark.parametrize("kind", ["json", "pkl"])
def test_path_vqa(tmp_path, kind):
    picture(tmp_path / "images" / "train" / "train_0422.jpg")
    if kind == "json":
        write(tmp_path / "train_vqa.json", PATH_VQA)
    else:
        (tmp_path / "train_vqa.pkl").write_bytes(pickle.dumps(PATH_VQA))
    where, normal = load_items(tmp_path, "train", rules=STRICT)
    assert (where.question, where.answer, where.answer_type) == ("Where are liver cells?", "in the center", "OPEN")
    assert (normal.answer, normal.answer_type, normal.id) == ("no", "CLOSED", "path-vqa/100422001")
    assert normal.open().size == (40, 20)


class _Bomb:
    def __reduce__(self):
        return os.mkdir, ("bombed",)


@pytest.mark.parametrize("evil", [_Bomb(), [{"img_id": _Bomb()}], print, {1, 2} and __import__("collections").OrderedDict(a=1)])
def test_a_pickle_builds_no_objects(tmp_path, monkeypatch, evil):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train_vqa.pkl").write_bytes(pickle.dumps(evil))
    with pytest.raises(UserError, match="only plain lists"):
        load_items(tmp_path, "train")
    assert not (tmp_path / "bombed").exists()


@pytest.mark.parametrize(("data", "message"), [(b"\x80\x04cut", "not a readable pickle"), (pickle.dumps({"a": 1}), "expected a list")])
def test_damaged_pickles(tmp_path, data, message):
    (tmp_path / "train_vqa.pkl").write_bytes(data)
    with pytest.raises(UserError, match=message):
        load_items(tmp_path, "train")


@pytest.mark.parametrize("folder", ["files", "images"])
def test_r2gen_annotation(tmp_path, folder, caplog):
    picture(tmp_path / folder / "p10" / "a.jpg")
    report = " ".join(["word"] * 60)
    records = [
        {
            "id": "a",
            "study_id": 1,
            "subject_id": 10,
            "image_path": ["p10/a.jpg", "p10/b.jpg"],
            "report": f" Heart\n normal. {report}",
            "split": "train",
        },
        {"id": "b", "study_id": 2, "subject_id": 10, "image_path": ["p10/gone.jpg"], "report": "Clear.", "split": "train"},
    ]
    write(tmp_path / "annotation.json", {"train": records, "val": [], "test": records[:1]})
    (only,) = load_items(tmp_path, "train")
    assert "mimic-cxr (train): 1 of 2 records left out: 1 with a missing image (first: annotation.json: train[1]" in caplog.text
    assert (only.task, only.dataset, only.subject, only.question) == ("caption", "mimic-cxr", "10", "")
    assert only.answer.startswith("Heart normal. word")
    assert len(only.answer.split()) == 50
    assert len(load_items(tmp_path, "test")) == 1

    write(tmp_path / "annotation_small.json", {"train": [{**records[0], "id": "small"}]})
    assert [item.id for item in load_items(tmp_path, "train")] == ["mimic-cxr/small"]
    assert [item.id for item in load_items(tmp_path, "test")] == ["mimic-cxr/a"]


def test_annotation_without_any_image(tmp_path):
    write(tmp_path / "annotation.json", {"train": [{"image_path": ["x.jpg"], "report": "Clear."}]})
    with pytest.raises(UserError, match=r"no record can be used.*1 with a missing image"):
        load_items(tmp_path, "train")


def test_medpix(tmp_path):
    picture(tmp_path / "a.png")
    picture(tmp_path / "images" / "b.png")
    rows = [
        "name,context,type",
        'a.png,"A mass,\nin the liver",caption',
        "b.png,Two,caption",
        "a.png,What is it?,vqa",
        "a.png,,caption",
        "gone.png,x,caption",
    ]
    write(tmp_path / "MedPix_single_train.csv", "\n".join(rows))
    one, two = load_items(tmp_path, "train")
    assert (one.answer, two.answer, one.task, one.dataset) == ("A mass, in the liver", "Two", "caption", "medpix")
    write(tmp_path / "MedPix_single_test.csv", "file,text\na,b\n")
    with pytest.raises(UserError, match="column 'name' is missing"):
        load_items(tmp_path, "test")


def test_medqa(tmp_path):
    lines = [
        {"question": "A 23-year-old woman " + "x " * 60, "answer": "Nitrofurantoin", "options": {"A": "Ampicillin"}, "meta_info": "step2&3"}
    ]
    write(tmp_path / "questions" / "US" / "train.jsonl", "".join(json.dumps(line) + "\n" for line in lines) + "\n")
    (only,) = load_items(tmp_path, "train")
    assert (only.task, only.image, only.answer, only.template) == ("qa", None, "Nitrofurantoin", "qa/medqa")
    assert len(only.question.split()) == 50


def test_pubmedqa(tmp_path):
    write(
        tmp_path / "train_set.json",
        {"21645374": {"QUESTION": "Do mitochondria play a role?", "CONTEXTS": ["..."], "final_decision": "yes"}},
    )
    (only,) = load_items(tmp_path, "train")
    assert (only.id, only.question, only.answer, only.dataset) == ("pubmedqa/21645374", "Do mitochondria play a role?", "yes", "pubmedqa")


def test_medmnist_names_and_sides(tmp_path):
    grey = np.arange(3 * 28 * 28, dtype=np.uint8).reshape(3, 28, 28)
    np.savez(
        tmp_path / "organsmnist_28.npz",
        train_images=grey,
        train_labels=np.array([[4], [5], [10]]),
        test_images=grey[:1],
        test_labels=np.array([[0]]),
    )
    found = load_items(tmp_path, "train")
    assert [item.answer for item in found] == ["left kidney", "right kidney", "spleen"]
    assert "left kidney, right kidney" in found[0].question
    assert found[2].open().size == found[2].size == (28, 28)
    np.testing.assert_array_equal(np.asarray(found[1].open())[..., 2], grey[1])
    assert load_items(tmp_path, "val") == []


def test_medmnist_colour(tmp_path):
    colour = np.zeros((2, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "dermamnist_224.npz", test_images=colour, test_labels=np.array([[4], [5]], np.uint8))
    assert [item.answer for item in load_items(tmp_path, "test")] == ["melanoma", "melanocytic nevi"]


def test_class_names():
    assert medmnist.class_name("femur-left") == "left femur"
    assert medmnist.class_name("benign keratosis-like lesions") == "benign keratosis-like lesions"


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": np.zeros((1, 8, 8), np.uint8)}, "expected train_images and train_labels"),
        ({"train_images": np.zeros((1, 8, 8), np.uint8)}, "train_labels"),
        ({"train_images": np.zeros((1, 8, 8)), "train_labels": np.zeros((1, 1), int)}, "expected uint8"),
        (
            {"train_images": np.zeros((2, 8, 8), np.uint8), "train_labels": np.zeros((1, 1), int)},
            "one integer, or one of 0 and 1 for each of 11 classes, for each of 2 images",
        ),
        ({"train_images": np.zeros((1, 8, 8), np.uint8), "train_labels": np.array([[11]])}, "label 11, but 11 class names"),
        ({"train_images": np.zeros((1, 8, 8), np.uint8), "train_labels": np.full((1, 11), 2)}, "expected 0 and 1"),
        ({"train_images": np.uint8(3), "train_labels": np.zeros((1, 1), int)}, "expected uint8"),
        ({"train_images": np.zeros((1, 8, 0), np.uint8), "train_labels": np.zeros((1, 1), int)}, "expected uint8"),
        ({"train_images": np.array([None, {}]), "train_labels": np.zeros((1, 1), int)}, "not a readable"),
    ],
)
def test_bad_medmnist(tmp_path, arrays, message):
    np.savez(tmp_path / "organsmnist.npz", **arrays)
    with pytest.raises(UserError, match=message):
        load_items(tmp_path, "train")


def test_other_bad_medmnist(tmp_path):
    (tmp_path / "organsmnist.npz").write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(UserError, match="not a readable"):
        load_items(tmp_path, "train")
    (tmp_path / "organsmnist.npz").unlink()
    np.savez(tmp_path / "mine.npz", train_images=np.zeros((1, 8, 8), np.uint8), train_labels=[[0]])
    with pytest.raises(UserError, match=r"without class names.*class names unknown"):
        load_items(tmp_path, "train")
    write(tmp_path / "mine.json", {"label": {"0": "a", "2": "b"}})
    with pytest.raises(UserError, match="expected 0 to 1"):
        load_items(tmp_path, "train")


QUESTION = {"img_name": "xmlab0/source.jpg", "q_lang": "en", "question": "What?", "answer": "MRI", "answer_type": "OPEN"}


@pytest.mark.each
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"questions": "[{]"}, "question.json: not valid JSON"),
        ({"questions": "[" * 100_000}, "question.json: not valid JSON"),
        ({"questions": {"a": 1}}, "expected a list"),
        ({"questions": ["x"]}, "expected an object"),
        ({"questions": [{"q_lang": "en", "answer": "a", "img_name": "xmlab0/source.jpg"}]}, "'question' is missing"),
        ({"questions": [{**QUESTION, "question": 3}]}, "expected str"),
        ({"questions": [{**QUESTION, "answer_type": "MAYBE"}]}, "OPEN or CLOSED"),
        ({"questions": [{**QUESTION, "img_name": "xmlab0/gone.jpg"}]}, "no such image"),
        ({"questions": [{**QUESTION, "img_name": "../../secret.jpg"}]}, "leads out of"),
        ({"questions": [{**QUESTION, "img_name": "/etc/hostname"}]}, "leads out of"),
        ({"cases": "../..\n"}, "leads out of"),
        ({"cases": "xmlab7\n"}, "names case 'xmlab7'"),
        ({"detections": [{"Liver": [1, 2, 3, 4], "Spleen": [1, 2, 3, 4]}]}, "one key"),
        ({"detections": [{"Liver": [1, 2, 3]}]}, "expected \\[x, y, width, height\\]"),
        ({"detections": [{"Liver": [1, 2, "3", 4]}]}, "expected \\[x, y, width, height\\]"),
        ({"detections": [{"Liver": [1, 2, 0, 4]}]}, "width and height must be above zero"),
        ({"detections": [{"Liver": [30, 2, 30, 4]}]}, "does not lie in the image of 40 x 20"),
    ],
)
def test_bad_slake(tmp_path, changes, message, caplog):
    slake(tmp_path, **changes)
    with pytest.raises(UserError, match=message) as caught:
        load_items(tmp_path, "train", rules=STRICT)
    assert "\n" not in str(caught.value)
    if changes.get("cases") is None:
        load_items(tmp_path, "train")
        assert re.search(message, caplog.text)
        return
    with pytest.raises(UserError, match=f"no record can be used: .*{message}"):  # nothing else is left of the set
        load_items(tmp_path, "train")


def test_links_in_the_data_are_followed_unless_that_is_turned_off(tmp_path):
    picture(tmp_path / "disk" / "outside.jpg", (50, 30))
    root = slake(tmp_path / "slake")
    (root / "imgs" / "xmlab0" / "source.jpg").unlink()
    (root / "imgs" / "xmlab0" / "source.jpg").symlink_to(tmp_path / "disk" / "outside.jpg")
    assert [item.size for item in load_items(root, "train", ["vqa"], STRICT)] == [(50, 30), (50, 30)]
    with pytest.raises(UserError, match=r"leads out of .* by a symbolic link"):
        load_items(root, "train", ["vqa"], Rules(links=False))


@pytest.mark.parametrize("name", ["annotation.json", "train_vqa.json"])
def test_path_escapes_in_other_layouts(tmp_path, name):
    picture(tmp_path / "secret.jpg")
    records = {
        "annotation.json": {"train": [{"image_path": ["../secret.jpg"], "report": "x"}]},
        "train_vqa.json": [{**PATH_VQA[0], "img_id": "../../secret"}],
    }
    write(tmp_path / "set" / name, records[name])
    (tmp_path / "set" / "images").mkdir()
    with pytest.raises(UserError, match="leads out of"):
        load_items(tmp_path / "set", "train")


def test_corrupt_image(tmp_path):
    slake(tmp_path)
    (tmp_path / "imgs" / "xmlab0" / "source.jpg").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"source\.jpg: not a readable image"):
        load_items(tmp_path, "train")


def test_what_is_asked_of_load_items(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        load_items(tmp_path / "gone", "train")
    with pytest.raises(UserError, match="no dataset found"):
        load_items(tmp_path, "train")
    with pytest.raises(UserError, match="unknown task 'vqs'"):
        load_items(tmp_path, "train", ["vqs"])
    with pytest.raises(UserError, match="expected one of train, slab"):
        load_items(slake(tmp_path), "holdout")


def test_any_split_that_the_data_has_can_be_read(tmp_path):
    archive = {"external_images": np.zeros((2, 8, 8), np.uint8), "external_labels": np.array([[0], [1]])}
    np.savez(tmp_path / "organsmnist.npz", **archive)
    assert [item.id for item in load_items(tmp_path, "external")] == ["organsmnist/external/0", "organsmnist/external/1"]
    assert load_items(tmp_path, "test") == []
    for name in ("external2", "../external", ""):
        with pytest.raises(UserError, match="expected one of train, slab"):
            load_items(tmp_path, name)


def test_load_image_of_arrays_and_nothing():
    assert load_image(np.zeros((4, 6), np.uint8)).size == (6, 4)
    with pytest.raises(UserError, match="expected uint8"):
        load_image(np.zeros((4, 6)))
    with pytest.raises(UserError, match="has no image"):
        Item("q", "qa", "medqa", "?", "a", None, None, None, "qa").open()


def test_clean():
    assert text.clean("  a \n\t b\u00a0 c ") == "a b c"
    assert text.clean("Kept, as IT is.") == "Kept, as IT is."
    assert text.clean(" ".join(map(str, range(60)))) == " ".join(map(str, range(50)))
    assert text.clean("a b c", 2) == "a b"
