"""Files of tensors, read without running anything in them, and the key map of a conversion."""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unimed.errors import UserError


class Row(NamedTuple):
    """A pattern of keys in the file and in our model, with N for a number, and how many tensors; `ours` says why where none is made."""

    theirs: str
    ours: str
    tensors: int


def key_map(pairs: Iterable[tuple[str, str]]) -> list[Row]:
    """The rows of (their key, our key)."""
    counted = Counter((_pattern(theirs), _pattern(ours)) for theirs, ours in pairs)
    return [Row(*names, count) for names, count in counted.items()]


def _pattern(key: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "N", key, count=1)


def read(path: str | os.PathLike) -> Any:
    """The content of a file of torch.save: tensors, numbers, text and their containers; anything else in it is an error.

    Tensors stay on the disk until they are used.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"{path}: not a checkpoint of plain tensors: {str(error).splitlines()[0]}") from error


def tensors(path: str | os.PathLike, content: Any) -> dict[str, Tensor]:
    """`content` as names and tensors."""
    if not isinstance(content, dict) or not content or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{path}: it must map names to tensors")
    return content


def shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in state.items()}


def refuse_existing(out: Path) -> None:
    if out.exists():
        raise UserError(f"{out}: exists; choose another name")
