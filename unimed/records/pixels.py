"""Images for the model: files, arrays and slices of volumes, always RGB.

What a file says about its pixels (depth, transparency, orientation, colour profile) is applied, and `Opened.notes` tells what was done.
docs/unimed/images.md lists every case. The readers of DICOM files and of volumes are imported when such a file comes: pydicom takes time.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from unimed.errors import UserError
from unimed.records.box import AS_STORED, Placement, turned
from unimed.records.greys import window
from unimed.records.modes import DEEP, deep, deep_with_alpha, from_cmyk, is_grey, opaque, read_as_stored
from unimed.records.text import short

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

    from unimed.records.dicom_rules import Voi
    from unimed.records.volume import Volume

VOLUMES = ("nifti", "series")  # kinds of files
NIFTI = (".nii", ".nii.gz", ".hdr", ".img", ".hdr.gz", ".img.gz")
MOST_SIDE = 4096  # pixels of a drawn slice
# By EXIF orientation: the axes are swapped, then mirrored left to right, and top to bottom.
_EXIF_TURNS = {
    2: (False, True, False), 3: (False, True, True), 4: (False, False, True), 5: (True, False, False), 6: (True, True, False),
    7: (True, True, True), 8: (True, False, True),
}  # fmt: skip
_PLAIN = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")  # PNG and JPEG, whatever they are called
_START = 352  # bytes that tell the kind of a file
_SILENT = (b"IDAT", b"tIME", b"tRNS")  # chunks of a PNG, behind the first pixels, without an orientation
_EXIF_ORIENTATION, _PHOTOMETRIC, _SAMPLE_FORMAT, _SIGNED = 0x0112, 262, 339, 2  # tags of TIFF and EXIF


@dataclass(frozen=True)
class View:
    """The part of a file that is shown: a slice of a volume by plane and index, a frame or page by index; black and white values."""

    path: Path
    plane: str = "axial"
    index: int | None = None
    grey: tuple[float, float] | None = None


@dataclass(frozen=True)
class Opened:
    """An image as the model sees it, what was done to its file, and where its pixels lie there.

    ``to_original(box)`` is a box of the shown image in pixels of the file, ``to_original.inverse(box)`` the way back. The pixels of a
    volume's file are voxels: see `volumes.placement`.
    """

    rgb: Image.Image
    notes: tuple[str, ...] = ()
    to_original: Placement = AS_STORED


def load_image(source: View | Path | str | np.ndarray) -> Image.Image:
    """The RGB image of a view, a file or a uint8 array [H, W] or [H, W, 3]."""
    if isinstance(source, View):
        return open_view(source).rgb
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or not (source.ndim == 2 or (source.ndim == 3 and source.shape[2] == 3)):
            raise UserError(f"image array of {source.dtype} {source.shape}: expected uint8 [H, W] or [H, W, 3]")
        return Image.fromarray(source).convert("RGB")
    return read_image_file(Path(source))


def image_size(path: Path) -> tuple[int, int]:
    """(width, height) of the image that `load_image` gives; from the header where that tells."""
    return placed_size(Path(path))[0]


def placed_size(path: Path, file: BinaryIO | None = None) -> tuple[tuple[int, int], Placement]:
    """Size and placement of the image that `load_image` gives; from the header where that tells. file: the same, opened."""
    if file is None and not path.is_dir():
        with _opened(path) as file:
            return placed_size(path, file)
    if file is not None:
        file.seek(0)
        if _kind_of(path.name, file.read(_START)) == "raster":
            file.seek(0)
            try:
                with Image.open(file) as image:
                    if _orientation(image, file) not in _EXIF_TURNS:
                        return image.size, AS_STORED
            except Exception as error:  # Pillow's readers let many kinds through
                raise UserError(f"{path}: not a readable image ({short(error)})") from error
    opened = open_image(path)
    return opened.rgb.size, opened.to_original


def _orientation(image: Image.Image, file: BinaryIO) -> int:
    """The EXIF orientation, with no pixel decoded where that can be."""
    if image.format == "PNG" and not _text_after_pixels(file):  # Pillow decodes a PNG to see what comes after its pixels
        return Image.Image.getexif(image).get(_EXIF_ORIENTATION, 1)
    return image.getexif().get(_EXIF_ORIENTATION, 1)


def _text_after_pixels(file: BinaryIO) -> bool:
    """Whether a PNG has a chunk behind its first pixels that may tell its orientation; also where its chunks cannot be followed."""
    place, at, pixels = file.tell(), 8, False
    try:
        while True:
            file.seek(at)
            head = file.read(8)
            kind, at = head[4:], at + 12 + int.from_bytes(head[:4])
            pixels |= kind == b"IDAT"
            if kind == b"IEND":
                return False
            if len(head) < 8 or (pixels and kind not in _SILENT):
                return True
    finally:
        file.seek(place)


def read_image_file(
    path: Path, plane: str = "axial", index: int | None = None, grey: tuple[float, float] | None = None, pixel_mm: float = 1.5
) -> Image.Image:
    """The RGB image of `open_image`."""
    return open_image(path, plane, index, grey, pixel_mm).rgb


def open_image(
    path: Path, plane: str = "axial", index: int | None = None, grey: tuple[float, float] | None = None, pixel_mm: float = 1.5
) -> Opened:
    """jpg, png, tiff and the like, a DICOM file, or a slice of a NIfTI volume or of a folder or zip with a DICOM series.

    Files are told apart by content. plane, index (default: the middle) and ``grey`` (lowest and highest value shown; default: as the file
    says, else by `greys.grey_range`) choose the slice and its window. In a file of several frames or pages ``index`` is the frame.
    """
    path = Path(path)
    return _open(path, str(path), kind_of(path), plane, index, grey, pixel_mm)


def open_bytes(
    data: bytes, name: str, plane: str = "axial", index: int | None = None, grey: tuple[float, float] | None = None, pixel_mm: float = 1.5
) -> Opened:
    """`open_image` of a file, or of a zip, that is in memory; no file is made. ``name`` is for messages."""
    return _open(data, name, _kind_of("", data[:_START]), plane, index, grey, pixel_mm)


def _open(
    source: Path | bytes, name: str, kind: str, plane: str, index: int | None, grey: tuple[float, float] | None, pixel_mm: float
) -> Opened:
    if kind == "raster" and plane == "axial":
        return _raster(source, name, index, grey)
    from unimed.records import dicom
    from unimed.records import volume as volumes

    if plane not in volumes.AXIS:
        raise UserError(f"plane {plane!r}: expected one of {', '.join(volumes.PLANES)}")
    if kind == "raster":
        raise UserError(f"{name}: plane {plane!r} needs a volume, this is one image")
    if kind == "dicom":
        try:
            data = source if isinstance(source, bytes) else source.read_bytes()
        except OSError as error:
            raise UserError(f"{name}: not readable ({error.strerror})") from None
        parsed = dicom.parse(name, data)
        dicom.check_picture(name, parsed)
        if plane == "axial":
            return _dicom_frame(name, parsed, index, grey)
        volume = volumes.read_dicom_frames(name, parsed)
    else:
        volume = _volume(source, name, kind)
    return _slice(name, volume, plane, index, grey, pixel_mm)


def open_view(view: View) -> Opened:
    """`open_image` of the part of a file that a view names. The volume read last is kept: slices of one volume come one after the other."""
    kind = kind_of(view.path)
    if kind not in VOLUMES:
        return open_image(view.path, view.plane, view.index, view.grey)
    return _slice(str(view.path), kept_volume(view.path, kind), view.plane, view.index, view.grey, 1.5)


def kept_volume(path: Path, kind: str) -> Volume:
    """The volume of a file or folder; read unless it was the last one."""
    key = path, sum(file.stat().st_mtime_ns for file in (path.rglob("*") if kind == "series" else [path]))
    if _kept.get(key) is None:
        _kept.clear()
        _kept[key] = _volume(path, str(path), kind)
    return _kept[key]


_kept: dict[tuple[Path, int], Volume] = {}


def _volume(source: Path | bytes, name: str, kind: str) -> Volume:
    from unimed.records import volume as volumes

    if kind != "nifti":
        return volumes.read_dicom_series(source, name)
    return volumes.nifti_from_bytes(name, source) if isinstance(source, bytes) else volumes.read_nifti(source)


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    try:
        file = path.open("rb")
    except FileNotFoundError:
        raise UserError(f"{path}: no such image") from None
    except OSError as error:
        raise UserError(f"{path}: not readable ({error.strerror})") from None
    with file:
        yield file


def kind_of(path: Path) -> str:
    """What a file is by its first bytes, or by its suffix where these do not tell: raster, dicom, nifti or series."""
    if path.is_dir():
        return "series"
    with _opened(path) as file:
        return _kind_of(path.name, file.read(_START))


def _kind_of(name: str, start: bytes) -> str:
    """The kind of a file by its name and its first bytes."""
    name = name.lower()
    if start.startswith(_PLAIN) and start[128:132] != b"DICM":
        return "raster"
    from unimed.records import dicom

    if start[128:132] == b"DICM" or name.endswith(dicom.SUFFIXES):
        return "dicom"
    if name.endswith(NIFTI) or start[344:347] in (b"n+1", b"ni1") or start[4:7] in (b"n+2", b"ni2") or start[:2] == b"\x1f\x8b":
        return "nifti"
    if start[:4] == b"PK\x03\x04" or name.endswith(".zip"):
        return "series"
    return "dicom" if dicom.is_dicom(start) else "raster"


def _dicom_frame(name: str, source: Dataset, index: int | None, grey: tuple[float, float] | None) -> Opened:
    from unimed.records import dicom

    count = dicom.frame_count(name, source)
    at = count // 2 if index is None else index
    if not 0 <= at < count:
        raise UserError(f"{name}: frame {index}, expected 0 to {count - 1}")
    rgb, notes, placement = dicom.picture(dicom.read_frame(name, source, at), grey)
    return Opened(rgb, (f"frame {at} of 0 to {count - 1}", *notes) if count > 1 else notes, placement)


def _slice(name: str, volume: Volume, plane: str, index: int | None, grey: tuple[float, float] | None, pixel_mm: float) -> Opened:
    from unimed.records import volume as volumes

    axis = volumes.AXIS[plane]
    count = volume.data.shape[axis]
    if index is None:
        index = count // 2
    notes = [f"{plane} slice {index} of 0 to {count - 1}", *volume.notes]
    shown: Voi | tuple[float, float] = grey or (0.0, 255.0)
    if volume.data.ndim == 4 and grey is not None:
        raise UserError(f"{name}: a colour volume takes no window")
    if volume.data.ndim == 3:
        shown = _window(volume, grey, notes)
    sizes = [(mm, count) for at, (mm, count) in enumerate(zip(volume.spacing, volume.data.shape, strict=False)) if at != axis]
    longest = max(mm * count for mm, count in sizes)
    chosen = min(mm for mm, _ in sizes) if min(mm for mm, _ in sizes) < pixel_mm / 4 else pixel_mm  # microscopy, small animals
    if longest / chosen > MOST_SIDE:
        chosen = longest / MOST_SIDE * 4
    if chosen != pixel_mm:
        notes.append(f"pixels of {chosen:.3g} mm")
    rgb = volumes.render(volume, plane, index, shown, chosen).convert("RGB")
    return Opened(rgb, tuple(notes), volumes.placement(volume, plane, rgb.size))


def _window(volume: Volume, grey: tuple[float, float] | None, notes: list[str]) -> Voi | tuple[float, float]:
    """As asked, else as the file says where that shows anything, else by `greys.grey_range`."""
    from unimed.records import volume as volumes
    from unimed.records.dicom_rules import Voi

    if grey is not None:
        notes.append(f"window {grey[0]:g} to {grey[1]:g} as asked")
        return grey
    said = volume.grey
    if isinstance(said, Voi):
        if said.shows(volume.data):
            notes.append(str(said))
            return said
        notes.append(f"{said} not used: it shows none of the values")
    elif said is not None:
        name = f"window {said[0]:g} to {said[1]:g} of the file (cal_min, cal_max)"
        if np.nanmin(volume.data) < said[1] and np.nanmax(volume.data) > said[0]:
            notes.append(name)
            return said
        notes.append(f"{name} not used: it shows none of the values")
    low, high = volumes.window_of(volume)
    notes.append(f"window {low:g} to {high:g}")
    return low, high


def _raster(source: Path | bytes, name: str, index: int | None, grey: tuple[float, float] | None) -> Opened:
    try:
        with Image.open(source if isinstance(source, Path) else io.BytesIO(source)) as image:
            if image.format == "EPS":
                raise UserError(f"{name}: EPS is a program, not pixels; convert it to PNG")
            pages = getattr(image, "n_frames", 1)
            if index is not None and not 0 <= index < pages:
                raise UserError(f"{name}: page {index}, expected 0 to {pages - 1}")
            if index:
                image.seek(index)
            opened = to_rgb(image, grey)
            page = f"page {index or 0} of 0 to {pages - 1}"
            return replace(opened, notes=(page, *opened.notes)) if pages > 1 else opened
    except UserError as error:
        raise error if str(error).startswith(name) else UserError(f"{name}: {error}") from error
    except UnidentifiedImageError as error:
        raise UserError(f"{name}: not a readable image (no known format: png, jpg, tiff, DICOM, NIfTI ...)") from error
    except Exception as error:  # Pillow's readers let many kinds through
        raise UserError(f"{name}: not a readable image ({short(error)})") from error


def to_rgb(image: Image.Image, grey: tuple[float, float] | None = None) -> Opened:
    """A Pillow image as RGB: deep grey brought to 8 bits, transparency onto black, turned as EXIF says, colours in sRGB.

    ``grey`` is the lowest and highest value shown, for grey images.
    """
    notes: list[str] = []
    tags = getattr(image, "tag_v2", {})
    inverted = image.mode in DEEP and tags.get(_PHOTOMETRIC) == 0  # white is zero; Pillow inverts 8 bits and less itself
    gamma, profile = image.info.get("gamma"), image.info.get("icc_profile")
    if profile or "srgb" in image.info or not isinstance(gamma, float) or not 0.01 < gamma < 100 or abs(gamma - 1 / 2.2) < 0.05:
        gamma = None  # a screen's own, or overruled
    deep_alpha = read_as_stored(image)
    orientation = image.getexif().get(_EXIF_ORIENTATION, 1)
    if _loaded(image).getexif().get(_EXIF_ORIENTATION, 1) in range(2, 9):
        image = ImageOps.exif_transpose(image)
        notes.append("turned as its EXIF orientation says")
    placement = turned(*image.size, *_EXIF_TURNS.get(orientation, ()))
    if image.mode == "L" and _SIGNED in np.atleast_1d(tags.get(_SAMPLE_FORMAT, 1)):
        image = Image.fromarray(np.asarray(image).view(np.int8).astype(np.int32))
    if deep_alpha:
        image = deep_with_alpha(image, grey, notes)
    elif image.mode in DEEP:
        image = Image.fromarray(deep(image, grey, inverted, notes))
    elif grey is not None:
        if image.mode not in ("L", "1"):
            raise UserError("a colour image takes no window")
        notes.append(f"window {grey[0]:g} to {grey[1]:g} as asked")
        image = Image.fromarray(window(np.asarray(image.convert("L")), *grey))
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = opaque(image, notes)
    elif image.mode == "CMYK" and profile:
        image = from_cmyk(image, profile, notes)
    rgb = image.convert("RGB")  # also where it is RGB: a copy that outlives the open file
    if gamma is not None:
        levels = np.rint(255 * (np.arange(256) / 255) ** (1 / 2.2 / gamma)).astype(np.uint8).tolist()
        rgb = rgb.point(levels * 3)
        notes.append(f"gamma {gamma:g} brought to that of a screen")
    elif profile and image.mode != "CMYK" and not is_grey(rgb):
        from unimed.records.dicom_rules import with_profile

        rgb = Image.fromarray(with_profile(np.array(rgb), profile, notes))
    return Opened(rgb, tuple(notes), placement)


def _loaded(image: Image.Image) -> Image.Image:
    """With its pixels read: only then does Pillow turn a TIFF file, and forget its orientation.

    Pillow 12.3 maps an uncompressed grey TIFF into memory with the sides of the turned image, which scrambles it. It does not map a file
    without a name.
    """
    name = getattr(image, "filename", "")
    if image.format == "TIFF" and name:
        image.filename = ""  # type: ignore[attr-defined]
    image.load()
    if image.format == "TIFF" and name:
        image.filename = name  # type: ignore[attr-defined]
    return image
