"""CT and MR volumes from NIfTI and DICOM, cut into slices as a radiologist reads them.

Every volume is first brought to the canonical RAS grid by its own affine (NIfTI) or by ImageOrientationPatient and ImagePositionPatient
(DICOM), so index x grows to the patient's right, y to anterior, z to superior. A slice is then drawn with the patient's right on the
image's left (axial, coronal), anterior on the left (sagittal), and anterior (axial) or superior (coronal, sagittal) at the top.
Oblique volumes are shown along the nearest axes.
"""

import io
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from unimed.errors import UserError
from unimed.records import dicom, limits
from unimed.records.box import Placement, stretched, turned
from unimed.records.dicom import Frame
from unimed.records.dicom_rules import Voi
from unimed.records.greys import CT_WINDOW, MR_PERCENTILE, grey_range, window
from unimed.records.text import short

__all__ = ["CT_WINDOW", "MR_PERCENTILE", "Region", "Volume", "window"]

UNITS = {1: ("meters", 1000.0), 3: ("microns", 0.001)}  # NIfTI's codes of units but mm, in mm
PLANES = ("axial", "coronal", "sagittal")
AXIS = {"axial": 2, "coronal": 1, "sagittal": 0}
MAX_FILES = 10_000

Region = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]  # half-open index ranges in x, y, z


@dataclass(frozen=True)
class Volume:
    """A volume on the canonical RAS grid.

    data: [X, Y, Z] with NaN where nothing was imaged, or colours uint8 [X, Y, Z, 3]; affine: voxel index to mm (RAS); labels: uint8
    [X, Y, Z] or None; modality: "CT", "MR" or "" when unknown. grey: how the file itself shows its values; inverted: low values are white.
    notes: what was done to the file. stored: for each axis of the file's array the axis here, and 1 or -1 where it grows the other way;
    the array of a DICOM series is [column, row, slice], slices in the order of their places.
    """

    data: np.ndarray
    affine: np.ndarray
    modality: str = ""
    labels: np.ndarray | None = None
    grey: Voi | tuple[float, float] | None = None
    inverted: bool = False
    notes: tuple[str, ...] = ()
    stored: tuple[tuple[int, int], ...] = ((0, 1), (1, 1), (2, 1))

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Voxel size in mm along x, y, z."""
        x, y, z = np.sqrt((self.affine[:3, :3] ** 2).sum(0))
        return float(x), float(y), float(z)

    @property
    def region(self) -> Region:
        """The whole volume as index ranges."""
        x, y, z = self.data.shape[:3]
        return (0, x), (0, y), (0, z)


def _canonical(data: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray, tuple[tuple[int, int], ...]]:
    """Data and affine on the closest RAS grid, and `Volume.stored`."""
    import nibabel as nib

    to_ras = nib.io_orientation(affine)
    turned = affine @ nib.orientations.inv_ornt_aff(to_ras, data.shape[:3])
    return np.ascontiguousarray(nib.apply_orientation(data, to_ras)), turned, tuple((int(axis), int(sign)) for axis, sign in to_ras)


def _flat(affine: np.ndarray) -> bool:
    """Whether an affine's axes span no volume, whatever their unit."""
    axes = affine[:3, :3]
    with np.errstate(all="ignore"):
        return not np.isfinite(affine).all() or not abs(np.linalg.det(axes / np.linalg.norm(axes, axis=0))) > 1e-6


def read_nifti(path: Path, modality: str = "") -> Volume:
    """A 3-D NIfTI file (.nii, .nii.gz, or the pair .hdr and .img) on the canonical grid."""
    path = Path(path)
    pair = None
    for one, other in ((".hdr", ".img"), (".img", ".hdr")):
        for packed in ("", ".gz"):
            if path.name.lower().endswith(one + packed):
                stem = path.name[: -len(one + packed)]
                pair = next((p for ending in (other, f"{other}.gz") if (p := path.with_name(stem + ending)).is_file()), None)
                if pair is None:
                    raise UserError(f"{path}: the other half of the pair, {stem}{other}, is not beside it")
    try:
        data = path.read_bytes()
        other_half = pair.read_bytes() if pair else None
    except OSError as error:
        raise UserError(f"{path}: not readable ({error.strerror})") from None
    if other_half is not None and ".img" in path.name.lower()[-7:]:
        data, other_half = other_half, data
    return nifti_from_bytes(str(path), data, modality, other_half)


