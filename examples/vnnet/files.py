"""Whole-or-nothing files: written beside their place, flushed to the disk, then renamed. And the error that ends in one line."""

import hashlib
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch


class UserError(Exception):
    """One line that says what is wrong, where, and what would be right."""


def write(path: Path, fill: Callable[[BinaryIO], Any]) -> None:
    """``fill`` writes into a file beside ``path``, which takes its place once complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(beside, "wb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    write(path, lambda file: file.write(text.encode()))


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_array(path: Path, value: np.ndarray) -> None:
    write(path, lambda file: np.save(file, value, allow_pickle=False))


def write_tensors(path: Path, value: dict[str, Any]) -> None:
    write(path, lambda file: torch.save(value, file))


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None


def read_array(path: Path, memory_mapped: bool = False) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r" if memory_mapped else None, allow_pickle=False)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    except ValueError as error:
        raise UserError(
            f"{path}: not a plain .npy array; stations of unequal length must be padded with NaN to one array ({error})"
        ) from None


def read_tensors(path: Path) -> dict[str, Any]:
    """Tensors and plain values only: nothing in the file is executed."""
    try:
        return torch.load(path, weights_only=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError) as error:
        raise UserError(f"{path}: not a whole checkpoint ({str(error).splitlines()[0][:100]}); delete it and train again") from None


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
