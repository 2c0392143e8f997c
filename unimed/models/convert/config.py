"""The release's YAML files, to our recipes. Every key is known, used or listed as without meaning here; any other key is an error."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from cmoe_kernels import CMoEConfig
from unimed import io
from unimed.errors import UserError
from unimed.models.convert import checkpoint
from unimed.models.convert.checkpoint import Row
from unimed.models.keys import nearest

# Width and patches of the tower that the release always builds.
WIDTH = 1408
# The release's name of a data set: our set, its layout is of the same name, and the source of the sampler.
DATASETS = {
    "medqa_en": ("medqa", "medqa/qa"),
    "pubmedqa": ("pubmedqa", "pubmedqa/qa"),
    "slakevqa_en": ("slake", "slake/vqa"),
    "path_vqa": ("path-vqa", "path-vqa/vqa"),
    "ref_slake": ("slake", "slake/refer"),
    "invref_slake": ("slake", "slake/identify"),
    "ref_sa_med": ("sa-med2d", "sa-med2d/refer"),
    "invref_sa_med": ("sa-med2d", "sa-med2d/identify"),
    "medpix_single": ("medpix", "medpix/caption"),
    "mimic_caption": ("mimic-cxr", "mimic-cxr/caption"),
    "medmnist_2d_small": ("medmnist", "cls"),
}
PROJECTORS = {"moe_mlp": "mlp", "moe_linear": "linear", "mlp2x_gelu": "mlp", "linear": "linear"}
ROUTER_INPUTS = {"router_task_token": "task_token", "router_token": "token", "router_task": "task"}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NOTHING = object()


class Section:
    """One section of the file; `take` reads a key once, `close` refuses what nothing took."""

    def __init__(self, where: str, name: str, given: Any, rows: list[Row]) -> None:
        if not isinstance(given, Mapping):
            raise UserError(f"{where}: {name} must be a section of keys, it is {given!r}")
        self.where, self.name, self.given, self.rows = where, name, dict(given), rows
        self.known: list[str] = []

    def take(self, key: str, ours: str, default: Any = NOTHING, only: Any = None) -> Any:
        """The value of `key`. `ours`: the recipe's key that it becomes. `only`: the values that are supported."""
        self.known.append(key)
        value = self.given.pop(key, NOTHING)
        if value is NOTHING:
            if default is NOTHING:
                raise UserError(f"{self.where}: {self.name}.{key} is missing")
            return default
        if only is not None and value not in only:
            raise UserError(f"{self.where}: {self.name}.{key}={value!r} is not supported; {', '.join(map(repr, only))} are")
        self.rows.append(Row(f"{self.name}.{key}", ours, 1))
        return value

    def number(self, key: str, ours: str, default: Any = NOTHING) -> Any:
        value = self.take(key, ours, default)
        try:
            number = float(value)
        except (TypeError, ValueError) as error:
            raise UserError(f"{self.where}: {self.name}.{key}={value!r} must be a number") from error
        return int(number) if number.is_integer() and not isinstance(value, float) and "e" not in str(value).lower() else number

    def whole(self, key: str, ours: str, default: Any = NOTHING) -> int:
        value = self.number(key, ours, default)
        if value != int(value) or value < 0:
            raise UserError(f"{self.where}: {self.name}.{key}={value!r} must be a whole number")
        return int(value)

    def without_meaning(self, *keys: str) -> None:
        for key in keys:
            self.take(key, "not used: no such setting here", None)

    def close(self) -> None:
        for key in self.given:
            near = nearest(key, self.known)
            raise UserError(f"{self.where}: unknown key {self.name}.{key}" + (f"; nearest: {self.name}.{near}" if near else ""))


def read(file: str | os.PathLike) -> dict[str, Any]:
    """The content of a YAML file."""
    try:
        content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror or error})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not readable as YAML ({str(error).splitlines()[0]})") from error
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise UserError(f"{file}: it must be a configuration of the release, with a section `model:`")
    return content


def model_recipe(where: str, given: Any, rows: list[Row]) -> dict[str, Any]:
    """The parts vision, connector and language of a recipe, and what else the section `model` says of training."""
    model = Section(where, "model", given, rows)
    model.take("arch", "(this model)", "uni_med", only=("uni_med",))
    model.take("vit_model", "vision.from", "eva_clip_g", only=("eva_clip_g",))
    model.take("drop_path_rate", "(zero)", 0, only=(0, 0.0))
    model.take("chat_template", "(always)", False, only=(True,))
    model.take("end_sym", "(</s>)", "</s>", only=("</s>",))
    model.take("prompt_template", "([INST] {} [/INST])", None, only=("[INST] {} [/INST]",))
    model.take("max_txt_len", "(tokens of an answer)", 1024, only=(1024,))
    model.take("max_context_len", "(tokens of a prompt)", 3800, only=(3800,))
    model.take("llm_model_name", "language.from", "llama2", only=("llama2",))
    model.without_meaning("model_type", "ckpt", "device_8bit")
    freeze = model.take("freeze_vit", "vision.freeze", True, only=(True, False))
    precision = model.take("vit_precision", "vision.dtype", "fp16", only=("fp16", "fp32"))
    if (size := model.whole("image_size", "(the size that the tower is converted for)", 224)) % 14:
        raise UserError(f"{where}: model.image_size={size} must be a multiple of 14")
    checkpointing = [model.take(key, "train.gradient_checkpointing", False, only=(True, False)) for key in CHECKPOINTING]
    vision = {"from": "checkpoints/eva-vit-g", "freeze": freeze, "dtype": precision if freeze else "fp32"}
    recipe: dict[str, Any] = {"vision": vision, "connector": _connector(model), "language": _language(model)}
    model.close()
    recipe["train"] = {"gradient_checkpointing": checkpointing[1] or (checkpointing[0] and not freeze)}
    return recipe


