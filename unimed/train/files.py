"""Writing files so that a killed run leaves whole ones: beside their place, then renamed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from unimed.data.files import sha256
from unimed.errors import UserError

MANIFEST = "manifest.json"


def write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1, sort_keys=False, ensure_ascii=False) + "\n")


def json_line(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"


def append_json_line(path: Path, value: Any) -> None:
    """Adds one whole line in one write."""
    with path.open("ab", buffering=0) as file:
        file.write(json_line(value).encode())


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from error


def write_folder(path: Path, fill: Callable[[Path], None]) -> None:
    """`fill` writes into a folder beside `path`; it takes its place with a manifest once complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.partial")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    try:
        fill(beside)
        place_folder(beside, path)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def place_folder(beside: Path, path: Path) -> None:
    """Seals the finished folder `beside` with a manifest of its files and renames it to `path`."""
    files = sorted(file for file in beside.rglob("*") if file.is_file() and file.name != MANIFEST)
    listed = {str(file.relative_to(beside)): {"bytes": file.stat().st_size, "sha256": sha256(file)} for file in files}
    write_json(beside / MANIFEST, listed)
    old = path.with_name(f".{path.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        os.replace(path, old)
    os.replace(beside, path)
    shutil.rmtree(old, ignore_errors=True)


def verify_folder(path: Path, hashes: bool = True) -> None:
    """Raises UserError naming the first file that is not as it was written. Without `hashes`, sizes only: no file is read."""
    if not (path / MANIFEST).is_file():
        raise UserError(f"{path}: no {MANIFEST}, so it is not a checkpoint that unimed finished writing")
    for name, expected in read_json(path / MANIFEST).items():
        file = path / name
        if not file.is_file():
            wrong = f"{name} is missing"
        elif (size := file.stat().st_size) != expected["bytes"]:
            wrong = f"{name} has {size} bytes, {expected['bytes']} were written"
        elif hashes and sha256(file) != expected["sha256"]:
            wrong = f"{name} is not what was written (sha256 differs)"
        else:
            continue
        raise UserError(f"{path}: corrupt: {wrong}; delete this folder, and --resume goes on from the checkpoint before it")
