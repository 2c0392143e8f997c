"""Images for the model: files, arrays and slices of volumes, always RGB."""

from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from unimed.data import volumes
from unimed.data.example import Example
from unimed.errors import UserError

NIFTI = (".nii", ".nii.gz")


def load_image(source: Example | Path | str | np.ndarray) -> Image.Image:
    """The RGB image of an example, a file or a uint8 array [H, W] or [H, W, 3]."""
    if isinstance(source, Example):
        if source.image is None:
            raise UserError(f"{source.id}: a {source.task} example has no image")
        source = source.image
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or not (source.ndim == 2 or (source.ndim == 3 and source.shape[2] == 3)):
            raise UserError(f"image array of {source.dtype} {source.shape}: expected uint8 [H, W] or [H, W, 3]")
        return Image.fromarray(source).convert("RGB")
    return read_image_file(Path(source))


def image_size(path: Path) -> tuple[int, int]:
    """(width, height) from the file's header."""
    try:
        with Image.open(path) as image:
            return image.size
    except FileNotFoundError:
        raise UserError(f"{path}: no such image") from None
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: not a readable image ({error})") from error


def read_image_file(
    path: Path, plane: str = "axial", index: int | None = None, grey: tuple[float, float] | None = None, pixel_mm: float = 1.5
) -> Image.Image:
    """jpg, png and the like, one DICOM image (.dcm), or a slice of a NIfTI volume or of a folder or zip with a DICOM series.

    plane, index (default: the middle) and ``grey`` (lowest and highest value shown; default by `volumes.window_of`) choose the slice and
    its window.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such image")
    name = path.name.lower()
    if name.endswith(".dcm"):
        return _one_dicom(path, grey).convert("RGB")
    if name.endswith(NIFTI) or name.endswith(".zip") or path.is_dir():
        volume = volumes.read_nifti(path) if name.endswith(NIFTI) else volumes.read_dicom_series(path)
        if plane not in volumes.AXIS:
            raise UserError(f"plane {plane!r}: expected one of {', '.join(volumes.PLANES)}")
        if index is None:
            index = volume.data.shape[volumes.AXIS[plane]] // 2
        return volumes.render(volume, plane, index, grey or volumes.window_of(volume), pixel_mm).convert("RGB")
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: not a readable image ({error})") from error


def _one_dicom(path: Path, grey: tuple[float, float] | None) -> Image.Image:
    header, pixels = volumes.read_dicom_slice(str(path), path.read_bytes())
    if grey is None:
        if header.get("Modality") == "CT":
            grey = volumes.CT_WINDOW
        elif header.get("Modality") in ("CR", "DX"):
            grey = float(np.percentile(pixels, 1)), float(np.percentile(pixels, 99))
        else:
            grey = min(0.0, float(pixels.min())), float(np.percentile(pixels, volumes.MR_PERCENTILE))
    shown = volumes.window(pixels, *grey)
    if header.get("PhotometricInterpretation") == "MONOCHROME1":
        shown = 255 - shown
    return Image.fromarray(shown)
