"""DICOM frames: from stored values to the picture that their file describes (PS3.3), for one frame at a time.

    grey    stored -> modality LUT or rescale -> window or VOI LUT -> presentation LUT, inversion -> shutter -> turned -> square pixels
    colour  stored -> palette or RGB -> ICC profile                                              -> shutter -> turned -> square pixels

An attribute that changes the picture is applied, or the file is refused by one line. docs/unimed/images.md says which is which.
pydicom decodes the pixels; dicom_rules.py turns stored values into grey and colour.
"""

import importlib.util
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pydicom
from PIL import Image
from pydicom import uid
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.filereader import _read_file_meta_info, read_preamble
from pydicom.pixels import get_decoder

from unimed.errors import UserError
from unimed.records import dicom_rules as rules
from unimed.records import limits
from unimed.records.box import AS_STORED, Placement, stretched, turned
from unimed.records.dicom_rules import Header, Voi
from unimed.records.greys import PROJECTIONS, finite, grey_range, window
from unimed.records.text import short

SUFFIXES = (".dcm", ".dicom", ".ima")
EXTRA = "pip install 'cmoe-kernels[dicom]'"
_JPEG2000 = (*uid.JPEG2000TransferSyntaxes, uid.HTJ2KLossless, uid.HTJ2KLosslessRPCL, uid.HTJ2K)
_EXTRA_SYNTAXES = (*uid.JPEGLSTransferSyntaxes, *_JPEG2000)
_JP2 = b"\x00\x00\x00\x0cjP  "  # how a JPEG 2000 file starts, where a frame is one in place of a bare codestream
_OTHER_CODECS = {uid.JPEGExtended12Bit: "pylibjpeg pylibjpeg-libjpeg"}  # GPL; for JPEG lossless python-gdcm serves
_MEASURED = ("CT", "MR", "NM", "PT", *PROJECTIONS)  # their values are measurements also where they have eight bits
_NOT_PICTURES = {"RTDOSE": "a dose distribution", "REG": "a registration", "RTPLAN": "a treatment plan"}
# Functional groups of multi-frame files whose attributes stand for those of the same name in single-frame files.
_GROUPS = (
    *("PixelValueTransformationSequence", "FrameVOILUTSequence", "FrameDisplayShutterSequence", "PixelMeasuresSequence"),
    *("PlanePositionSequence", "PlaneOrientationSequence", "FramePixelDataPropertiesSequence"),
    *("CTImageFrameTypeSequence", "MRImageFrameTypeSequence", "PETFrameTypeSequence"),
)


@dataclass(frozen=True)
class Frame:
    """One decoded frame.

    values: grey in the file's unit, float32 with NaN where nothing was imaged, or colour uint8 [H, W, 3].
    visible: the shutter's opening, None without one; level: the shutter's grey. bits: of stored grey that is shown as stored, else 0.
    """

    name: str
    header: Header
    values: np.ndarray
    modality: str = ""
    voi: Voi | None = None
    inverted: bool = False
    presentation: np.ndarray | None = None
    visible: np.ndarray | None = None
    level: int = 0
    bits: int = 0
    notes: tuple[str, ...] = ()


@contextmanager
def readable(name: str) -> Iterator[None]:
    """Whatever goes wrong inside becomes one line of a UserError."""
    try:
        yield
    except UserError as error:
        raise UserError(short(error, 400)) from error  # it may quote the header
    except Exception as error:  # pydicom and its decoders raise many kinds
        raise UserError(f"{name}: not a readable DICOM image ({short(error)})") from error


def is_dicom(data: bytes) -> bool:
    """By content: the DICM prefix, or a first element of group 0002 or 0008 where a file has no preamble."""
    little = data[:2] in (b"\x02\x00", b"\x08\x00") and data[3:4] == b"\x00"
    big = data[:3] in (b"\x00\x02\x00", b"\x00\x08\x00")
    return data[128:132] == b"DICM" or (len(data) > 8 and (little or big))


def parse(name: str, data: bytes) -> Dataset:
    """The header and the pixels, still encoded. Files without a preamble and without a transfer syntax are read as what they look like."""
    with readable(name):
        if not is_dicom(data):
            raise ValueError("it starts with neither the DICM prefix nor a header")
        _check_deflated(name, data)
        made = pydicom.dcmread(io.BytesIO(data), force=True)
        if "TransferSyntaxUID" not in made.file_meta:
            if "PixelData" in made and made["PixelData"].is_undefined_length:
                raise UserError(f"{name}: compressed pixels, but no TransferSyntaxUID that says how")
            implicit, little = made.original_encoding
            made.file_meta = made.file_meta or FileMetaDataset()
            made.file_meta.TransferSyntaxUID = (
                uid.ImplicitVRLittleEndian if implicit else uid.ExplicitVRLittleEndian if little else uid.ExplicitVRBigEndian
            )
        return made


