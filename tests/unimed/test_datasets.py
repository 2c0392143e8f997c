"""Data sets as objects: one file and one name each, read as records."""

import dataclasses
import json
from pathlib import Path

import data_samples
import numpy as np
import pytest
from data_samples import VQA_RAD, picture, slake, vqa_rad, write
from PIL import Image
from typer.testing import CliRunner

import unimed
from unimed import Record
from unimed.cli import app as cli
from unimed.datasets import DatasetSpec, load_items, validate
from unimed.datasets.alike import Alike
from unimed.datasets.convert import convert
from unimed.datasets.load import load_set, terms
from unimed.datasets.validate import ALIKE, check
from unimed.errors import UserError
from unimed.records import jsonl
from unimed.records.image import Images
from unimed.records.policy import Rules, Tally
from unimed.records.record import Label
from unimed.records.source import Source
from unimed.report.report import _limits
from unimed.tasks import prompts
from unimed.train import recipe as recipes
from unimed.train.run import items

STRICT = Rules(strict=True)


def records(root, layout, split="train", rules=STRICT):
    source = Source(Tally(layout, root, split, rules), Images(root, {}))
    return [record for _, record in unimed.DATASETS[layout].read(source)]


def test_vqa_rad(tmp_path):
    vqa_rad(tmp_path)
    first, second = load_items(tmp_path, "train", rules=STRICT)
    assert (first.id, first.question, first.answer, first.answer_type) == ("vqa-rad/q0", "Is it normal?", "No", "CLOSED")
    assert (second.id, second.image.name) == ("vqa-rad/q2", "b.jpg")
    (only,) = load_items(tmp_path, "test", rules=STRICT)
    assert (only.answer, only.answer_type, only.image.name) == ("4", "OPEN", "a.jpg")
    assert load_items(tmp_path, "val") == []


def test_vqa_rad_with_bad_rows(tmp_path, caplog):
    rows = [
        VQA_RAD[0],
        {**VQA_RAD[0], "phrase_type": 3},
        {**VQA_RAD[0], "answer_type": "MAYBE"},
        {**VQA_RAD[0], "image_name": "../x.jpg"},
        7,
    ]
    vqa_rad(tmp_path, rows)
    assert len(load_items(tmp_path, "train")) == 1
    assert "vqa-rad (train): 4 of 5 records left out" in caplog.text


def test_a_record_holds_all_that_is_known_of_an_image(tmp_path):
    (case,) = records(slake(tmp_path), "slake")
    assert isinstance(case, Record)
    assert (case.id, case.dataset, case.split, case.patient, case.source) == ("xmlab0", "slake", "train", "xmlab0", "slake")
    assert [one.kind for one in case.annotations] == ["qa", "qa", "box", "box"]
    assert [one.path for one in case.images] == ["imgs/xmlab0/source.jpg"]
    assert case.annotations[2].xyxy == (4, 5, 14, 15)


def test_texts_of_records_are_whole_and_questions_are_cut(tmp_path):
    data_samples.reports(tmp_path, [{**data_samples.REPORTS[0], "report": "word " * 60}])
    (record,) = records(tmp_path, "mimic-cxr")
    assert len(record.annotations[0].text.split()) == 60
    assert len(load_items(tmp_path, "train")[0].answer.split()) == 50


@pytest.mark.parametrize("name", data_samples.LAYOUTS)
def test_every_layout_reads_records(tmp_path, name):
    root = data_samples.LAYOUTS[name](tmp_path)
    (layout,) = [spec.name for spec in unimed.DATASETS.values() if spec.matches(root)]
    found = records(root, layout)
    assert found
    for record in found:
        assert Record.model_validate_json(record.model_dump_json()) == record


def test_every_data_set_says_whose_it_is():
    for spec in unimed.DATASETS.values():
        assert spec.licence, spec.name
        assert spec.where, spec.name
        assert spec.citation or spec.name == "records"
        assert set(spec.tasks) <= set(unimed.TASKS)
    page = (Path(__file__).parents[2] / "docs" / "unimed" / "datasets.md").read_text()
    for spec in unimed.DATASETS.values():
        assert spec.licence in page
        assert spec.where in page


