"""MIMIC-CXR reports, as R2Gen writes them: annotation.json."""

from collections.abc import Iterator
from pathlib import Path

from unimed.datasets.spec import DatasetSpec
from unimed.records import files
from unimed.records.policy import BadRecord
from unimed.records.record import Record, Report, made
from unimed.records.source import Source


def matches(folder: Path) -> bool:
    """annotation.json or annotation_small.json."""
    return (folder / "annotation.json").is_file() or (folder / "annotation_small.json").is_file()


def read(source: Source) -> Iterator[tuple[str, Record]]:
    """The first image and the report of each row under the split's key; training prefers `annotation_small.json`, as the release does.

    Images are in `files/` (MIMIC-CXR) or `images/`.
    """
    folder, split = source.folder, source.split
    small = folder / "annotation_small.json"
    path = small if split == "train" and small.is_file() else folder / "annotation.json"
    if not path.is_file():
        return
    images = "files" if (folder / "files").is_dir() else "images"
    for number, row in enumerate(files.of_kind(files.read_json(path, dict).get(split, []), list, f"{path}: {split!r}")):
        where = f"{path}: {split}[{number}]"
        with source.tally.record():
            text = files.text(row, "report", where)
            names = files.field(row, "image_path", where, (list, str))
            first = names if isinstance(names, str) else next(iter(names), None)
            if not isinstance(first, str):
                raise BadRecord("with a wrong 'image_path'", f"{where}: image_path is {files.short(names)}, expected a list of file names")
            ref, _ = source.image(images, first, where)
            key, patient = files.name(row.get("id", number)), files.name(row.get("subject_id", ""))
            report = made(Report, where, text=text, id=key)
            values = {"patient": patient, "modality": "X-ray", "organ": "chest", "source": SPEC.name}
            yield where, source.record(where, key, SPEC.name, images=(ref,), annotations=(report,), **values)


SPEC = DatasetSpec(
    name="mimic-cxr",
    title="MIMIC-CXR",
    files="MIMIC-CXR reports (annotation.json, images/ or files/)",
    matches=matches,
    read=read,
    tasks=("caption",),
    ratio={"caption": 8},
    sized=False,
    licence="PhysioNet Credentialed Health Data License 1.5.0",
    citation="Johnson et al., MIMIC-CXR, a de-identified publicly available database of chest radiographs, Scientific Data 2019",
    where="https://physionet.org/content/mimic-cxr-jpg/ (after training and a signed agreement); annotation.json from R2Gen",
)
