"""What a DICOM file says of how its stored values become grey or colour (PS3.3): tables, windows, palettes, profiles and shutters.

pydicom applies the tables. Some of its table functions wrap round or fail on tables that PS3.3 allows; here every table first gets the form
on which they are right (`_table`), and values are cut to the table's range.
"""

import io
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from pydicom.dataset import Dataset
from pydicom.multival import MultiValue
from pydicom.pixels import apply_color_lut, apply_icc_profile, apply_modality_lut, apply_presentation_lut, apply_voi, apply_windowing

from unimed.records.greys import finite
from unimed.records.text import plain, short


class Header:
    """The attributes of one frame: its own functional groups first, then the shared ones, then the file. Empty counts as absent."""

    def __init__(self, *datasets: Dataset):
        self._datasets = datasets

    def get(self, keyword: str, default: Any = None) -> Any:
        for dataset in self._datasets:
            value = dataset.get(keyword)
            if value is not None and not (hasattr(value, "__len__") and len(value) == 0):
                return value
        return default

    def text(self, keyword: str, default: str = "") -> str:
        return str(first_of(self.get(keyword, default))).strip().upper()

    def numbers(self, keyword: str, count: int | None = None) -> tuple[float, ...] | None:
        """Finite numbers, or None where the attribute is absent."""
        value = self.get(keyword)
        if value is None:
            return None
        values = tuple(float(v) for v in _list(value))
        if not np.isfinite(values).all() or (count is not None and len(values) != count):
            raise ValueError(f"{keyword} is {value}, expected {count or 'finite'} number{'s' if count != 1 else ''}")
        return values

    def has(self, keyword: str) -> bool:
        """Whether the attribute is there, empty or not."""
        return any(keyword in dataset for dataset in self._datasets)

    def number(self, keyword: str, default: float) -> float:
        values = self.numbers(keyword)
        return default if values is None else values[0]


@dataclass(frozen=True)
class Voi:
    """The window, sigmoid or table by which a file shows its values: values in, grey 0 to 255 out."""

    kind: str  # LINEAR, LINEAR_EXACT, SIGMOID or LUT
    key: tuple[float, ...]  # centre and width, or the table's first value and entries
    label: str = ""
    top: float = 255.0
    rules: Dataset = field(default_factory=Dataset, compare=False, repr=False)

    def __call__(self, values: np.ndarray) -> np.ndarray:
        if self.kind == "LUT":
            first = self.key[0]
            index = np.rint(np.clip(np.nan_to_num(values, nan=first), first, first + len(self.key) - 2)).astype(np.int64)
            grey = apply_voi(index, self.rules) * (255 / self.top)
        else:
            with np.errstate(over="ignore"):
                grey = apply_windowing(values, self.rules)
        return np.rint(np.nan_to_num(np.clip(grey, 0, 255))).astype(np.uint8)

    def shows(self, values: np.ndarray) -> bool:
        """False where all values would look the same: the window lies beside them."""
        values = finite(values)
        return bool(values.size) and len(np.unique(self(np.array([values.min(), values.max()])))) > 1

    def __str__(self) -> str:
        if self.kind == "LUT":
            return f"VOI LUT of the file{self.label}"
        centre, width = self.key
        if self.kind == "SIGMOID":
            return f"sigmoid of the file, centre {centre:g}, width {width:g}{self.label}"
        if self.kind == "LINEAR":
            centre, width = centre - 0.5, width - 1
        return f"window {centre - width / 2:g} to {centre + width / 2:g} of the file{self.label}"


def _list(value: Any) -> list[Any]:
    """The values of an attribute that may have one or several."""
    return list(value) if isinstance(value, list | tuple | MultiValue) else [value]


def first_of(value: Any) -> Any:
    return _list(value)[0]


