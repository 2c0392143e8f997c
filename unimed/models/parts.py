"""The two parts that transformers brings: vision towers and language models, from scratch, from a folder or from a hub.

Weights are read from safetensors only, and code that comes with them is never run.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import HfApi, try_to_load_from_cache
from torch import nn
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig
from transformers.utils import logging

from unimed.errors import UserError
from unimed.models.published import published
from unimed.models.quantized import read_gguf
from unimed.models.spec import LANGUAGE, VISION, Family, Language, Vision, family
from unimed.models.unimed.modeling import tower_class
from unimed.models.unimed.tokenization import IMAGE_TOKEN

T = TypeVar("T")
NEVER = {"trust_remote_code": False}


def vision_config(part: Vision) -> PreTrainedConfig:
    """The configuration of a tower from scratch."""
    kind = _kind("vision", part.source, VISION)
    sizes = {"hidden_size": part.width, "num_hidden_layers": part.layers, "num_attention_heads": part.heads}
    sizes |= {"image_size": part.image_size, "patch_size": part.patch_size}
    sizes |= {"mlp_ratio": 3} if hasattr(kind, "mlp_ratio") else {"intermediate_size": 3 * part.width}
    defaults = dict(VISION[part.source].defaults) if part.source in VISION else {}
    return _configured("vision", kind, {**defaults, **sizes, **part.config})


def text_config(part: Language, tokenizer: Any, vocab_size: int) -> PreTrainedConfig:
    """The configuration of a language model from scratch, for the tokens of `tokenizer`."""
    kind = _kind("language", part.source, LANGUAGE)
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(f"language.from={part.source!r}: not a causal language model; tested are {', '.join(LANGUAGE)}")
    sizes = {"vocab_size": vocab_size, "hidden_size": part.width, "intermediate_size": part.mlp_width}
    sizes |= {"num_hidden_layers": part.layers, "num_attention_heads": part.heads, "max_position_embeddings": 1024}
    optional = {"num_key_value_heads": part.heads, "head_dim": part.width // part.heads}
    sizes |= {name: size for name, size in optional.items() if hasattr(kind, name)}
    tokens = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    return _configured("language", kind, {**sizes, **tokens, "tie_word_embeddings": True, **part.config})


def read_config(part: str, source: str) -> PreTrainedConfig:
    """The configuration of what `from` names, without its weights: of a folder, of published weights, or of the hub's cache."""
    known = published(source)
    if known is not None and not Path(source).is_dir():
        fields = dict(known.config)
        return CONFIG_MAPPING[fields.pop("model_type")](**fields)
    if source.endswith(".gguf"):
        return _read(part, source, lambda: AutoConfig.from_pretrained(Path(source).parent, gguf_file=Path(source).name))
    return _read(part, source, lambda: AutoConfig.from_pretrained(source, **NEVER))


def read_tower(source: str, dtype: torch.dtype) -> nn.Module:
    """A tower with its weights; of a model for image and text, its vision side."""

    def read() -> nn.Module:
        config = AutoConfig.from_pretrained(source, **NEVER)
        config = getattr(config, "vision_config", config)
        return tower_class(config).from_pretrained(source, config=config, dtype=dtype, use_safetensors=True)

    return _read("vision", source, read)


def read_language_model(source: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """A causal language model and its tokenizer, both with `<image>` as a token."""

    def read() -> tuple[Any, Any]:
        if source.endswith(".gguf"):
            return read_gguf(Path(source), dtype)
        tokenizer = AutoTokenizer.from_pretrained(source, **NEVER)
        return AutoModelForCausalLM.from_pretrained(source, dtype=dtype, use_safetensors=True, **NEVER), tokenizer

    model, tokenizer = _read("language", source, read)
    if tokenizer.eos_token is None:
        raise UserError(f"language.from={source!r}: its tokenizer has no eos_token, so answers would not end")
    tokenizer.chat_template = None  # the processor has its own
    if tokenizer.convert_tokens_to_ids(IMAGE_TOKEN) in (None, tokenizer.unk_token_id):
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]}, replace_extra_special_tokens=False)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if len(tokenizer) > model.config.vocab_size:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.config.__dict__.pop("_name_or_path", None)
    return model, tokenizer


def answer_prefix(tokenizer: Any) -> str:
    """The text before an answer that is tokenised: a blank, unless the tokenizer adds its own."""
    first = tokenizer.convert_ids_to_tokens(tokenizer("a", add_special_tokens=False)["input_ids"])[0]
    return "" if first.startswith("\u2581") else " "


def image_statistics(source: str, config: PreTrainedConfig) -> dict[str, Any]:
    """Mean and deviation of the images that a tower was trained on: of its own folder, else of its family."""
    file = Path(source) / "preprocessor_config.json"
    if file.is_file():
        try:
            stored = json.loads(file.read_text(encoding="utf-8"))
            return {name: [float(value) for value in stored[name]] for name in ("image_mean", "image_std")}
        except (OSError, ValueError, TypeError, KeyError):
            pass
    known = family(config.model_type)
    return {"image_mean": list(known.mean), "image_std": list(known.std)}


def _kind(part: str, name: str, tested: dict[str, Family]) -> type[PreTrainedConfig]:
    known = tested[name].model_type if name in tested else name
    if known not in CONFIG_MAPPING:
        what = f"no architecture of transformers; tested are {', '.join(tested)}; a folder is written with a slash: ./{name}"
        raise UserError(f"{part}.from={name!r}: {what}")
    return CONFIG_MAPPING[known]


def _configured(part: str, kind: type[PreTrainedConfig], settings: dict[str, Any]) -> PreTrainedConfig:
    try:
        return kind(**settings)
    except Exception as error:  # each configuration has its own checks
        raise UserError(f"{part}.config: {' '.join(str(error).split())}") from error


def _read(part: str, source: str, read: Callable[[], T]) -> T:
    """`read`, quietly; what goes wrong is one line."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        if not Path(source).exists() and not isinstance(try_to_load_from_cache(source, "config.json"), str):
            HfApi().model_info(source, timeout=10)  # from_pretrained would try again and again for a minute
        return read()
    except UserError:
        raise
    except Exception as error:  # transformers, huggingface_hub, safetensors and the file system each have their own
        what = "cannot be read" if Path(source).exists() else "is no folder here, and as a hub name it cannot be read"
        raise UserError(f"{part}.from={source!r}: {what}: {' '.join(str(error).split())[:300]}") from error
    finally:
        logging.set_verbosity(verbosity)
