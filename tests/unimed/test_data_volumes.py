"""Which way is up and which side is right, proven from the masks and from files stored in other orientations; series of DICOM files."""

import io
import zipfile

import nibabel as nib
import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import FileMetaDataset

from unimed.errors import UserError
from unimed.records import volume as volumes
from unimed.records.pixels import read_image_file
from unimed.sample.masks import STRUCTURES
from unimed.sample.slices import ASSETS, vendored_volume


@pytest.fixture(scope="module")
def vendored():
    return {name: vendored_volume(name) for name in ("ct", "mr", "ct_dicom")}


def centre(volume, plane, structure):
    """(column, row) centre of a structure over all slices of a plane, as shares of the image's width and height."""
    value = 1 + STRUCTURES.index(structure)
    seen = [volumes.render_labels(volume, plane, index, 3.0) == value for index in range(volume.data.shape[volumes.AXIS[plane]])]
    rows, columns = np.nonzero(np.sum(seen, axis=0))
    weights = np.sum(seen, axis=0)[rows, columns]
    height, width = seen[0].shape
    return float(np.average(columns, weights=weights) / width), float(np.average(rows, weights=weights) / height)


@pytest.mark.parametrize("name", ["ct", "mr", "ct_dicom"])
@pytest.mark.parametrize("plane", ["axial", "coronal"])
def test_patients_right_is_on_the_images_left(vendored, name, plane):
    spine = centre(vendored[name], plane, "spine")[0]
    assert centre(vendored[name], plane, "liver")[0] < spine - 0.05
    assert centre(vendored[name], plane, "spleen")[0] > spine + 0.1
    assert centre(vendored[name], plane, "right back muscle")[0] < spine < centre(vendored[name], plane, "left back muscle")[0]


@pytest.mark.parametrize("name", ["ct", "mr", "ct_dicom"])
def test_anterior_is_at_the_top_of_axial_and_on_the_left_of_sagittal_images(vendored, name):
    muscle, stomach = (centre(vendored[name], "axial", structure) for structure in ("left back muscle", "stomach"))
    assert stomach[1] < muscle[1] - 0.2
    muscle, stomach = (centre(vendored[name], "sagittal", structure) for structure in ("left back muscle", "stomach"))
    assert stomach[0] < muscle[0] - 0.2


@pytest.mark.parametrize(
    ("name", "above", "below"), [("ct", "right lung", "right kidney"), ("ct", "spleen", "small bowel"), ("mr", "spleen", "left kidney")]
)
@pytest.mark.parametrize("plane", ["coronal", "sagittal"])
def test_superior_is_at_the_top(vendored, name, above, below, plane):
    assert centre(vendored[name], plane, above)[1] < centre(vendored[name], plane, below)[1] - 0.1


def test_superior_is_at_the_top_of_the_dicom_series(vendored):
    volume = vendored["ct_dicom"]
    assert volume.affine[2, 2] > 0
    assert volume.affine[2, 3] == pytest.approx(-804.5)  # the lowest ImagePositionPatient is the first slice
    column = volumes.cut(np.broadcast_to(np.arange(volume.data.shape[2]), volume.data.shape), "coronal", 0)[:, 0]
    assert column[0] == volume.data.shape[2] - 1


@pytest.mark.parametrize(
    ("name", "structure", "low", "high"),
    [("ct", "liver", 25, 75), ("ct", "right lung", -900, -500), ("ct_dicom", "liver", 60, 150), ("ct_dicom", "spine", 100, 400)],
)
def test_masks_lie_on_the_organs(vendored, name, structure, low, high):
    volume = vendored[name]
    assert low < volume.data[volume.labels == 1 + STRUCTURES.index(structure)].mean() < high


def phantom():
    """A volume with one value in each octant corner and its RAS affine."""
    data = np.zeros((12, 10, 8), np.int16)
    data[9:, :3, 5:] = 100  # right, posterior, superior
    data[:2, 8:, :2] = 200  # left, anterior, inferior
    return data, np.array([[2.0, 0, 0, -30], [0, 2.5, 0, 7], [0, 0, 3.0, 90], [0, 0, 0, 1]])


@pytest.mark.parametrize("codes", ["RAS", "LPS", "LAS", "PIR", "SAL", "IPL", "ARI"])
def test_any_stored_orientation_gives_the_same_view(tmp_path, codes):
    data, affine = phantom()
    stored = nib.Nifti1Image(data, affine).as_reoriented(
        nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(codes))
    )
    assert "".join(nib.aff2axcodes(stored.affine)) == codes
    nib.save(stored, tmp_path / "v.nii.gz")
    volume = volumes.read_nifti(tmp_path / "v.nii.gz")
    np.testing.assert_array_equal(volume.data, data)
    np.testing.assert_allclose(volume.affine, affine, atol=1e-5)
    axial = volumes.cut(volume.data, "axial", 7)
    assert axial.shape == (10, 12)
    assert axial[-1, 0] == 100  # posterior right: at the bottom, on the image's left
    assert volumes.cut(volume.data, "axial", 0)[0, -1] == 200  # anterior left: at the top, on the image's right
    assert volumes.cut(volume.data, "coronal", 0)[0, 0] == 100  # superior right
    assert volumes.cut(volume.data, "sagittal", 11)[0, -1] == 100  # superior posterior: anterior is on the left


