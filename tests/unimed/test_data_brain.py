"""The average brain of Med-MoE's fourth domain, from a wheel in the shape of the real one."""

import gzip
import shutil
import zipfile
from itertools import pairwise
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from unimed.cli import train as commands
from unimed.cli.app import app
from unimed.datasets import load_items
from unimed.datasets.load import load_set
from unimed.errors import UserError
from unimed.evaluate.run import is_sample
from unimed.records import jsonl
from unimed.sample import about, archives, brain
from unimed.sample.masks import findings
from unimed.sample.slices import PIXEL_MM
from unimed.train import recipe as recipes

SHAPE = (100, 110, 155)  # template, RAS, 1 mm
ORIGIN = (-50.0, -60.0, -70.0)
SHIFT = (7, 9, 4)  # the atlas's first voxel on the template's grid
# Label -> voxels of the template's grid.
PLACES = {
    "Left-Thalamus-Proper": (slice(28, 45), slice(50, 70), slice(20, 140)),
    "Right-Thalamus-Proper": (slice(55, 72), slice(50, 70), slice(20, 140)),
    "Brain-Stem": (slice(45, 55), slice(30, 45), slice(10, 100)),
    "ctx-lh-insula": (slice(20, 24), slice(50, 60), slice(62, 64)),  # too small for a box
}


def wheel(path, affine_of_atlas=None, labels=()):
    table = {"Unknown": 0} | {label: 10 * number for number, label in enumerate(sum(brain.STRUCTURES.values(), ()), 1)}
    template, atlas = np.zeros(SHAPE, np.int16), np.zeros(SHAPE, np.uint16)
    template[15:85, 15:95, 5:152] = 60
    for label, place in PLACES.items():
        template[place], atlas[place] = 90, table[label]
    affine = np.eye(4)
    affine[:3, 3] = ORIGIN
    cropped = atlas[SHIFT[0] : 93, SHIFT[1] : 100, SHIFT[2] :]
    moved = affine.copy()
    moved[:3, 3] += SHIFT
    stored = nib.Nifti1Image(cropped, moved).as_reoriented([[0, -1], [2, 1], [1, -1]])  # as the real one, not along RAS
    if affine_of_atlas is not None:
        stored = nib.Nifti1Image(cropped, affine_of_atlas)
    rows = "".join(f"{value},{label}\n" for label, value in table.items() if label not in labels)
    with zipfile.ZipFile(path, "w") as packed:
        for name, image in ((brain.TEMPLATE, nib.Nifti1Image(template, affine)), (brain.ATLAS, stored)):
            packed.writestr(name, gzip.compress(image.to_bytes()))
        packed.writestr(brain.LABELS, f"index,name\n{rows}")
    return path


def read_all(folder):
    return [record for _, record in jsonl.read_records(folder)]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """archive, the set's folder. Read it, do not change it."""
    place = tmp_path_factory.mktemp("brain")
    archive = wheel(place / "atlas.whl")
    brain.build_brain(place / "brain", archive)
    return archive, place / "brain"


def test_the_atlas_lies_on_the_template(built):
    volume = brain.brain_volume(built[0])
    names = list(brain.STRUCTURES)
    for name, label in (("left thalamus", "Left-Thalamus-Proper"), ("brain stem", "Brain-Stem"), ("left insula", "ctx-lh-insula")):
        expected = np.zeros(SHAPE, bool)
        expected[PLACES[label]] = True
        assert np.array_equal(volume.labels == 1 + names.index(name), expected)


def test_records_boxes_and_splits(built):
    items = {split: load_set("brain", built[1], "records", split) for split in ("train", "slab", "subject")}
    assert {item.task for item in items["train"]} == {"vqa", "refer", "identify", "caption"}
    assert {item.answer for item in items["train"] if item.task == "identify"} == {"left thalamus", "right thalamus", "brain stem"}
    assert len(items["subject"]) == 0
    records = read_all(built[1])
    axial = sorted((int(one.id.rpartition("_")[2]), one.split) for one in records if "axial" in one.id)
    assert {index for index, split in axial if split == "val"} == set(range(62, 72))
    assert all(b - a >= 3 for (a, first), (b, second) in pairwise(axial) if first != second)  # voxels between, in no image
    assert all(one.split == "train" and one.id.endswith(("_z08", "_z74")) for one in records if "axial" not in one.id)
    for one in records:
        if "axial" in one.id:
            boxes = {box.name: box.xyxy for box in one.annotations if box.kind == "box"}
            if {"left thalamus", "right thalamus"} <= set(boxes):
                assert boxes["right thalamus"][2] <= boxes["left thalamus"][0]  # radiological: the patient's right is on the left
                width = Image.open(built[1] / one.images[0].path).width
                assert abs(boxes["left thalamus"][0] + boxes["right thalamus"][2] - width) < 4