def padding(header: Header, stored: np.ndarray) -> np.ndarray | None:
    """Pixels where nothing was imaged: the padding value, or from it to the range's other end."""
    prefix = {"f4": "Float", "f8": "DoubleFloat"}.get(stored.dtype.str[1:], "")
    ends = [header.get(f"{prefix}PixelPadding{end}") for end in ("Value", "RangeLimit")]
    if ends[0] is None:
        return None
    limits = [float(first_of(end)) for end in ends if end is not None]
    if stored.dtype.kind == "i":  # some writers give signed values as unsigned ones
        half = 2 ** (8 * stored.dtype.itemsize - 1)
        limits = [limit - 2 * half if limit >= half else limit for limit in limits]
    return (stored >= min(limits)) & (stored <= max(limits))


def _table(source: Dataset, item: Dataset, signed: bool) -> tuple[Dataset, int, int, float]:
    """A LUT item in the form that pydicom reads rightly, its first value, its size and its greatest grey.

    Entries come as words or as packed bytes, in the file's byte order; the first value may be written as unsigned. Where no entry
    comes near the depth that the descriptor names, the depth of the entries counts (as viewers do), else the picture would be black.
    """
    size, first, bits = (int(v) for v in item.LUTDescriptor)
    size, first = size % 65536 or 65536, first - 65536 if signed and first > 32767 else first
    data = item.LUTData
    if isinstance(data, bytes):
        order = "<" if source.file_meta.TransferSyntaxUID.is_little_endian else ">"
        entries = np.frombuffer(data[: len(data) // 2 * 2], order + "u2") if len(data) >= 2 * size else np.frombuffer(data, np.uint8)
    else:
        entries = np.atleast_1d(np.array(data, np.int64)) & 0xFFFF
    entries = entries[:size].astype(np.int64)
    if len(entries) < size:
        raise ValueError(f"a LUT with {len(entries)} of {size} entries")
    made = Dataset()
    made.LUTDescriptor = [size % 65536, first, 16]
    made.add_new("LUTData", "US", entries.tolist())
    return made, first, size, _greatest(entries, bits)


def _greatest(entries: np.ndarray, bits: int) -> float:
    """The value of a full grey or colour: by the depth named, or by that of the entries where they are far below or above it."""
    most = int(entries.max())
    named = 2 ** min(max(bits, 1), 16) - 1
    return float(named if named / 16 < most <= named else 2 ** max(8, most.bit_length()) - 1)


def modality(source: Dataset, header: Header, stored: np.ndarray, notes: list[str]) -> np.ndarray:
    """Values in the file's unit; ``stored`` itself where the file changes nothing."""
    rules = Dataset()
    if header.get("ModalityLUTSequence"):
        table, first, size, _ = _table(source, header.get("ModalityLUTSequence")[0], stored.dtype.kind == "i")
        rules.ModalityLUTSequence = [table]
        notes.append("modality LUT")
        return apply_modality_lut(np.clip(stored.astype(np.int64), first, first + size - 1), rules)
    slope, intercept = header.number("RescaleSlope", 1), header.number("RescaleIntercept", 0)
    if slope == 0:
        raise ValueError("RescaleSlope is 0, which makes every pixel the same")
    if (slope, intercept) == (1, 0):
        return stored
    rules.add_new("RescaleSlope", "FD", slope)  # as floats: pydicom's decimal strings have 16 characters at most
    rules.add_new("RescaleIntercept", "FD", intercept)
    notes.append(f"rescaled by {slope:g} and {intercept:+g}")
    return apply_modality_lut(stored, rules)


def voi(source: Dataset, header: Header, values: np.ndarray, notes: list[str]) -> Voi | None:
    """The file's first VOI LUT, else its first window; None without a usable one."""
    if header.get("VOILUTSequence"):
        item = header.get("VOILUTSequence")[0]
        table, first, _, top = _table(source, item, bool(finite(values).min(initial=0) < 0))
        rules = Dataset()
        rules.VOILUTSequence = [table]
        return Voi("LUT", (first, *table.LUTData), _label(item.get("LUTExplanation")), top, rules)
    try:
        centres, widths = header.numbers("WindowCenter"), header.numbers("WindowWidth")
    except ValueError as error:
        notes.append(f"window ignored: {short(error)}")
        return None
    if centres is None or widths is None:
        return None
    kind = header.text("VOILUTFunction", "LINEAR")
    if kind not in ("LINEAR", "LINEAR_EXACT", "SIGMOID"):
        raise ValueError(f"VOILUTFunction {kind}, expected LINEAR, LINEAR_EXACT or SIGMOID")
    if widths[0] < 1 if kind == "LINEAR" else widths[0] <= 0:
        notes.append(f"window ignored: its width is {widths[0]:g}")
        return None
    rules = Dataset()  # an unsigned 8-bit picture: pydicom then maps to 0..255
    rules.PhotometricInterpretation, rules.BitsStored, rules.PixelRepresentation, rules.VOILUTFunction = "MONOCHROME2", 8, 0, kind
    rules.add_new("WindowCenter", "FD", centres[0])
    rules.add_new("WindowWidth", "FD", widths[0])
    return Voi(kind, (centres[0], widths[0]), _label(header.get("WindowCenterWidthExplanation")), rules=rules)


def _label(value: Any) -> str:
    text = plain(first_of(value or ""))
    return f" ({text})" if text else ""


def presentation(source: Dataset, header: Header) -> np.ndarray | None:
    """Grey 0..255 to grey 0..255 by the presentation LUT, None without one."""
    if not header.get("PresentationLUTSequence"):
        return None
    table, _, _, top = _table(source, header.get("PresentationLUTSequence")[0], False)
    rules = Dataset()
    rules.PresentationLUTSequence = [table]
    # pydicom stretches what it gets to the table's length, so it gets the whole range of grey.
    return np.rint(np.clip(apply_presentation_lut(np.arange(256), rules) * (255 / top), 0, 255)).astype(np.uint8)


def coloured(source: Dataset, header: Header, stored: np.ndarray, colours: str, bits: int, notes: list[str]) -> np.ndarray:
    if colours == "PALETTE COLOR":
        first, table = _palette(source, header, stored.dtype.kind == "i")
        rgb = table[np.clip(stored.astype(np.int64) - first, 0, len(table) - 1)]
        notes.append("palette")
    elif colours == "RGB" and stored.ndim == 3 and stored.shape[2] == 3 and stored.dtype.kind == "u":
        rgb = stored
        if bits != 8 or stored.dtype.itemsize != 1:
            rgb = np.rint(np.clip(stored / (2.0**bits - 1), 0, 1) * 255).astype(np.uint8)
    else:
        raise ValueError(f"PhotometricInterpretation {colours} with pixels of {stored.dtype}: expected grey, RGB, YBR_FULL or a palette")
    path = header.get("OpticalPathSequence")
    profile = header.get("ICCProfile") or (path[0].get("ICCProfile") if path else None)
    return with_profile(rgb, profile, notes) if profile else rgb


def with_profile(rgb: np.ndarray, profile: bytes, notes: list[str]) -> np.ndarray:
    """Colours (uint8 [H, W, 3]) brought from their ICC profile to sRGB."""
    from PIL import ImageCms

    try:
        told = plain(ImageCms.getProfileDescription(ImageCms.ImageCmsProfile(io.BytesIO(profile))))
        if "srgb" in told.lower():
            return rgb
        rules = Dataset()
        rules.ICCProfile = profile
        made = apply_icc_profile(rgb.copy(), rules, color_space="sRGB")
    except Exception as error:  # a broken profile; pydicom and littleCMS raise many kinds
        notes.append(f"ICC profile ignored ({short(error)})")
        return rgb
    notes.append(f"ICC profile {told}")
    return made


def _palette(source: Dataset, header: Header, signed: bool) -> tuple[int, np.ndarray]:
    """First mapped value and colours uint8 [entries, 3]."""
    rules, seen = Dataset(), set()
    rules.file_meta = source.file_meta
    segmented = header.get("RedPaletteColorLookupTableData") is None
    if segmented and header.get("SegmentedRedPaletteColorLookupTableData") is None:
        raise ValueError("PALETTE COLOR, but no palette")
    for colour in ("Red", "Green", "Blue"):
        size, first, bits = (int(v) for v in header.get(f"{colour}PaletteColorLookupTableDescriptor", (0, 0, 0)))
        size, first = size % 65536 or 65536, first - 65536 if signed and first > 32767 else first
        seen.add((size, first, bits))
        setattr(rules, f"{colour}PaletteColorLookupTableDescriptor", [size % 65536, 0, bits if segmented else 16])
        item = Dataset()
        item.LUTDescriptor = [size % 65536, 0, bits]
        if segmented:
            data = header.get(f"Segmented{colour}PaletteColorLookupTableData", b"")
            _check_segments(data, size, bits, source.file_meta.TransferSyntaxUID.is_little_endian)
            setattr(rules, f"Segmented{colour}PaletteColorLookupTableData", data)
        else:
            item.add_new("LUTData", "OW", header.get(f"{colour}PaletteColorLookupTableData", b""))
            entries = np.array(_table(source, item, False)[0].LUTData, np.uint16)
            setattr(rules, f"{colour}PaletteColorLookupTableData", entries.tobytes())
    if len(seen) != 1:
        raise ValueError("palettes of red, green and blue with different descriptors")
    if header.get("AlphaPaletteColorLookupTableData") or header.get("SegmentedAlphaPaletteColorLookupTableData"):
        raise ValueError("a palette with transparency")
    table = apply_color_lut(np.arange(size), rules)
    greatest = 0xFF00 if bits == 16 and table.any() and not (table & 0xFF).any() else _greatest(table, bits)  # 8 bits in the high byte
    return first, np.rint(table * (255 / greatest)).clip(0, 255).astype(np.uint8)


def _check_segments(data: bytes, size: int, bits: int, little: bool) -> None:
    """Refuse the segmented palettes that pydicom expands wrongly."""
    if bits == 8:
        if size > 256:
            raise ValueError(f"a segmented 8-bit palette of {size} entries, at most 256 are supported")
        return
    words, at = np.frombuffer(data, "<u2" if little else ">u2"), 0
    while at + 1 < len(words):
        if words[at] == 2:
            raise ValueError("a segmented 16-bit palette with indirect segments")
        at += 3 if words[at] == 1 else 2 + int(words[at + 1])


def shutter(source: Dataset, header: Header, shape: tuple[int, int]) -> tuple[np.ndarray | None, int]:
    """True where the display shutter is open, and the grey outside."""
    shapes = header.get("ShutterShape")
    if shapes is None:
        return None, 0
    rows, columns = np.indices(shape) + 1
    visible = np.ones(shape, bool)
    for kind in [shapes] if isinstance(shapes, str) else shapes:
        if kind == "RECTANGULAR":
            left, right, upper, lower = (
                header.number(f"Shutter{edge}Edge", missing)
                for edge, missing in (
                    ("LeftVertical", 1),
                    ("RightVertical", shape[1]),
                    ("UpperHorizontal", 1),
                    ("LowerHorizontal", shape[0]),
                )
            )
            visible &= (columns >= left) & (columns <= right) & (rows >= upper) & (rows <= lower)
        elif kind == "CIRCULAR":
            row, column = header.numbers("CenterOfCircularShutter", 2) or (0, 0)
            visible &= (rows - row) ** 2 + (columns - column) ** 2 <= header.number("RadiusOfCircularShutter", 0) ** 2
        elif kind == "POLYGONAL":
            corners = np.array(header.numbers("VerticesOfThePolygonalShutter") or ()).reshape(-1, 2)[:, ::-1] - 1
            drawn = Image.new("1", shape[::-1])
            ImageDraw.Draw(drawn).polygon([(float(x), float(y)) for x, y in corners], fill=1, outline=1)
            visible &= np.asarray(drawn)
        elif kind == "BITMAP":
            group = int(header.get("ShutterOverlayGroup", 0))
            closed = source.overlay_array(group).astype(bool)
            if closed.shape != shape or [int(v) for v in source[group, 0x0050].value] != [1, 1]:
                raise ValueError("a bitmap shutter that does not cover the picture")
            visible &= ~closed
        else:
            raise ValueError(f"ShutterShape {kind}, expected RECTANGULAR, CIRCULAR, POLYGONAL or BITMAP")
    if not visible.any():
        raise ValueError("a shutter that hides every pixel")
    return visible, int(header.number("ShutterPresentationValue", 0)) % 65536 // 257
