"""CT and MR volumes from NIfTI and DICOM, cut into slices as a radiologist reads them.

Every volume is first brought to the canonical RAS grid by its own affine (NIfTI) or by ImageOrientationPatient and ImagePositionPatient
(DICOM), so index x grows to the patient's right, y to anterior, z to superior. A slice is then drawn with the patient's right on the
image's left (axial, coronal), anterior on the left (sagittal), and anterior (axial) or superior (coronal, sagittal) at the top.
Oblique volumes are shown along the nearest axes.
"""

import gzip
import io
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from unimed.errors import UserError

PLANES = ("axial", "coronal", "sagittal")
AXIS = {"axial": 2, "coronal": 1, "sagittal": 0}
CT_WINDOW = (-160.0, 240.0)  # HU, soft tissue
MR_PERCENTILE = 99.5

Region = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]  # half-open index ranges in x, y, z


@dataclass(frozen=True)
class Volume:
    """A volume on the canonical RAS grid.

    data: [X, Y, Z]; affine: voxel index to mm (RAS); labels: uint8 [X, Y, Z] or None; modality: "CT", "MR" or "" when unknown.
    """

    data: np.ndarray
    affine: np.ndarray
    modality: str = ""
    labels: np.ndarray | None = None

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Voxel size in mm along x, y, z."""
        x, y, z = np.sqrt((self.affine[:3, :3] ** 2).sum(0))
        return float(x), float(y), float(z)

    @property
    def region(self) -> Region:
        """The whole volume as index ranges."""
        x, y, z = self.data.shape
        return (0, x), (0, y), (0, z)


def _canonical(data: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    import nibabel as nib

    image = nib.as_closest_canonical(nib.Nifti1Image(data, affine))
    return np.ascontiguousarray(np.asarray(image.dataobj)), np.asarray(image.affine)


def read_nifti(path: Path, modality: str = "") -> Volume:
    """A 3-D NIfTI file (.nii, .nii.gz) on the canonical grid."""
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: not readable ({error.strerror})") from None
    return nifti_from_bytes(str(path), data, modality)


def nifti_from_bytes(name: str, data: bytes, modality: str = "") -> Volume:
    """A NIfTI file that is already in memory, for example a member of an archive; ``name`` is for messages."""
    import nibabel as nib

    try:
        image = nib.Nifti1Image.from_bytes(gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data)
        voxels, affine = np.asarray(image.dataobj), np.asarray(image.affine)
    except Exception as error:  # nibabel lets errors of gzip, zlib and its own parsers through
        raise UserError(f"{name}: not a readable NIfTI file ({error})") from error
    if voxels.ndim == 4 and voxels.shape[3] == 1:
        voxels = voxels[..., 0]
    if voxels.ndim != 3 or 0 in voxels.shape:
        raise UserError(f"{name}: shape {voxels.shape}, expected a volume of three axes")
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise UserError(f"{name}: its affine cannot be inverted, so left and right are unknown")
    voxels, affine = _canonical(voxels, affine)
    return Volume(voxels, affine, modality)


def _dicom_files(path: Path) -> Iterable[tuple[str, bytes]]:
    if path.is_dir():
        for file in sorted(path.iterdir()):
            if file.is_file() and not file.name.startswith("."):
                yield str(file), file.read_bytes()
        return
    try:
        with zipfile.ZipFile(path) as archive:
            for name in sorted(archive.namelist()):
                if not name.endswith("/"):
                    yield f"{path}:{name}", archive.read(name)
    except (OSError, zipfile.BadZipFile, zlib.error, RuntimeError) as error:  # RuntimeError: an encrypted member
        raise UserError(f"{path}: expected a folder or a zip of DICOM files ({error})") from error


def read_dicom_slice(name: str, data: bytes) -> tuple[Any, np.ndarray]:
    """Header and rescaled pixels (float32, HU for CT) of one single-frame grey DICOM file."""
    import pydicom

    try:
        slice_ = pydicom.dcmread(io.BytesIO(data))
        pixels = slice_.pixel_array
    except Exception as error:  # pydicom's decoders raise many kinds
        raise UserError(f"{name}: not a readable DICOM image ({error})") from error
    if pixels.ndim != 2:
        raise UserError(f"{name}: pixel array of shape {pixels.shape}, expected one grey image")
    scaled = pixels * np.float32(slice_.get("RescaleSlope", 1)) + np.float32(slice_.get("RescaleIntercept", 0))
    return slice_, scaled


def read_dicom_series(path: Path) -> Volume:
    """One DICOM series (a folder or a zip of single-frame slices), ordered by position, on the canonical grid."""
    path = Path(path)
    slices = [(name, *read_dicom_slice(name, data)) for name, data in _dicom_files(path)]
    if len(slices) < 2:
        raise UserError(f"{path}: {len(slices)} DICOM slices, a volume needs two or more")
    first = slices[0][1]
    for name, header, pixels in slices:
        for keyword in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"):
            if keyword not in header:
                raise UserError(f"{name}: tag {keyword} is missing, so its place in the patient is unknown")
        if pixels.shape != slices[0][2].shape or not np.allclose(header.ImageOrientationPatient, first.ImageOrientationPatient, atol=1e-4):
            raise UserError(f"{name}: size or orientation differ from {slices[0][0]}: one series at a time")
    orientation = np.array(first.ImageOrientationPatient, float)
    along_columns, along_rows = orientation[:3], orientation[3:]  # direction of a growing column index, and of a growing row index
    normal = np.cross(along_columns, along_rows)
    slices.sort(key=lambda item: float(np.dot(normal, np.array(item[1].ImagePositionPatient, float))))
    positions = np.array([item[1].ImagePositionPatient for item in slices], float)
    steps = np.diff(positions @ normal)
    if steps.min() < 1e-3 or steps.max() - steps.min() > 0.05 * steps.max():
        raise UserError(f"{path}: slice distances from {steps.min():.2f} to {steps.max():.2f} mm: expected one series with even steps")
    row_mm, column_mm = (float(v) for v in first.PixelSpacing)
    lps = np.eye(4)
    lps[:3, 0] = along_columns * column_mm
    lps[:3, 1] = along_rows * row_mm
    lps[:3, 2] = (positions[-1] - positions[0]) / (len(slices) - 1)
    lps[:3, 3] = positions[0]
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ lps  # DICOM counts to the left and posterior, NIfTI to the right and anterior
    data = np.stack([pixels.T for _, _, pixels in slices], axis=2)
    data, affine = _canonical(data, affine)
    return Volume(data, affine, str(first.get("Modality", "")))


def with_labels(volume: Volume, mask: Volume, where: str = "mask") -> Volume:
    """``volume`` with the labels of ``mask``, which must lie on the same grid."""
    if mask.data.shape != volume.data.shape or not np.allclose(mask.affine, volume.affine, atol=0.05):
        raise UserError(
            f"{where}: shape {mask.data.shape} or affine differ from the image's ({volume.data.shape}): they must share one grid"
        )
    if not mask.data.any():
        raise UserError(f"{where}: a mask without labels (all zero)")
    labels = np.rint(mask.data)
    if labels.min() < 0 or labels.max() > 255:
        raise UserError(f"{where}: labels from {labels.min()} to {labels.max()}, expected 0 to 255")
    return replace(volume, labels=labels.astype(np.uint8))


def window(data: np.ndarray, low: float, high: float) -> np.ndarray:
    """Grey values uint8: low and below 0, high and above 255."""
    scaled = (data.astype(np.float32) - low) / max(high - low, 1e-6)
    return np.rint(np.clip(scaled, 0, 1) * 255).astype(np.uint8)


def window_of(volume: Volume, region: Region | None = None) -> tuple[float, float]:
    """Display window: soft tissue for CT, else 0 to the 99.5th percentile (of ``region``). Unknown with air at -500 or less is CT."""
    inside = volume.data[tuple(slice(*bounds) for bounds in (region or volume.region))]
    if volume.modality == "CT" or (not volume.modality and float(inside.min()) <= -500):
        return CT_WINDOW
    return 0.0, float(np.percentile(inside, MR_PERCENTILE))


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
    return np.ascontiguousarray(flat[::-1, ::-1].T)


def render(
    volume: Volume, plane: str, index: int, grey: tuple[float, float], pixel_mm: float = 1.5, region: Region | None = None
) -> Image.Image:
    """A slice as an 8-bit grey image with square pixels of ``pixel_mm``."""
    flat = window(cut(volume.data, plane, index, region), *grey)
    return Image.fromarray(flat).resize(_size(volume, plane, flat, pixel_mm), Image.Resampling.BILINEAR)


def render_labels(volume: Volume, plane: str, index: int, pixel_mm: float = 1.5, region: Region | None = None) -> np.ndarray:
    """The labels of the same slice on the same pixels, uint8 [height, width]."""
    if volume.labels is None:
        raise UserError("the volume has no labels")
    flat = cut(volume.labels, plane, index, region)
    return np.asarray(Image.fromarray(flat).resize(_size(volume, plane, flat, pixel_mm), Image.Resampling.NEAREST))


def _size(volume: Volume, plane: str, flat: np.ndarray, pixel_mm: float) -> tuple[int, int]:
    across, down = [mm for axis, mm in enumerate(volume.spacing) if axis != AXIS[plane]]
    return max(1, round(flat.shape[1] * across / pixel_mm)), max(1, round(flat.shape[0] * down / pixel_mm))
