"""Everything in a DICOM file that changes its picture is applied, or the file is refused by one line."""

from pathlib import Path

import numpy as np
import pydicom
import pytest
from dicom_samples import SYNTAXES, attempt, dicom_dataset, dicom_file, lut, written
from PIL import ImageCms
from pydicom.data import get_palette_files, get_testdata_file
from pydicom.pixels import apply_color_lut

from unimed.records import dicom
from unimed.records.dicom import parse, picture, read_frame
from unimed.records.pixels import read_image_file

pytestmark = pytest.mark.filterwarnings("ignore")

BUNDLED = Path(pydicom.__file__).parent / "data" / "test_files"
RAMP = np.arange(256, dtype=np.uint16).reshape(16, 16) * 16  # 0..4080


def drawn(data, index=0, grey=None):
    """RGB uint8 of a file's frame."""
    return np.asarray(picture(read_frame("f", parse("f", data), index), grey)[0])


def shown(pixels, index=0, grey=None, **kwargs):
    """Grey uint8 of a file with ``pixels`` and tags."""
    rgb = drawn(dicom_file(pixels, **kwargs), index, grey)
    assert (rgb[..., 0] == rgb[..., 1]).all()
    assert (rgb[..., 0] == rgb[..., 2]).all()
    return rgb[..., 0]


def notes(pixels, index=0, **kwargs):
    return picture(read_frame("f", parse("f", dicom_file(pixels, **kwargs)), index))[1]


def refused(data, index=0):
    _, error = attempt(lambda: seen_as_user("f.dcm", data, index))
    assert error is not None
    assert "\n" not in error
    assert error.startswith("f.dcm: ")
    return error


def seen_as_user(name, data, index=0):
    source = parse(name, data)
    dicom.check_picture(name, source)
    return picture(read_frame(name, source, index))[0]


def linear(values, centre, width):
    """PS3.3 C.11.2.1.2.1, to 0..255."""
    return np.rint(np.clip((values - (centre - 0.5)) / (width - 1) + 0.5, 0, 1) * 255)


# Modality LUT and rescale
@pytest.mark.parametrize("empty", [{"RescaleSlope": None}, {"RescaleIntercept": None}, {"RescaleSlope": None, "RescaleIntercept": None}])
def test_empty_rescale_tags_mean_one_and_zero(empty):
    given = {"Modality": "MR", "RescaleSlope": 1, "RescaleIntercept": 0}
    expected = shown(RAMP, **given)
    assert expected.min() == 0
    assert expected.max() == 255
    np.testing.assert_array_equal(shown(RAMP, **{**given, **empty}), expected)


def test_an_intercept_counts_without_a_slope():
    window = {"Modality": "CT", "WindowCenter": 40, "WindowWidth": 400}
    np.testing.assert_array_equal(shown(RAMP, **window, RescaleIntercept=-1024), linear(RAMP - 1024.0, 40, 400))


@pytest.mark.parametrize("slope", ["0", "nan", "inf"])
def test_a_slope_that_means_nothing_is_refused(slope):
    source = dicom_dataset(RAMP, RescaleIntercept=0)
    source.add_new("RescaleSlope", "DS", slope)
    assert "RescaleSlope is" in refused(written(source))


def test_negative_slope_turns_the_greys():
    window = {"RescaleSlope": -1, "RescaleIntercept": 4080, "WindowCenter": 2040.5, "WindowWidth": 4081}
    np.testing.assert_array_equal(shown(RAMP, **window), linear(4080.0 - RAMP, 2040.5, 4081))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16])
def test_modality_lut(dtype):
    """Also where pydicom's own function wraps round: 8-bit pixels and long tables, negative first values."""
    pixels = np.arange(100).reshape(10, 10).astype(dtype)
    first = -5 if dtype == np.int16 else 5
    table = lut([value * 100 for value in range(300)], first=first)
    window = {"WindowCenter": 5000.5, "WindowWidth": 10001}
    expected = linear(np.clip(pixels.astype(int) - first, 0, 299) * 100.0, 5000.5, 10001)
    np.testing.assert_array_equal(shown(pixels, ModalityLUTSequence=[table], **window), expected)


