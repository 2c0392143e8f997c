"""CheXmask: masks of heart and lungs of six public sets, as run-length text; and masks of these structures as images.

    OriginalResolution/<set>.csv   the image's id (dicom_id of MIMIC-CXR-JPG, image_id of VinDr-CXR, ImageID of PadChest, "Image Index" of
                                   ChestX-Ray8, Path of CheXpert), "Dice RCA (Mean)", "Dice RCA (Max)", Landmarks, "Left Lung",
                                   "Right Lung", Heart, Height, Width
    masks/heart/<id>.png           our own form, also .gif: with left_lung/ and right_lung/ beside it

The tables under Preprocessed/ hold masks of another size than the images, and are not read. The authors advise against masks whose mean
Dice RCA is below 0.7: they are left out by choice. Left and right are the patient's.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from unimed.datasets.sources import masks, tables
from unimed.datasets.sources.spec import Known, Row, SourceSpec
from unimed.errors import UserError
from unimed.records.files import short
from unimed.records.policy import BadRecord, Tally
from unimed.records.record import Annotation, BoxOf, made

STRUCTURES = {"heart": "Heart", "right lung": "Right Lung", "left lung": "Left Lung"}
IDS = ("dicom_id", "image_id", "ImageID", "Image Index", "Path", "Image ID")
COLUMNS = ("Dice RCA (Mean)", "Left Lung", "Right Lung", "Heart", "Height", "Width")
GOOD = 0.7
IMAGES = (".png", ".gif")


def _tables(folder: Path) -> list[Path]:
    inner = folder / "OriginalResolution"
    where = inner if inner.is_dir() else folder
    return sorted([*where.glob("*.csv"), *where.glob("*.csv.gz")])


def _pictures(folder: Path) -> dict[str, Path]:
    return {name: folder / "masks" / name.replace(" ", "_") for name in STRUCTURES}


def matches(folder: Path) -> bool:
    """Pictures of masks, or tables that name the three structures in their first row."""
    pictures = _pictures(folder)["heart"].is_dir() or (folder / "OriginalResolution").is_dir()
    return pictures or any(tables.has(path, COLUMNS) for path in _tables(folder))


def read(folder: Path, tally: Tally) -> Iterator[Row]:
    if _pictures(folder)["heart"].is_dir():
        yield from _read_pictures(folder)
    for path in _tables(folder):
        for where, cells in tables.rows(path, COLUMNS, tally):
            name = next((name for name in IDS if name in cells), None)
            if name is None:
                raise UserError(f"{path}: no column with the image's id; known are {', '.join(IDS)}")
            with tally.record():
                if tables.number(cells, "Dice RCA (Mean)", where) < GOOD:
                    tally.choose(f"with a mean Dice RCA below {GOOD}")
                    continue
                shape = [int(tables.number(cells, column, where)) for column in ("Height", "Width")]
                if min(shape) < 1 or max(shape) > 2**16:
                    raise BadRecord("with a wrong size of the mask", f"{where}: Height, Width are {short(shape)}, expected 1 to 65536")
                values = {"shape": shape, **{name: cells[column] for name, column in STRUCTURES.items()}}
                yield Row(where, image=_id(cells[name]), values=values)


def _id(text: str) -> str:
    """Of ids that are file names (PadChest, NIH) the stem; CheXpert's are paths."""
    return str(Path(text).with_suffix("")) if Path(text).suffix.lower() in (".png", ".jpg", ".dcm") else text


def _read_pictures(folder: Path) -> Iterator[Row]:
    folders = _pictures(folder)
    names = sorted({path.stem for inner in folders.values() for path in inner.glob("*") if path.suffix.lower() in IMAGES})
    for key in names:
        files = {}
        for name, inner in folders.items():
            path = next((inner / f"{key}{suffix}" for suffix in IMAGES if (inner / f"{key}{suffix}").is_file()), None)
            if path is not None:
                files[name] = str(path.relative_to(folder))
        yield Row(f"masks/*/{key}", image=key, values={"files": files})


def make(row: Row, image: Known, folder: Path, tally: Tally) -> Iterator[Annotation]:
    """Boxes of the structures. The masks go to `image`; an empty or missing one stays out."""
    found = {}
    for name in STRUCTURES:
        if "files" in row.values:
            if name not in row.values["files"]:
                continue
            mask = masks.read(folder / row.values["files"][name])
        else:
            height, width = row.values["shape"]
            mask = masks.decode(row.values[name], height, width, row.where)
        if mask.any():
            found[name] = masks.check(mask, image.size, f"{row.where}: {name}")
    image.masks |= found
    for name, mask in found.items():
        yield made(BoxOf, row.where, name=name, xyxy=masks.box(mask))


SOURCE = SourceSpec(
    name="chexmask",
    title="CheXmask",
    files="masks of heart and lungs (OriginalResolution/*.csv, or masks/heart/*.png with left_lung/ and right_lung/)",
    matches=matches,
    read=read,
    make=make,
    once=True,
    licence="CC BY 4.0 (masks; the images have their own)",
    citation="Gaggion et al., CheXmask: a large-scale dataset of anatomical segmentation masks for multi-center chest x-ray images, 2024",
    where="https://physionet.org/content/chexmask-cxr-segmentation-data/",
    pages=("https://physionet.org/content/chexmask-cxr-segmentation-data/", "https://github.com/ngaggion/CheXmask-Database"),
)
