"""Read saved models strictly."""

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import logging

from unimed import io
from unimed.errors import UserError
from unimed.models import quantized
from unimed.models.keys import require_same_keys
from unimed.models.unimed.configuration import UniMedConfig
from unimed.models.unimed.modeling import UniMedForConditionalGeneration
from unimed.models.unimed.processing import UniMedProcessor


def load(
    path: str | os.PathLike,
    *,
    base: str | os.PathLike | None = None,
    dtype: torch.dtype | None = None,
    trainable: bool = False,
    search: Iterable[str | os.PathLike] = (),
    quantize: bool = True,
) -> tuple[Any, UniMedProcessor]:
    """The model and processor saved in a folder; safetensors only, nothing fetched, every key and shape must fit.

    A folder with an adapter gives a model with LoRA on `base` (default: the base that the adapter names, relative to the adapter; if it
    is not there, a folder of that name in one of the folders `search`). `quantize=False`: the language model as it is saved, also where it
    was trained in 4 or 8 bits.
    """
    folder = Path(path)
    if (folder / "adapter_config.json").is_file():
        from unimed.models.adapter import load_adapter  # peft takes a second to import

        where = Path(base) if base is not None else base_folder(folder, search)
        model = load_base(where, dtype, quantize)
        return load_adapter(model, folder, trainable), _processor(folder if _has_processor(folder) else where, model.config)
    model = load_base(folder, dtype, quantize)
    return model, _processor(folder, model.config)


def base_folder(folder: Path, search: Iterable[str | os.PathLike] = ()) -> Path:
    """The folder of the base model that an adapter names."""
    name = _read_json(folder / "adapter_config.json").get("base_model_name_or_path")
    if not name:
        raise UserError(f"{folder}: the adapter names no base model, give its folder as base")
    places = [folder / name, Path(name), *(Path(place) / Path(name).name for place in search)]
    found = next((place for place in places if (place / "config.json").is_file()), None)
    if found is None:
        tried = " or ".join(dict.fromkeys(map(str, places)))
        raise UserError(f"{folder}: the adapter's base model is not at {tried}; give its folder as base")
    return found


def connector_weights(folder: Path) -> dict[str, Tensor]:
    """The connector's weights in a saved model, an adapter, or the `model` folder of a run."""
    for place in (folder, folder / "model"):
        for name, prefix in (("adapter_model.safetensors", "base_model.model.connector."), ("model.safetensors", "connector.")):
            if (place / name).is_file():
                try:
                    with safe_open(place / name, framework="pt") as file:
                        keys = [key for key in file.keys() if key.startswith(prefix)]  # noqa: SIM118
                        return {key.removeprefix(prefix): file.get_tensor(key) for key in keys}
                except (SafetensorError, OSError) as error:
                    raise UserError(f"{place / name}: cannot be read: {str(error).splitlines()[0]}") from error
    raise UserError(f"connector.from={str(folder)!r}: no model.safetensors or adapter_model.safetensors there; give a saved model or a run")


def pick_device(name: str) -> torch.device:
    """The device that `name` stands for: "auto" (a GPU where there is one), "cpu", "cuda", "cuda:1"."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    match = re.fullmatch(r"cpu|cuda(?::(\d+))?", name)
    if match is None:
        raise UserError(f"device {name!r}: it must be auto, cpu, cuda, or cuda:N")
    if name != "cpu" and not torch.cuda.is_available():
        raise UserError(f"device {name!r}: PyTorch finds no GPU here; use cpu or auto")
    if match[1] and int(match[1]) >= torch.cuda.device_count():
        raise UserError(f"device {name!r}: this machine has {torch.cuda.device_count()} GPUs, numbered from 0")
    return torch.device(name)


def load_base(folder: Path, dtype: torch.dtype | None = None, quantize: bool = True) -> UniMedForConditionalGeneration:
    """The model in a folder that holds all of it."""
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: no config.json, it must be a folder written by save_pretrained")
    stored = _read_json(folder / "config.json")
    kind, bits = stored.get("model_type"), stored.get("quantize") if quantize else None
    if kind != UniMedConfig.model_type:
        raise UserError(f"{folder}: config.json is of a {kind!r} model, it must be {UniMedConfig.model_type!r}")
    products = dtype or getattr(torch, (stored.get("dtypes") or {}).get("language_model", "float32"))
    packed = {"quantization_config": quantized.settings(bits, products)} if bits else {}
    if any(str((stored.get(part) or {}).get("model_type")).startswith("medmoe_") for part in ("vision_config", "text_config")):
        import unimed.models.medmoe  # noqa: F401  (its classes become known to the Auto classes)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # the report below says it in one line
    load_with_report: Any = UniMedForConditionalGeneration.from_pretrained
    try:
        model, info = load_with_report(
            folder,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **packed,
        )
    except (SafetensorError, OSError, ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"{folder}: the model cannot be read: {str(error).splitlines()[0]}") from error
    finally:
        logging.set_verbosity(verbosity)
    shapes = {key: (tuple(saved), tuple(wanted)) for key, saved, wanted in info["mismatched_keys"]}
    saved = dict.fromkeys(info["unexpected_keys"], ()) | {key: shape[0] for key, shape in shapes.items()}
    wanted = dict.fromkeys(info["missing_keys"], ()) | {key: shape[1] for key, shape in shapes.items()}
    require_same_keys(str(folder), saved, wanted)
    if dtype is None:
        model.apply_dtypes()
    return model


def _has_processor(folder: Path) -> bool:
    return (folder / "processor_config.json").is_file()


def _processor(folder: Path, config: UniMedConfig) -> UniMedProcessor:
    if not _has_processor(folder):
        raise UserError(f"{folder}: no processor_config.json, save the processor beside the model")
    try:
        processor = UniMedProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{folder}: the processor cannot be read: {str(error).splitlines()[0]}") from error
    if processor.num_image_tokens != config.num_image_tokens or tuple(processor.tasks) != config.tasks:
        raise UserError(
            f"{folder}: the processor makes {processor.num_image_tokens} image tokens for tasks {', '.join(processor.tasks)}, "
            f"the model takes {config.num_image_tokens} for {', '.join(config.tasks)}"
        )
    if len(processor.tokenizer) > config.text_config.vocab_size:
        raise UserError(f"{folder}: the tokenizer has {len(processor.tokenizer)} tokens, the model has {config.text_config.vocab_size}")
    return processor


def _read_json(file: Path) -> dict[str, Any]:
    content = io.read_json(file)
    if not isinstance(content, dict):
        raise UserError(f"{file}: it must hold a JSON object")
    return content
