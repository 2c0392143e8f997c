"""Uni-Med: vision tower -> connector mixture of experts -> language model.

    features   [I, P, C]   the encoder's patches of the I images in the batch, after its last norm, class token dropped
    embeddings [I, N, O]   what the connector makes of them, each image by its own task
    input_ids  [B, L]      text, in which N `<image>` tokens in a row stand for one image

The embeddings replace the `<image>` tokens in order, so a batch may mix tasks, and samples with and without an image.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import MODEL_MAPPING, AutoModelForCausalLM, Blip2VisionModel, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.utils import ModelOutput, is_tracing
from transformers.utils.deprecation import deprecate_kwarg

from cmoe_kernels import CMoEConfig, CMoEConnector
from unimed import io
from unimed.errors import UserError
from unimed.models.spec import family
from unimed.models.unimed.card import write_card
from unimed.models.unimed.configuration import UniMedConfig

PARTS = ("vision_tower", "connector", "language_model")


@dataclass
class UniMedOutput(ModelOutput):
    """What a forward pass gives; fields that do not apply are None.

    `loss` = `lm_loss` + `aux_loss`. `gates` are the mixing weights of this batch's images, `aux_losses` the parts by name, without weights.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    cache: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    gates: Tensor | None = None
    aux_loss: Tensor | None = None
    aux_losses: dict[str, Tensor] | None = None
    lm_loss: Tensor | None = None


