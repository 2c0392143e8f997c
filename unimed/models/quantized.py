"""Language models in fewer bits: Linears in 4 or 8 bits while they are used (bitsandbytes), and files that hold them so (GGUF)."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from unimed.errors import UserError

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig

WHOLE = ["vision_tower", "connector", "lm_head"]  # parts that stay as they are


def settings(kind: str, dtype: torch.dtype) -> BitsAndBytesConfig:
    """For from_pretrained: "4bit" (NF4, its scales quantised too) or "8bit". `dtype`: of the products."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"language.quantize={kind!r}: the package bitsandbytes is not installed; get it with: pip install bitsandbytes")
    from transformers import BitsAndBytesConfig

    if kind == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=WHOLE)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=WHOLE,
    )


def read_gguf(file: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """The model of a GGUF file, its weights in `dtype`, and its tokenizer."""
    if importlib.util.find_spec("gguf") is None:
        raise UserError(f"{file.name}: the package gguf is not installed; get it with: pip install gguf")
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    # Without dequantize the weights stay in their blocks, and such a model cannot be saved.
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, quantization_config=GgufConfig(dequantize=True), dtype=dtype
    )
    for name in ("quantization_config", "_name_or_path"):
        model.config.__dict__.pop(name, None)
    return model, tokenizer