# A data set of a caller's own: one file, one name


def matches(folder):
    return (folder / "toy.txt").is_file()


def read(source):
    """Lines "image class": the toy layout."""
    source.classes["animal"] = ["cat", "dog"]
    for number, line in enumerate((source.folder / "toy.txt").read_text().splitlines() if source.split == "train" else ()):
        where = f"{source.folder / 'toy.txt'}:{number + 1}"
        with source.tally.record():
            image, _, name = line.partition(" ")
            ref, _ = source.image("", image, where)
            yield (
                where,
                source.record(where, str(number), "toy", images=(ref,), annotations=(Label(set="animal", value=name),), source="toy"),
            )


TOY = DatasetSpec(name="toy", files="toy (toy.txt)", matches=matches, read=read, tasks=("cls",), licence="none", where="here")


def toy(root, lines="a.png cat\nb.png dog\ngone.png cat\n"):
    picture(root / "a.png")
    picture(root / "b.png")
    write(root / "toy.txt", lines)
    return root


def test_a_toy_data_set(tmp_path, monkeypatch, caplog):
    toy(tmp_path)
    with pytest.raises(UserError, match="no dataset found"):
        load_items(tmp_path, "train")
    monkeypatch.setitem(unimed.DATASETS, "toy", TOY)
    first, second = load_items(tmp_path, "train")
    assert (first.id, first.question, first.answer) == ("toy/0/cls0", "Which animal is in the image: cat, dog?", "cat")
    assert second.answer == "dog"
    assert "toy (train): 1 of 3 records left out: 1 with a missing image (first: toy.txt:3" in caplog.text
    assert [one.id for one in load_set("pets", tmp_path, "toy", "train")] == ["pets/0/cls0", "pets/1/cls0"]


def test_licences_come_from_the_layouts_and_of_own_records_from_their_file(tmp_path, monkeypatch):
    monkeypatch.setitem(unimed.DATASETS, "toy", dataclasses.replace(TOY, citation="Doe, Toys"))
    toy(tmp_path / "all" / "pets")
    convert("vqa-rad", vqa_rad(tmp_path / "rad"), tmp_path / "all" / "rad")
    shared(tmp_path / "own", "a.png", "b.png")
    write(tmp_path / "own" / "dataset.json", {"name": "mine", "licence": "ours", "made_by": "me"})
    records, pets, mine = terms(tmp_path / "all", {"own": (tmp_path / "own", "records")})
    if records["title"] == "toy":
        records, pets = pets, records
    assert pets == {"title": "toy", "licence": "none", "citation": "Doe, Toys", "known": ""}
    assert (records["title"], records["licence"]) == ("vqa-rad", "CC0 1.0")
    assert "the published split shares images" in records["known"]
    assert mine == {"title": "own", "licence": "ours", "citation": "", "known": ""}
    lines = _limits({"data": {"sample": False}, "sets": [pets, records, mine], "splits": {}, "evaluate": {"limit": 0}, "left_out": {}})
    assert "toy: licence none. Doe, Toys." in lines
    assert "own: licence ours." in lines


def test_a_spec_with_a_folder_needs_none_in_the_recipe(tmp_path, monkeypatch):
    monkeypatch.setitem(unimed.DATASETS, "toy", dataclasses.replace(TOY, root=str(toy(tmp_path))))
    recipe = recipes.load("tiny", ["data.sets.pets.layout=toy", "data.tasks=[cls]", "sampler.ratios={cls: 1}"])
    assert recipe.data.sets["pets"].root == str(tmp_path)
    assert len(items(recipe, "train")) == 2
    with pytest.raises(UserError, match=r"data\.sets\.pets\.root: which folder"):
        recipes.load("tiny", ["data.sets.pets.layout=slake"])


