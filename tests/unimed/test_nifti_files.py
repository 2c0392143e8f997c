"""NIfTI: bad files, headers, units, colours, pairs of files, mutated headers."""

import gzip

import nibabel as nib
import numpy as np
import pytest
from dicom_samples import attempt

from tests.unimed.test_data_volumes import ramp
from unimed.errors import UserError
from unimed.records import limits
from unimed.records import volume as volumes
from unimed.records.pixels import open_image, read_image_file


# Bad input: one line each.
def nifti(data, affine=None):
    return gzip.compress(nib.Nifti1Image(data, np.eye(4) if affine is None else affine).to_bytes())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not a volume", "not a readable NIfTI"),
        (nifti(np.zeros((4, 4, 4), np.uint8))[:-20], "not a readable NIfTI"),
        (nifti(np.zeros((4, 4), np.uint8)), "three axes"),
        (nifti(np.zeros((4, 4, 4, 2), np.uint8)), "three axes"),
    ],
)
def test_bad_nifti(tmp_path, content, message):
    (tmp_path / "v.nii.gz").write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        volumes.read_nifti(tmp_path / "v.nii.gz")
    assert "\n" not in str(caught.value)


def test_missing_nifti(tmp_path):
    with pytest.raises(UserError, match=r"v\.nii"):
        volumes.read_nifti(tmp_path / "v.nii")


def test_affine_that_cannot_be_inverted():
    image = nib.Nifti1Image(np.zeros((3, 3, 3), np.uint8), None)
    image.header["sform_code"] = 1
    for row in ("srow_x", "srow_y", "srow_z"):
        image.header[row] = [0, 0, 0, 0]
    with pytest.raises(UserError, match="cannot be inverted"):
        volumes.nifti_from_bytes("v", image.to_bytes())


@pytest.mark.parametrize(("unit", "side"), [("meter", 0.0009), ("mm", 0.0005), ("micron", 3.0), ("unknown", 1.0)])
def test_small_voxels_are_voxels_in_every_unit(unit, side):
    image = nib.Nifti1Image(ramp(), np.diag([side] * 3 + [1]))
    image.header.set_xyzt_units(unit)
    scale = {"meter": 1000, "micron": 0.001}.get(unit, 1)
    assert np.allclose(volumes.nifti_from_bytes("v", image.to_bytes()).spacing, side * scale)


@pytest.mark.parametrize("kind", ["int64", "uint64"])
def test_integers_of_64_bits_are_read(kind):
    found = volumes.nifti_from_bytes("v", nib.Nifti1Image(ramp().astype(kind), np.eye(4), dtype=kind).to_bytes())
    assert found.data.dtype == kind
    assert np.array_equal(found.data, ramp())


def test_an_unknown_unit_is_none(tmp_path):
    image = header_of_ramp(xyzt_units=4)
    assert volumes.nifti_from_bytes("v", image.to_bytes()).spacing == (1, 1, 1)


def header_of_ramp(**fields):
    image = nib.Nifti1Image(ramp(), np.eye(4))
    for name, value in fields.items():
        image.header[name] = value
    return image


def test_voxels_that_are_not_numbers_are_black_and_leave_the_window_alone(tmp_path):
    """One NaN voxel made the whole volume black."""
    data = ramp()
    data[0, 0, 0], data[1, 0, 0], data[2, 0, 0] = np.nan, np.inf, -np.inf
    nib.save(nib.Nifti1Image(data, np.eye(4)), tmp_path / "v.nii.gz")
    opened = open_image(tmp_path / "v.nii.gz", index=0, pixel_mm=1)
    assert "3 voxels that are not numbers drawn black" in opened.notes
    seen = np.asarray(opened.rgb)[::-1, ::-1, 0].T  # x, y
    assert (seen[:3, 0] == 0).all()
    np.testing.assert_array_equal(seen[3:], np.rint(ramp()[3:, :, 0] / np.percentile(np.delete(ramp(), [0, 30, 60]), 99.5) * 255))
    with pytest.raises(UserError, match="no voxel holds a number"):
        volumes.nifti_from_bytes("v", nib.Nifti1Image(np.full((3, 3, 3), np.nan, np.float32), np.eye(4)).to_bytes())


def test_window_of_the_header(tmp_path):
    nib.save(header_of_ramp(cal_min=20, cal_max=60), tmp_path / "v.nii")
    opened = open_image(tmp_path / "v.nii", index=3, pixel_mm=1)
    expected = volumes.window(volumes.cut(ramp(), "axial", 3), 20, 60)
    np.testing.assert_array_equal(np.asarray(opened.rgb)[..., 0], expected)
    assert "window 20 to 60 of the file (cal_min, cal_max)" in opened.notes
    nib.save(header_of_ramp(cal_min=2000, cal_max=6000), tmp_path / "v.nii")  # would show black
    assert any("not used" in note for note in open_image(tmp_path / "v.nii").notes)
    assert len(np.unique(np.asarray(read_image_file(tmp_path / "v.nii", pixel_mm=1)))) > 10


@pytest.mark.parametrize(("unit", "factor"), [(1, 1000), (2, 1), (3, 0.001), (0, 1)])
def test_units_of_the_header(unit, factor):
    volume = volumes.nifti_from_bytes("v", header_of_ramp(xyzt_units=unit).to_bytes())
    np.testing.assert_allclose(volume.spacing, [factor] * 3)


def test_very_small_and_very_large_voxels_are_still_seen(tmp_path):
    data = np.random.default_rng(0).integers(0, 99, (60, 50, 40)).astype(np.int16)
    for size, expected in ((0.02, (60, 50)), (400, (1024, 853))):
        nib.save(nib.Nifti1Image(data, np.diag([size] * 3 + [1])), tmp_path / "v.nii")
        opened = open_image(tmp_path / "v.nii")
        assert opened.rgb.size == expected
        assert any(note.startswith("pixels of") for note in opened.notes)