def _check_deflated(name: str, data: bytes) -> None:
    """Refuse a deflated file that inflates to more than `limits.BYTES`, before pydicom inflates it. pydicom itself says where it begins."""
    file = io.BytesIO(data)
    read_preamble(file, force=True)
    if _read_file_meta_info(file).get("TransferSyntaxUID") != uid.DeflatedExplicitVRLittleEndian:
        return
    unpack, rest, inflated = zlib.decompressobj(-zlib.MAX_WBITS), data[file.tell() :], 0
    while rest and not unpack.eof:
        inflated += len(unpack.decompress(rest, 1 << 24))
        rest = unpack.unconsumed_tail
        if inflated > limits.BYTES:
            raise UserError(f"{name}: inflates to more than {limits.size(limits.BYTES)}")


def has_pixels(source: Dataset) -> bool:
    return any(keyword in source for keyword in ("PixelData", "FloatPixelData", "DoubleFloatPixelData"))


def check_picture(name: str, source: Dataset) -> None:
    """Refuse what holds no picture."""
    with readable(name):
        kind = uid.UID(str(source.get("SOPClassUID") or source.file_meta.get("MediaStorageSOPClassUID") or "")).name
        modality = str(source.get("Modality") or "")
        if "DirectoryRecordSequence" in source or kind == "Media Storage Directory Storage":
            raise UserError(f"{name}: a DICOMDIR is an index of files; give one of them, or the folder of one series")
        if kind == "RT Dose Storage":
            modality = "RTDOSE"
        if modality in _NOT_PICTURES:
            raise UserError(f"{name}: {modality} is {_NOT_PICTURES[modality]}, not a picture")
        if not has_pixels(source):
            raise UserError(f"{name}: a DICOM file without pixels ({kind or modality or 'of unknown kind'})")
        if "TotalPixelMatrixColumns" in source and (tiles := frame_count(name, source)) > 1:
            raise UserError(f"{name}: a whole-slide image in {tiles} tiles; export the region you want as one picture")


def frame_count(name: str, source: Dataset) -> int:
    with readable(name):
        count = int(rules.first_of(source.get("NumberOfFrames") or 1) or 1)
        if count < 1:
            raise ValueError(f"NumberOfFrames is {count}")
        return count


def header_of(source: Dataset, index: int) -> Header:
    """The attributes of frame ``index``."""
    found = []
    for groups, at in (("PerFrameFunctionalGroupsSequence", index), ("SharedFunctionalGroupsSequence", 0)):
        items = source.get(groups) or []
        if items and at >= len(items):
            raise ValueError(f"{groups} has {len(items)} items, none for frame {index}")
        found += [items[at][keyword].value[0] for keyword in _GROUPS if items and items[at].get(keyword)]
    return Header(*found, source)


def read_frame(name: str, source: Dataset, index: int = 0) -> Frame:
    """Frame ``index``, decoded and rescaled."""
    with readable(name):
        header = header_of(source, index)
        if int(header.get("Rows", 0)) * int(header.get("Columns", 0)) > limits.PIXELS:
            raise UserError(f"{name}: {header.get('Columns')} x {header.get('Rows')} pixels, at most {limits.PIXELS} are read")
        stored, found = _decode(name, source, header, index)
        colours = found["photometric_interpretation"]
        bits = int(found.get("bits_stored", 0))
        notes: list[str] = []
        if any(element.tag.group in range(0x6000, 0x6100, 2) and element.tag.element in (0x3000, 0x0100) for element in source):
            notes.append("overlays not drawn")
        visible, level = rules.shutter(source, header, stored.shape[:2])
        if visible is not None:
            notes.append(f"shutter ({header.text('ShutterShape').lower()})")
        if colours in ("MONOCHROME1", "MONOCHROME2"):
            frame = _grey(name, source, header, stored, colours, bits, notes)
            if visible is not None:
                frame.values[~visible] = np.nan
        else:
            frame = Frame(name, header, rules.coloured(source, header, stored, colours, bits, notes))
        return replace(frame, visible=visible, level=level, notes=tuple(notes))