CHECKPOINTING = ("use_grad_checkpoint", "use_grad_checkpoint_llm")


def _connector(model: Section) -> dict[str, Any]:
    projector = model.take("projector_type", "connector.expert", "linear", only=tuple(PROJECTORS))
    mixture = model.take("has_moe", "connector", False, only=(True, False))
    if mixture != projector.startswith("moe_"):
        raise UserError(f"{model.where}: model.has_moe={mixture} and model.projector_type={projector!r} do not go together")
    resample = model.take("resample_method", "connector.resample", "projection", only=("projection", "avgpool", "maxpool"))
    rate = model.whole("resample_rate", "connector.resample_rate", 4)
    experts = model.whole("num_experts", "connector.num_experts", 3)
    router = model.take("router_type", "connector.router", "soft", only=("soft", "sparse", "hard", "constant"))
    inputs = ROUTER_INPUTS[model.take("router_method", "connector.router_inputs", "router_task_token", only=tuple(ROUTER_INPUTS))]
    tokens = model.whole("num_task_tokens", "connector.num_task_tokens", 10)
    task = model.whole("task_token_c", "connector.task_features", 768)
    top_k = model.whole("sparse_topk", "connector.top_k", 2)
    shared = {"expert": PROJECTORS[projector], "resample": resample, "resample_rate": rate}
    if not mixture:  # one projector is a mixture of one
        return {"num_experts": 1, "router": "constant", **shared}
    if tokens != 1 and (inputs != "token" or tokens):
        raise UserError(f"{model.where}: model.num_task_tokens={tokens} is not supported: the release runs with one only")
    image = WIDTH * (rate if resample == "projection" else 1)
    reads = {"task_token": task + image, "token": image, "task": task}[inputs]
    learned = {} if router in ("hard", "constant") else {"router_inputs": inputs, "router_features": 4 * reads}
    if learned and inputs != "token":
        learned |= {"task_features": task, "num_task_tokens": 1}
    return {"num_experts": experts, "router": router, **learned, "top_k": top_k, **shared}


def _language(model: Section) -> dict[str, Any]:
    path = model.take("llm_model_path", "language.from", "") or "checkpoints/llama-2-7b-chat"
    tuned = model.take("sft_type", "language.lora", "lora", only=("lora", "none", "full"))
    r = model.whole("lora_r", "language.lora.r", 64)
    alpha = model.whole("lora_alpha", "language.lora.alpha", 16)
    dropout = model.number("lora_dropout", "language.lora.dropout", 0.05)
    targets = model.take("lora_target_modules", "language.lora.targets", ["q_proj", "v_proj"])
    low = model.take("low_resource", "language.quantize", False, only=(True, False))
    if not isinstance(targets, list) or not set(targets) <= {"all", *TARGETS}:
        raise UserError(f"{model.where}: model.lora_target_modules={targets!r} must list 'all' or some of {', '.join(TARGETS)}")
    language: dict[str, Any] = {"from": str(path), "dtype": "fp32"}
    if low:
        language["quantize"] = "8bit"
    if tuned == "lora":
        some = {} if "all" in targets or set(targets) == set(TARGETS) else {"targets": targets}
        language["lora"] = {"r": r, "alpha": alpha, "dropout": dropout, **some}
    elif tuned == "none":
        language["freeze"] = True
    return language


