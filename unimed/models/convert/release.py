"""Checkpoints of the released project: the trained tensors, to a model folder of ours."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cmoe_kernels import CMoEConfig
from cmoe_kernels.nn.convert import from_unimed
from unimed import io
from unimed.errors import UserError
from unimed.models.adapter import BASE, add_lora
from unimed.models.build import build
from unimed.models.convert import checkpoint, config, eva
from unimed.models.convert.checkpoint import Row
from unimed.models.keys import nearest, require_same_keys
from unimed.models.load import load
from unimed.models.spec import DTYPES, Lora, ModelSpec
from unimed.models.unimed.card import record_training
from unimed.models.unimed.modeling import EvaVisionModel

LLM = "llm_model.base_model.model."
LORA = re.compile(re.escape(LLM) + r"(model\.layers\.\d+\.(?:.+\.)?(\w+)\.lora_([AB]))\.default\.weight")
ROTARY = re.compile(re.escape(LLM) + r"model\.layers\.(\d+)\.self_attn\.rotary_emb\.inv_freq")
TOWER, NORM = "visual_encoder.", "ln_vision."
CONNECTOR = re.compile(r"(moe_layers|llm_proj)\.(\d+)\.([02])\.(weight|bias)|router\.fc[12]\.(weight|bias)|task_tokens\.\w+")
PLAIN = re.compile(r"llm_proj\.([02])\.(weight|bias)")  # one projector, no mixture
OURS = {"fc1.weight": "w1", "fc1.bias": "b1", "fc2.weight": "w2", "fc2.bias": "b2"}
KNOWN = [f"{name}.N.{layer}.{kind}" for name in ("moe_layers", "llm_proj") for layer in (0, 2) for kind in ("weight", "bias")]
KNOWN += [f"router.{name}" for name in OURS] + [f"task_tokens.{task}" for task in ("vqa", "refer", "identify", "caption", "cls")]
KNOWN += [f"{LLM}model.layers.N.self_attn.{name}_proj.lora_{side}.default.weight" for name in "qkvo" for side in "AB"]
KNOWN += [f"{LLM}model.layers.N.mlp.{name}_proj.lora_{side}.default.weight" for name in ("gate", "up", "down") for side in "AB"]
KNOWN += [f"{LLM}model.layers.N.self_attn.rotary_emb.inv_freq", "ln_vision.weight", "ln_vision.bias"]


@dataclass(frozen=True)
class Released:
    """A checkpoint's tensors. `connector` is in our names; `lora`, `rotary` and `tower` are in the file's. `rows`: the key map."""

    where: str
    connector_config: CMoEConfig
    connector: dict[str, Tensor]
    lora: dict[str, Tensor]
    targets: list[str]
    alpha: int
    dropout: float
    rotary: dict[str, Tensor]
    tower: dict[str, Tensor]
    norm: dict[str, Tensor]
    rows: list[Row]


def read(path: str | os.PathLike, settings: Mapping[str, Any] | None = None) -> Released:
    """Read a checkpoint: tensors only, nothing in the file is executed.

    `settings`: a configuration of the release, for what shapes cannot show; by default the one in the file, else the released values.
    """
    content = checkpoint.read(path)
    state = content.get("model") if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path}: it must hold a dictionary whose 'model' entry maps names to tensors")
    inside = content.get("config")
    given = settings or (inside if isinstance(inside, dict) and isinstance(inside.get("model"), dict) else {})
    parts = config.model_recipe(str(path), given["model"], []) if given else {"connector": {}, "language": {}}
    wanted = parts["language"].get("lora", {})

    groups: dict[str, dict[str, Tensor]] = {name: {} for name in ("connector", "lora", "rotary", "tower", "norm")}
    for key, value in state.items():
        groups[_group(str(path), key)][key] = value
    plain = {key: value for key, value in groups["connector"].items() if PLAIN.fullmatch(key)}
    named = {key.replace("llm_proj.", "moe_layers.0.") if key in plain else key: value for key, value in groups["connector"].items()}
    chosen = {
        name: parts["connector"][name]
        for name in ("router", "router_inputs", "top_k", "resample", "resample_rate")
        if name in parts["connector"]
    }
    if plain:
        chosen = {**chosen, "router": "constant"}
    try:
        connector_config, connector = from_unimed(named, **chosen)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: {error}") from error
    targets = sorted({found[2] for key in groups["lora"] if (found := LORA.fullmatch(key))})
    return Released(
        where=str(path),
        connector_config=connector_config,
        connector=connector,
        lora=groups["lora"],
        targets=targets,
        alpha=wanted.get("alpha", 16),
        dropout=wanted.get("dropout", 0.05),
        rotary=groups["rotary"],
        tower={key.removeprefix(TOWER): value for key, value in groups["tower"].items()},
        norm={key.removeprefix(NORM): value for key, value in groups["norm"].items()},
        rows=checkpoint.key_map((key, _our_key(key, connector_config)) for key in state),
    )


def _group(where: str, key: str) -> str:
    if CONNECTOR.fullmatch(key) or PLAIN.fullmatch(key):
        return "connector"
    for name, found in (("lora", LORA.fullmatch(key)), ("rotary", ROTARY.fullmatch(key))):
        if found:
            return name
    for name, prefix in (("tower", TOWER), ("norm", NORM)):
        if key.startswith(prefix):
            return name
    near = nearest(re.sub(r"\.\d+\.", ".N.", key, count=1), KNOWN)
    raise UserError(f"{where}: unknown key {key}" + (f"; nearest: {near}" if near else ""))


def lora_key(theirs: str) -> str:
    """Our adapter's name of a released LoRA tensor."""
    return "base_model.model.language_model." + theirs.removeprefix(LLM).replace(".default.weight", ".weight")


