"""PNG, TIFF and the like as they were meant: deep greys, transparency, orientation, profiles; and what is done with them."""

import hashlib
import io
import struct
import zlib

import numpy as np
import pytest
from dicom_samples import attempt
from PIL import Image, ImageCms, PngImagePlugin, TiffImagePlugin

from unimed.errors import UserError
from unimed.inference.images import open_source
from unimed.records import pixels as images
from unimed.records import volume as volumes
from unimed.records.pixels import image_size, load_image, open_image, read_image_file
from unimed.sample.slices import vendored_volume

RAMP16 = np.array([[0, 257, 514, 32896, 65535]], np.uint16)


def opened(tmp_path, image, name="a.png", **options):
    image.save(tmp_path / name, **options)
    return open_image(tmp_path / name)


def grey(tmp_path, image, name="a.png", **options):
    rgb = np.asarray(opened(tmp_path, image, name, **options).rgb)
    assert (rgb[..., :1] == rgb).all()
    return rgb[..., 0]


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.jp2", "a.pgm"])
def test_sixteen_bits_become_eight(tmp_path, name):
    options = {"irreversible": False} if name == "a.jp2" else {}
    pixels = np.repeat(RAMP16, 4, 0)
    if name == "a.pgm":
        (tmp_path / name).write_bytes(b"P5 5 4 65535\n" + pixels.astype(">u2").tobytes())
        np.testing.assert_array_equal(np.asarray(read_image_file(tmp_path / name))[0, :, 0], [0, 1, 2, 128, 255])
        return
    np.testing.assert_array_equal(grey(tmp_path, Image.fromarray(pixels), name, **options)[0], [0, 1, 2, 128, 255])


def test_sixteen_bits_of_the_other_byte_order(tmp_path):
    np.testing.assert_array_equal(
        grey(tmp_path, Image.frombytes("I;16B", (5, 1), RAMP16.astype(">u2").tobytes()), "a.tif")[0], [0, 1, 2, 128, 255]
    )


@pytest.mark.parametrize("bits", [8, 10, 12, 14])
def test_the_depth_in_use_counts(tmp_path, bits):
    """A 12-bit image in a 16-bit file was black, or white."""
    most = 2**bits - 1
    pixels = np.linspace(0, most, 256).astype(np.uint16).reshape(16, 16)
    np.testing.assert_array_equal(grey(tmp_path, Image.fromarray(pixels)), np.rint(pixels / most * 255))
    assert open_image(tmp_path / "a.png").notes == (f"values 0 to {most} shown as black to white",)


@pytest.mark.parametrize("top", [1.0, 255.0])
def test_floats(tmp_path, top):
    pixels = np.linspace(0, top, 256, dtype=np.float32).reshape(16, 16)
    np.testing.assert_array_equal(grey(tmp_path, Image.fromarray(pixels), "a.tif").ravel(), np.arange(256))
    pixels[0, :3] = np.nan, np.inf, -np.inf
    seen = grey(tmp_path, Image.fromarray(pixels), "a.tif").ravel()
    np.testing.assert_array_equal(seen[:3], [0, 255, 0])
    np.testing.assert_array_equal(seen[3:], np.arange(3, 256))


@pytest.mark.parametrize("scale", [1e-4, 1e-2, 30.0, 1e6])
def test_floats_and_integers_of_no_known_range(tmp_path, scale):
    pixels = (np.linspace(0, 1, 256) * scale).astype(np.float32).reshape(16, 16)
    assert len(np.unique(grey(tmp_path, Image.fromarray(pixels), "a.tif"))) > 200
    pixels = (np.linspace(-1, 1, 256) * 1000).astype(np.int32).reshape(16, 16)  # HU
    np.testing.assert_array_equal(grey(tmp_path, Image.fromarray(pixels), "a.tif"), volumes.window(pixels, -160, 240))


def tiff(pixels, **tags):
    """A TIFF of one strip with tags of our own."""
    out = io.BytesIO()
    info = TiffImagePlugin.ImageFileDirectory_v2()
    for tag, value in {**tags}.items():
        info[int(tag[1:])] = value
    Image.fromarray(pixels).save(out, "TIFF", tiffinfo=info)
    return out.getvalue()