def _decode(name: str, source: Dataset, header: Header, index: int) -> tuple[np.ndarray, dict[str, Any]]:
    """Stored values of one frame and the attributes that describe them after decoding; YBR comes as RGB."""
    syntax = source.file_meta.TransferSyntaxUID
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:
        raise UserError(f"{name}: pixels encoded as {syntax.name}, which is not a still picture that can be decoded") from None
    allocated, high, kept = (int(header.get(keyword, 0)) for keyword in ("BitsAllocated", "HighBit", "BitsStored"))
    shifted = header.get("HighBit") is not None and kept > 0 and high != kept - 1 and "PixelData" in source
    if shifted and not kept - 1 < high < allocated:
        raise ValueError(f"HighBit {high} does not fit BitsStored {kept} and BitsAllocated {allocated}")
    shifted = shifted and (not syntax.is_encapsulated or syntax == uid.RLELossless)
    if syntax in _JPEG2000:
        _check_boxes(source.PixelData)
    options: dict[str, Any] = {"bits_stored": allocated} if shifted else {}
    try:
        stored, found = decoder.as_array(source, index=index, **options)
    except Exception as error:
        if not decoder.is_available or _missing_codec(syntax):
            helps = EXTRA if syntax in _EXTRA_SYNTAXES else f"pip install {_OTHER_CODECS.get(syntax, 'python-gdcm')}"
            raise UserError(f"{name}: its pixels are {syntax.name}; to decode them: {helps}") from error
        raise
    if stored.dtype.kind in "iu" and stored.dtype.itemsize == 8:
        raise ValueError("64-bit integer pixels")
    if shifted:  # the values do not end at bit 0, which pydicom takes for granted
        stored = np.right_shift(np.left_shift(stored, allocated - 1 - high), allocated - kept)
        found["bits_stored"] = kept
    return stored, found


def _check_boxes(data: bytes) -> None:
    """Refuse JP2 boxes of no length: pydicom 3.0 would walk round them for ever."""
    start = data.find(_JP2)
    while start >= 0:
        at = start + 12
        while at < len(data) and data[at + 4 : at + 8] != b"jp2c":
            length = int.from_bytes(data[at : at + 4], "big")
            if length < 8:
                raise ValueError("a JPEG 2000 box of no length")
            at += length
        start = data.find(_JP2, start + 1)


def _missing_codec(syntax: uid.UID) -> bool:
    if syntax in uid.JPEG2000TransferSyntaxes:
        return importlib.util.find_spec("openjpeg") is None
    return syntax == uid.JPEGExtended12Bit and importlib.util.find_spec("libjpeg") is None


def _grey(name: str, source: Dataset, header: Header, stored: np.ndarray, colours: str, bits: int, notes: list[str]) -> Frame:
    if header.text("PixelPresentation") in ("COLOR", "MIXED") or "EnhancedPaletteColorLookupTableSequence" in source:
        raise UserError(f"{name}: grey with a supplemental or enhanced palette, which is not supported")
    if "GrayLookupTableData" in source:
        raise UserError(f"{name}: a retired grey lookup table, which is not supported")
    padded = rules.padding(header, stored)
    rescaled = rules.modality(source, header, stored, notes)
    values = rescaled.astype(np.float32)
    if padded is not None and padded.any():
        values[padded] = np.nan
        notes.append("padding drawn black")
    modality = header.text("Modality")
    hounsfield = header.has("RescaleIntercept") or header.has("ModalityLUTSequence") or finite(values).min(initial=0) < 0
    if modality == "CT" and not (hounsfield and header.text("RescaleType", "HU") in ("HU", "HU_MOD")):
        modality = "OT"
        notes.append("CT values that are not in HU")
    shape = header.text("PresentationLUTShape")
    if shape not in ("", "IDENTITY", "INVERSE", "LIN OD"):
        raise UserError(f"{name}: PresentationLUTShape {shape}, expected IDENTITY or INVERSE")
    inverted = colours == "MONOCHROME1" or shape == "INVERSE"  # one inversion: for MONOCHROME1 PS3.3 wants INVERSE as well
    if inverted:
        notes.append(f"inverted ({colours if colours == 'MONOCHROME1' else 'PresentationLUTShape INVERSE'})")
    if header.text("PresentationIntentType") == "FOR PROCESSING":
        notes.append("raw detector values (FOR PROCESSING)")
    if header.text("RecommendedViewingMode") == "SUB":
        notes.append("without the subtraction that the file recommends")
    if header.text("Modality") == "SEG":
        notes.append("a mask (SEG), not an image")
    as_stored = 0 < bits <= 8 and stored.dtype.kind == "u" and rescaled is stored and modality not in _MEASURED
    voi, presentation = rules.voi(source, header, values, notes), rules.presentation(source, header)
    return Frame(name, header, values, modality, voi, inverted, presentation, bits=bits if as_stored else 0)