def _our_key(key: str, c: CMoEConfig) -> str:
    """For the key map."""
    if LORA.fullmatch(key):
        return lora_key(key)
    if ROTARY.fullmatch(key):
        return "compared with the base's rope_theta"
    if key.startswith(TOWER):
        return "vision_tower, as unimed convert eva"
    if key.startswith(NORM):
        return "vision_tower.post_layernorm" + key.removeprefix("ln_vision")
    if key.startswith("task_tokens."):
        return "connector.router.task_tokens" if c.uses_task_tokens else f"not used: router {c.router} on {c.router_inputs}"
    if key.startswith("router."):
        return f"connector.router.{OURS[key.removeprefix('router.')]}" if c.learned else f"not used: router {c.router} reads none"
    *_, layer, kind = key.split(".")
    return f"connector.experts.{'w' if kind == 'weight' else 'b'}{1 if layer == '0' else 2}"


def convert(file: Path, base: Path, out: Path, settings: Path | None = None) -> list[Row]:
    """Write a model folder of the checkpoint in front of `base` to the new folder `out`; LoRA makes it an adapter folder.

    `base`: a saved model of ours without LoRA, or a folder that holds two, a tower (`unimed convert eva`) and a language model
    (`unimed convert llama`); such a base is written into `out`.
    """
    checkpoint.refuse_existing(out)
    found = read(file, config.read(settings) if settings else None)
    model, processor = _base(base, found)
    _set_tower(model, found)
    _check_rotary(model, found)
    record_training(model.config, {**(model.config.training or {}), "converted_from": file.name})
    if found.lora:
        model = add_lora(model, Lora(r=_rank(found), alpha=found.alpha, dropout=found.dropout, targets=found.targets))
        model.home = out
    apply(model, found)

    def fill(folder: Path) -> None:
        model.save_pretrained(folder)
        for one in (folder, folder / BASE):
            if one.is_dir():
                processor.save_pretrained(one)

    io.write_folder(out, fill)
    return found.rows


def apply(model: Any, found: Released) -> None:
    """Put a checkpoint's connector and LoRA into a model with LoRA of the same sizes, or the connector into one without."""
    if not found.lora:
        require_same_keys(found.where, checkpoint.shapes(found.connector), checkpoint.shapes(model.connector.state_dict()))
        model.connector.load_state_dict(found.connector)
        return
    targets: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if ".lora_" in name and ".language_model." in name:
            targets[LLM + name.removeprefix("base_model.model.language_model.")] = parameter
        elif ".connector.modules_to_save." in name:
            targets[name.partition(".modules_to_save.default.")[2]] = parameter
    saved = found.connector | found.lora
    require_same_keys(found.where, checkpoint.shapes(saved), checkpoint.shapes(targets))
    with torch.no_grad():
        for key, value in saved.items():
            targets[key].copy_(value)


