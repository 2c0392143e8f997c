"""Reading JSON, JSON lines, CSV, record fields and images with errors that say where. A record that is wrong is a BadRecord."""

import csv
import json
import math
import os
import reprlib
from collections import Counter
from collections.abc import Iterable, Iterator
from io import BufferedReader, BytesIO
from pathlib import Path
from typing import Any, BinaryIO

from unimed.errors import UserError
from unimed.records.box import Placement
from unimed.records.pixels import View, open_image, open_view, placed_size
from unimed.records.policy import BadRecord, Tally
from unimed.records.text import clean

SMALL = 1 << 16  # bytes: a smaller file is read at once
ENDS = {b"\xff\xd8": b"\xff\xd9", b"\x89P": b"IEND"}  # of a JPEG and of a PNG: a file that was cut off does not end like this
# The cells that pandas.read_csv reads as missing by default, with which the release drops rows.
MISSING = frozenset(
    ["", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA", "NULL", "NaN", "None",
     "n/a", "nan", "null"]
)  # fmt: skip


def short(value: Any) -> str:
    """``repr`` of a value for a message, cut where it is long."""
    return reprlib.repr(value)


def read_text(path: Path) -> str:
    """A UTF-8 text file."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise BadRecord("in a missing file", f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise BadRecord("in a file that is not UTF-8 text", f"{path}: not readable as UTF-8 text ({error})") from error


def parse_json(text: str, where: str) -> Any:
    """A JSON value. Any error of the parser is a BadRecord, also numbers with too many digits and nesting too deep."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRecord("that are not valid JSON", f"{where}: not valid JSON ({error})") from error


def read_json(path: Path, kind: type) -> Any:
    """A JSON file whose top is a ``kind`` (list or dict)."""
    return of_kind(parse_json(read_text(path), str(path)), kind, f"{path}: the top")


def of_kind(value: Any, kind: type, what: str) -> Any:
    """``value``, which must be a ``kind``."""
    if not isinstance(value, kind):
        raise BadRecord("of the wrong form", f"{what} is a {type(value).__name__}, expected a {kind.__name__}")
    return value


def read_lines(path: Path) -> Iterator[str]:
    """Lines of a text file with their ends, cut at line feeds and carriage returns only: U+2028, U+0085 and the like belong to the text.

    Bytes that are not UTF-8 come as lone surrogates: `text` finds them in the record that has them.
    """
    try:
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            yield from file
    except OSError as error:
        raise BadRecord("in a file that cannot be read", f"{path}: cannot be read ({error})") from error


def csv_rows(path: Path, columns: Iterable[str], tally: Tally) -> Iterator[tuple[int, dict[str, str]]]:
    """Line number and cells by column of every row of a CSV file whose first row names the columns.

    A row without one cell for each column is left out. Where a quote never closes, only the line that opens it is lost.
    """
    lines = list(read_lines(path))
    header, at, wrong = _csv_row(lines, 0)
    if wrong:
        raise UserError(f"{path}:1: {wrong}")
    for column in columns:
        if column not in header:
            raise UserError(f"{path}: column {column!r} is missing in its first row, which has {short(header)}")
    while at < len(lines):
        cells, used, wrong = _csv_row(lines, at)
        if not wrong and cells and len(cells) != len(header):
            wrong = f"{len(cells)} cells, expected {len(header)}"
        if wrong:
            kind = "with a quote that never closes" if "quote" in wrong or used > 1 else "with too few or too many cells"
            tally.leave_out(BadRecord(kind, f"{path}:{at + 1}: {wrong}"))
            used = 1
        elif cells:
            yield at + 1, dict(zip(header, cells, strict=True))
        at += used