@pytest.mark.parametrize("dtype", ["RGB", "RGBA"])
def test_colour_volumes(tmp_path, dtype):
    values = np.random.default_rng(0).integers(0, 256, (4, 5, 6, len(dtype)), dtype=np.uint8)
    values[..., 3:] = 255
    values[0, 0, 0, 3:] = 0
    data = values.view([(channel, np.uint8) for channel in dtype])[..., 0]
    nib.save(nib.Nifti1Image(data, np.diag([-1, 1, 1, 1])), tmp_path / "v.nii")
    seen = np.asarray(read_image_file(tmp_path / "v.nii", index=0, pixel_mm=1))
    expected = values[::-1, :, 0, :3].copy()
    if dtype == "RGBA":
        expected[-1, 0] = 0
    np.testing.assert_array_equal(seen, expected[::-1, ::-1].swapaxes(0, 1))
    with pytest.raises(UserError, match="takes no window"):
        read_image_file(tmp_path / "v.nii", grey=(0, 1))


@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize("given", [".hdr", ".img"])
def test_a_pair_of_files(tmp_path, packed, given):
    nib.save(nib.Nifti1Pair(ramp(), np.eye(4)), tmp_path / f"v.img{packed}")
    np.testing.assert_array_equal(volumes.read_nifti(tmp_path / f"v{given}{packed}").data, ramp())
    np.testing.assert_array_equal(open_image(tmp_path / f"v{given}{packed}").rgb.size, (3, 3))
    (tmp_path / f"v{'.img' if given == '.hdr' else '.hdr'}{packed}").unlink()
    with pytest.raises(UserError, match="the other half"):
        volumes.read_nifti(tmp_path / f"v{given}{packed}")


def test_nifti_2_trailing_axes_scaling_and_unknown_orientation():
    np.testing.assert_array_equal(volumes.nifti_from_bytes("v", nib.Nifti2Image(ramp(), np.eye(4)).to_bytes()).data, ramp())
    long = nib.Nifti1Image(ramp()[..., None, None], np.eye(4)).to_bytes()
    np.testing.assert_array_equal(volumes.nifti_from_bytes("v", long).data, ramp())
    image = nib.Nifti1Image(ramp().astype(np.int16), np.eye(4))
    for slope, intercept, expected in ((0, 5, ramp()), (np.nan, np.nan, ramp()), (2, 5, ramp() * 2 + 5)):
        data = bytearray(image.to_bytes())
        data[112:120] = np.array([slope, intercept], "<f4").tobytes()
        np.testing.assert_allclose(volumes.nifti_from_bytes("v", bytes(data)).data, expected)
    nowhere = nib.Nifti1Image(ramp(), None)
    assert any("left and right are a guess" in note for note in volumes.nifti_from_bytes("v", nowhere.to_bytes()).notes)
    labels = header_of_ramp(intent_code=1002)
    assert "values are label (intent code)" in volumes.nifti_from_bytes("v", labels.to_bytes()).notes


def test_normalised_volumes_keep_what_is_below_zero(tmp_path):
    data = np.linspace(-3, 3, 4 * 5 * 6, dtype=np.float32).reshape(4, 5, 6)
    low, high = volumes.window_of(volumes.Volume(data, np.eye(4), "MR"))
    assert low < -2.5
    assert high > 2.5
    sparse = np.zeros((10, 10, 10))
    sparse[0, 0, :3] = 1, 2, 3
    assert volumes.window_of(volumes.Volume(sparse, np.eye(4), "MR")) == (0.0, 3.0)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (nib.Nifti1Image(ramp().astype(np.complex64), np.eye(4)).to_bytes(), "voxels of type complex64"),
        (nib.Nifti1Image(ramp(), np.eye(4)).to_bytes()[:-9], "480 bytes of voxels by its header, 471 in the file"),
        (nib.AnalyzeImage(ramp(), None).header.binaryblock + bytes(999), "ANALYZE 7.5"),
        (nib.Nifti1Pair(ramp(), np.eye(4)).header.binaryblock, "a header without its voxels"),
        (b"\x1f\x8b\x08\x00" + bytes(20), "not a readable NIfTI"),
    ],
)
def test_nifti_that_is_refused(data, message):
    with pytest.raises(UserError, match=message) as caught:
        volumes.nifti_from_bytes("v", data)
    assert "\n" not in str(caught.value)


def test_nifti_that_unpacks_to_too_much(monkeypatch):
    data = gzip.compress(bytes(100_000)) + gzip.compress(bytes(100_000))
    monkeypatch.setattr(limits, "BYTES", 150_000)
    with pytest.raises(UserError, match="unpacks to more than"):
        volumes.nifti_from_bytes("v", data)


def test_mutated_nifti_headers_give_a_volume_or_one_line():
    whole, outcomes = header_of_ramp(sform_code=0, qform_code=1).to_bytes(), []
    for case in range(200):
        rng = np.random.default_rng(case)
        data = bytearray(whole)
        for _ in range(rng.integers(1, 4)):
            data[int(rng.integers(0, 352))] = int(rng.integers(0, 256))
        volume, error = attempt(lambda data=data: volumes.nifti_from_bytes("v", bytes(data)))
        assert volume is None or volume.data.shape[:3] == volumes.cut(volume.data, "axial", 0).shape[1::-1] + volume.data.shape[2:3]
        assert error is None or (error.startswith("v: ") and "\n" not in error)
        outcomes.append(error is None)
    assert 40 < sum(outcomes) < 190