def test_two_folders_of_one_layout_live_side_by_side(tmp_path, monkeypatch):
    monkeypatch.setitem(unimed.DATASETS, "toy", TOY)
    toy(tmp_path / "north")
    toy(tmp_path / "south")
    vqa_rad(tmp_path / "rad")
    found = load_items(tmp_path, "train")
    assert {one.dataset for one in found} == {"north", "south", "vqa-rad"}
    assert len({one.id for one in found}) == len(found)


# Conversion


@pytest.mark.parametrize("name", data_samples.LAYOUTS)
@pytest.mark.parametrize("protocol", ["released", "standard"])
def test_a_converted_data_set_has_the_same_questions(tmp_path, name, protocol):
    root = data_samples.LAYOUTS[name](tmp_path / "there")
    (layout,) = [spec.name for spec in unimed.DATASETS.values() if spec.matches(root)]
    done = convert(layout, root, tmp_path / "mine")
    rules = Rules(strict=True, protocol=protocol)
    for split in ("train", "test"):
        before, after = (load_items(place, split, rules=rules) for place in (root, tmp_path / "mine"))
        for one, other in zip(before, after, strict=True):
            for key in ("id", "task", "dataset", "question", "answer", "box", "template", "answer_type", "subject", "layout"):
                assert getattr(one, key) == getattr(other, key)
            assert prompts.instruction(one, None) == prompts.instruction(other, None)
            if one.image is not None:
                assert np.array_equal(np.asarray(one.open()), np.asarray(other.open()))
    assert done.records["train"] == len(list(records(root, layout)))
    assert jsonl.read_info(tmp_path / "mine").licence == unimed.DATASETS[layout].licence


def test_archives_whose_classes_differ_are_converted_one_by_one(tmp_path):
    data_samples.medmnist(tmp_path / "two")
    data_samples.medmnist(tmp_path / "two", "organmnist3d", labels=((0,), (1,), (2,)))
    with pytest.raises(UserError, match="'organ' has other classes than before"):
        convert("medmnist", tmp_path / "two", tmp_path / "mine")
    assert [one.name for one in tmp_path.iterdir()] == ["two"]


def test_a_wrong_conversion_says_so_and_leaves_nothing(tmp_path):
    slake(tmp_path / "there")
    for layout, root, words in (
        ("slaek", "there", "'slaek': no layout to convert from; one of slake, "),
        ("records", "there", "no layout to convert from"),
        ("slake", "gone", "gone: no such folder"),
        ("medqa", "there", "not a folder of the layout MedQA"),
        ("slake", "empty", "no record can be used: its files hold none"),
    ):
        (tmp_path / "empty" / "imgs").mkdir(parents=True, exist_ok=True)
        (tmp_path / "empty" / "test.txt").touch()
        with pytest.raises(UserError, match=words):
            convert(layout, tmp_path / root, tmp_path / "mine")
        assert not (tmp_path / "mine").exists()
    shown = CliRunner().invoke(cli.app, ["data", "convert", "slake", str(tmp_path / "there"), "--out", str(tmp_path / "mine")])
    assert shown.exit_code == 0, shown.output
    assert "1 records with 2 qa, 2 box: train 1, val 0, test 0" in shown.output
    again = CliRunner().invoke(cli.app, ["data", "convert", "slake", str(tmp_path / "there"), "--out", str(tmp_path / "mine")])
    assert again.exit_code == 2
    assert "exists already" in again.output


# Leakage, known faults, the page


