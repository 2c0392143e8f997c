"""DICOM files made for the tests, and what comes of opening files."""

import io

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from unimed.errors import UserError

SYNTAXES = {"explicit": ExplicitVRLittleEndian, "implicit": ImplicitVRLittleEndian, "big endian": ExplicitVRBigEndian}


def dicom_dataset(pixels, **tags):
    """An image of grey [H, W], RGB [H, W, 3] or, with NumberOfFrames, a stack of these. Tags overrule; None is an empty tag."""
    made = Dataset()
    made.SOPClassUID, made.SOPInstanceUID, made.Modality = "1.2.840.10008.5.1.4.1.1.7", "2.25.1", "OT"
    flat = pixels[0] if "NumberOfFrames" in tags else pixels
    made.Rows, made.Columns = flat.shape[:2]
    made.SamplesPerPixel, made.PhotometricInterpretation = (3, "RGB") if flat.ndim == 3 else (1, "MONOCHROME2")
    if flat.ndim == 3:
        made.PlanarConfiguration = 0
    made.BitsAllocated = made.BitsStored = 8 * pixels.dtype.itemsize
    made.HighBit, made.PixelRepresentation = made.BitsStored - 1, int(pixels.dtype.kind == "i")
    for keyword, value in tags.items():
        setattr(made, keyword, value)
    made.PixelData = pixels.tobytes()
    made["PixelData"].VR = "OW" if made.BitsAllocated > 8 else "OB"
    return made


def written(made, syntax="explicit", preamble=True):
    if syntax == "big endian" and made.BitsAllocated > 8:
        made.PixelData = np.frombuffer(made.PixelData, f"u{made.BitsAllocated // 8}").byteswap().tobytes()
        made["PixelData"].VR = "OW"
    made.file_meta = FileMetaDataset()
    made.file_meta.MediaStorageSOPClassUID, made.file_meta.MediaStorageSOPInstanceUID = made.SOPClassUID, made.SOPInstanceUID
    made.file_meta.TransferSyntaxUID = SYNTAXES[syntax]
    out = io.BytesIO()
    made.save_as(out, enforce_file_format=True)
    data = out.getvalue()
    return data if preamble else data[144 + int.from_bytes(data[140:144], "little") :]


def dicom_file(pixels, syntax="explicit", preamble=True, **tags):
    return written(dicom_dataset(pixels, **tags), syntax, preamble)


def item(**tags):
    made = Dataset()
    for keyword, value in tags.items():
        setattr(made, keyword, value)
    return made


def lut(entries, first=0, bits=16, size=None, **tags):
    """A LUT item; ``entries`` are numbers, or bytes as they lie in the file."""
    made = item(**tags)
    made.add_new("LUTDescriptor", "SS" if first < 0 else "US", [(size or len(entries)) % 65536, first, bits])
    made.add_new("LUTData", "OW" if isinstance(entries, bytes) else "US", entries)
    return made


def attempt(read):
    """(what ``read`` gives, None) or (None, the UserError's text); any other exception goes through."""
    try:
        return read(), None
    except UserError as error:
        return None, str(error)
