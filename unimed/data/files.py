"""Files written whole or not at all, and paths that stay where they belong."""

import hashlib
import os
import tempfile
from pathlib import Path, PurePosixPath, PureWindowsPath

from unimed.errors import UserError


def write_bytes(path: Path, data: bytes) -> None:
    """Write beside ``path`` and rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as out:
            out.write(data)
        Path(name).chmod(0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def inside(root: Path, name: str, links: bool = True) -> Path:
    """``root / name``. A name with ``..``, an absolute one, or one that no file can have is a UserError.

    ``links``: symbolic links that lie in ``root`` are followed, wherever they lead; else one that leads out of ``root`` is a UserError.
    """
    for parts in (PurePosixPath(name), PureWindowsPath(name)):  # the same data set is refused on every system
        if parts.anchor or ".." in parts.parts:
            raise UserError(f"{name!r} leads out of {root}: file names in a dataset must stay inside its folder")
    path = Path(os.path.abspath(root), name)
    try:
        if os.fsencode(path).find(b"\0") >= 0:
            raise ValueError("null byte")
        if not links and not path.resolve().is_relative_to(root.resolve()):
            raise UserError(f"{name!r} leads out of {root} by a symbolic link, and data.links=false does not follow it")
    except (ValueError, OSError, RuntimeError) as error:  # a null byte, a lone surrogate, too long, a loop of links
        raise UserError(f"{name!r} in {root} is not a possible file name ({error})") from error
    return path


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
