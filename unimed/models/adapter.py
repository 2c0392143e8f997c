"""Low-rank adapters on the language model and the vision tower, with the connector in the same adapter folder.

`task_type` stays unset on purpose: peft's class for causal language models takes `task_ids` for itself, and the connector would miss them.
"""

import os
import re
from pathlib import Path
from typing import Any, cast

from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch import nn

from unimed import io
from unimed.errors import UserError
from unimed.models.keys import require_same_keys
from unimed.models.spec import Lora
from unimed.models.unimed.card import write_card
from unimed.models.unimed.configuration import UniMedConfig
from unimed.models.unimed.modeling import UniMedForConditionalGeneration, freeze_unread, is_unread

WEIGHTS = "adapter_model.safetensors"
BASE = "base"  # in an adapter folder: the base model, if it was never saved anywhere else


class UniMedPeftModel(PeftModel):
    """A PeftModel whose adapter folder has our model card, and holds its base where nothing else does; every file is complete before it
    takes its name."""

    home: Path | None = None  # where the folder that is being written will lie, if not where it is written

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """As peft does. The base is named relative to the adapter: both may move together."""
        target = Path(save_directory)
        target.mkdir(parents=True, exist_ok=True)
        config = self.peft_config["default"]
        base = config.base_model_name_or_path = config.base_model_name_or_path or BASE
        try:
            # The vocabulary belongs to the base model; left to itself, peft would look the base up on a hub.
            if base == BASE and kwargs.get("is_main_process", True):
                self._save_base(target / BASE)
            if base != BASE:
                config.base_model_name_or_path = os.path.relpath(base, (self.home or target).resolve())
            write = super().save_pretrained
            io.write_into(target, lambda beside: write(str(beside), *args, **{"save_embedding_layers": False, **kwargs}))
        finally:
            config.base_model_name_or_path = base

    def _save_base(self, folder: Path) -> None:
        base = cast(UniMedForConditionalGeneration, self.get_base_model())
        untouched = {
            name.replace(".base_layer.", ".").replace(".original_module.", "."): value
            for name, value in base.state_dict().items()
            if ".lora_" not in name and ".modules_to_save." not in name
        }
        base.save_pretrained(folder, state_dict=untouched)

    def create_or_update_model_card(self, output_dir: str) -> None:
        trained = sum(p.numel() for p in self.parameters() if p.requires_grad)
        base = self.peft_config["default"].base_model_name_or_path
        write_card(Path(output_dir), cast(UniMedConfig, self.get_base_model().config), trained, base)


def add_lora(model: UniMedForConditionalGeneration, language: Lora | None = None, vision: Lora | None = None) -> UniMedPeftModel:
    """LoRA on every Linear of the language model but its head, and of the tower; by default on the language model.

    What is not frozen and has no LoRA (the connector, the tower) trains whole, and its weights go into the adapter folder.
    """
    if language is None and vision is None:
        language = Lora()
    of = {name: lora for name, lora in (("language_model", language), ("vision_tower", vision)) if lora}
    targets = {name: _linears(model, name, lora.targets) for name, lora in of.items()}
    first, *others = of
    config = LoraConfig(
        r=of[first].r,
        lora_alpha=of[first].alpha,
        lora_dropout=of[first].dropout,
        target_modules="|".join(targets.values()),
        rank_pattern={targets[name]: of[name].r for name in others},
        alpha_pattern={targets[name]: of[name].alpha for name in others},
        modules_to_save=_whole(model, of) or None,
    )
    config.base_model_name_or_path = _folder_of(model)
    adapted = UniMedPeftModel(model, config)
    freeze_unread(adapted.get_base_model())
    return adapted


def _whole(model: UniMedForConditionalGeneration, of: dict[str, Lora]) -> list[str]:
    """The parts that train whole beside LoRA."""
    frozen = {"connector": model.config.freeze_connector, "vision_tower": model.config.freeze_vision}
    return [name for name, is_frozen in frozen.items() if not is_frozen and name not in of]


def _linears(model: UniMedForConditionalGeneration, part: str, targets: list[str]) -> str:
    """A regex for the Linears of a part, without the head of the language model and what is left out of a tower's features.

    `targets`: only those whose names end so; empty for all.
    """
    head, kind = model.get_output_embeddings(), model.config.vision_config.model_type
    names = [name for name, module in model.get_submodule(part).named_modules() if isinstance(module, nn.Linear) and module is not head]
    paths = [name.split(".") for name in names if part != "vision_tower" or not is_unread(kind, name)]
    if absent := sorted(set(targets) - {path[-1] for path in paths}):
        there = ", ".join(sorted({path[-1] for path in paths}))
        raise UserError(f"lora.targets: no Linear of the {part} is called {', '.join(absent)}; there are {there}")
    paths = [path for path in paths if not targets or path[-1] in targets]
    first, last = ("|".join(sorted({re.escape(path[end]) for path in paths})) for end in (0, -1))
    return rf"{part}\.({first})\..*\.({last})"


def _folder_of(model: UniMedForConditionalGeneration) -> str | None:
    """Where the base model was loaded from, if it is still there."""
    saved = Path(model.config.name_or_path or "")
    return str(saved.resolve()) if (saved / "config.json").is_file() else None


def merge(model: UniMedPeftModel) -> UniMedForConditionalGeneration:
    """The plain model with the adapter worked into its weights; same answers, up to rounding."""
    whole = model.merge_and_unload()
    whole.config.name_or_path = ""  # these weights are in no folder yet: an adapter put on them must not name the old base
    return whole


def load_adapter(model: UniMedForConditionalGeneration, folder: str | os.PathLike, trainable: bool = False) -> UniMedPeftModel:
    """Put a saved adapter on its base model. Keys and shapes must be exactly the adapter's."""
    folder = Path(folder)
    if not (folder / WEIGHTS).is_file():
        raise UserError(f"{folder}: no {WEIGHTS}, it must be a folder saved from a model with LoRA")
    try:
        config = LoraConfig.from_pretrained(str(folder))
        config.inference_mode = not trainable
        if config.base_model_name_or_path != BASE:
            config.base_model_name_or_path = _folder_of(model)
        adapted = UniMedPeftModel(model, config)
        with safe_open(folder / WEIGHTS, framework="pt") as weights:
            saved = {key: tuple(weights.get_slice(key).get_shape()) for key in weights.keys()}  # noqa: SIM118
    except (SafetensorError, TypeError, ValueError, OSError) as error:
        raise UserError(f"{folder}: the adapter cannot be read: {str(error).splitlines()[0]}") from error
    wanted = {key: tuple(value.shape) for key, value in get_peft_model_state_dict(adapted, save_embedding_layers=False).items()}
    require_same_keys(str(folder), saved, wanted)
    adapted.load_adapter(str(folder), "default", is_trainable=trainable)
    freeze_unread(adapted.get_base_model())
    return adapted
