"""CSV tables of any length, plain or gzipped, read row by row."""

from __future__ import annotations

import csv
import gzip
import io
import math
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from unimed.errors import UserError
from unimed.records.files import short
from unimed.records.policy import BadRecord, Tally

CELL = 1 << 27  # characters of a cell at most: a run-length mask is long


def find(folder: Path, names: Sequence[str]) -> Path | None:
    """The first of the tables that is there, plain or gzipped. A name may be a pattern."""
    for name in names:
        for form in (name, f"{name}.gz"):
            found = sorted(folder.glob(form))
            if found:
                return found[0]
    return None


def has(path: Path, columns: Sequence[str]) -> bool:
    """Whether the first row of a table names the columns."""
    try:
        with _text(path) as file:
            return set(columns) <= {name.strip() for name in next(csv.reader(file), [])}
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error):
        return False


def rows(path: Path, columns: Sequence[str], tally: Tally) -> Iterator[tuple[str, dict[str, str]]]:
    """Place ("file:line") and cells by column of every row. A row with too few or too many cells is left out.

    Raises:
        UserError: the first row lacks one of the columns, or the file cannot be read.
    """
    csv.field_size_limit(CELL)
    place = path.relative_to(tally.folder) if path.is_relative_to(tally.folder) else path
    try:
        with _text(path) as file:
            reader = csv.reader(file)
            header = [name.strip() for name in next(reader, [])]
            for column in columns:
                if column not in header:
                    raise UserError(f"{path}: column {column!r} is missing in its first row, which has {short(header)}")
            for cells in reader:
                where = f"{place}:{reader.line_num}"
                if not cells:
                    continue
                if len(cells) != len(header):
                    what = f"{path}:{reader.line_num}: {len(cells)} cells, expected {len(header)}"
                    tally.leave_out(BadRecord("with too few or too many cells", what))
                    continue
                yield where, dict(zip(header, cells, strict=True))
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not a readable CSV table ({error})") from error


def _text(path: Path) -> io.TextIOBase:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
    return path.open(encoding="utf-8-sig", newline="")


def number(cells: dict[str, str], column: str, where: str) -> float:
    """A cell that must hold a finite number."""
    try:
        found = float(cells[column])
    except ValueError:
        found = math.nan
    if not math.isfinite(found):
        raise BadRecord(f"with a wrong {column!r}", f"{where}: {column} is {short(cells[column])}, expected a number")
    return found


def size(cells: dict[str, str], width: str, height: str) -> tuple[int, int] | None:
    """(width, height) of two cells; None unless both are whole numbers above zero."""
    try:
        found = int(float(cells.get(width, ""))), int(float(cells.get(height, "")))
    except (ValueError, OverflowError):
        return None
    return found if min(found) > 0 else None
