"""What a Uni-Med model is made of: a vision tower, a CMoE connector and a language model."""

from typing import Any

from transformers import Blip2VisionConfig, LlamaConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from cmoe_kernels import CMoEConfig
from unimed.errors import UserError

TASKS = ("vqa", "refer", "identify", "caption", "cls")
"""The image tasks, in the order in which the connector numbers them. "qa" has no image and meets no connector."""


class UniMedConfig(PreTrainedConfig):
    """Configuration of :class:`~unimed.model.modeling.UniMedForConditionalGeneration`.

    Args:
        vision_config: the encoder (its defaults are EVA-CLIP ViT-g, as released).
        text_config: the language model.
        connector: fields of :class:`cmoe_kernels.CMoEConfig`; `in_features` and `out_features` follow from the other two. The router's
            auxiliary losses (`aux_losses`) live here.
        image_token_index: the token that stands for one image embedding, a row of the language model's vocabulary.
        freeze_vision: keep the encoder as it is, and run it without recording a graph.
        training: whatever settings trained the weights; copied into the model card.
    """

    model_type = "unimed"
    sub_configs_defaults = {"vision_config": SubConfigSpec(Blip2VisionConfig), "text_config": SubConfigSpec(LlamaConfig)}  # noqa: RUF012
    attribute_map = {"image_token_id": "image_token_index"}  # noqa: RUF012
    keys_to_ignore_at_inference = ["past_key_values", "gates", "aux_loss", "aux_losses", "lm_loss"]  # noqa: RUF012

    vision_config: Any = None
    text_config: Any = None
    connector: Any = None
    image_token_index: int = 32000
    freeze_vision: bool = True
    tie_word_embeddings: bool = False
    training: dict | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        # Both ends of the connector are fixed by its neighbours: filled in when absent, checked when given.
        widths = {"in_features": self.vision_config.hidden_size, "out_features": self.text_config.hidden_size}
        self.connector = {**widths, "tasks": list(TASKS), **(self.connector or {})}
        for name, width in widths.items():
            if self.connector[name] != width:
                part = "vision_config" if name == "in_features" else "text_config"
                raise UserError(f"config: connector.{name} is {self.connector[name]}, it must be {width} ({part}.hidden_size)")
        if isinstance(self.connector["tasks"], tuple):
            self.connector["tasks"] = list(self.connector["tasks"])  # JSON knows no tuples
        self.tie_word_embeddings = self.text_config.tie_word_embeddings

    def connector_config(self) -> CMoEConfig:
        """The connector's own configuration; a wrong field is one line that names it."""
        fields = dict(self.connector)
        fields["tasks"] = tuple(fields["tasks"])
        try:
            return CMoEConfig(**fields)
        except (TypeError, ValueError) as error:
            raise UserError(f"config: connector: {error}") from error

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(self.connector["tasks"])

    @property
    def num_image_tokens(self) -> int:
        """Embeddings that one image becomes."""
        vision, connector = self.vision_config, self.connector
        side = vision.image_size // vision.patch_size
        resample, rate = connector.get("resample", "projection"), connector.get("resample_rate", 4)
        if resample == "none":
            return side * side
        if resample == "projection":
            if side * side % rate:
                raise UserError(f"config: {side}x{side} patches cannot be joined in groups of connector.resample_rate = {rate}")
            return side * side // rate
        root = round(rate**0.5)
        return (side // root) ** 2