def nifti_from_bytes(name: str, data: bytes, modality: str = "", image_data: bytes | None = None) -> Volume:
    """A NIfTI file that is already in memory, for example a member of an archive; ``name`` is for messages.

    ``image_data``: the voxels of a pair (.img), whose header is ``data``.
    """
    try:
        return _volume(*_nifti(_unpacked(data), None if image_data is None else _unpacked(image_data)), modality)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
    except Exception as error:  # nibabel lets errors of gzip, zlib and its own parsers through
        raise UserError(f"{name}: not a readable NIfTI file ({short(error)})") from error


def _volume(voxels: np.ndarray, header: Any, affine: np.ndarray, modality: str) -> Volume:
    colour = voxels.dtype.names is not None
    if colour:
        opaque = voxels["A"] / 255 if "A" in (voxels.dtype.names or ()) else 1  # transparent is black
        voxels = np.stack([np.rint(voxels[channel] * opaque).astype(np.uint8) for channel in "RGB"], axis=-1)
    grid = voxels.shape[:-1] if colour else voxels.shape
    while len(grid) > 3 and grid[-1] == 1:
        voxels, grid = voxels[..., 0, :] if colour else voxels[..., 0], grid[:-1]
    if len(grid) != 3 or 0 in grid:
        raise UserError(f"shape {grid}, expected a volume of three axes")
    if voxels.dtype.kind not in "iuf" or voxels.dtype.itemsize > 8:
        raise UserError(f"voxels of type {voxels.dtype}, expected integers, floats or RGB")
    if _flat(affine):
        raise UserError("its affine cannot be inverted, so left and right are unknown")
    notes = []
    if unit := UNITS.get(int(header["xyzt_units"]) & 7):
        name, mm = unit
        affine = np.diag([mm] * 3 + [1]) @ affine
        notes.append(f"coordinates in {name}")
    if not header["sform_code"] and not header["qform_code"]:
        notes.append("no orientation in the header (sform and qform codes are 0): left and right are a guess")
    intent = header.get_intent()[0]
    if intent != "none":
        notes.append(f"values are {intent} (intent code)")
    voxels, affine, stored = _canonical(voxels, affine)
    if voxels.dtype.kind == "f" and not np.isfinite(voxels).all():
        if not np.isfinite(voxels).any():
            raise UserError("no voxel holds a number")
        notes.append(f"{int((~np.isfinite(voxels)).sum())} voxels that are not numbers drawn black")
        voxels = np.where(np.isfinite(voxels), voxels, np.nan)
    low, high = float(header["cal_min"]), float(header["cal_max"])
    grey = (low, high) if not colour and np.isfinite([low, high]).all() and low < high else None
    return Volume(voxels, affine, modality, grey=grey, notes=tuple(notes), stored=stored)


def _unpacked(data: bytes) -> bytes:
    """The bytes of a file that may be gzipped; a file that unpacks to more than `limits.BYTES` is an error."""
    if data[:2] != b"\x1f\x8b":
        return data
    parts: list[bytes] = []
    while data[:2] == b"\x1f\x8b":  # gzip files may have several members
        unpack = zlib.decompressobj(wbits=31)
        parts.append(unpack.decompress(data, limits.BYTES + 1 - sum(map(len, parts))))
        if sum(map(len, parts)) > limits.BYTES:
            raise UserError(f"unpacks to more than {limits.size(limits.BYTES)}")
        if not unpack.eof:
            raise EOFError("the compressed file ends too early")
        data = unpack.unused_data
    return b"".join(parts)