def recipe_of(where: str, content: Mapping[str, Any]) -> tuple[dict[str, Any], list[Row]]:
    """The recipe that a configuration of the release describes, and the key map."""
    rows: list[Row] = []
    top = Section(where, "the file", content, [])
    parts = model_recipe(where, top.take("model", "", {}), rows)
    sets, ratios, batch = _datasets(where, top.take("datasets", "", {}), rows)
    run = Section(where, "run", top.take("run", "", {}), rows)
    top.close()
    run.take("task", "(training)", "image_text_pretrain", only=("image_text_pretrain",))
    run.take("lr_sched", "optim.schedule", "linear_warmup_cosine_lr", only=("linear_warmup_cosine_lr",))
    rate = run.number("init_lr", "optim.lr")
    optim = {
        "lr": rate,
        "warmup_lr": run.number("warmup_lr", "optim.warmup_lr", rate),
        "min_lr": run.number("min_lr", "optim.min_lr", 0),
        "warmup_steps": run.whole("warmup_steps", "optim.warmup_steps", 0),
        "schedule": "released",
        "betas": [0.9, run.number("beta2", "optim.betas", 0.999)],
        "weight_decay": run.number("weight_decay", "optim.weight_decay", 0.05),
        "no_decay": ["bias", "ln", "bn"],
        "clip": 0.0,
    }
    steps = run.whole("max_epoch", "train.max_steps", 1) * run.whole("iters_per_epoch", "train.max_steps")
    train = {
        "max_steps": steps,
        "batch_size": batch,
        "accumulate": run.whole("accum_grad_iters", "train.accumulate", 1),
        "seed": run.whole("seed", "train.seed", 42),
        "precision": "fp16" if run.take("amp", "train.precision", False, only=(True, False)) else "fp32",
        **parts.pop("train"),
        "log_every": 50,
        "save_every": max(steps // 10 // 50, 1) * 50,
    }
    if run.take("wandb_log", "train.report_to", False, only=(True, False)):
        train["report_to"] = ["wandb"]
    workers = run.whole("num_workers", "data.workers", 0)
    run.without_meaning("output_dir", "resume_ckpt_path", "evaluate", "train_splits", "valid_splits", "test_splits", "device")
    run.without_meaning("world_size", "dist_url", "distributed", "job_name", "batch_size_train", "batch_size_eval", "log_freq", "save_freq")
    run.close()
    recipe = {
        "description": "a configuration of the release",
        "data": {"root": "", "sets": sets, "workers": workers},
        **parts,
        "sampler": {"mode": "homogeneous", "ratios": ratios},
        "optim": optim,
        "train": train,
        "evaluate": {"splits": ["test"], "batch_size": 40, "max_new_tokens": 100},
    }
    return recipe, rows


def _datasets(where: str, given: Any, rows: list[Row]) -> tuple[dict[str, Any], dict[str, float], int]:
    every = Section(where, "datasets", given, [])
    sets: dict[str, Any] = {}
    ratios: dict[str, float] = {}
    batches: dict[str, int] = {}
    for name, (ours, source) in DATASETS.items():
        if (one := every.take(name, "", None)) is None:
            continue
        section = Section(where, f"datasets.{name}", one, rows)
        batches[name] = section.whole("batch_size", "train.batch_size")
        ratios[source] = section.number("sample_ratio", f"sampler.ratios.{source}", 1)
        section.take("vis_processor", "(CLIP's mean and deviation, no augmentation)", None)
        text = section.take("text_processor", "data.protocol", None) or {}
        names = {stage.get("name") for stage in text.values() if isinstance(stage, Mapping)} if isinstance(text, Mapping) else {str(text)}
        if names - {"blip_caption_new"}:
            raise UserError(f"{where}: datasets.{name}.text_processor: {sorted(map(str, names))} is not supported; blip_caption_new is")
        build = section.take("build_info", f"data.sets.{ours}.root", None) or {}
        section.without_meaning("data_type", "type")
        section.close()
        root = next((str(value) for key, value in build.items() if key.endswith("dir") and value), f"data/{ours}")
        sets.setdefault(ours, {"root": root, "layout": ours})
    every.close()
    if not batches:
        raise UserError(f"{where}: datasets names no data set; known are {', '.join(DATASETS)}")
    if len(set(batches.values())) > 1:
        raise UserError(f"{where}: datasets.*.batch_size must be one number, they are {', '.join(f'{k} {v}' for k, v in batches.items())}")
    return sets, ratios, next(iter(batches.values()))


def release_section(connector: CMoEConfig, lora: Mapping[str, Any] | None) -> dict[str, Any]:
    """The section `model` of the release for a connector and LoRA (r, alpha, targets): the inverse of what this file reads of them."""
    mixture = connector.num_experts > 1 or connector.router != "constant"
    projector = next(name for name, expert in PROJECTORS.items() if expert == connector.expert and name.startswith("moe_") == mixture)
    methods = {ours: theirs for theirs, ours in ROUTER_INPUTS.items()}
    return {
        "arch": "uni_med",
        "has_moe": mixture,
        "projector_type": projector,
        "num_experts": connector.num_experts,
        "router_type": connector.router,
        "router_method": methods[connector.router_inputs],
        "sparse_topk": connector.top_k,
        "num_task_tokens": 1,
        "task_token_c": connector.task_features or connector.in_features,
        "resample_method": connector.resample,
        "resample_rate": connector.resample_rate,
        "llm_model_name": "llama2",
        "chat_template": True,
        "sft_type": "lora" if lora else "none",
        **({"lora_r": lora["r"], "lora_alpha": lora["alpha"], "lora_target_modules": list(lora["targets"])} if lora else {}),
    }


def convert(file: Path, out: Path) -> list[Row]:
    """Write the recipe to the new file `out`."""
    checkpoint.refuse_existing(out)
    recipe, rows = recipe_of(str(file), read(file))
    text = f"# Made by `unimed convert config` from {file.name}.\n" + yaml.safe_dump(
        recipe, sort_keys=False, default_flow_style=None, width=140
    )
    io.write_text(out, text)
    return rows