def test_white_is_zero_and_signed_bytes(tmp_path):
    data = tiff(np.repeat(RAMP16, 2, 0))
    photometric = (262).to_bytes(2, "little") + b"\x03\x00\x01\x00\x00\x00"
    assert data.count(photometric + b"\x01\x00") == 1
    (tmp_path / "a.tif").write_bytes(data.replace(photometric + b"\x01\x00", photometric + b"\x00\x00"))
    np.testing.assert_array_equal(np.asarray(read_image_file(tmp_path / "a.tif"))[0, :, 0], [255, 254, 253, 127, 0])
    values = np.arange(-8, 8, dtype=np.int8).reshape(4, 4)
    (tmp_path / "b.tif").write_bytes(tiff(values.view(np.uint8), t339=2))
    seen = np.asarray(read_image_file(tmp_path / "b.tif"))[..., 0].ravel().astype(int)
    assert (np.diff(seen) >= 0).all()
    assert seen[-1] - seen[0] > 200


def test_eight_bits_stay_as_they_are(tmp_path):
    pixels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    np.testing.assert_array_equal(grey(tmp_path, Image.fromarray(pixels)), pixels)
    rgb = np.random.default_rng(0).integers(0, 256, (8, 9, 3), np.uint8)
    made = opened(tmp_path, Image.fromarray(rgb))
    np.testing.assert_array_equal(np.asarray(made.rgb), rgb)
    assert made.notes == ()
    Image.fromarray(rgb).save(tmp_path / "a.jpg")
    with Image.open(tmp_path / "a.jpg") as image:
        np.testing.assert_array_equal(np.asarray(read_image_file(tmp_path / "a.jpg")), np.asarray(image.convert("RGB")))
    np.testing.assert_array_equal(grey(tmp_path, Image.fromarray(pixels > 99)), (pixels > 99) * 255)
    palette = Image.fromarray(rgb).quantize(16)
    np.testing.assert_array_equal(np.asarray(opened(tmp_path, palette).rgb), np.asarray(palette.convert("RGB")))
    assert opened(tmp_path, Image.new("CMYK", (2, 2), (0, 0, 0, 255)), "a.jpg").rgb.getpixel((0, 0)) == (0, 0, 0)


def deep_png_with_alpha(path, values, alpha):
    """A PNG of grey and transparency, 16 bits each, which Pillow does not write."""
    pairs = np.stack([values, alpha], axis=-1).astype(">u2")
    lines = b"".join(b"\0" + row.tobytes() for row in pairs)

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    size = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, 4, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b""))
    return path


def test_deep_grey_with_transparency_keeps_its_depth(tmp_path):
    """Pillow keeps the upper byte of each: a 12-bit image was black, and took no window."""
    values = np.array([[0, 1024, 2048, 4095, 4095]])
    path = deep_png_with_alpha(tmp_path / "a.png", values, np.array([[65535, 65535, 65535, 65535, 0]]))
    found = open_image(path)
    assert np.asarray(found.rgb)[0, :, 0].tolist() == [0, 64, 128, 255, 0]
    assert found.notes[0] == "values 0 to 4095 shown as black to white"
    assert np.asarray(open_image(path, grey=(0, 2048)).rgb)[0, :, 0].tolist() == [0, 128, 255, 255, 0]
    path = deep_png_with_alpha(tmp_path / "b.png", np.array([[0, 65535]]), np.array([[65535, 65535]]))
    assert np.asarray(open_image(path).rgb)[0].tolist() == [[0] * 3, [255] * 3]
    path = deep_png_with_alpha(tmp_path / "c.png", np.array([[0, 4095]]), np.array([[0, 0]]))
    found = open_image(path)
    assert np.asarray(found.rgb)[0, :, 0].tolist() == [0, 255]
    assert "transparent everywhere: transparency ignored" in found.notes


@pytest.mark.parametrize("mode", ["LA", "RGBA", "P", "L", "RGB", "I;16"])
def test_transparency_onto_black(tmp_path, mode):
    colours = np.full((2, 2, 4), (200, 200, 200, 255), np.uint8)
    colours[0, 0, 3] = 0
    rgba = Image.fromarray(colours)
    if mode in ("LA", "RGBA"):
        image, options = rgba.convert(mode), {}
    elif mode == "P":
        image = Image.fromarray(np.array([[0, 1], [1, 1]], np.uint8)).convert("P")
        image.putpalette([200] * 6)
        options = {"transparency": 0}
    elif mode == "I;16":
        image, options = Image.fromarray(np.array([[7, 65535], [65535, 65535]], np.uint16)), {"transparency": 7}
    else:
        colours[0, 0] = 9
        image, options = Image.fromarray(colours[..., :3]).convert(mode), {"transparency": 9 if mode == "L" else (9, 9, 9)}
    seen = grey(tmp_path, image, **options)
    assert seen[0, 0] == 0
    assert (seen[0, 1], seen[1, 0], seen[1, 1]) == ((255,) * 3 if mode == "I;16" else (200,) * 3)


