"""DICOM: files of many frames, series and archives; what is refused; the bundled files; mutated headers."""

import io
import re
import zipfile
from pathlib import Path

import numpy as np
import pydicom
import pytest
from dicom_samples import SYNTAXES, attempt, dicom_dataset, dicom_file, item, lut, written
from pydicom.data import get_testdata_file

from tests.unimed.test_data_dicom import BUNDLED, RAMP, linear, palette, refused, shown
from unimed.errors import UserError
from unimed.records import dicom, limits
from unimed.records import volume as volumes
from unimed.records.dicom import parse
from unimed.records.pixels import open_image, read_image_file


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


@pytest.mark.each
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


def test_text_called_dcm_or_nothing(tmp_path):
    for name in ("a.dcm", "b"):
        (tmp_path / name).write_text("no image at all, only some words")
        with pytest.raises(UserError, match="not a readable"):
            read_image_file(tmp_path / name)
    (tmp_path / "dir.zip").write_bytes(b"")
    with pytest.raises(UserError, match="expected a folder or a zip"):
        read_image_file(tmp_path / "dir.zip")