def test_reports(built):
    texts = {one.id: part.text for one in read_all(built[1]) for part in one.annotations if part.kind == "report"}
    assert texts["brain_axial_063"] == "Axial MRI of the brain. The brain stem is visible. Left and right thalamus are visible."
    assert texts["brain_axial_130"] == "Axial MRI of the brain. Left and right thalamus are visible."
    assert texts["brain_axial_012"] == "Axial MRI of the brain. The brain stem is visible."


def test_a_structure_in_pieces_gets_no_box():
    mask = np.zeros((60, 60), np.uint8)
    mask[5:25, 5:25] = 1
    mask[40:55, 40:55] = 1
    for share, count in ((0.6, 1), (0.7, 0)):  # 400 of 625 pixels in one piece
        assert len(findings(mask, PIXEL_MM, 150.0, 9.0, ("one",), share)) == count


def test_the_same_bytes_and_nothing_of_others_is_replaced(built, tmp_path):
    shutil.copytree(built[1], tmp_path / "brain")
    (tmp_path / "brain" / "records-00000.jsonl").write_text("")
    brain.build_brain(tmp_path / "brain", built[0])
    for path in built[1].rglob("*"):
        if path.is_file():
            assert (tmp_path / "brain" / path.relative_to(built[1])).read_bytes() == path.read_bytes()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="mine: exists, and unimed sample brain did not make it"):
        brain.build_brain(tmp_path / "mine", built[0])
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "mine"


def test_other_archives(tmp_path):
    with pytest.raises(UserError, match="has no label 'Brain-Stem'"):
        brain.build_brain(tmp_path / "out", wheel(tmp_path / "a.whl", labels=("Brain-Stem",)))
    with pytest.raises(UserError, match="not on one grid"):
        brain.build_brain(tmp_path / "out", wheel(tmp_path / "b.whl", affine_of_atlas=np.diag([2.0, 2.0, 2.0, 1.0])))
    with zipfile.ZipFile(tmp_path / "c.whl", "w") as packed:
        packed.writestr("readme", "")
    with pytest.raises(UserError, match="has no member"):
        brain.build_brain(tmp_path / "out", tmp_path / "c.whl")
    assert not (tmp_path / "out").exists()


def test_the_demo_takes_the_brain_as_its_fourth_domain(built, sample_folder, tmp_path, monkeypatch, capsys):
    root = tmp_path / "unimed" / "sample"
    root.parent.mkdir()
    root.symlink_to(sample_folder)
    assert commands._with_brain(str(root)) == []
    monkeypatch.setattr(archives, "fetch_sample", lambda dest, names, progress: {"brain": built[0]})
    out = root.with_name("brain")
    done = CliRunner().invoke(app, ["sample", "brain", "--out", str(out)])
    assert done.exit_code == 0, done.output
    recipe = recipes.load("medmoe-1", commands._with_brain(str(root)))
    assert list(recipe.medmoe.domains) == ["organ crops", "CT body", "MR body", "MR brain"]
    assert (recipe.data.root, recipe.data.sets["brain"].root) == (str(root), str(out))
    assert is_sample(recipe.data)
    from unimed.train import run as training
    from unimed.train import stages

    domains = {item.dataset: stages.domain(recipe.medmoe, item) for item in training.items(recipe, "slab") if item.task == "vqa"}
    assert domains["brain"] == 3
    assert len(load_items(Path(sample_folder), "slab")) < len(training.items(recipe, "slab"))
    recipe.data.sets["brain"].root = str(tmp_path)
    assert not is_sample(recipe.data)
    assert about.BRAIN_BY == "unimed sample brain"