def shared(root, train, test):
    """A data set of two records, one in each split."""
    rows = []
    for split, image in (("train", train), ("test", test)):
        qa = {"kind": "qa", "question": "Which <b>plane</b>?", "answer": "axial"}
        box = {"kind": "box", "name": "liver", "xyxy": [2, 3, 20, 30]}
        rows.append({"id": split, "dataset": "d", "split": split, "images": [{"path": image}], "annotations": [qa, box]})
    write(root / "dataset.json", {"name": "d"})
    write(root / "records-00000.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return root


def textured(seed, size=(160, 120)):
    small = np.random.default_rng(seed).integers(0, 255, (12, 16), np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def test_pictures_that_look_alike_are_found_in_another_format_and_size(tmp_path):
    shared(tmp_path, "a.png", "b.jpg")
    textured(0).save(tmp_path / "a.png")
    textured(0).resize((200, 150)).save(tmp_path / "b.jpg", quality=80)
    assert list(check(tmp_path).findings) == [ALIKE]
    textured(1).save(tmp_path / "b.jpg", quality=80)
    assert not check(tmp_path).findings
    for name in ("a.png", "b.jpg"):
        Image.new("L", (160, 120 if name == "a.png" else 90), 30).save(tmp_path / name)
    assert not check(tmp_path).findings  # flat pictures look like nothing


def test_an_image_is_looked_at_once_however_many_records_name_it(tmp_path, monkeypatch):
    rows = (shared(tmp_path, "a.png", "a.png") / "records-00000.jsonl").read_text()
    write(tmp_path / "records-00001.jsonl", rows.replace("a.png", "b.png").replace('"id": "', '"id": "b'))
    textured(0).save(tmp_path / "a.png")
    data = bytearray((tmp_path / "a.png").read_bytes())
    data[len(data) // 2] ^= 255
    (tmp_path / "b.png").write_bytes(data)
    looked, real = [], validate.look_hash
    monkeypatch.setattr(validate, "look_hash", lambda image: looked.append(image.size) or real(image))
    opened, load = [], validate.load_image
    monkeypatch.setattr(validate, "load_image", lambda path: opened.append(path.name) or load(path))
    found = check(tmp_path).findings["images that cannot be read"]
    assert (looked, opened) == ([(160, 120)], ["a.png", "b.png"])
    assert found.count == 2  # each record is named


def test_an_image_of_many_records_hides_no_other_that_shares_a_part_of_its_look():
    alike, part = Alike(), 0xFFFFFFFF
    for number in range(70):
        assert not alike.add(part | 0xFFFF << 64, "train", "a", f"{number}")
    assert not alike.add(part, "train", "b", "b.png")
    assert alike.add(part, "test", "c", "c.png") == "train: b.png"


def test_the_images_that_vqa_rad_shares_are_known(tmp_path):
    convert("vqa-rad", vqa_rad(tmp_path / "rad"), tmp_path / "mine")
    checked = check(tmp_path / "mine", strict=True)
    (finding,) = checked.findings.values()
    assert "the published split shares images" in finding.known
    assert checked.fine
    shown = CliRunner().invoke(cli.app, ["data", "validate", str(tmp_path / "mine")], env={"COLUMNS": "200"})
    assert shown.exit_code == 0, shown.output
    assert "1 images in several splits" in shown.output
    assert "no other findings" in shown.output
    info = json.loads((tmp_path / "mine" / "dataset.json").read_text())
    write(tmp_path / "mine" / "dataset.json", {**info, "made_by": "me"})
    assert not check(tmp_path / "mine").fine


@pytest.mark.parametrize("command", ["validate", "stats"])
def test_the_page_shows_samples_and_runs_nothing(tmp_path, command):
    shared(tmp_path, "a.png", "gone.png")
    textured(0).save(tmp_path / "a.png")
    out = tmp_path / "page.html"
    shown = CliRunner().invoke(cli.app, ["data", command, str(tmp_path), "--html", str(out)])
    assert shown.exit_code == (1 if command == "validate" else 0), shown.output
    text = out.read_text()
    assert text.count('<img src="data:image/jpeg;base64,') == 1
    assert "Which &lt;b&gt;plane&lt;/b&gt;? → axial" in text
    assert "default-src 'none'" in text
    assert ("images that are missing" in text) == (command == "validate")


def test_samples_are_spread_over_the_data(tmp_path):
    rows = [{"id": str(n), "dataset": "d", "split": "train", "annotations": []} for n in range(1000)]
    write(tmp_path / "dataset.json", {"name": "d"})
    write(tmp_path / "records-00000.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    found = [int(one.id) for one in check(tmp_path, images=False).samples]
    assert 12 <= len(found) <= 24
    assert found[0] == 0
    assert found[-1] > 900