# Windows and VOI LUTs
@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (None, lambda v: np.clip((v - 1999.5) / 999 + 0.5, 0, 1)),
        ("LINEAR", lambda v: np.clip((v - 1999.5) / 999 + 0.5, 0, 1)),
        ("LINEAR_EXACT", lambda v: np.clip((v - 2000) / 1000 + 0.5, 0, 1)),
        ("SIGMOID", lambda v: 1 / (1 + np.exp(-4 * (v - 2000) / 1000))),
    ],
)
def test_windows_of_the_file(function, expected):
    tags = {"VOILUTFunction": function} if function else {}
    many = {"WindowCenter": [2000, 5], "WindowWidth": [1000, 5], "WindowCenterWidthExplanation": ["LUNG\x1b[31m", "B"]}
    np.testing.assert_array_equal(shown(RAMP, **many, **tags), np.rint(expected(RAMP.astype(float)) * 255))
    told = notes(RAMP, **many, **tags)
    assert any("(LUNG [31m)" in note and "of the file" in note for note in told)


def test_the_users_window_comes_first():
    np.testing.assert_array_equal(
        shown(RAMP, grey=(0, 255 * 16), WindowCenter=1, WindowWidth=2), np.rint(np.clip(RAMP / (255.0 * 16), 0, 1) * 255)
    )


@pytest.mark.parametrize("tags", [{"WindowWidth": 0}, {"WindowWidth": -5}, {"WindowCenter": None}, {"WindowCenter": -9000}])
def test_a_window_that_shows_nothing_is_not_used(tags):
    """Each gave a black or white picture, or an error."""
    grey = shown(RAMP, **{"WindowCenter": 2000, "WindowWidth": 100, **tags})
    assert len(np.unique(grey)) > 200
    assert len(np.unique(shown(RAMP, WindowCenter=2000, WindowWidth=1))) == 2


@pytest.mark.parametrize("syntax", SYNTAXES)
@pytest.mark.parametrize("form", ["numbers", "words", "bytes"])
def test_voi_lut(syntax, form):
    entries = [255 - value for value in range(256)]
    order = ">u2" if syntax == "big endian" else "<u2"
    data = {"numbers": entries, "words": np.array(entries, order).tobytes(), "bytes": bytes(entries)}[form]
    table = lut(data, first=1000, bits=8, size=256)
    grey = shown(RAMP, syntax=syntax, VOILUTSequence=[table], WindowCenter=9, WindowWidth=2)  # a table wins over a window
    np.testing.assert_array_equal(grey, 255 - np.clip(RAMP.astype(int) - 1000, 0, 255))


def test_voi_lut_of_values_beyond_16_bits_and_below_zero():
    pixels = np.array([[-70000, -10, 0], [10, 500, 70000]], np.int32)
    grey = shown(pixels, VOILUTSequence=[lut([0, 100, 255], first=65535, bits=8)])  # -1 written as unsigned
    np.testing.assert_array_equal(grey, [[0, 0, 100], [255, 255, 255]])


