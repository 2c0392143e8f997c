"""Everything in a DICOM file that changes its picture is applied, or the file is refused by one line."""

import io
import re
import zipfile
from pathlib import Path

import numpy as np
import pydicom
import pytest
from dicom_samples import SYNTAXES, attempt, dicom_dataset, dicom_file, item, lut, written
from PIL import Image, ImageCms
from pydicom.data import get_palette_files, get_testdata_file
from pydicom.pixels import apply_color_lut

from unimed.errors import UserError
from unimed.records import dicom, limits
from unimed.records import volume as volumes
from unimed.records.dicom import parse, picture, read_frame
from unimed.records.pixels import open_image, read_image_file

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


# Frames
def enhanced(frames, **tags):
    """An Enhanced MR file: window, rescale and place of each frame in its functional groups."""
    pixels = np.stack([np.full((4, 5), 100 + index, np.uint16) + np.arange(5, dtype=np.uint16) for index in range(frames)])
    shared = item(
        PixelMeasuresSequence=[item(PixelSpacing=[1, 1])],
        PlaneOrientationSequence=[item(ImageOrientationPatient=[1, 0, 0, 0, 1, 0])],
    )
    own = [
        item(
            PlanePositionSequence=[item(ImagePositionPatient=[0, 0, 2.0 * index])],
            PixelValueTransformationSequence=[item(RescaleSlope=index + 1, RescaleIntercept=-50, RescaleType="US")],
            FrameVOILUTSequence=[item(WindowCenter=100 * (index + 1), WindowWidth=101)],
        )
        for index in range(frames)
    ]
    groups = {"SharedFunctionalGroupsSequence": [shared], "PerFrameFunctionalGroupsSequence": own}
    return pixels, {"NumberOfFrames": frames, "Modality": "MR", **groups, **tags}


def test_functional_groups_of_each_frame_count():
    pixels, tags = enhanced(3)
    for index in range(3):
        expected = linear(pixels[index] * (index + 1.0) - 50, 100 * (index + 1), 101)
        np.testing.assert_array_equal(shown(pixels, index, **tags), expected)
    assert "none for frame 3" in refused(dicom_file(np.concatenate([pixels, pixels[:1]]), **{**tags, "NumberOfFrames": 4}), 3)


def test_a_multi_frame_file_is_a_volume(tmp_path):
    pixels, tags = enhanced(6)
    (tmp_path / "many").write_bytes(dicom_file(pixels, **tags))
    volume = volumes.read_dicom_frames("many", parse("many", (tmp_path / "many").read_bytes()))
    expected = pixels * np.arange(1.0, 7)[:, None, None] - 50
    np.testing.assert_allclose(volume.data, expected.transpose(2, 1, 0)[::-1, ::-1])
    np.testing.assert_allclose(volume.spacing, (1, 1, 2))
    assert read_image_file(tmp_path / "many", "coronal").size == (3, 8)
    opened = open_image(tmp_path / "many")
    assert opened.notes[0] == "frame 3 of 0 to 5"
    assert opened.rgb.size == (5, 4)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "IM0").write_bytes(dicom_file(pixels, **tags))
    np.testing.assert_array_equal(volumes.read_dicom_series(folder).data, volume.data)


def test_frames_and_planes_that_are_not_there(tmp_path):
    (tmp_path / "cine").write_bytes(dicom_file(np.zeros((3, 4, 4, 3), np.uint8), NumberOfFrames=3))
    with pytest.raises(UserError, match="frame 3, expected 0 to 2"):
        open_image(tmp_path / "cine", index=3)
    with pytest.raises(UserError, match="colour image, expected grey slices"):
        open_image(tmp_path / "cine", "coronal")
    with pytest.raises(UserError, match="takes no window"):
        open_image(tmp_path / "cine", grey=(0, 1))


# Files
@pytest.mark.parametrize("syntax", SYNTAXES)
@pytest.mark.parametrize("preamble", [True, False])
@pytest.mark.parametrize("name", ["IM000001", "a.IMA", "a.dicom", "a.dcm"])
def test_any_name_and_any_header(tmp_path, syntax, preamble, name):
    (tmp_path / name).write_bytes(dicom_file(RAMP, syntax, preamble, WindowCenter=2000, WindowWidth=4000))
    np.testing.assert_array_equal(np.asarray(read_image_file(tmp_path / name))[..., 0], linear(RAMP, 2000, 4000))