def _rank(found: Released) -> int:
    ranks = {value.shape[0] if ".lora_A." in key else value.shape[1] for key, value in found.lora.items()}
    if len(ranks) > 1:
        raise UserError(f"{found.where}: LoRA has the ranks {sorted(ranks)}, it must have one")
    return ranks.pop()


def _base(base: Path, found: Released) -> tuple[Any, Any]:
    if (base / "config.json").is_file():
        model, processor = load(base)
        own = dataclasses.asdict(CMoEConfig.from_dict(model.config.connector))
        other = dataclasses.asdict(found.connector_config)
        differ = [name for name in own if own[name] != other[name] and name not in ("aux_losses", "recompute")]
        if differ:
            listed = ", ".join(f"{name} {own[name]!r} and not {other[name]!r}" for name in differ)
            raise UserError(f"{found.where}: the connector of {base} has {listed}; give a base with the connector of the checkpoint")
        return model, processor
    kinds = {folder.parent: io.read_json(folder) for folder in sorted(base.glob("*/config.json"))}
    towers = [folder for folder, about in kinds.items() if about.get("model_type") == "blip_2_vision_model"]
    models = [folder for folder in kinds if folder not in towers]
    if len(towers) != 1 or len(models) != 1:
        there = ", ".join(f"{folder.name} ({about.get('model_type')})" for folder, about in kinds.items()) or "none"
        what = "a saved model, or one folder of a tower (unimed convert eva) and one of a language model (unimed convert llama)"
        raise UserError(f"{base}: it must be or hold {what}; folders with a config.json there: {there}")
    connector = found.connector_config.to_dict()
    for name in ("in_features", "out_features", "tasks"):
        connector.pop(name)
    short = {long: name for name, long in DTYPES.items()}
    dtypes = [short.get(str(kinds[folder].get("dtype") or kinds[folder].get("torch_dtype")), "fp32") for folder in (towers[0], models[0])]
    spec = {
        "vision": {"from": str(towers[0].resolve()), "freeze": True, "dtype": dtypes[0]},
        "connector": connector,
        "language": {"from": str(models[0].resolve()), "freeze": True, "dtype": dtypes[1]},
    }
    model, processor = build(ModelSpec.model_validate(spec), tasks=found.connector_config.tasks)
    model.config.freeze_language = not found.lora
    return model, processor


def _set_tower(model: Any, found: Released) -> None:
    """What the checkpoint holds of the tower. Then the base is another one, and is saved beside the adapter."""
    tower = model.vision_tower
    if not found.tower and not found.norm:
        return
    if not isinstance(tower, EvaVisionModel):
        raise UserError(
            f"{found.where}: it holds tensors of EVA-CLIP, and the tower of the base is a {model.config.vision_config.model_type}"
        )
    state = dict(tower.state_dict())
    own = {key: value for key, value in state.items() if key not in eva.LAST_NORM}
    if found.tower:
        _, made, _ = eva.tower_state(found.where, found.tower, model.config.vision_config.image_size)
        own = {key: value for key, value in made.items() if key not in eva.LAST_NORM}
    norm = {f"post_layernorm.{key}": value for key, value in found.norm.items()} or {key: state[key] for key in eva.LAST_NORM}
    new = own | norm
    require_same_keys(found.where, checkpoint.shapes(new), checkpoint.shapes(state))
    if not all(torch.equal(new[key].to(state[key].dtype), state[key]) for key in state):
        tower.load_state_dict(new)
        model.config.name_or_path = ""


def _check_rotary(model: Any, found: Released) -> None:
    for key, value in found.rotary.items():
        wanted = rotary(model.config.text_config)
        if wanted is None or value.shape != wanted.shape or not torch.allclose(value.float(), wanted, rtol=1e-2):
            raise UserError(f"{found.where}: {key} does not fit the positions of the base's language model (rope_parameters)")


def rotary(text: Any) -> Tensor | None:
    """The frequencies of rotary positions that the release's language model keeps as a buffer; None for other kinds of positions."""
    rope = getattr(text, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "default" or "rope_theta" not in rope:
        return None
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 1.0 / (rope["rope_theta"] ** (torch.arange(0, width, 2).float() / width))
