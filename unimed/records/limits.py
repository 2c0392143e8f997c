"""The most of an image that is opened. A process that opens images of strangers lowers both (`lower`)."""

from PIL import Image

PIXELS = 178_956_970  # of a frame; Pillow's own limit for the other formats
BYTES = 4 << 30  # of a file, a volume or an archive, unpacked


def lower(pixels: int, unpacked: int) -> None:
    """The limits of this process from now on, for every format."""
    global PIXELS, BYTES
    PIXELS, BYTES = pixels, unpacked
    Image.MAX_IMAGE_PIXELS = max(1, pixels // 2)  # Pillow warns from there on, and refuses twice as many


def size(count: int) -> str:
    """A number of bytes, for messages."""
    return f"{count / 2**30:.3g} GiB" if count >= 2**29 else f"{count / 2**20:.3g} MiB"