def series_slice(k, **tags):
    pixels = np.full((4, 5), k, np.int16) + np.arange(5, dtype=np.int16) * 10
    place = {"ImagePositionPatient": [0, 0, 2.0 * k], "ImageOrientationPatient": [1, 0, 0, 0, 1, 0], "PixelSpacing": [1, 1]}
    return dicom_file(pixels, **{"Modality": "MR", "SeriesInstanceUID": "2.25.7", **place, **tags})


def series_folder(path, count=3, **tags):
    path.mkdir(exist_ok=True)
    for k in range(count):
        (path / f"IM{k:06}").write_bytes(series_slice(k, **tags))
    return path


def test_files_beside_the_slices_do_not_stop_a_series(tmp_path):
    plain = volumes.read_dicom_series(series_folder(tmp_path / "plain"))
    crowded = series_folder(tmp_path / "crowded")
    report = written(dicom_dataset(RAMP))
    holder = parse("r", report)
    del holder.PixelData
    out = io.BytesIO()
    holder.save_as(out)
    extra = {
        "DICOMDIR": Path(get_testdata_file("DICOMDIR")).read_bytes(),
        "LICENSE": b"All rights reserved\n",
        "README.txt": b"read me",
        "report.dcm": out.getvalue(),
    }
    left_behind = {"._IM000000": b"\x00\x05\x16\x07", ".DS_Store": b"\x00\x00\x00\x01Bud1"}
    for name, data in {**extra, **left_behind}.items():
        (crowded / name).write_bytes(data)
    volume = volumes.read_dicom_series(crowded)
    np.testing.assert_array_equal(volume.data, plain.data)
    assert any(note.startswith("4 files without DICOM pixels passed over (DICOMDIR, LICENSE, README.txt, ...") for note in volume.notes)
    with zipfile.ZipFile(tmp_path / "mac.zip", "w") as archive:
        for file in crowded.iterdir():
            archive.write(file, f"scan/{file.name}")
            archive.writestr(f"__MACOSX/scan/._{file.name}", b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X")
    np.testing.assert_array_equal(volumes.read_dicom_series(tmp_path / "mac.zip").data, plain.data)
    np.testing.assert_array_equal(np.asarray(read_image_file(tmp_path / "mac.zip")), np.asarray(read_image_file(tmp_path / "plain")))


def test_an_inverted_series_is_inverted(tmp_path):
    plain, inverted = series_folder(tmp_path / "plain"), series_folder(tmp_path / "inverted", PhotometricInterpretation="MONOCHROME1")
    one, other = (np.asarray(read_image_file(folder, pixel_mm=1)) for folder in (plain, inverted))
    assert len(np.unique(one)) > 3
    np.testing.assert_array_equal(other, 255 - one)
    series_folder(plain, 1, PhotometricInterpretation="MONOCHROME1")
    with pytest.raises(UserError, match="mean another thing"):
        volumes.read_dicom_series(plain)


def test_the_windows_and_the_padding_of_a_series(tmp_path):
    folder = series_folder(tmp_path / "a", WindowCenter=20.5, WindowWidth=41)
    row = np.asarray(read_image_file(folder, index=1, pixel_mm=1))[0, :, 0]
    np.testing.assert_array_equal(row, linear(1.0 + np.arange(5) * 10, 20.5, 41))
    sigmoid = series_folder(tmp_path / "b", WindowCenter=20.5, WindowWidth=41, VOILUTFunction="SIGMOID")
    assert any("sigmoid of the file" in note for note in open_image(sigmoid).notes)
    for k in range(3):
        (folder / f"IM{k:06}").write_bytes(series_slice(k, WindowCenter=k + 1, WindowWidth=9))
    assert any("differ from slice to slice" in note for note in open_image(folder).notes)
    padded = series_folder(tmp_path / "c", PixelPaddingValue=41, PhotometricInterpretation="MONOCHROME1")
    assert np.asarray(read_image_file(padded, index=1, pixel_mm=1))[0, 4, 0] == 0
    assert np.isnan(volumes.read_dicom_series(padded).data).any()


def test_two_series_are_refused(tmp_path):
    folder = series_folder(tmp_path / "a")
    (folder / "other").write_bytes(series_slice(9, SeriesInstanceUID="2.25.8"))
    with pytest.raises(UserError, match="2 series with 3, 1 files"):
        volumes.read_dicom_series(folder)


def test_archives_that_unpack_to_too_much(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a", bytes(100_000))
    monkeypatch.setattr(limits, "BYTES", 50_000)
    with pytest.raises(UserError, match="unpacks to more than"):
        volumes.read_dicom_series(tmp_path / "a.zip")


def test_a_jpeg_2000_box_of_no_length_does_not_hang():
    data = (BUNDLED / "GDCMJ2K_TextGBR.dcm").read_bytes()
    at = data.index(b"\x00\x00\x00\x0cjP  ") + 12
    assert "box of no length" in refused(data[:at] + bytes(4) + data[at + 4 :])


def test_a_deflated_file_that_inflates_to_too_much(monkeypatch):
    data = (BUNDLED / "image_dfl.dcm").read_bytes()
    assert parse("f", data).Rows == 512
    length = int.from_bytes(data[140:144], "little")
    ungrouped = data[:132] + data[144:]  # without the element that says how long the meta header is
    assert parse("f", ungrouped).Rows == 512
    assert len(data) - 144 - length > 0
    monkeypatch.setattr(limits, "BYTES", 100_000)
    for bomb in (data, ungrouped):
        assert "inflates to more than" in refused(bomb)


def test_frames_that_decode_to_too_much(tmp_path, monkeypatch):
    data = dicom_file(np.zeros((4, 8, 8), np.uint8), NumberOfFrames=4)
    monkeypatch.setattr(limits, "BYTES", 4 * 4 * 64 - 1)
    with pytest.raises(UserError, match="256 voxels, which take more than"):
        volumes.read_dicom_frames("f", parse("f", data))


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        ({"Modality": "RTDOSE"}, "a dose distribution"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.481.2"}, "a dose distribution"),
        ({"PhotometricInterpretation": "HSV"}, "PhotometricInterpretation HSV"),
        ({"PhotometricInterpretation": "PALETTE COLOR"}, "no palette"),
        ({"PixelPresentation": "MIXED"}, "supplemental"),
        ({"PresentationLUTShape": "LIN"}, "PresentationLUTShape LIN"),
        ({"VOILUTFunction": "CUBIC", "WindowCenter": 1, "WindowWidth": 9}, "VOILUTFunction CUBIC"),
        ({"HighBit": 3, "BitsStored": 12}, "HighBit 3"),
        ({"ShutterShape": "STAR"}, "ShutterShape STAR"),
        ({"ShutterShape": "CIRCULAR"}, "hides every pixel"),
        ({"PixelSpacing": [1, 1000]}, "not a plausible shape"),
        ({"Rows": 65535, "Columns": 65535}, "at most"),
        ({"Rows": 17}, "less than expected"),
        ({"ModalityLUTSequence": [lut([1, 2], size=9)]}, "2 of 9 entries"),
        ({"TotalPixelMatrixColumns": 999, "NumberOfFrames": 9}, "whole-slide image in 9 tiles"),
    ],
)
def test_refused(tags, message):
    source = dicom_dataset(RAMP)
    for keyword, value in tags.items():
        setattr(source, keyword, value)
    assert message in refused(written(source))


def test_a_retired_grey_table_is_refused():
    source = dicom_dataset(RAMP)
    source.add_new("GrayLookupTableData", "OW", bytes(8))
    assert "retired grey lookup table" in refused(written(source))


def test_segmented_palettes_that_pydicom_expands_wrongly_are_refused():
    words = np.array([0, 2, 5, 6, 2, 1, 0, 0], "<u2").tobytes()
    tags = {}
    for colour in ("Red", "Green", "Blue"):
        tags[f"{colour}PaletteColorLookupTableDescriptor"] = [4, 0, 16]
        tags[f"Segmented{colour}PaletteColorLookupTableData"] = words
    assert "indirect" in refused(dicom_file(RAMP, PhotometricInterpretation="PALETTE COLOR", **tags))


def test_a_missing_decoder_names_the_extra(monkeypatch):
    class Missing:
        is_available = False

        def as_array(self, *args, **kwargs):
            raise RuntimeError("all plugins are missing dependencies")

    monkeypatch.setattr(dicom, "get_decoder", lambda syntax: Missing())
    for name, helps in (("MR_small_jpeg_ls_lossless.dcm", "cmoe-kernels[dicom]"), ("SC_rgb_jpeg_gdcm.dcm", "python-gdcm")):
        assert helps in refused(Path(get_testdata_file(name)).read_bytes())


# pydicom's bundled files and the page that lists them
PAGE = Path(__file__).parents[2] / "docs" / "unimed/images.md"


def listed():
    rows = re.findall(r"^\| `([^`]+\.dcm)` \| (\w+) \| (.*) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    return {name: (verdict, text) for name, verdict, text in rows}


def test_the_page_lists_every_bundled_file():
    table = listed()
    assert len(table) == 78
    assert sum(verdict in ("yes", "extra") for verdict, _ in table.values()) == 50
    assert {path.name for path in BUNDLED.glob("*.dcm")} <= set(table) or not pydicom.__version__.startswith("3.0.")


@pytest.mark.parametrize("name", sorted(listed()))
def test_bundled_files_do_what_the_page_says(name):
    path, (verdict, text) = BUNDLED / name, listed()[name]
    if not path.is_file():
        pytest.skip("not in this version of pydicom")
    opened, error = attempt(lambda: open_image(path))
    if opened is None:
        assert "\n" not in error
        wanted = {"extra": "cmoe-kernels[dicom]", "no": text}[verdict]
        assert wanted in error or (text == "Unable to decode" and "cmoe-kernels[dicom]" in error)
        return
    assert verdict != "no" or "decode" in text  # another decoder may be installed
    if verdict != "no":
        assert text == ("; ".join(opened.notes) or "colours as stored")
    assert len(np.unique(np.asarray(opened.rgb.convert("L")))) > 1


def test_no_mutated_header_gives_a_traceback(tmp_path):
    """Bytes of headers turned, dropped or repeated: a picture or one line, for 200 files, alone and as the slice of a series."""
    folder = series_folder(tmp_path / "series")
    corners = {"VerticesOfThePolygonalShutter": [1, 1, 1, 8, 8, 8], "PixelAspectRatio": [1, 2]}
    seeds = [
        series_slice(0, Modality="CT", WindowCenter=40, WindowWidth=400, RescaleSlope=1, RescaleIntercept=-1024),
        dicom_file(RAMP[:8, :8], "implicit", False, VOILUTSequence=[lut(list(range(64)))], PixelPaddingValue=5),
        dicom_file((RAMP[:8, :8] // 32).astype(np.uint8), **palette("packed")[0], ShutterShape="POLYGONAL", **corners),
        dicom_file(enhanced(2)[0], "big endian", **enhanced(2)[1]),
    ]
    outcomes = []  # of each file: whether it gave a picture
    for case in range(200):
        rng = np.random.default_rng(case)
        data = bytearray(seeds[case % len(seeds)])
        header = data.rfind(b"\xe0\x7f") if case % 4 != 3 else data.rfind(b"\x7f\xe0")
        for _ in range(rng.integers(1, 4)):
            at, kind = int(rng.integers(0, header)), int(rng.integers(0, 10))
            if kind < 8:
                data[at] = int(rng.integers(0, 256)) if kind < 4 else data[at] ^ (1 << int(rng.integers(0, 8)))
            elif kind == 8:
                del data[at : at + int(rng.integers(1, 9))]
            else:
                data[at:at] = data[at : at + int(rng.integers(1, 9))]
        (tmp_path / "f.dcm").write_bytes(data)
        (folder / "IM000000").write_bytes(data)
        if case % 4 == 0:
            _, error = attempt(lambda: read_image_file(folder))
            assert error is None or (error.startswith(str(folder)) and "\n" not in error)
        image, error = attempt(lambda: read_image_file(tmp_path / "f.dcm"))
        assert image is None or image.mode == "RGB"
        assert error is None or (error.startswith(f"{tmp_path / 'f.dcm'}: ") and "\n" not in error)
        outcomes.append(error is None)
    assert 40 < sum(outcomes) < 160


def test_a_png_called_dcm_and_text(tmp_path):
    Image.new("L", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / "a.dcm")
    (tmp_path / "b").write_text("no image at all, only some words")
    for name in ("a.dcm", "b"):
        with pytest.raises(UserError, match="not a readable"):
            read_image_file(tmp_path / name)
    (tmp_path / "dir.zip").write_bytes(b"")
    with pytest.raises(UserError, match="expected a folder or a zip"):
        read_image_file(tmp_path / "dir.zip")