def test_half_transparent_and_wholly_transparent(tmp_path):
    assert (grey(tmp_path, Image.new("LA", (2, 2), (200, 128))) == 100).all()
    made = opened(tmp_path, Image.new("RGBA", (2, 2), (200, 100, 50, 0)))
    assert made.rgb.getpixel((0, 0)) == (200, 100, 50)
    assert made.notes == ("transparent everywhere: transparency ignored",)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tif"])
def test_exif_orientation(tmp_path, orientation, name):
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:8, :16], upright[:8, 16:], upright[8:, :16] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    stored = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1],
        5: upright.swapaxes(0, 1), 6: np.rot90(upright), 7: upright[::-1, ::-1].swapaxes(0, 1), 8: np.rot90(upright, -1),
    }[orientation]  # fmt: skip
    image = Image.fromarray(np.ascontiguousarray(stored))
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(tmp_path / name, exif=exif, **({"quality": 95, "subsampling": 0} if name == "a.jpg" else {}))
    np.testing.assert_allclose(np.asarray(read_image_file(tmp_path / name)).astype(int), upright, atol=8)
    assert image_size(tmp_path / name) == (32, 16) == load_image(tmp_path / name).size


def test_the_size_of_a_png_is_told_without_its_pixels_unless_a_later_chunk_may_turn_it(tmp_path, monkeypatch):
    exif = Image.Exif()
    exif[0x0112] = 6
    path, late, cut = (tmp_path / name for name in ("a.png", "late.png", "cut.png"))
    Image.fromarray(np.zeros((16, 32, 3), np.uint8)).save(path, exif=exif)
    data = path.read_bytes()
    start = data.index(b"eXIf") - 4
    chunk = data[start : start + 12 + int.from_bytes(data[start : start + 4])]
    late.write_bytes(data.replace(chunk, b"").replace(data[-12:], chunk + data[-12:]))
    cut.write_bytes(data[:-12])
    assert image_size(path) == image_size(late) == load_image(late).size == load_image(path).size == (16, 32)
    Image.fromarray(np.zeros((16, 32, 3), np.uint8)).save(path)
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", None)
    assert image_size(path) == (32, 16)
    for other in (late, cut):
        with pytest.raises(UserError, match="not a readable image"):
            image_size(other)


def test_pages_and_frames(tmp_path):
    pages = [Image.new("L", (4, 4), level) for level in (10, 20, 30)]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    assert open_image(tmp_path / "a.tif").rgb.getpixel((0, 0)) == (10, 10, 10)
    assert open_image(tmp_path / "a.tif").notes == ("page 0 of 0 to 2",)
    assert read_image_file(tmp_path / "a.tif", index=2).getpixel((0, 0)) == (30, 30, 30)
    for index in (3, -1):
        with pytest.raises(UserError, match="expected 0 to 2"):
            read_image_file(tmp_path / "a.tif", index=index)
    with pytest.raises(UserError, match="needs a volume"):
        read_image_file(tmp_path / "a.tif", "coronal")


def test_a_window_for_grey_images(tmp_path):
    pixels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    np.testing.assert_array_equal(
        np.asarray(read_image_file(tmp_path / "a.png", grey=(100, 200)))[..., 0], volumes.window(pixels, 100, 200)
    )
    Image.fromarray(RAMP16).save(tmp_path / "b.png")
    np.testing.assert_array_equal(np.asarray(read_image_file(tmp_path / "b.png", grey=(0, 514)))[0, :, 0], [0, 128, 255, 255, 255])
    Image.new("RGB", (4, 4)).save(tmp_path / "c.png")
    with pytest.raises(UserError, match=r"c\.png: a colour image takes no window"):
        read_image_file(tmp_path / "c.png", grey=(0, 1))


def test_gamma_of_png(tmp_path):
    pixels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    for gamma, expected in ((100_000, np.rint(255 * (pixels / 255) ** (1 / 2.2))), (45_455, pixels)):
        info = PngImagePlugin.PngInfo()
        info.add(b"gAMA", gamma.to_bytes(4, "big"))
        np.testing.assert_array_equal(grey(tmp_path, Image.fromarray(pixels), pnginfo=info), expected)


def test_icc_profiles(tmp_path):
    rgb = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    made = opened(tmp_path, Image.fromarray(rgb), icc_profile=srgb)
    np.testing.assert_array_equal(np.asarray(made.rgb), rgb)
    made = opened(tmp_path, Image.fromarray(rgb), icc_profile=b"no profile" * 30)
    np.testing.assert_array_equal(np.asarray(made.rgb), rgb)
    assert made.notes[0].startswith("ICC profile ignored")