def _csv_row(lines: list[str], at: int) -> tuple[list[str], int, str]:
    """Cells of the row that begins at a line, how many lines it takes, and what is wrong with it."""
    reader = csv.reader((lines[i] for i in range(at, len(lines))), strict=True)
    try:
        return next(reader, []), max(reader.line_num, 1), ""
    except csv.Error as error:
        # strict: a quote that was left open ends at the next one that opens, two records later, with text behind it.
        if reader.line_num > 1 or "end of data" in str(error):
            return [], reader.line_num, f"a quote opens and never closes ({error})"
    try:
        return next(csv.reader(lines[at : at + 1])), 1, ""  # as pandas reads a quote in the middle of a cell
    except csv.Error as error:
        return [], 1, str(error)


def field(record: Any, key: str, where: str, kind: type | tuple[type, ...] = str) -> Any:
    """``record[key]``, which must be there and be a ``kind``."""
    if not isinstance(record, dict):
        raise BadRecord("of the wrong form", f"{where}: a {type(record).__name__}, expected an object with {key!r}")
    if record.get(key) is None:
        has = short(list(record)) if record else "none"
        raise BadRecord(f"without {key!r}", f"{where}: field {key!r} is {'null' if key in record else f'missing (it has {has})'}")
    if not isinstance(record[key], kind) or isinstance(record[key], bool):
        names = " or ".join(one.__name__ for one in (kind if isinstance(kind, tuple) else (kind,)))
        raise BadRecord(f"with a wrong {key!r}", f"{where}: field {key!r} is a {type(record[key]).__name__}, expected {names}")
    return record[key]


def text(record: Any, key: str, where: str, kind: type | tuple[type, ...] = str) -> str:
    """The text of a field, which must hold some."""
    return cleaned(field(record, key, where, kind), key, where)


def cleaned(value: Any, key: str, where: str, max_words: int = 0) -> str:
    """``value`` as text with single spaces, of at most ``max_words`` words (0: all); empty or not Unicode is a BadRecord."""
    if isinstance(value, float) and not math.isfinite(value):
        raise BadRecord(f"without {key!r}", f"{where}: field {key!r} is {value}, expected text")
    words = clean(str(value), max_words)
    if not words:
        raise BadRecord(f"without {key!r}", f"{where}: field {key!r} is empty")
    if not _is_unicode(words):
        raise BadRecord("with text that is not Unicode", f"{where}: field {key!r} holds bytes or surrogates that are no text")
    return words


def name(value: Any) -> str:
    """An identifier of a record as text that can be written to any file."""
    found = str(value)
    return found if _is_unicode(found) else found.encode("utf-8", "backslashreplace").decode()


def _is_unicode(value: str) -> bool:
    try:
        return value.isascii() or bool(value.encode())
    except UnicodeEncodeError:
        return False


def whole_image(image: Path | View) -> tuple[tuple[int, int], Placement]:
    """Size and placement of an image that is there, readable and not cut off."""
    path = image if isinstance(image, Path) else image.path
    try:
        if not (os.path.isfile(path) or (isinstance(image, View) and os.path.isdir(path))):  # Path.is_file raises for too long a name
            raise BadRecord("with a missing image", f"{path}: no such image")
        if isinstance(image, View):
            opened = open_view(image)
            return opened.rgb.size, opened.to_original
        with path.open("rb", buffering=0) as raw:
            start = raw.read(SMALL)
            file: BinaryIO = BytesIO(start) if len(start) < SMALL else BufferedReader(raw)
            file.seek(-min(64, len(start)), 2)
            # Pixels are decoded in training; here only of files that do not say where they end, or do not end there.
            if (end := ENDS.get(start[:2])) and end in file.read():
                return placed_size(path, file)
        opened = open_image(path)
        return opened.rgb.size, opened.to_original
    except BadRecord:
        raise
    except Exception as error:  # decoders raise nearly anything
        text = str(error) if isinstance(error, UserError) else f"{path}: not a readable image ({error})"
        raise BadRecord("with an unreadable image", text) from error


def once(key: str, seen: Counter[str]) -> str:
    """The key, with a number behind it where it came before; ``seen`` counts the keys so far."""
    seen[key] += 1
    return key if seen[key] == 1 else f"{key}#{seen[key]}"
