"""Damages image files and lines of records and reads them as training does, in 1 GB of address space: `python mutate.py COUNT SEED`.

A case ends in questions whose images open, in a counted skip, or in one line. Anything else, a traceback or ten seconds, is printed.
"""

import io
import json
import random
import resource
import signal
import sys
import tempfile
import traceback
import warnings
from pathlib import Path

import nibabel
import numpy as np
from dicom_samples import dicom_file
from PIL import Image

from unimed.datasets import DATASETS
from unimed.datasets.items import read_items
from unimed.errors import UserError
from unimed.records.policy import Tally

LIMIT = 1 << 30
SECONDS = 10
HEADER = 400  # bytes at the beginning, where most of the damage goes
RAMP = np.arange(24 * 32, dtype=np.uint16).reshape(24, 32)


def encoded(name, **options):
    packed = io.BytesIO()
    Image.fromarray(RAMP if name == "16 bit png" else (RAMP % 256).astype(np.uint8)).save(packed, name.rpartition(" ")[2], **options)
    return packed.getvalue()


def files():
    """Name and bytes of a whole file of each kind."""
    volume = nibabel.Nifti1Image(np.arange(6 * 7 * 5, dtype=np.int16).reshape(6, 7, 5), np.diag([1.0, 1.0, 2.0, 1.0]))
    exif = Image.Exif()
    exif[0x0112] = 6
    return {
        "a.png": encoded("png"),
        "deep.png": encoded("16 bit png"),
        "a.jpg": encoded("jpeg", exif=exif),
        "a.tif": encoded("tiff"),
        "a.dcm": dicom_file(RAMP),
        "frames.dcm": dicom_file(np.stack([RAMP] * 3), NumberOfFrames=3),
        "v.nii": volume.to_bytes(),
    }


def record(name):
    ref = {"path": name, **({"frame": 1} if name == "frames.dcm" else {"slice": 2, "plane": "axial"} if name == "v.nii" else {})}
    qa = {"kind": "qa", "question": "Which plane?", "answer": "axial", "options": ["axial", "coronal"]}
    box = {"kind": "box", "name": "liver", "xyxy": [1, 1, 4, 4]}
    return json.dumps({"id": "r", "dataset": "d", "split": "train", "patient": "p", "images": [ref], "annotations": [qa, box]})


def damaged(data, rng):
    """Up to four flipped bits, most in the header; at times bytes are cut off, doubled or overwritten."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        changed[rng.randrange(min(HEADER, len(changed)) if rng.random() < 0.8 else len(changed))] ^= 1 << rng.randrange(8)
    at = rng.randrange(len(changed))
    kind = rng.random()
    if kind < 0.1:
        del changed[at:]
    elif kind < 0.2:
        changed[at:at] = changed[at : at + rng.randint(1, 40)]
    elif kind < 0.4:
        changed[at : at + 4] = rng.choice([b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f"])
    return bytes(changed)


def case(folder, whole, rng):
    """One damaged data set; True when questions came of it."""
    name = rng.choice(sorted(whole))
    line = record(name).encode()
    if rng.random() < 0.2:
        line = damaged(line, rng)
        (folder / name).write_bytes(whole[name])
    else:
        (folder / name).write_bytes(damaged(whole[name], rng))
    (folder / "records-00000.jsonl").write_bytes(line + b"\n")
    tally = Tally("d", folder, "train")
    try:
        items = read_items(DATASETS["records"], tally)
        assert "\n" not in tally.line()
        for item in items:
            if item.image is not None:
                item.open()
    except UserError as error:
        if "\n" in str(error):
            raise RuntimeError("an error of several lines") from error
        return False
    assert items or tally.left_out or tally.records <= 1
    return bool(items)


def late(*_):
    raise TimeoutError(f"longer than {SECONDS} s")


def main(count, seed):
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT, LIMIT))
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGALRM, late)
    whole = files()
    useful = 0
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "dataset.json").write_text('{"name": "d"}')
        for number in range(count):
            signal.alarm(SECONDS)
            try:
                useful += case(folder, whole, random.Random(f"{seed}/{number}"))
            except Exception:
                print(f"case {number} of seed {seed}:", traceback.format_exc(), sep="\n")
                return 1
            finally:
                signal.alarm(0)
    print(f"{count} cases, {useful} of use")
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2])))
