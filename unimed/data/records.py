"""Reading JSON, JSON lines and record fields with errors that say where."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from unimed.errors import UserError


def read_text(path: Path) -> str:
    """A UTF-8 text file."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as UTF-8 text ({error})") from error


def read_json(path: Path, kind: type) -> Any:
    """A JSON file whose top is a ``kind`` (list or dict)."""
    try:
        value = json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(value, kind):
        raise UserError(f"{path}: the top is a {type(value).__name__}, expected a {kind.__name__}")
    return value


def read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers and objects of a JSON lines file; blank lines are skipped."""
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise UserError(f"{path}:{number}: not valid JSON ({error})") from error
        if not isinstance(value, dict):
            raise UserError(f"{path}:{number}: a {type(value).__name__}, expected an object")
        yield number, value


def field(record: Any, key: str, where: str, kind: type | tuple[type, ...] = str) -> Any:
    """``record[key]``, which must be there and be a ``kind``."""
    if not isinstance(record, dict):
        raise UserError(f"{where}: a {type(record).__name__}, expected an object with {key!r}")
    if key not in record:
        raise UserError(f"{where}: field {key!r} is missing (it has {', '.join(map(str, list(record)[:8])) or 'none'})")
    if not isinstance(record[key], kind) or isinstance(record[key], bool):
        names = " or ".join(one.__name__ for one in (kind if isinstance(kind, tuple) else (kind,)))
        raise UserError(f"{where}: field {key!r} is a {type(record[key]).__name__}, expected {names}")
    return record[key]
