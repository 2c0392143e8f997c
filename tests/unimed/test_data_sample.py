"""The built-in sample: what it holds, that it is the same every time, and that nothing held out is in training."""

import hashlib
import io
import json
import zipfile
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pydicom
import pytest
from PIL import Image

from unimed.datasets import load_items
from unimed.errors import UserError
from unimed.records import box as boxes
from unimed.records import jsonl
from unimed.sample import about, build_sample
from unimed.sample.masks import STRUCTURES, findings
from unimed.sample.slices import ASSETS, BLOCKS, GAP, MIN_MM2, MIN_SIDE_MM, PIXEL_MM, slices, subject, vendored_volume
from unimed.sample.vendor import KEPT_TAGS, vendor
from unimed.tasks import RELEASED_TASKS

SPLITS = ("train", "slab", "subject")


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def items(sample_folder):
    return {split: load_items(sample_folder, split) for split in SPLITS}


@pytest.fixture(scope="module")
def manifest(sample_folder):
    return json.loads((sample_folder / "sample.json").read_text())


# The vendored files.
def test_the_vendored_files_are_small_and_their_origin_is_told():
    assert sum(path.stat().st_size for path in ASSETS.iterdir()) < 5_000_000
    notice = (ASSETS / "NOTICE").read_text()
    assert "5d4223ef93973bc36d710869d11e7742ead2c154c72f7f9edcaaadd5b6c4bd03" in notice
    assert all(path.name in notice for path in ASSETS.iterdir() if path.name != "NOTICE")
    assert "Apache License" in (ASSETS / "LICENSE").read_text()


def test_the_dicom_files_carry_geometry_and_nothing_about_a_person():
    added = {
        "SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID", "PatientName", "PatientID",
        "PatientIdentityRemoved", "DeidentificationMethod", "StudyDate", "StudyTime",
    }  # fmt: skip
    with zipfile.ZipFile(ASSETS / "ct_dicom.zip") as packed:
        assert len(packed.namelist()) == 20
        for name in packed.namelist():
            data = packed.read(name)
            header = pydicom.dcmread(io.BytesIO(data))
            assert {element.keyword for element in header} == added | set(KEPT_TAGS)
            assert not any(element.tag.is_private for element in header)
            assert (str(header.PatientName), header.PatientID, header.StudyDate, header.StudyTime) == ("", "sample", "", "")
            for uid in (header.SOPInstanceUID, header.StudyInstanceUID, header.SeriesInstanceUID, header.FrameOfReferenceUID):
                assert uid.startswith("2.25.")
            assert not any(word in data for word in (b"2022", b"60064", b"Basel", b"SIEMENS", b"PETCT"))


def test_vendoring_again_gives_the_same_files(tmp_path):
    archive = ASSETS.parents[2] / ".cache" / "unimed" / "archives" / "totalsegmentator-2.18.0.tar.gz"
    if not archive.is_file():
        pytest.skip("needs the TotalSegmentator sdist: unimed sample fetch totalsegmentator")
    vendor(archive, tmp_path)
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (ASSETS / path.name).read_bytes()


# Building.
def test_the_same_bytes_every_time(sample_folder, tmp_path):
    seen = []
    build_sample(tmp_path / "again", progress=lambda done, total, what: seen.append((done, total, what)))
    assert contents(tmp_path / "again") == contents(sample_folder)
    assert [done for done, _, _ in seen] == sorted(done for done, _, _ in seen)
    assert seen[-1][0] == seen[-1][1]
    assert [path.name for path in tmp_path.iterdir()] == ["again"]

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "again").rglob("*")}
    build_sample(tmp_path / "again")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "again").rglob("*")} == before

    (tmp_path / "again" / "records-00000.jsonl").write_text("")
    build_sample(tmp_path / "again")  # a damaged sample is built anew
    assert contents(tmp_path / "again") == contents(sample_folder)