def dicom_slice(pixels, position, orientation, spacing, number, **tags):
    made = pydicom.Dataset()
    made.SOPClassUID, made.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.2", f"2.25.{1000 + number}"
    made.Modality, made.InstanceNumber = "CT", number
    made.ImagePositionPatient, made.ImageOrientationPatient = [float(v) for v in position], [float(v) for v in orientation]
    made.PixelSpacing = [float(v) for v in spacing]
    made.SamplesPerPixel, made.PhotometricInterpretation = 1, "MONOCHROME2"
    made.Rows, made.Columns = pixels.shape
    made.BitsAllocated, made.BitsStored, made.HighBit, made.PixelRepresentation = 16, 16, 15, 1
    made.RescaleSlope, made.RescaleIntercept = 1, -10
    made.PixelData = np.ascontiguousarray(pixels + 10, "<i2").tobytes()
    for keyword, value in tags.items():
        setattr(made, keyword, value)
    made.file_meta = FileMetaDataset()
    made.file_meta.MediaStorageSOPClassUID, made.file_meta.MediaStorageSOPInstanceUID = made.SOPClassUID, made.SOPInstanceUID
    made.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    out = io.BytesIO()
    made.save_as(out, enforce_file_format=True)
    return out.getvalue()


# Columns and rows of the stored images in patient axes (index and sign in R, A, S): axial, axial mirrored, coronal, sagittal, odd.
@pytest.mark.parametrize(
    ("across", "down"), [((0, -1), (1, -1)), ((0, 1), (1, -1)), ((0, -1), (2, -1)), ((1, -1), (2, -1)), ((2, 1), (0, 1))]
)
def test_dicom_orientation_tags_decide(tmp_path, across, down):
    data, affine = phantom()
    through = ({0, 1, 2} - {across[0], down[0]}).pop()
    spacing = np.diag(affine)[:3]
    to_lps = np.array([-1.0, -1.0, 1.0])
    order = np.random.default_rng(0).permutation(data.shape[through])
    for number, k in enumerate(order):
        flat = np.moveaxis(data, (down[0], across[0], through), (0, 1, 2))[:, :, k]
        flat = flat[:: down[1], :: across[1]]
        corner = np.zeros(3)
        corner[through] = k
        for axis, sign in (across, down):
            corner[axis] = data.shape[axis] - 1 if sign < 0 else 0
        position = (affine @ [*corner, 1])[:3] * to_lps
        orientation = np.concatenate([np.eye(3)[axis] * sign * to_lps for axis, sign in (across, down)])
        (tmp_path / f"{number}.dcm").write_bytes(dicom_slice(flat, position, orientation, (spacing[down[0]], spacing[across[0]]), number))
    volume = volumes.read_dicom_series(tmp_path)
    np.testing.assert_array_equal(volume.data, data)
    np.testing.assert_allclose(volume.affine, affine, atol=1e-4)
    assert volume.modality == "CT"


def test_the_zip_of_the_dicom_series_reads_like_a_folder(tmp_path):
    with zipfile.ZipFile(ASSETS / "ct_dicom.zip") as packed:
        packed.extractall(tmp_path)
    folder, packed_volume = volumes.read_dicom_series(tmp_path), volumes.read_dicom_series(ASSETS / "ct_dicom.zip")
    np.testing.assert_array_equal(folder.data, packed_volume.data)
    np.testing.assert_array_equal(folder.affine, packed_volume.affine)


def test_windows():
    np.testing.assert_array_equal(volumes.window(np.array([-500, -160, 40, 240, 999]), -160, 240), [0, 0, 128, 255, 255])
    data, affine = phantom()
    mr = volumes.Volume(data.astype(np.float32), affine, "MR")
    assert volumes.window_of(mr) == (0.0, float(np.percentile(data, 99.5)))
    assert volumes.window_of(mr, ((0, 2), (8, 10), (0, 2))) == (0.0, 200.0)
    assert volumes.window_of(volumes.Volume(data - 1000, affine)) == volumes.CT_WINDOW


def test_rendered_pixels_are_square():
    data, affine = phantom()
    volume = volumes.Volume(data, affine, "MR", labels=(data > 0).astype(np.uint8))
    for plane, size in (("axial", (24, 25)), ("coronal", (24, 24)), ("sagittal", (25, 24))):
        assert volumes.render(volume, plane, 1, (0, 200), 1.0).size == size
        assert volumes.render_labels(volume, plane, 1, 1.0).shape == size[::-1]


def test_a_region_is_cut_before_anything_is_drawn():
    data, affine = phantom()
    region = ((2, 10), (1, 9), (0, 5))
    other = data.copy()
    other[:2], other[10:], other[:, :1], other[:, 9:], other[:, :, 5:] = 7, 7, 7, 7, 7
    for plane in volumes.PLANES:
        one, two = (volumes.render(volumes.Volume(v, affine, "MR"), plane, 4, (0, 200), 1.0, region) for v in (data, other))
        assert one.tobytes() == two.tobytes()