def picture(frame: Frame, grey: tuple[float, float] | None = None) -> tuple[Image.Image, tuple[str, ...], Placement]:
    """The frame as an RGB image with square pixels, what was done to it, and where its pixels lie in the file.

    ``grey``: lowest and highest value shown.
    """
    with readable(frame.name):
        notes = list(frame.notes)
        if frame.values.ndim == 3:
            if grey is not None:
                raise UserError(f"{frame.name}: a colour image takes no window")
            shown = frame.values.copy() if frame.visible is not None else frame.values
        else:
            shown = _shown(frame, grey, notes)
        if frame.visible is not None:
            shown[~frame.visible] = frame.level
        spacing = _pixel_size(frame.header)
        shown, spacing, placement = _turned(shown, frame.header, spacing, notes)
        image = Image.fromarray(np.ascontiguousarray(shown)).convert("RGB")
        ratio = spacing[0] / spacing[1]
        if abs(ratio - 1) > 0.01:
            if not 1 / 16 <= ratio <= 16:
                raise ValueError(f"pixels of {spacing[0]:g} x {spacing[1]:g}, which is not a plausible shape")
            size = (image.width, round(image.height * ratio)) if ratio > 1 else (round(image.width / ratio), image.height)
            placement = placement.after(stretched(size, image.size))
            image = image.resize(size, Image.Resampling.BILINEAR)
            notes.append(f"stretched to square pixels, {size[0]} x {size[1]}")
        return image, tuple(notes), placement


def _shown(frame: Frame, grey: tuple[float, float] | None, notes: list[str]) -> np.ndarray:
    """Grey uint8 after window, presentation LUT and inversion."""
    values = frame.values
    known = finite(values)
    if not known.size:
        raise UserError(f"{frame.name}: every pixel is padding or not a number")
    voi = frame.voi
    if grey is None and voi is not None and not voi.shows(known):
        if known.min() < known.max():
            notes.append(f"{voi} not used: it shows none of the values {known.min():g} to {known.max():g}")
        voi = None
    if grey is not None:
        notes.append(f"window {grey[0]:g} to {grey[1]:g} as asked")
        shown = window(values, *grey)
    elif voi is not None:
        notes.append(str(voi))
        shown = voi(values)
    else:
        full = 2.0**frame.bits - 1
        low, high = (0.0, full) if frame.bits and known.max() > full / 16 else grey_range(known, frame.modality)
        notes.append(f"window {low:g} to {high:g}")
        shown = window(values, low, high)
    if frame.presentation is not None:
        notes.append("presentation LUT")
        shown = frame.presentation[shown]
    if frame.inverted:
        shown = 255 - shown
    shown[np.isnan(values)] = 0
    return shown


def _pixel_size(header: Header) -> tuple[float, float]:
    """Height and width of a pixel; (1, 1) where the file does not say."""
    for keyword in ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing", "PixelAspectRatio"):
        try:
            size = header.numbers(keyword, 2)
        except ValueError:
            continue
        if size is not None and min(size) > 0:
            return size[0], size[1]
    return 1.0, 1.0


def _turned(
    shown: np.ndarray, header: Header, spacing: tuple[float, float], notes: list[str]
) -> tuple[np.ndarray, tuple[float, float], Placement]:
    """A slice whose place in the patient is known, in radiological view: right on the left, anterior or superior at the top."""
    try:
        directions = header.numbers("ImageOrientationPatient", 6)
    except ValueError:
        directions = None
    if directions is None:
        _name_mirrored(header, notes)
        return shown, spacing, AS_STORED
    across, down = np.array(directions[:3]), np.array(directions[3:])
    x, y = int(np.abs(across).argmax()), int(np.abs(down).argmax())
    if x == y or not across[x] or not down[y]:
        notes.append("ImageOrientationPatient is no pair of axes: shown as stored")
        return shown, spacing, AS_STORED
    # The axes of a view and their growing directions, in DICOM's patient axes (left, posterior, superior).
    wanted = {2: ((0, 1), (1, 1)), 1: ((0, 1), (2, -1)), 0: ((1, 1), (2, -1))}[3 - x - y]
    view, swapped = shown, x != wanted[0][0]
    if swapped:
        view, across, down, x, y, spacing = view.swapaxes(0, 1), down, across, y, x, spacing[::-1]
    left_right, top_bottom = across[x] * wanted[0][1] < 0, down[y] * wanted[1][1] < 0
    if left_right:
        view = view[:, ::-1]
    if top_bottom:
        view = view[::-1]
    if view is not shown:
        notes.append("turned to the radiological view")
    return view, spacing, turned(view.shape[1], view.shape[0], swapped, bool(left_right), bool(top_bottom))


def _name_mirrored(header: Header, notes: list[str]) -> None:
    """Radiographs are shown as stored, as viewers do; a header that calls them mirrored or upside down is named."""
    sides = header.get("PatientOrientation")
    if sides is not None and not isinstance(sides, str) and len(sides) == 2:
        across, down = str(sides[0]).upper(), str(sides[1]).upper()
        if across.startswith("R") or down.startswith("H"):
            notes.append(f"shown as stored; its rows run to {across}, its columns to {down} (PatientOrientation)")