def test_a_build_that_stops_leaves_nothing(tmp_path):
    def stop(done, total, what):
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_sample(tmp_path / "sample", progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="not a sample"):
        build_sample(tmp_path)
    with pytest.raises(UserError, match="not a sample"):
        build_sample(tmp_path / "thesis.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


# The split.
def test_slabs_and_gaps():
    for name, blocks in BLOCKS.items():
        assert list(blocks) == sorted(blocks, key=lambda block: block.start)
        for one, two in pairwise(blocks):
            assert two.start - one.stop >= (GAP if one.split != two.split else 0)
        depth = vendored_volume(name).data.shape[2]
        assert blocks[0].start == 0
        assert blocks[-1].stop == depth
    assert {block.split for block in BLOCKS["ct_dicom"]} == {"subject"}


def test_no_training_image_shows_a_held_out_voxel(manifest):
    shapes = {name: vendored_volume(name).data.shape for name in BLOCKS}
    shown = {split: {name: np.zeros(shape, bool) for name, shape in shapes.items()} for split in SPLITS}
    for image in manifest["images"]:
        shown[image["split"]][image["subject"]][tuple(slice(*bounds) for bounds in image["region"])] = True
    assert not shown["train"]["ct_dicom"].any()
    for name in ("ct", "mr"):
        train, slab = (shown[split][name].any((0, 1)) for split in ("train", "slab"))
        for z in np.nonzero(slab)[0]:
            assert not train[max(0, z - GAP) : z + GAP + 1].any()
        planes = Counter(image["plane"] for image in manifest["images"] if (image["subject"], image["split"]) == (name, "slab"))
        assert set(planes) == {"axial", "coronal", "sagittal"}


def test_held_out_voxels_cannot_change_a_training_file(sample_folder, tmp_path):
    """Other voxels and labels in slabs, gaps and the held-out subject: every training file keeps its bytes."""
    changed = {}
    for name, blocks in BLOCKS.items():
        volume = vendored_volume(name)
        kept = np.zeros(volume.data.shape[2], bool)
        for block in blocks:
            kept[block.start : block.stop] |= block.split == "train"
        data, labels = volume.data.copy(), volume.labels.copy()
        data[:, :, ~kept] = data[::-1, :, ~kept] + 17
        labels[:, :, ~kept] = labels[::-1, :, ~kept]
        changed[name] = replace(volume, data=data, labels=labels)
    build_sample(tmp_path / "changed", volumes=changed)
    was, now = load_items(sample_folder, "train"), load_items(tmp_path / "changed", "train")
    assert len(was) == len(now) > 1000
    for one, two in zip(was, now, strict=True):
        assert replace(one, image=None) == replace(two, image=None)
        if one.image is not None:
            assert one.image.read_bytes() == two.image.read_bytes()
    held = {item.id: item.answer for item in load_items(sample_folder, "slab")}
    other = {item.id: item.answer for item in load_items(tmp_path / "changed", "slab")}
    assert held != other


# The content.
def test_counts(items):
    for split, fewest in (("train", 200), ("slab", 40), ("subject", 40)):
        counts = Counter(item.task for item in items[split])
        assert set(counts) == set(RELEASED_TASKS)
        assert min(counts.values()) >= fewest
    assert {item.subject for item in items["train"] if item.image is not None} == {"ct", "mr"}
    assert {item.subject for item in items["subject"] if item.image is not None} == {"ct_dicom"}
    for split in SPLITS:
        assert len({item.id for item in items[split]}) == len(items[split])


def test_every_held_out_class_was_trained(items, manifest):
    trained = Counter(item.question for item in items["train"] if item.task == "refer")
    assert min(trained.values()) >= 20
    assert set(trained) == set(manifest["classes"])
    assert set(manifest["classes"]) | set(manifest["left_out"]) == set(STRUCTURES)
    for split in ("slab", "subject"):
        assert {item.question for item in items[split] if item.task == "refer"} <= set(trained)
        assert {item.answer for item in items[split] if item.task == "cls"} <= set(trained)


@pytest.fixture(scope="module")
def cut():
    return {made.id: made for name in BLOCKS for made in slices(subject(name, vendored_volume(name)))}


def test_boxes_surround_their_organ_on_the_written_image(items, cut):
    for split in SPLITS:
        for item in items[split]:
            if item.task != "refer":
                continue
            made = cut[item.image.stem]
            assert item.open().size == item.size == made.image.size
            x1, y1, x2, y2 = item.box
            assert 0 <= x1 < x2 <= item.size[0]
            assert 0 <= y1 < y2 <= item.size[1]
            assert made.finding(item.question).xyxy == item.box
            assert item.answer == boxes.to_text(item.box, item.size)


def test_the_written_image_is_the_slice(items, cut):
    for item in items["slab"][::40]:
        if item.task == "vqa":
            written = np.asarray(item.open().convert("L")).astype(int)
            assert np.abs(written - np.asarray(cut[item.image.stem].image)).mean() < 4  # JPEG


def test_answers_follow_from_the_masks(items, cut):
    for split in SPLITS:
        for item in items[split]:
            if item.task != "vqa":
                continue
            made, kind = cut[item.image.stem], item.template.split("/")[1:]
            if kind[0] == "modality":
                assert item.answer == {"CT": "CT", "MR": "MRI"}[made.modality]
            elif kind[0] == "plane":
                assert item.answer == made.plane
            elif kind[0] == "presence":
                assert item.answer == ("yes" if made.finding(kind[1]) else "no")
                assert bool(made.finding(kind[1])) == (kind[1] in made.present)
            elif kind[0] == "largest":
                assert made.finding(item.answer).area_mm2 == max(found.area_mm2 for found in made.findings if found.name in STRUCTURES[:12])
            elif kind == ["side", "body"]:
                assert made.plane == "sagittal"
                assert item.answer == made.body_side
            else:
                assert kind[0] == "side"
                found = made.finding(kind[1]).xyxy
                assert item.answer == ("left" if found[0] + found[2] < made.image.width else "right")
                assert kind[1] in item.question
            assert item.answer_type == ("CLOSED" if kind[0] in ("presence", "side") else "OPEN")


def test_sagittal_sides_are_the_patients(cut):
    """Right kidney and liver lie on slices called right, left kidney and spleen on slices called left."""
    sides = {
        name: Counter(made.body_side for made in cut.values() if made.plane == "sagittal" and made.finding(name)) for name in STRUCTURES
    }
    assert sides["right kidney"]["left"] == sides["left kidney"]["right"] == sides["spleen"]["right"] == 0
    assert sides["right kidney"]["right"] > 10
    assert sides["left kidney"]["left"] > 10
    assert sides["liver"]["right"] > sides["liver"]["left"]


def test_presence_is_asked_evenly(items):
    for split in SPLITS:
        asked = Counter((item.template, item.answer) for item in items[split] if item.template.startswith("vqa/presence/"))
        assert asked
        for (template, answer), count in asked.items():
            assert asked[template, "no" if answer == "yes" else "yes"] == count


def test_crops_show_the_organ(items, cut):
    crops = [item for item in items["slab"] if item.task == "cls"]
    found = [(made, one) for made in cut.values() if made.split == "slab" for one in made.findings if one.name in {c.answer for c in crops}]
    assert len(crops) == len(found)
    for item, (made, one) in zip(crops, found, strict=True):
        assert item.answer == one.name
        assert item.size == (64, 64)
        x, y, width, height = one.box
        side = max(width, height)
        inner = np.asarray(made.image)[y : y + height, x : x + width]
        crop = np.asarray(item.open().convert("L").resize((round(side * 1.1), round(side * 1.1))))
        top, left = (crop.shape[0] - height) // 2, (crop.shape[1] - width) // 2
        assert np.abs(crop[top : top + height, left : left + width].astype(int) - inner).mean() < 25


def test_reports_say_what_is_there_and_are_called_synthetic(items, cut):
    assert about.SYNTHETIC
    for item in [one for split in SPLITS for one in items[split] if one.task == "caption"]:
        made, report = cut[item.image.stem], item.answer
        assert item.layout == about.NAME  # what `evaluate` calls synthetic
        assert report.lower().startswith(f"{made.plane} {'ct' if made.modality == 'CT' else 'mri'} of the abdomen.")
        assert len(report.split()) <= 50
        for name in STRUCTURES[:8]:
            assert (name in report) == bool(made.finding(name))
        kidneys = [name for name in ("right kidney", "left kidney") if made.finding(name)]
        assert ("Both kidneys" in report) == (len(kidneys) == 2)
        if "No kidney" in report:
            assert not {"right kidney", "left kidney"} & made.present
        if "No large organ" in report:
            assert not set(STRUCTURES[:12]) & made.present


def test_text_questions_hold_out_wordings_and_no_facts(items):
    facts = {split: {(e.template, e.answer) for e in items[split] if e.task == "qa"} for split in SPLITS}
    questions = {split: {e.question for e in items[split] if e.task == "qa"} for split in SPLITS}
    assert facts["train"] == facts["slab"] == facts["subject"]
    assert not questions["train"] & questions["slab"]
    assert not questions["train"] & questions["subject"]
    assert not questions["slab"] & questions["subject"]
    assert {e.image for e in items["train"] if e.task == "qa"} == {None}


def test_the_sample_is_a_folder_of_records(sample_folder, manifest):
    info = jsonl.read_info(sample_folder)
    assert (info.name, info.classes) == ("sample", {"organ": manifest["classes"]})
    records = [record for _, record in jsonl.read_records(sample_folder)]
    assert {one.kind for record in records for one in record.annotations} == {"qa", "box", "label", "report"}
    assert all(one.answer in one.options for record in records if not record.images for one in record.annotations)
    named = {image.path for record in records for image in record.images}
    assert named == {name for name in contents(sample_folder) if name.startswith(("images/", "crops/"))}


def test_boxes_follow_from_the_written_masks(sample_folder, manifest):
    boxed = [record for _, record in jsonl.read_records(sample_folder) if any(one.kind == "box" for one in record.annotations)]
    for record in boxed[::20]:
        mask = np.asarray(Image.open(sample_folder / "masks" / f"{record.id}.png"))
        found = {one.name: one.xyxy for one in findings(mask, PIXEL_MM, MIN_MM2, MIN_SIDE_MM)}
        assert {one.name: one.xyxy for one in record.annotations if one.kind == "box"} == {
            name: tuple(box) for name, box in found.items() if name in manifest["classes"]
        }
    assert manifest["structures"] == list(STRUCTURES)


def test_the_manifest_names_every_file(sample_folder, manifest):
    listed = json.loads((sample_folder / "manifest.json").read_text())
    assert set(listed) | {"manifest.json"} == set(contents(sample_folder))
    for name, digest in manifest["sources"].items():
        if (ASSETS / name).is_file():
            assert hashlib.sha256((ASSETS / name).read_bytes()).hexdigest() == digest