def _nifti(data: bytes, image_data: bytes | None) -> tuple[np.ndarray, Any, np.ndarray]:
    """Voxels (scaled as the header says), header and affine of NIfTI-1 or NIfTI-2, in one file or as a pair."""
    import nibabel as nib

    second = data[:4] in (b"\x1c\x02\x00\x00", b"\x00\x00\x02\x1c")  # the header's size, 540
    magic = data[4:7] if second else data[344:347]
    if magic not in (b"n+2", b"ni2", b"n+1", b"ni1"):
        if data[:4] in (b"\x5c\x01\x00\x00", b"\x00\x00\x01\x5c"):
            raise UserError("an ANALYZE 7.5 file, which does not say where right and left are; convert it to NIfTI")
        raise ValueError("it does not start as NIfTI files do")
    if (magic[1:2] == b"i") != (image_data is not None):
        raise ValueError("a header without its voxels" if image_data is None else "a whole file, not half of a pair")
    kinds = {b"n+1": nib.Nifti1Image, b"ni1": nib.Nifti1Pair, b"n+2": nib.Nifti2Image, b"ni2": nib.Nifti2Pair}
    kind = kinds[magic]
    header = kind.header_class.from_fileobj(io.BytesIO(data))
    shape = header.get_data_shape()
    there = (len(data) if image_data is None else len(image_data)) - max(0, int(header["vox_offset"]))
    needed = header.get_data_dtype().itemsize
    for side in shape:
        needed *= int(side)
    if needed > there:
        raise ValueError(f"{needed} bytes of voxels by its header, {max(0, there)} in the file")
    files = kind.make_file_map()
    files["image"].fileobj = io.BytesIO(data if image_data is None else image_data)
    if image_data is not None:
        files["header"].fileobj = io.BytesIO(data)
    image = kind.from_file_map(files)
    return np.asarray(image.dataobj), image.header, np.asarray(image.affine)


def _files(source: Path | bytes, name: str) -> Iterable[tuple[str, bytes]]:
    """Names and bytes of the files in a folder (and below) or a zip, without those that systems leave behind."""
    try:
        if isinstance(source, Path) and source.is_dir():
            names = sorted(file for file in source.rglob("*") if file.is_file() and not _left_behind(file.relative_to(source).parts))
            if len(names) > MAX_FILES:
                raise UserError(f"{name}: {len(names)} files, at most {MAX_FILES} are searched: give the folder of one series")
            yield from ((str(file), file.read_bytes()) for file in names)
            return
        with zipfile.ZipFile(source if isinstance(source, Path) else io.BytesIO(source)) as archive:
            members = sorted((entry for entry in archive.infolist() if not entry.is_dir()), key=lambda entry: entry.filename)
            members = [entry for entry in members if not _left_behind(entry.filename.split("/"))]
            if sum(entry.file_size for entry in members) > limits.BYTES:
                raise UserError(f"{name}: unpacks to more than {limits.size(limits.BYTES)}")
            yield from ((f"{name}:{entry.filename}", archive.read(entry)) for entry in members)
    except (OSError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError) as error:  # RuntimeError: encrypted
        raise UserError(f"{name}: expected a folder or a zip of DICOM files ({short(error)})") from error


def _left_behind(parts: Sequence[str]) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in parts)


def read_dicom_series(source: Path | bytes, name: str = "") -> Volume:
    """One DICOM series (a folder or a zip, or the bytes of a zip), ordered by position, on the canonical grid. ``name`` is for messages.

    Files that hold no picture (DICOMDIR, reports, a licence) are passed over and counted in the notes.
    """
    where = name or str(source)
    found: list[tuple[str, Any]] = []
    others: list[str] = []
    for name, data in _files(source if isinstance(source, bytes) else Path(source), where):
        if not dicom.is_dicom(data) and not name.lower().endswith(dicom.SUFFIXES):
            others.append(name)
            continue
        one = dicom.parse(name, data)
        if dicom.has_pixels(one) or not dicom.is_dicom(data):
            found.append((name, one))
        else:
            others.append(name)
    series: dict[str, int] = {}
    for name, one in found:
        with dicom.readable(name):
            key = str(one.get("SeriesInstanceUID") or "")
        series[key] = series.get(key, 0) + 1
    if len(series) > 1:
        sizes = ", ".join(str(count) for count in series.values())
        raise UserError(f"{where}: {len(series)} series with {sizes} files; give the folder of one series")
    frames: list[Frame] = []
    for name, one in found:
        dicom.check_picture(name, one)
        frames += _frames(name, one, sum(frame.values.size for frame in frames))
    if others:
        shown = ", ".join(name.replace("\\", "/").rsplit("/", 1)[-1] for name in others[:3])
        others = [f"{len(others)} files without DICOM pixels passed over ({shown}{', ...' if len(others) > 3 else ''})"]
    return stack(where, frames, tuple(others))


def read_dicom_frames(name: str, source: Any) -> Volume:
    """The volume of one multi-frame file that says where each frame lies."""
    return stack(name, _frames(name, source))


