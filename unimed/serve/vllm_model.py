"""The model as vLLM runs it: tower and connector as in ours, vLLM's own language model, our processor. One image a prompt.

The connector's task is the prompt's first [tag], as everywhere. All parts have one dtype, vLLM's. The folder holds a whole model: LoRA is
merged first (unimed merge).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BatchFeature
from vllm.config import VllmConfig
from vllm.model_executor.models.interfaces import MultiModalEmbeddings, SupportsMultiModal, SupportsPP
from vllm.model_executor.models.utils import AutoWeightsLoader, init_vllm_registered_model, maybe_prefix
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.processing import BaseDummyInputsBuilder, BaseMultiModalProcessor, BaseProcessingInfo, PromptReplacement

from cmoe_kernels import CMoEConfig, CMoEConnector
from unimed.models.unimed.configuration import UniMedConfig
from unimed.models.unimed.modeling import make_tower, patch_features
from unimed.models.unimed.processing import UniMedProcessor
from unimed.models.unimed.tokenization import IMAGE_TOKEN
from unimed.tasks.prompts import IMAGE

PLACED = IMAGE.replace("<ImageHere>", IMAGE_TOKEN)  # an image's place in a prompt


class Info(BaseProcessingInfo):
    """What vLLM asks about the images of a prompt."""

    def get_hf_config(self) -> UniMedConfig:
        return self.ctx.get_hf_config(UniMedConfig)

    def get_hf_processor(self, **kwargs: object) -> UniMedProcessor:
        return self.ctx.get_hf_processor(UniMedProcessor)

    def get_supported_mm_processor_kwargs(self) -> dict[str, set[str]]:
        return {}

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"image": 1}

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        return {"image": self.get_hf_config().num_image_tokens}


class Dummy(BaseDummyInputsBuilder[Info]):
    """The largest input, with which vLLM measures memory."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        return PLACED * mm_counts.get("image", 0)

    def get_dummy_mm_data(self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Mapping[str, Any]) -> dict[str, Any]:
        side = self.info.get_hf_config().vision_config.image_size
        images = self._get_dummy_images(
            width=side, height=side, num_images=mm_counts.get("image", 0), overrides=(mm_options or {}).get("image")
        )
        return {"image": images}


class Processor(BaseMultiModalProcessor[Info]):
    """Pixels and task of an image by our processor; its one token in the prompt becomes as many as the image has embeddings."""

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        tasks = self.info.get_hf_config().tasks
        tags = [tag for tag in re.findall(r"\[(\w+)\]", self.info.get_tokenizer().decode(inputs.prompt)) if tag in tasks]
        task = {"task": tags[0] if tags else tasks[0]}  # part of the image's key in vLLM's caches
        return super().apply(replace(inputs, hf_processor_mm_kwargs={**inputs.hf_processor_mm_kwargs, **task}), timing_ctx)

    def _call_hf_processor(self, hf_data: Mapping[str, object], hf_kwargs: Mapping[str, object]) -> BatchFeature:
        images, task = list(hf_data["images"]), hf_kwargs.get("task", self.info.get_hf_config().tasks[0])  # type: ignore[call-overload]
        made = self.info.get_hf_processor()(text=[IMAGE] * len(images), images=images, task=[task] * len(images))
        return BatchFeature({name: made[name] for name in ("pixel_values", "task_ids")})

    def _get_mm_fields_config(self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]) -> Mapping[str, Any]:
        return {name: MultiModalFieldConfig.batched("image") for name in ("pixel_values", "task_ids")}

    def _get_prompt_updates(self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, object], out_mm_kwargs: Any) -> Sequence[Any]:
        config = self.info.get_hf_config()
        token = config.image_token_index
        return [PromptReplacement(modality="image", target=[token], replacement=[token] * config.num_image_tokens)]

    def _postprocess_prompt(self, prompt: list[int]) -> list[int]:
        start = self.info.get_tokenizer().bos_token_id
        return prompt if start is None or prompt[:1] == [start] else [start, *prompt]


@MULTIMODAL_REGISTRY.register_processor(Processor, info=Info, dummy_inputs=Dummy)
class UniMedForConditionalGeneration(nn.Module, SupportsMultiModal, SupportsPP):
    """`unimed.models.unimed.UniMedForConditionalGeneration` for vLLM. Research use, not for diagnosis."""

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        return PLACED if modality == "image" else None

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = self.config = vllm_config.model_config.hf_config
        mixed: Any = self  # nn.Module's __getattr__ hides the methods of vLLM's protocols from type checkers
        mixed.configure_mm_token_handling(config.text_config.vocab_size, [config.image_token_index])
        with mixed._mark_tower_model(vllm_config, "image"):
            self.vision_tower = make_tower(config.vision_config)
            self.connector = CMoEConnector(CMoEConfig.from_dict(config.connector))
        with mixed._mark_language_model(vllm_config):
            name = maybe_prefix(prefix, "language_model")
            self.language_model = init_vllm_registered_model(vllm_config, hf_config=config.text_config, prefix=name)
        self.make_empty_intermediate_tensors = self.language_model.make_empty_intermediate_tensors

    def embed_multimodal(self, **inputs: Any) -> MultiModalEmbeddings:
        """[images, tokens, width]."""
        pixels = inputs.get("pixel_values")
        if pixels is None:
            return []
        features = patch_features(self.vision_tower, self.config.vision_config, pixels, next(self.connector.parameters()).dtype)
        return self.connector(features, task=inputs["task_ids"].flatten()).embeddings

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: object,
    ) -> Any:
        embeds = None if intermediate_tensors is not None else inputs_embeds
        return self.language_model.model(input_ids, positions, intermediate_tensors, inputs_embeds=embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        return self.language_model.compute_logits(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        with torch.no_grad():
            return AutoWeightsLoader(self).load_weights(weights)