def test_a_lut_whose_entries_use_fewer_bits_than_named_is_not_black():
    grey = shown(RAMP, VOILUTSequence=[lut([value // 16 for value in range(4096)], bits=16)])
    np.testing.assert_array_equal(grey, RAMP // 16)


def test_default_windows():
    ct = {"Modality": "CT", "RescaleSlope": 1, "RescaleIntercept": -1024}
    np.testing.assert_array_equal(shown(RAMP, **ct), np.rint(np.clip((RAMP - 1024.0 + 160) / 400, 0, 1) * 255))
    assert "CT values that are not in HU" in notes(RAMP, **ct, RescaleType="Z_EFF")
    assert len(np.unique(shown(RAMP, Modality="CT"))) > 200  # no rescale: stored values, which HU's window would show white
    eight = (RAMP // 16).astype(np.uint8)
    np.testing.assert_array_equal(shown(eight, Modality="US"), eight)
    assert shown(eight // 128, Modality="OT").max() == 255  # a mask of 0 and 1
    assert shown(eight // 16, Modality="NM").max() == 255  # counts
    signed = RAMP.astype(np.int16) - 2040  # as normalised MR: zero is in the middle
    assert len(np.unique(shown(signed, Modality="MR"))) > 200


# Inversion and presentation
@pytest.mark.parametrize("tags", [{"PhotometricInterpretation": "MONOCHROME1"}, {"PresentationLUTShape": "INVERSE"}])
def test_inversion(tags):
    window = {"WindowCenter": 3000.5, "WindowWidth": 4001}  # the brightest pixel is not white: 255 - value, not the maximum - value
    expected = 255 - linear(RAMP, 3000.5, 4001)
    np.testing.assert_array_equal(shown(RAMP, **window, **tags), expected)
    np.testing.assert_array_equal(shown(RAMP, **window, PhotometricInterpretation="MONOCHROME1", PresentationLUTShape="INVERSE"), expected)


def test_presentation_lut_sequence():
    eight = (RAMP // 32).astype(np.uint8)  # the lower half: the table is for the whole range
    table = lut([255 - value for value in range(256)], bits=8)
    np.testing.assert_array_equal(shown(eight, PresentationLUTSequence=[table]), 255 - eight)


# Stored values
@pytest.mark.parametrize("signed", [False, True])
def test_high_bit_and_what_lies_in_the_other_bits(signed):
    values = np.arange(-128, 128).reshape(16, 16) * 8 if signed else RAMP
    rng = np.random.default_rng(0)
    window = {"WindowCenter": 0.5 if signed else 2000, "WindowWidth": 2001}
    expected = linear(values, window["WindowCenter"], 2001)
    tags = {"BitsStored": 12, "PixelRepresentation": int(signed), **window}
    left = ((values & 0xFFF) << 4 | rng.integers(0, 16, values.shape)).astype(np.uint16)  # bits 4 to 15
    right = (values & 0xFFF | rng.integers(0, 16, values.shape) << 12).astype(np.uint16)  # bits 0 to 11, overlays above
    np.testing.assert_array_equal(shown(left, HighBit=15, **tags), expected)
    np.testing.assert_array_equal(shown(right, HighBit=11, **tags), expected)


@pytest.mark.parametrize("padding", [{"PixelPaddingValue": 4000}, {"PixelPaddingValue": 4080, "PixelPaddingRangeLimit": 3900}])
def test_padding_is_black_and_leaves_the_window_alone(padding):
    body = RAMP // 40
    pixels = body.copy()
    pixels[:4] = 4000
    for tags in ({}, {"PhotometricInterpretation": "MONOCHROME1"}):
        grey = shown(pixels, Modality="MR", **tags, **padding)
        assert (grey[:4] == 0).all()
        assert len(np.unique(grey[4:])) > 30


def test_signed_padding_written_as_unsigned():
    pixels = RAMP.astype(np.int16)
    pixels[0] = -2000
    source = dicom_dataset(pixels, Modality="MR", PhotometricInterpretation="MONOCHROME1")
    source.add_new("PixelPaddingValue", "US", 63536)
    assert (drawn(written(source))[0] == 0).all()


def test_only_padding_is_refused():
    assert "every pixel is padding" in refused(dicom_file(np.full((4, 4), 7, np.uint16), PixelPaddingValue=7))


# Colour
@pytest.mark.skipif(not (BUNDLED / "examples_palette.dcm").is_file(), reason="not in this version of pydicom")
def test_palette_of_pydicoms_example():
    rgb = np.asarray(read_image_file(BUNDLED / "examples_palette.dcm"))
    np.testing.assert_allclose(rgb.mean((0, 1)), [15.9, 20.1, 25.4], atol=0.05)


def palette(kind, **more):
    """Entries 1..n in one of the forms that PS3.3 has, and the colours they mean."""
    size = 4096 if "long" in kind else 256
    entries = np.stack([np.arange(size), np.arange(size)[::-1], np.full(size, 7 * size // 256)]) * 256 // size
    wide = {"words": entries * 257, "high": entries * 256}.get(kind.split()[-1], entries)
    order = ">u2" if "big" in kind else "<u2"
    tags = {}
    for colour, row in zip(("Red", "Green", "Blue"), wide, strict=True):
        data = row.astype(np.uint8).tobytes() if "packed" in kind else row.astype(order).tobytes()
        tags[f"{colour}PaletteColorLookupTableDescriptor"] = [size, 3, 16 if kind.split()[-1] in ("words", "high") else 8]
        tags[f"{colour}PaletteColorLookupTableData"] = data
    return {"PhotometricInterpretation": "PALETTE COLOR", **tags, **more}, entries.T.astype(np.uint8)


@pytest.mark.parametrize("kind", ["words", "high", "low", "packed", "long packed", "long words", "big words"])
def test_palettes(kind):
    tags, colours = palette(kind)
    pixels = np.array([[0, 3, 4], [100, 258, 5000]], np.uint16)
    rgb = drawn(dicom_file(pixels, syntax="big endian" if "big" in kind else "explicit", **tags))
    np.testing.assert_array_equal(rgb, colours[np.clip(pixels.astype(int) - 3, 0, len(colours) - 1)])


@pytest.mark.parametrize("name", ["spring.dcm", "winter.dcm"])
def test_segmented_palettes(name):
    well_known = pydicom.dcmread(get_palette_files(name)[0])
    tags = {element.keyword: element.value for element in well_known if "PaletteColorLookupTable" in element.keyword and element.VR != "UI"}
    pixels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    rgb = drawn(dicom_file(pixels, PhotometricInterpretation="PALETTE COLOR", **tags))
    np.testing.assert_array_equal(rgb, apply_color_lut(pixels, palette=well_known.SOPInstanceUID))


def test_deep_rgb_and_ybr():
    rgb = np.arange(48, dtype=np.uint16).reshape(4, 4, 3) * 1000
    np.testing.assert_array_equal(drawn(dicom_file(rgb)), np.rint(rgb / 65535 * 255))
    np.testing.assert_array_equal(drawn(dicom_file(rgb // 16, BitsStored=12, HighBit=11)), np.rint(rgb // 16 / 4095 * 255))
    grey = np.full((2, 2, 3), (90, 128, 128), np.uint8)
    assert (drawn(dicom_file(grey, PhotometricInterpretation="YBR_FULL")) == 90).all()


def test_icc_profile_of_dicom():
    rgb = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    np.testing.assert_array_equal(drawn(dicom_file(rgb, ICCProfile=srgb)), rgb)
    np.testing.assert_array_equal(drawn(dicom_file(rgb, ICCProfile=b"broken" * 40)), rgb)
    assert any("ICC profile ignored" in note for note in notes(rgb, ICCProfile=b"broken" * 40))
    crayons = Path(get_testdata_file("crayons.icc")).read_bytes()  # exchanges the channels
    assert not (drawn(dicom_file(rgb, ICCProfile=crayons)) == rgb).all()


# Geometry, shutters
def test_square_pixels():
    rgb = np.zeros((10, 20, 3), np.uint8)
    for tags in ({"PixelSpacing": [2, 1]}, {"PixelAspectRatio": [2, 1]}, {"ImagerPixelSpacing": [0.2, 0.1]}):
        assert drawn(dicom_file(rgb, **tags)).shape == (20, 20, 3)
    assert drawn(dicom_file(rgb, PixelSpacing=[1, 3])).shape == (10, 60, 3)
    assert drawn(dicom_file(rgb, PixelSpacing=[0, 0])).shape == (10, 20, 3)


VIEWS = {"axial": ((1, 0, 0), (0, 1, 0)), "coronal": ((1, 0, 0), (0, 0, -1)), "sagittal": ((0, 1, 0), (0, 0, -1))}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("upside_down", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_slice_is_shown_in_radiological_view(view, flipped, upside_down, transposed):
    rgb = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    across, down = (np.array(direction) for direction in VIEWS[view])
    stored = rgb[:, ::-1] if flipped else rgb
    stored = stored[::-1] if upside_down else stored
    across, down = -across if flipped else across, -down if upside_down else down
    if transposed:
        stored, across, down = stored.swapaxes(0, 1), down, across
    tags = {"ImageOrientationPatient": [float(v) for v in (*across, *down)]}
    np.testing.assert_array_equal(drawn(dicom_file(np.ascontiguousarray(stored), **tags)), rgb)
    assert any("turned" in note for note in notes(np.ascontiguousarray(stored), **tags)) == (flipped or upside_down or transposed)


def test_a_mirrored_radiograph_is_named():
    assert any("PatientOrientation" in note for note in notes(RAMP, Modality="DX", PatientOrientation=["R", "F"]))
    assert not any("PatientOrientation" in note for note in notes(RAMP, Modality="DX", PatientOrientation=["L", "F"]))


def test_shutters():
    rgb = np.full((10, 12, 3), 200, np.uint8)
    rows, columns = np.indices((10, 12)) + 1
    rectangle = {
        "ShutterLeftVerticalEdge": 3,
        "ShutterRightVerticalEdge": 8,
        "ShutterUpperHorizontalEdge": 2,
        "ShutterLowerHorizontalEdge": 9,
    }
    inside = (columns >= 3) & (columns <= 8) & (rows >= 2) & (rows <= 9)
    circle = {"CenterOfCircularShutter": [5, 6], "RadiusOfCircularShutter": 3}
    round_ = (rows - 5) ** 2 + (columns - 6) ** 2 <= 9
    polygon = {"VerticesOfThePolygonalShutter": [2, 3, 2, 8, 9, 8, 9, 3]}
    for shape, tags, visible in (
        ("RECTANGULAR", rectangle, inside),
        ("CIRCULAR", circle, round_),
        ("POLYGONAL", polygon, inside),
        (["RECTANGULAR", "CIRCULAR"], {**rectangle, **circle}, inside & round_),
    ):
        seen = drawn(dicom_file(rgb, ShutterShape=shape, **tags))[..., 0]
        np.testing.assert_array_equal(seen, np.where(visible, 200, 0))
    seen = drawn(dicom_file(rgb, ShutterShape="RECTANGULAR", ShutterPresentationValue=65535, **rectangle))[..., 0]
    np.testing.assert_array_equal(seen, np.where(inside, 200, 255))
    bright = RAMP[:10, :12].copy()
    bright[~inside] = 60000  # beyond the shutter: not part of the window
    assert len(np.unique(shown(bright, ShutterShape="RECTANGULAR", Modality="MR", **rectangle))) > 40


def test_bitmap_shutter_and_overlays():
    rgb = np.full((8, 8, 3), 200, np.uint8)
    source = dicom_dataset(rgb, ShutterShape="BITMAP", ShutterOverlayGroup=0x6000)
    closed = np.zeros((8, 8), np.uint8)
    closed[:3] = 1
    for element, vr, value in (
        (0x10, "US", 8),
        (0x11, "US", 8),
        (0x40, "CS", "G"),
        (0x50, "SS", [1, 1]),
        (0x100, "US", 1),
        (0x102, "US", 0),
        (0x3000, "OW", np.packbits(closed, bitorder="little").tobytes()),
    ):
        source.add_new((0x6000, element), vr, value)
    data = written(source)
    np.testing.assert_array_equal(drawn(data)[..., 0], np.where(closed, 0, 200))
    assert "overlays not drawn" in picture(read_frame("f", parse("f", data)))[1]