def _frames(name: str, source: Any, before: int = 0) -> list[Frame]:
    """Every frame of a file, whose pixels, after ``before`` others, fit `limits.BYTES` once they are decoded."""
    count = dicom.frame_count(name, source)
    with dicom.readable(name):
        pixels = before + count * int(source.get("Rows") or 0) * int(source.get("Columns") or 0)
        if 4 * pixels > limits.BYTES:
            raise UserError(f"{name}: {pixels} voxels, which take more than {limits.size(limits.BYTES)} decoded")
    return [dicom.read_frame(name, source, index) for index in range(count)]


def stack(name: str, frames: Sequence[Frame], notes: tuple[str, ...] = ()) -> Volume:
    """Grey frames of one size, orientation and even steps as a volume on the canonical grid."""
    if len(frames) < 2:
        raise UserError(f"{name}: {len(frames)} DICOM slices, a volume needs two or more")
    first = frames[0]
    places = [_place(frame) for frame in frames]
    for frame, (_, orientation, spacing) in zip(frames, places, strict=True):
        if (
            frame.values.shape != first.values.shape
            or not np.allclose(orientation, places[0][1], atol=1e-4)
            or not np.allclose(spacing, places[0][2], rtol=1e-3)
        ):
            raise UserError(f"{frame.name}: size, spacing or orientation differ from {first.name}: one series at a time")
        if frame.inverted != first.inverted or frame.header.text("Modality") != first.header.text("Modality"):
            raise UserError(f"{frame.name}: its values mean another thing than those of {first.name}: one series at a time")
    orientation, (row_mm, column_mm) = places[0][1], places[0][2]
    along_columns, along_rows = orientation[:3], orientation[3:]  # direction of a growing column index, and of a growing row index
    normal = np.cross(along_columns, along_rows)
    order = sorted(range(len(frames)), key=lambda index: float(np.dot(normal, places[index][0])))
    positions = np.array([places[index][0] for index in order])
    steps = np.diff(positions @ normal)
    if not steps.min() >= 1e-3 or steps.max() - steps.min() > 0.05 * steps.max():
        raise UserError(f"{name}: slice distances from {steps.min():.2f} to {steps.max():.2f} mm: expected one series with even steps")
    lps = np.eye(4)
    lps[:3, 0] = along_columns * column_mm
    lps[:3, 1] = along_rows * row_mm
    lps[:3, 2] = (positions[-1] - positions[0]) / (len(frames) - 1)
    lps[:3, 3] = positions[0]
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ lps  # DICOM counts to the left and posterior, NIfTI to the right and anterior
    if _flat(affine):
        raise UserError(f"{name}: its slices do not span a volume")
    data, affine, stored = _canonical(np.stack([frames[index].values.T for index in order], axis=2), affine)
    if not np.isfinite(data).any():
        raise UserError(f"{name}: every voxel is padding or not a number")
    same = all(frame.voi == first.voi for frame in frames)
    if not same:
        notes = (*notes, "windows of the file not used: they differ from slice to slice")
    told = dict.fromkeys(note for frame in frames for note in frame.notes if not note.startswith("rescaled"))
    modality = "CT" if any(frame.modality == "CT" for frame in frames) else first.modality
    return Volume(data, affine, modality, grey=first.voi if same else None, inverted=first.inverted, notes=(*told, *notes), stored=stored)