def test_masks_must_fit_and_hold_something():
    data, affine = phantom()
    volume = volumes.Volume(data, affine, "CT")
    with pytest.raises(UserError, match="without labels"):
        volumes.with_labels(volume, volumes.Volume(np.zeros_like(data), affine))
    with pytest.raises(UserError, match="one grid"):
        volumes.with_labels(volume, volumes.Volume(data[1:], affine))
    with pytest.raises(UserError, match="one grid"):
        volumes.with_labels(volume, volumes.Volume(data, affine + np.eye(4)))
    with pytest.raises(UserError, match="0 to 255"):
        volumes.with_labels(volume, volumes.Volume(data * 3, affine))


# NIfTI: what the header says
def ramp():
    return np.arange(4 * 5 * 6, dtype=np.float32).reshape(4, 5, 6)


def usual(k, **tags):
    return dicom_slice(np.full((4, 5), k), (0, 0, 2.0 * k), (1, 0, 0, 0, 1, 0), (1, 1), k, **tags)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "0 DICOM slices"),
        ([usual(0)], "1 DICOM slices"),
        ([usual(0), b"no dicom"], "not a readable DICOM"),
        ([usual(0), usual(1), usual(3)], "even steps"),
        ([usual(0), usual(0)], "even steps"),
        ([usual(0), usual(1, ImageOrientationPatient=[0.0, 1, 0, 1, 0, 0])], "one series"),
        ([usual(0), dicom_slice(np.zeros((3, 3)), (0, 0, 2), (1, 0, 0, 0, 1, 0), (1, 1), 1)], "one series"),
    ],
)
def test_bad_dicom_series(tmp_path, files, message):
    for number, content in enumerate(files):
        (tmp_path / f"{number}.dcm").write_bytes(content)
    with pytest.raises(UserError, match=message):
        volumes.read_dicom_series(tmp_path)


def test_dicom_without_position(tmp_path):
    for k in range(2):
        header = pydicom.dcmread(io.BytesIO(usual(k)))
        del header.ImagePositionPatient
        header.save_as(tmp_path / f"{k}.dcm")
    with pytest.raises(UserError, match="ImagePositionPatient is missing"):
        volumes.read_dicom_series(tmp_path)


def test_read_image_file(tmp_path, vendored):
    Image.new("L", (7, 5), 200).save(tmp_path / "a.png")
    assert read_image_file(tmp_path / "a.png").size == (7, 5)
    assert read_image_file(tmp_path / "a.png").mode == "RGB"
    with zipfile.ZipFile(ASSETS / "ct_dicom.zip") as packed:
        (tmp_path / "one.dcm").write_bytes(packed.read("slice_00.dcm"))
    one = read_image_file(tmp_path / "one.dcm")
    assert (one.mode, one.size) == ("RGB", (512, 512))
    volume = vendored["ct"]
    by_hand = volumes.render(volume, "coronal", 40, volumes.CT_WINDOW)
    assert read_image_file(ASSETS / "ct.nii.gz", "coronal", 40).convert("L").tobytes() == by_hand.tobytes()
    assert read_image_file(ASSETS / "ct_dicom.zip", "axial").size == (333, 333)


def test_dicom_greys(tmp_path):
    ramp = np.arange(20).reshape(4, 5) * 30
    for name, tags in (
        ("ct", {}),
        ("xray", {"Modality": "DX"}),
        ("inverted", {"Modality": "DX", "PhotometricInterpretation": "MONOCHROME1"}),
    ):
        (tmp_path / f"{name}.dcm").write_bytes(dicom_slice(ramp, (0, 0, 0), (1, 0, 0, 0, 1, 0), (1, 1), 0, **tags))
    ct, xray, inverted = (
        np.asarray(read_image_file(tmp_path / f"{name}.dcm").convert("L")).astype(int) for name in ("ct", "xray", "inverted")
    )
    assert ct[0, 0] == 102  # 0 HU in -160..240
    assert xray[0, 0] == 0
    assert xray[-1, -1] == 255
    np.testing.assert_array_equal(xray, 255 - inverted)


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.dcm", "a.nii.gz"])
def test_corrupt_and_missing_images(tmp_path, name):
    with pytest.raises(UserError, match="no such image"):
        read_image_file(tmp_path / name)
    (tmp_path / name).write_bytes(b"\xff\xd8\xff\xe0 cut off")
    with pytest.raises(UserError, match="not a readable"):
        read_image_file(tmp_path / name)


def test_a_truncated_jpeg_is_an_error(tmp_path):
    Image.effect_noise((64, 64), 50).save(tmp_path / "a.jpg")
    (tmp_path / "a.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:900])
    with pytest.raises(UserError, match="not a readable image"):
        read_image_file(tmp_path / "a.jpg")


def test_unknown_plane_and_slice():
    with pytest.raises(UserError, match="axial, coronal, sagittal"):
        read_image_file(ASSETS / "ct.nii.gz", "transverse")
    with pytest.raises(UserError, match="expected 0 to 29"):
        read_image_file(ASSETS / "ct.nii.gz", "axial", 30)
