"""Files and folders written whole or not at all, JSON read with errors that say where, paths that stay where they belong."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from unimed.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

MANIFEST = "manifest.json"


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """A path beside ``path`` to write a file to. It is renamed to ``path`` when the block ends, and removed when the block fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        yield Path(name)
        Path(name).chmod(0o644)
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    with beside(path) as partial:
        partial.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1, sort_keys=False, ensure_ascii=False) + "\n")


def json_line(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"


def append_json_line(path: Path, value: Any) -> None:
    """Adds one whole line in one write."""
    with path.open("ab", buffering=0) as file:
        file.write(json_line(value).encode())


def written_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file that `append_json_line` writes; a last line that a kill cut off is removed from the file."""
    if not path.exists():
        return []
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    found = []
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            one = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}:{number}: not valid JSON ({error}); move this file away, or name another one") from error
        if not isinstance(one, dict):
            raise UserError(f"{path}:{number}: not a JSON object; move this file away, or name another one")
        found.append(one)
    if whole != data:
        write_bytes(path, whole)
    return found


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
    partial = path.with_name(f".{path.name}.partial")
    with _own(partial, path):
        try:
            fill(partial)
            place_folder(partial, path)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _own(partial: Path, path: Path) -> Iterator[None]:
    """An empty folder that no other process fills meanwhile; what a killed one left in it is deleted."""
    partial.mkdir(exist_ok=True)
    folder = os.open(partial, os.O_RDONLY) if fcntl else -1
    try:
        try:
            if fcntl:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = not fcntl or (partial.is_dir() and os.path.samestat(os.fstat(folder), partial.stat()))
        except BlockingIOError:
            free = False
        except OSError:  # a file system without locks
            free = True
        if not free:
            raise UserError(f"{path}: another process is writing it; wait for it, or choose another folder")
        for left in partial.iterdir():
            shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
        yield
    finally:
        if fcntl:
            os.close(folder)


def write_into(folder: Path, fill: Callable[[Path], None]) -> set[str]:
    """`fill` writes files into a folder inside `folder`; each takes its place once all are complete. Returns their names."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder, ignore_cleanup_errors=True) as name:
        fill(Path(name))
        files = list(Path(name).iterdir())
        for file in files:
            os.replace(file, folder / file.name)
    return {file.name for file in files}


def place_folder(partial: Path, path: Path) -> None:
    """Seals the finished folder `partial` with a manifest of its files and renames it to `path`."""
    files = sorted(file for file in partial.rglob("*") if file.is_file() and file.name != MANIFEST)
    listed = {str(file.relative_to(partial)): {"bytes": file.stat().st_size, "sha256": sha256(file)} for file in files}
    write_json(partial / MANIFEST, listed)
    _take_place(partial, path)


def _take_place(partial: Path, path: Path) -> None:
    old = path.with_name(f".{path.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        os.replace(path, old)
    os.replace(partial, path)
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


# Names without anything that needs a look: no part begins with a dot, no drive, no backslash, no character that a file system lacks.
_PLAIN = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,199}(?:/[A-Za-z0-9_-][A-Za-z0-9_.-]{0,199}){0,9}")


def check_name(name: str, root: Path) -> None:
    """A name with ``..``, an absolute one, or one that no file in ``root`` can have is a UserError."""
    if _PLAIN.fullmatch(name):  # nearly all names; paths are slow to take apart
        return
    for parts in (PurePosixPath(name), PureWindowsPath(name)):  # the same data set is refused on every system
        if parts.anchor or ".." in parts.parts:
            raise UserError(f"{name!r} leads out of {root}: file names in a dataset must stay inside its folder")
    try:
        if os.fsencode(name).find(b"\0") >= 0:
            raise ValueError("null byte")
    except ValueError as error:  # also a lone surrogate
        raise _impossible(name, root, error) from error


def inside(root: Path, name: str, links: bool = True) -> Path:
    """``root / name``, for a name that `check_name` lets through.

    ``links``: symbolic links that lie in ``root`` are followed, wherever they lead; else one that leads out of ``root`` is a UserError.
    """
    check_name(name, root)
    path = Path(os.path.abspath(root), name)
    try:
        if not links and not path.resolve().is_relative_to(root.resolve()):
            raise UserError(f"{name!r} leads out of {root} by a symbolic link, and data.links=false does not follow it")
    except (ValueError, OSError, RuntimeError) as error:  # too long, a loop of links
        raise _impossible(name, root, error) from error
    return path


def _impossible(name: str, root: Path, error: Exception) -> UserError:
    return UserError(f"{name!r} in {root} is not a possible file name ({error})")


def cache_folder() -> Path:
    """Where what can be made again is kept: UNIMED_CACHE, by default ~/.cache/unimed."""
    return Path(os.path.abspath(os.environ.get("UNIMED_CACHE") or os.path.expanduser("~/.cache/unimed")))


def index_folder() -> Path:
    """Where `unimed.datasets.index` keeps the items of data sets."""
    return cache_folder() / "index"


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
