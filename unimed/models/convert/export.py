"""A trained model of ours, to the released layout: what `convert release` reads, bit for bit."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cmoe_kernels import CMoEConfig
from cmoe_kernels.nn.convert import to_unimed
from unimed import io
from unimed.errors import UserError
from unimed.models.adapter import WEIGHTS
from unimed.models.convert import checkpoint, eva
from unimed.models.convert.checkpoint import Row
from unimed.models.convert.config import release_section
from unimed.models.convert.release import LLM, TOWER, rotary
from unimed.models.load import base_folder
from unimed.models.unimed.configuration import UniMedConfig

ADAPTER = "base_model.model."


def convert(folder: Path, out: Path) -> list[Row]:
    """Write the file `out`. Only the folder's own tensors are read, not the base of an adapter."""
    checkpoint.refuse_existing(out)
    state, model_config, lora = _trained(folder)
    if model_config.text_config.model_type != "llama" or model_config.vision_config.model_type != "blip_2_vision_model":
        kinds = f"{model_config.vision_config.model_type} and {model_config.text_config.model_type}"
        raise UserError(f"{folder}: the released layout is of EVA-CLIP (blip_2_vision_model) and llama; this model is of {kinds}")
    c = CMoEConfig.from_dict(model_config.connector)
    pairs: list[tuple[str, str]] = []
    released: dict[str, Tensor] = {}

    def add(new: dict[str, Tensor], ours: str) -> None:
        released.update(new)
        pairs.extend((ours, key) for key in new)

    for layer in range(model_config.text_config.num_hidden_layers if lora else 0):
        if (frequencies := rotary(model_config.text_config)) is not None:
            add({f"{LLM}model.layers.{layer}.self_attn.rotary_emb.inv_freq": frequencies}, "(computed)")
    for key, value in state.items():
        part, _, rest = key.partition(".")
        if part == "language_model" and ".lora_" in rest:
            add({LLM + rest.replace(".weight", ".default.weight"): value}, key)
        elif part == "connector":
            try:
                named = to_unimed({rest: value}, c)
            except ValueError as error:
                raise UserError(f"{folder}: {error}") from error
            if "experts" in rest and release_section(c, None)["has_moe"] is False:
                named = {name.replace("moe_layers.0.", "llm_proj."): one for name, one in named.items()}
            else:
                named |= {name.replace("moe_layers", "llm_proj"): one for name, one in named.items() if name.startswith("moe_layers")}
            add(named, key)
        elif part != "vision_tower" or ".lora_" in rest:
            raise UserError(f"{folder}: {key} was trained, and the released layout has no place for it")
    if tower := {key.removeprefix("vision_tower."): value for key, value in state.items() if key.startswith("vision_tower.")}:
        add({TOWER + key: value for key, value in eva.tower_file(tower).items()}, "vision_tower.*")
        add({key.replace("post_layernorm", "ln_vision"): tower[key] for key in eva.LAST_NORM}, "vision_tower.post_layernorm.*")
    with io.beside(out) as partial:
        torch.save({"model": released, "config": {"model": release_section(c, lora)}, "epoch": 0}, partial)
    return checkpoint.key_map(pairs)


def _trained(folder: Path) -> tuple[dict[str, Tensor], UniMedConfig, dict[str, Any] | None]:
    """What trained, under the names of the model without adapters; the model's configuration; r, alpha and targets of its LoRA."""
    if (folder / WEIGHTS).is_file():
        adapter = io.read_json(folder / "adapter_config.json")
        base = base_folder(folder)
        state = {key.removeprefix(ADAPTER): value for key, value in _tensors(folder / WEIGHTS).items()}
        targets = sorted({found[1] for key in state if (found := re.search(r"\.(\w+)\.lora_A\.", key))})
        lora = {"r": adapter["r"], "alpha": adapter["lora_alpha"], "targets": targets}
        return state, UniMedConfig.from_pretrained(base), lora
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: no trained model there: neither {WEIGHTS} nor config.json")
    config = UniMedConfig.from_pretrained(folder)
    frozen = {"vision_tower": config.freeze_vision, "connector": config.freeze_connector, "language_model": config.freeze_language}
    state = {}
    for file in sorted(folder.glob("model*.safetensors")):
        state |= _tensors(file, tuple(f"{part}." for part, still in frozen.items() if not still or part == "connector"))
    return state, config, None


def _tensors(file: Path, prefixes: tuple[str, ...] = ("",)) -> dict[str, Tensor]:
    try:
        with safe_open(file, framework="pt") as opened:
            return {key: opened.get_tensor(key) for key in opened.keys() if key.startswith(prefixes)}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: cannot be read: {str(error).splitlines()[0]}") from error
