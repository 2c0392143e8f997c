"""What a Uni-Med model is made of: a vision tower, a CMoE connector and a language model."""

import math
from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from cmoe_kernels import CMoEConfig
from unimed.errors import UserError

TASKS = ("vqa", "refer", "identify", "caption", "cls")
"""The image tasks, in the order in which the connector numbers them. "qa" has no image and meets no connector."""


class UniMedConfig(PreTrainedConfig):
    """Configuration of :class:`~unimed.models.unimed.modeling.UniMedForConditionalGeneration`.

    Args:
        vision_config: the encoder, any that AutoModel knows (by default EVA-CLIP ViT-g, as released).
        text_config: the language model, any that AutoModelForCausalLM knows (by default Llama).
        connector: fields of :class:`cmoe_kernels.CMoEConfig`; `in_features` and `out_features` follow from the other two. The router's
            auxiliary losses (`aux_losses`) live here.
        image_token_index: the token that stands for one image embedding, a row of the language model's vocabulary (default: the last).
        freeze_vision: keep the encoder as it is, and run it without recording a graph.
        freeze_connector, freeze_language: keep the connector, the language model as they are.
        dtypes: the dtype of each part ("vision_tower": "bfloat16"), where they differ.
        quantize: "4bit" or "8bit" for a language model that is quantised when it is loaded; its files are not.
        training: whatever settings trained the weights; copied into the model card.
    """

    model_type = "unimed"
    sub_configs_defaults = {  # noqa: RUF012
        "vision_config": SubConfigSpec(AutoConfig, model_type="blip_2_vision_model"),
        "text_config": SubConfigSpec(AutoConfig, model_type="llama"),
    }
    attribute_map = {"image_token_id": "image_token_index"}  # noqa: RUF012
    keys_to_ignore_at_inference = ["cache", "gates", "aux_loss", "aux_losses", "lm_loss"]  # noqa: RUF012

    vision_config: Any = None
    text_config: Any = None
    connector: Any = None
    image_token_index: int | None = None
    freeze_vision: bool = True
    freeze_connector: bool = False
    freeze_language: bool = False
    dtypes: dict | None = None
    quantize: str | None = None
    tie_word_embeddings: bool = False
    training: dict | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        # Both ends of the connector are fixed by its neighbours: filled in when absent, checked when given.
        widths = {
            "in_features": ("vision_config", self.vision_config.hidden_size),
            "out_features": ("text_config", self.text_config.hidden_size),
        }
        given = {**{name: width for name, (_, width) in widths.items()}, "tasks": TASKS, **(self.connector or {})}
        for name, (part, width) in widths.items():
            if given[name] != width:
                raise UserError(f"config: connector.{name} is {given[name]}, it must be {width} ({part}.hidden_size)")
        try:
            connector = CMoEConfig.from_dict(given)
        except (TypeError, ValueError) as error:
            raise UserError(f"config: connector: {error}") from error
        self.connector = connector.to_dict()  # with every default, so that config.json records all settings
        self.tie_word_embeddings = self.text_config.tie_word_embeddings
        if self.image_token_index is None:
            self.image_token_index = self.text_config.vocab_size - 1
        if not 0 <= self.image_token_index < self.text_config.vocab_size:
            raise UserError(
                f"config: image_token_index is {self.image_token_index}, it must be below {self.text_config.vocab_size} (vocab_size)"
            )

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(self.connector["tasks"])

    @property
    def num_image_tokens(self) -> int:
        """Embeddings that one image becomes."""
        side = self.vision_config.image_size // self.vision_config.patch_size
        resample, rate = self.connector["resample"], self.connector["resample_rate"]
        if resample == "none":
            return side * side
        if side * side % rate or (resample != "projection" and side % math.isqrt(rate)):
            raise UserError(f"config: {side}x{side} patches cannot be joined {rate} to one (connector.resample_rate)")
        return side * side // rate