def _place(frame: Frame) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Position and orientation in the patient, and spacing (row, column) in mm."""
    if frame.values.ndim != 2:
        raise UserError(f"{frame.name}: a colour image, expected grey slices")
    if frame.presentation is not None:
        raise UserError(f"{frame.name}: a presentation LUT, which is supported for single images only")
    found = []
    for keyword, count in (("ImagePositionPatient", 3), ("ImageOrientationPatient", 6), ("PixelSpacing", 2)):
        try:
            numbers = frame.header.numbers(keyword, count)
        except ValueError as error:
            raise UserError(f"{frame.name}: {short(error)}") from error
        if numbers is None:
            raise UserError(f"{frame.name}: tag {keyword} is missing, so its place in the patient is unknown")
        found.append(np.array(numbers))
    if found[2].min() <= 0:
        raise UserError(f"{frame.name}: PixelSpacing is {found[2][0]:g} x {found[2][1]:g} mm")
    return found[0], found[1], found[2]


def with_labels(volume: Volume, mask: Volume, where: str = "mask") -> Volume:
    """``volume`` with the labels of ``mask``, which must lie on the same grid."""
    if mask.data.shape != volume.data.shape or not np.allclose(mask.affine, volume.affine, atol=0.05):
        raise UserError(
            f"{where}: shape {mask.data.shape} or affine differ from the image's ({volume.data.shape}): they must share one grid"
        )
    if not mask.data.any():
        raise UserError(f"{where}: a mask without labels (all zero)")
    labels = np.rint(mask.data)
    if not np.isfinite(labels).all():
        raise UserError(f"{where}: labels that are not numbers")
    if labels.min() < 0 or labels.max() > 255:
        raise UserError(f"{where}: labels from {labels.min()} to {labels.max()}, expected 0 to 255")
    return replace(volume, labels=labels.astype(np.uint8))


def window_of(volume: Volume, region: Region | None = None) -> tuple[float, float]:
    """Display window (of ``region``), by `greys.grey_range`: what the file itself says is `Volume.grey`."""
    return grey_range(volume.data[tuple(slice(*bounds) for bounds in (region or volume.region))], volume.modality)


def cut(array: np.ndarray, plane: str, index: int, region: Region | None = None) -> np.ndarray:
    """The slice ``index`` of a canonical array in radiological view, rows from the top. ``region`` crops it before anything is drawn."""
    if plane not in AXIS:
        raise UserError(f"plane {plane!r}: expected one of {', '.join(PLANES)}")
    axis = AXIS[plane]
    if not 0 <= index < array.shape[axis]:
        raise UserError(f"slice {index} of the {plane} plane: expected 0 to {array.shape[axis] - 1}")
    if region is not None:
        array = array[tuple(slice(*bounds) if i != axis else slice(None) for i, bounds in enumerate(region))]
    flat = np.take(array, index, axis)  # axes left: (x, y), (x, z) or (y, z), each growing to right, anterior, superior
    return np.ascontiguousarray(flat[::-1, ::-1].swapaxes(0, 1))


def render(
    volume: Volume, plane: str, index: int, grey: Voi | tuple[float, float], pixel_mm: float = 1.5, region: Region | None = None
) -> Image.Image:
    """A slice as an 8-bit image, grey or RGB, with square pixels of ``pixel_mm``."""
    flat = cut(volume.data, plane, index, region)
    if volume.data.ndim == 3:
        known = ~np.isnan(flat) if flat.dtype.kind == "f" else True
        flat = grey(flat) if isinstance(grey, Voi) else window(flat, *grey)
        if volume.inverted:
            flat = (255 - flat) * np.uint8(known)
    return Image.fromarray(flat).resize(_size(volume, plane, flat, pixel_mm), Image.Resampling.BILINEAR)


def placement(volume: Volume, plane: str, shown: tuple[int, int]) -> Placement:
    """Where the pixels of a slice, shown with size ``shown``, lie in the file.

    Of the two stored axes that the slice spans, x counts voxels along the first and y along the second.
    """
    across, down = (axis for axis in range(3) if axis != AXIS[plane])  # axes here; both are drawn against their growing direction
    first, second = (one for one in volume.stored if one[0] != AXIS[plane])
    swapped = first[0] != across
    grows_x, grows_y = (second[1], first[1]) if swapped else (first[1], second[1])
    size = (volume.data.shape[across], volume.data.shape[down])
    return turned(*size, swapped, grows_x > 0, grows_y > 0).after(stretched(shown, size))


def render_labels(volume: Volume, plane: str, index: int, pixel_mm: float = 1.5, region: Region | None = None) -> np.ndarray:
    """The labels of the same slice on the same pixels, uint8 [height, width]."""
    if volume.labels is None:
        raise UserError("the volume has no labels")
    flat = cut(volume.labels, plane, index, region)
    return np.asarray(Image.fromarray(flat).resize(_size(volume, plane, flat, pixel_mm), Image.Resampling.NEAREST))


def _size(volume: Volume, plane: str, flat: np.ndarray, pixel_mm: float) -> tuple[int, int]:
    across, down = [mm for axis, mm in enumerate(volume.spacing) if axis != AXIS[plane]]
    return max(1, round(flat.shape[1] * across / pixel_mm)), max(1, round(flat.shape[0] * down / pixel_mm))
