"""Files written whole or not at all, and paths that stay where they belong."""

import hashlib
import os
import tempfile
from pathlib import Path

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


def inside(root: Path, name: str) -> Path:
    """``root / name``, or a UserError when that would leave ``root`` (``..``, an absolute path, a link out)."""
    root = root.resolve()
    path = (root / name).resolve()
    if not path.is_relative_to(root):
        raise UserError(f"{name!r} leads out of {root}: file names in a dataset must stay inside its folder")
    return path


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