def test_pictures_that_are_too_large_or_no_pixels(tmp_path, monkeypatch):
    Image.new("1", (300, 300)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    for read in (read_image_file, image_size):
        with pytest.raises(UserError, match="not a readable image"):
            read(tmp_path / "a.png")
    (tmp_path / "a.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\nshowpage\n%%EOF\n")
    with pytest.raises(UserError, match="EPS"):
        read_image_file(tmp_path / "a.eps")


@pytest.mark.parametrize("name", ["x.dcm", "x.nii", "x.nii.gz", "x.zip", "x.img", "x"])
def test_a_picture_is_one_whatever_it_is_called(tmp_path, name):
    for form in ("PNG", "JPEG"):
        Image.new("RGB", (9, 7), "red").save(tmp_path / name, form)
        assert read_image_file(tmp_path / name).size == image_size(tmp_path / name) == (9, 7)


def test_integers_of_32_bits_keep_their_order():
    """From 2^31 on they were negative."""
    grey = np.asarray(open_source(np.array([[0, 2**31, 2**32 - 1]], np.uint32)).rgb)[0, :, 0]
    assert grey[0] < grey[1] < grey[2]


def test_pictures_handed_over_in_memory_become_rgb_the_same_way():
    from model_samples import VQA
    from test_model_processor import PROCESSOR

    deep = Image.fromarray(np.tile(np.arange(256, dtype=np.uint16) * 257, (32, 1)))
    eight = Image.fromarray(np.tile(np.arange(256, dtype=np.uint8), (32, 1)))
    pixels = [PROCESSOR(text=[VQA], images=[image])["pixel_values"] for image in (deep, eight)]
    np.testing.assert_array_equal(*pixels)
    with pytest.raises(UserError, match="image 0: no pixel"):
        PROCESSOR(text=[VQA], images=[Image.fromarray(np.full((4, 4), np.nan, np.float32))])


def test_the_answer_tells_what_was_done_to_the_file(tmp_path):
    from unimed.inference.request import Request, prepare

    Image.fromarray(RAMP16).save(tmp_path / "a.png")
    asked = prepare(Request(tmp_path / "a.png", "which organ"))
    assert asked.opened.notes == ("values 0 to 65535 shown as black to white",)


# sha256 of the sample's grey values, 8 bits, before they are resized: taken at commit 298e6e7.
SAMPLE = {
    "ct": "cfc4c8ca64b709611b26cd6944a264e70fdb7346ffd22dc378cd5ede5d5114ee",
    "mr": "16032a9be7dce2f59a8e7901d280203e79c205c07c9c72c15c3d36459d162874",
    "ct_dicom": "43b595f0c435dd5b287d345defe42886e2a1768be6bd30d17d6472370f2c9da1",
}


@pytest.mark.parametrize("name", SAMPLE)
def test_the_built_in_sample_keeps_its_pixels(name):
    volume = vendored_volume(name)
    seen = hashlib.sha256()
    for plane in volumes.PLANES:
        size = volume.data.shape[volumes.AXIS[plane]]
        for index in range(0, size, max(1, size // 10)):
            seen.update(volumes.window(volumes.cut(volume.data, plane, index), *volumes.window_of(volume)).tobytes())
    assert seen.hexdigest() == SAMPLE[name]


@pytest.mark.parametrize("case", range(40))
def test_mutated_pictures_give_an_image_or_one_line(tmp_path, case):
    rng = np.random.default_rng(case)
    image = Image.fromarray(rng.integers(0, 65536, (8, 8)).astype(np.uint16))
    name = ["a.png", "a.tif"][case % 2]
    image.save(tmp_path / name)
    data = bytearray((tmp_path / name).read_bytes())
    for _ in range(2):
        data[int(rng.integers(8, len(data)))] = int(rng.integers(0, 256))
    (tmp_path / name).write_bytes(data)
    image, error = attempt(lambda: read_image_file(tmp_path / name))
    assert image is None or image.mode == "RGB"
    assert error is None or (error.startswith(f"{tmp_path / name}: ") and "\n" not in error)
    attempt(lambda: image_size(tmp_path / name))


def test_an_unreadable_folder_or_file_is_one_line(tmp_path):
    with pytest.raises(UserError, match="no such image"):
        images.image_size(tmp_path / "none.png")
    with pytest.raises(UserError, match="0 DICOM slices"):
        read_image_file(tmp_path)
