"""SA-Med2D: boxes of organs and lesions on 2-D images of many modalities, in the selection and form of the release."""

from collections.abc import Iterator
from pathlib import Path

from unimed.datasets.boxes import read_boxes
from unimed.datasets.spec import DatasetSpec
from unimed.records import files
from unimed.records.record import Record
from unimed.records.source import Source


def matches(folder: Path) -> bool:
    """regions_small_train or regions_small_test."""
    return any((folder / f"regions_small_{split}").is_dir() for split in ("train", "test"))


def read(source: Source) -> Iterator[tuple[str, Record]]:
    """Boxes of `regions_small_<split>/<modality>/<id>.json` on `images_small_<split>/<modality>/<id>.png`; there is no validation split."""
    images = f"images_small_{source.split}"
    for path in sorted((source.folder / f"regions_small_{source.split}").glob("*/*.json")):
        modality, name = path.parent.name, path.stem
        found = list(read_boxes(source, f"{modality}/{name}", images, f"{modality}/{name}.png", path))
        if found:
            key, boxes = files.name(f"{modality}/{name}"), tuple(box for _, box in found)
            values = {"patient": files.name(name), "modality": files.name(modality), "source": SPEC.name}
            yield str(path), source.record(str(path), key, SPEC.name, images=(found[0][0],), annotations=boxes, **values)


SPEC = DatasetSpec(
    name="sa-med2d",
    title="SA-Med2D-20M",
    files="SA-Med2D (regions_small_*/, images_small_*/)",
    matches=matches,
    read=read,
    tasks=("refer", "identify"),
    splits=("train", "test"),
    ratio={"refer": 4, "identify": 4},
    licence="CC BY-NC-SA 4.0 (as its hub page says); each source data set has its own",
    citation="Ye et al., SA-Med2D-20M dataset: segment anything in 2D medical imaging with 20 million masks, 2023",
    where="https://huggingface.co/datasets/OpenGVLab/SA-Med2D-20M",
)