class EvaVisionModel(Blip2VisionModel):
    """EVA-CLIP ViT-g with the release's last norm: a LayerNorm of its own, with torch's default eps, after the encoder."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.post_layernorm.eps = 1e-5


def tower_class(config: PreTrainedConfig) -> Any:
    """The model for a vision configuration."""
    if config.model_type == "blip_2_vision_model":  # not among the Auto classes
        return EvaVisionModel
    found: Any = MODEL_MAPPING.get(type(config), None)
    if found is None or not all(hasattr(type(config), name) for name in ("hidden_size", "image_size", "patch_size")):
        raise UserError(f"vision: {config.model_type!r} is not a tower that has hidden_size, image_size and patch_size")
    return found


def make_tower(config: PreTrainedConfig) -> Any:
    """A vision tower from scratch."""
    return tower_class(config)._from_config(config)


def patch_features(tower: nn.Module, config: Any, pixel_values: Tensor, dtype: torch.dtype) -> Tensor:
    """[images, patches, width] of a tower."""
    tokens = tower(pixel_values=pixel_values.to(next(tower.parameters()).dtype)).last_hidden_state
    # The class token and registers, where a tower has them, come before the patches.
    return tokens[:, -((config.image_size // config.patch_size) ** 2) :].to(dtype)


def _many_processes() -> bool:
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


class UniMedForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """Answers text from medical images and text. Research use, not for diagnosis."""

    config_class = UniMedConfig
    config: UniMedConfig
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _no_split_modules = ["CMoEConnector"]  # noqa: RUF012  (tower and language model add theirs)

    def __init__(self, config: UniMedConfig) -> None:
        super().__init__(config)
        self.vision_tower = make_tower(config.vision_config)
        self.connector = CMoEConnector(CMoEConfig.from_dict(config.connector))
        self.language_model = AutoModelForCausalLM.from_config(config.text_config)
        self.post_init()
        # A tower may name layers of a model that it is one part of; FSDP refuses a name that is not there.
        there = {type(module).__name__ for module in self.modules()}
        self._no_split_modules = sorted(there & set(self._no_split_modules or ()))
        self.set_trainable()

    def _init_weights(self, module: nn.Module) -> None:
        # Called for children first: the connector's own initialisation (torch's defaults, as released) has the last word on its parts.
        super()._init_weights(module)
        if isinstance(module, CMoEConnector) and not all(getattr(p, "_is_hf_initialized", False) for p in module.parameters()):
            module.reset_parameters()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.set_trainable()  # weights are loaded as trainable tensors
        return loaded

    def set_trainable(self) -> None:
        """Frozen parts take no gradient, and neither does what is left out of a tower's patch features."""
        config = self.config
        for name, frozen in zip(PARTS, (config.freeze_vision, config.freeze_connector, config.freeze_language), strict=True):
            if frozen:
                getattr(self, name).requires_grad_(False)
        freeze_unread(self)

    def apply_dtypes(self) -> None:
        """Each part in its own dtype, as `config.dtypes` says."""
        for name, dtype in (self.config.dtypes or {}).items():
            if name in PARTS and not (name == "language_model" and getattr(self, "is_quantized", False)):
                getattr(self, name).to(getattr(torch, dtype))

    @property
    def vision_is_frozen(self) -> bool:
        return not any(p.requires_grad for p in self.vision_tower.parameters())

    def train(self, mode: bool = True) -> "UniMedForConditionalGeneration":
        super().train(mode)
        if self.vision_is_frozen:
            self.vision_tower.eval()
        return self

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.language_model.set_output_embeddings(new_embeddings)

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """Patch features [I, P, C] of images [I, 3, H, W], in the connector's dtype; a frozen encoder records no graph."""
        side = self.config.vision_config.image_size
        if pixel_values.dim() != 4 or tuple(pixel_values.shape[1:]) != (3, side, side):
            raise ValueError(f"pixel_values are {list(pixel_values.shape)}, they must be [images, 3, {side}, {side}]")
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.vision_is_frozen):
            return patch_features(self.vision_tower, self.config.vision_config, pixel_values, next(self.connector.parameters()).dtype)

    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")  # as the models of transformers accept it
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        task_ids: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        num_images_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> UniMedOutput:
        """
        Args:
            pixel_values: [I, 3, H, W], the images of the batch in the order of their `<image>` tokens.
            task_ids: [I], each image's index in `config.tasks`.
            labels: [B, L], -100 where nothing is learned; the shift by one happens here.
            num_items_in_batch: learned tokens of the whole optimiser step, when this batch is one part of it.
            num_images_in_batch: images of the whole optimiser step; by default the auxiliary loss weighs by learned tokens, too.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        connected = absent = None
        if pixel_values is not None:
            if input_ids is None:
                raise ValueError("pixel_values need input_ids: the image tokens say where the images go")
            connected = self.connector(self.encode_images(pixel_values), task=task_ids)
            inputs_embeds = self._place_images(inputs_embeds, input_ids, connected.embeddings)
        elif labels is not None and self.training and torch.is_grad_enabled() and _many_processes():
            absent = self._without_images(labels.device)
        if position_ids is None and cache is None and attention_mask is not None and attention_mask.dim() == 2:
            # Counted over real tokens, so that padding on either side changes nothing.
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)

        if use_cache is None and labels is not None:
            use_cache = False

        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **{**kwargs, "return_dict": True},
        )
        loss = lm_loss = None
        if labels is not None:
            targets = functional.pad(labels[:, 1:], (0, 1), value=-100).to(outputs.logits.device)
            learned = (targets != -100).sum()
            # A step without a learned token has the loss 0, not 0 / 0.
            total = (learned if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)).clamp(min=1)
            summed = functional.cross_entropy(outputs.logits.float().flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")
            loss = lm_loss = summed / total
            if connected is not None:
                # A part of an optimiser step weighs by its images, or as its language loss does.
                share: Tensor | float = 1.0
                if num_images_in_batch is not None:
                    share = connected.embeddings.shape[0] / num_images_in_batch
                elif num_items_in_batch is not None:
                    share = learned / total
                loss = lm_loss + share * connected.aux_loss
            elif absent is not None:
                loss = lm_loss + absent
        return UniMedOutput(
            loss=loss,
            logits=outputs.logits,
            cache=outputs.cache,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            gates=connected.gates if connected is not None else None,
            aux_loss=connected.aux_loss if connected is not None else None,
            aux_losses=connected.aux_losses if connected is not None else None,
            lm_loss=lm_loss,
        )

    def _without_images(self, device: torch.device) -> Tensor:
        """Zero, with every parameter of tower and connector in its graph.

        Processes average their gradients tensor by tensor: one whose batch has no image takes part with zeros, or the others wait.
        """
        side = self.config.vision_config.image_size
        pixels = torch.zeros(1, 3, side, side, device=device)
        connected = self.connector(self.encode_images(pixels), task=torch.zeros(1, dtype=torch.long, device=device))
        return 0.0 * (connected.embeddings.float().sum() + connected.aux_loss)

    def _place_images(self, inputs_embeds: Tensor, input_ids: Tensor, embeddings: Tensor) -> Tensor:
        where = torch.eq(input_ids, cast(int, self.config.image_token_index))
        if not is_tracing(where):  # there, input_ids have no values yet
            slots, needed = int(where.sum()), embeddings.shape[0] * embeddings.shape[1]
            if slots != needed:
                images, tokens = embeddings.shape[:2]
                raise ValueError(f"input_ids hold {slots} image tokens, {images} images of {tokens} tokens each need {needed}")
        return inputs_embeds.masked_scatter(where.unsqueeze(-1), embeddings.to(inputs_embeds.dtype))

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        if "pixel_values" not in inputs:  # dropped after the prompt, which the cache already holds
            inputs.pop("task_ids", None)
        return inputs

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """As transformers does, and a model card; every file is complete before it takes its name."""

        def fill(beside: Path) -> None:
            super(UniMedForConditionalGeneration, self).save_pretrained(beside, *args, **kwargs)
            if kwargs.get("is_main_process", True):
                write_card(beside, self.config, sum(p.numel() for p in self.parameters()))

        target = Path(save_directory)
        written = io.write_into(target, fill)
        for stale in target.glob("model*.safetensors*"):
            if stale.name not in written:
                stale.unlink()


def is_unread(model_type: str, name: str) -> bool:
    """Whether a parameter or module of a tower is left out of its patch features."""
    return any(f".{name}.".startswith(f".{unread}.") for unread in family(model_type).unread)


def freeze_unread(model: Any) -> None:
    """What a tower's patch features do not depend on takes no gradient."""
    tower = model.get_submodule("vision_tower")
    for one in [tower, *getattr(tower, "modules_to_save", nn.ModuleDict()).values()]:  # the second: copies that peft trains
        for name, parameter in one.named_parameters():
            if is_unread(model.config.vision_config.model_type, name):
                parameter.requires_grad_(False)
