"""What opening an image does travels with it: a box of the shown image lies where it does in the file."""

import nibabel as nib
import numpy as np
import pytest
from dicom_samples import dicom_file
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from unimed.records import image as records_image
from unimed.records.box import AS_STORED, FORMATS, Placement, stretched, turned
from unimed.records.pixels import Opened, open_image, to_rgb
from unimed.records.record import ImageRef

BOX = (2, 1, 7, 4)  # of a bright block in the file


def block(shape, box=BOX):
    values = np.zeros(shape, np.uint16)
    values[box[1] : box[3], box[0] : box[2]] = 1000
    return values


def seen(opened: Opened):
    """The box of what is bright on the shown image."""
    rows, columns = np.nonzero(np.asarray(opened.rgb)[..., 0] > 127)
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


def check(opened: Opened, box=BOX, within=0.0):
    """The box of the file lies on the bright block of the shown image, and that one back in the file."""
    assert np.abs(np.subtract(opened.to_original.inverse(box), seen(opened))).max() <= within
    assert np.abs(np.subtract(opened.to_original(seen(opened)), box)).max() <= within
    assert opened.to_original(opened.to_original.inverse(box)) == pytest.approx(box, abs=1e-5)


@pytest.mark.parametrize("suffix", [".png", ".tif", ".jpg"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientations(tmp_path, orientation, suffix):
    tags = Image.Exif()
    tags[0x0112] = orientation
    path = tmp_path / f"a{suffix}"
    grown = tuple(8 * value for value in BOX)  # whole blocks of a JPEG
    Image.fromarray((block((80, 96), grown) > 0).astype(np.uint8) * 255).save(path, exif=tags)
    check(open_image(path), grown)
    if orientation == 1:
        assert open_image(path).to_original == AS_STORED


DIRECTIONS = [
    (sign_across, sign_down, axes) for sign_across in (1, -1) for sign_down in (1, -1) for axes in ((0, 1), (1, 0), (0, 2), (1, 2), (2, 1))
]


@pytest.mark.parametrize(("across", "down", "axes"), DIRECTIONS)
def test_dicom_images_turned_to_the_radiological_view(tmp_path, across, down, axes):
    directions = np.zeros((2, 3))
    directions[0, axes[0]], directions[1, axes[1]] = across, down
    path = tmp_path / "IM1"
    path.write_bytes(dicom_file(block((10, 12)), ImageOrientationPatient=[float(value) for value in directions.ravel()]))
    check(open_image(path))
    path.write_bytes(dicom_file(block((10, 12)), ImageOrientationPatient=[*map(float, directions.ravel())], PixelSpacing=[2, 1]))
    check(open_image(path), within=0.5)


@pytest.mark.parametrize("codes", ["RAS", "LPS", "LAS", "ASR", "SPL", "RSP"])
@pytest.mark.parametrize("plane", ["axial", "coronal", "sagittal"])
def test_slices_of_volumes_in_every_storage_order(tmp_path, codes, plane):
    """x counts voxels along the first, y along the second stored axis of the slice."""
    to_stored = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(codes))
    axis = {"sagittal": 0, "coronal": 1, "axial": 2}[plane]
    stored_axes = [int(one) for one in nib.orientations.axcodes2ornt(codes)[:, 0]]
    inplane = [place for place, one in enumerate(stored_axes) if one != axis]
    stored = np.zeros((14, 12, 10), np.float32)
    where = [slice(None)] * 3
    where[inplane[0]], where[inplane[1]] = slice(BOX[0], BOX[2]), slice(BOX[1], BOX[3])
    stored[tuple(where)] = 100
    plain = nib.Nifti1Image(np.zeros([stored.shape[stored_axes.index(one)] for one in range(3)], np.float32), np.diag([1.5, 1.5, 1.5, 1]))
    affine = plain.as_reoriented(to_stored).affine
    nib.save(nib.Nifti1Image(stored, affine), tmp_path / "v.nii.gz")
    assert "".join(nib.aff2axcodes(affine)) == codes
    opened = open_image(tmp_path / "v.nii.gz", plane=plane, index=4, grey=(0, 100))
    check(opened)


def test_a_dicom_series_counts_columns_and_rows_of_its_files(tmp_path):
    for k in range(4):
        place = {"ImagePositionPatient": [0, 0, 2.0 * k], "ImageOrientationPatient": [-1, 0, 0, 0, 1, 0], "PixelSpacing": [1.5, 1.5]}
        (tmp_path / f"{k}.dcm").write_bytes(dicom_file(block((10, 12)), Modality="MR", SeriesInstanceUID="2.25.3", **place))
    check(records_image.open_image(ImageRef(path=tmp_path.name, plane="axial", slice=2, window=(0, 1000)), tmp_path.parent))


def test_a_volume_is_read_once_for_its_slices(tmp_path, monkeypatch):
    from unimed.records import volume as volumes

    nib.save(nib.Nifti1Image(np.random.default_rng(0).random((6, 6, 6), np.float32), np.eye(4)), tmp_path / "v.nii")
    read = []
    monkeypatch.setattr(volumes, "read_nifti", lambda path, real=volumes.read_nifti: read.append(path) or real(path))
    shown = [records_image.open_image(ImageRef(path="v.nii", slice=k), tmp_path) for k in range(6)]
    assert len(read) == 1
    assert shown[2].notes[0] == "axial slice 2 of 0 to 5"
    nib.save(nib.Nifti1Image(np.zeros((6, 6, 6), np.float32), np.eye(4)), tmp_path / "v.nii")
    assert not np.asarray(records_image.open_image(ImageRef(path="v.nii", slice=2), tmp_path).rgb).any()


def test_the_frame_and_window_of_a_reference(tmp_path):
    frames = np.stack([np.full((4, 4), value, np.uint8) for value in (10, 60, 110)])
    (tmp_path / "m.dcm").write_bytes(dicom_file(frames, NumberOfFrames=3))
    opened = records_image.open_image(ImageRef(path="set:m.dcm", frame=1, window=(10, 110)), tmp_path / "x", {"set": ".."})
    assert np.asarray(opened.rgb)[0, 0, 0] == 128
    assert "frame 1 of 0 to 2" in opened.notes


SIDES = st.floats(1, 4000)


@settings(deadline=None)
@given(SIDES, SIDES, SIDES, SIDES, st.booleans(), st.booleans(), st.booleans(), st.tuples(*[st.floats(0, 1)] * 4))
def test_placements_go_there_and_back(width, height, wide, high, swapped, left_right, top_bottom, shares):
    placement = turned(width, height, swapped, left_right, top_bottom).after(stretched((wide, high), (width, height)))
    x, y = sorted((shares[0] * wide, shares[2] * wide)), sorted((shares[1] * high, shares[3] * high))
    box = (x[0], y[0], x[1], y[1])
    assert placement.inverse(placement(box)) == pytest.approx(box, abs=1e-2)
    whole = placement((0, 0, wide, high))
    assert whole == pytest.approx((0, 0, height, width) if swapped else (0, 0, width, height), abs=1e-4)


def test_a_format_writes_and_reads_boxes():
    bins = FORMATS["bins100"]
    assert bins.write((10, 5, 20, 20), (40, 20)) == "{<25><25><50><100>}"
    assert bins.read("{<25><25><50><100>} and more") == (25, 25, 50, 100)
    assert Placement()(BOX) == BOX
    assert to_rgb(Image.new("RGB", (3, 2))).to_original == AS_STORED
