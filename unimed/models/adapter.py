"""Low-rank adapters on the language model, with the connector in the same adapter folder.

`task_type` stays unset on purpose: peft's class for causal language models takes `task_ids` for itself, and the connector would miss them.
"""

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, cast

from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open

from unimed.errors import UserError
from unimed.models.keys import require_same_keys
from unimed.models.unimed.card import write_card
from unimed.models.unimed.configuration import UniMedConfig
from unimed.models.unimed.modeling import UniMedForConditionalGeneration

TARGETS = r"language_model\..*\.(q|k|v|o|gate|up|down)_proj"
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
        beside = Path(tempfile.mkdtemp(prefix=".saving-", dir=target))
        try:
            # The vocabulary belongs to the base model; left to itself, peft would look the base up on a hub.
            if base == BASE and kwargs.get("is_main_process", True):
                self._save_base(target / BASE)
            if base != BASE:
                config.base_model_name_or_path = os.path.relpath(base, (self.home or target).resolve())
            super().save_pretrained(str(beside), *args, **{"save_embedding_layers": False, **kwargs})
            for file in beside.iterdir():
                file.replace(target / file.name)
        finally:
            config.base_model_name_or_path = base
            shutil.rmtree(beside, ignore_errors=True)

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


def add_lora(model: UniMedForConditionalGeneration, r: int = 8, alpha: int = 16, dropout: float = 0.05) -> UniMedPeftModel:
    """LoRA on every Linear of the language model but its head; the connector, and an encoder that is not frozen, train whole."""
    whole = ["connector"] if model.config.freeze_vision else ["connector", "vision_tower"]
    config = LoraConfig(r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=TARGETS, modules_to_save=whole)
    config.base_model_name_or_path = _folder_of(model)
    return UniMedPeftModel(model, config)


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
    return adapted
