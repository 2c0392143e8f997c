"""A model ready to train and its processor, from a ModelSpec; or its sizes only."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from transformers import AutoModelForCausalLM, BlipImageProcessorPil, GenerationConfig, LlamaConfig

from cmoe_kernels import CMoEConfig, CMoEConnector
from unimed.errors import UserError
from unimed.models import parts, quantized, smollm2
from unimed.models.adapter import add_lora
from unimed.models.keys import require_same_keys
from unimed.models.load import connector_weights, load_base
from unimed.models.spec import DTYPES, SMOLLM2, ModelSpec, from_scratch
from unimed.models.tiny import smooth_coordinates
from unimed.models.unimed.configuration import TASKS, UniMedConfig
from unimed.models.unimed.modeling import PARTS, UniMedForConditionalGeneration, make_tower
from unimed.models.unimed.processing import UniMedProcessor
from unimed.models.unimed.tokenization import IMAGE_TOKEN, token_id, train_tokenizer


def build(
    spec: ModelSpec, texts: Iterable[str] = (), *, tasks: Iterable[str] = TASKS, seed: int = 0, kept: Path | None = None
) -> tuple[UniMedForConditionalGeneration, UniMedProcessor]:
    """The model that a spec describes, without its LoRA (`adapt` adds it), and its processor; the same for the same seed.

    A language model from scratch gets a tokenizer that is trained on `texts`, or is read from the file `kept`. `tasks`: the image
    tasks, as the connector numbers them.
    """
    vision, language = spec.vision, spec.language
    if language.quantize:
        quantized.settings(language.quantize, torch.float32)  # an error here, before weights are read
    read_text = read_vision = None
    if from_scratch(language.source):
        tokenizer = train_tokenizer(texts, language.vocab_size, kept)
        text_config = parts.text_config(language, tokenizer, len(tokenizer))
    else:
        source = str(smollm2.folder(language.archive)) if language.source == SMOLLM2 else language.source
        read_text, tokenizer = parts.read_language_model(source, getattr(torch, DTYPES[language.dtype]))
        text_config = read_text.config
    if from_scratch(vision.source):
        vision_config = parts.vision_config(vision)
    else:
        read_vision = parts.read_tower(vision.source, getattr(torch, DTYPES[vision.dtype]))
        vision_config = read_vision.config  # type: ignore[assignment]
    config = _config(spec, vision_config, text_config, token_id(tokenizer, IMAGE_TOKEN), tasks)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if read_text is None and read_vision is None:
            model = UniMedForConditionalGeneration(config)
        else:  # no weights are made only to be replaced
            with torch.device("meta"):
                model = UniMedForConditionalGeneration(config)
            model.vision_tower = read_vision or make_tower(config.vision_config)
            model.connector = CMoEConnector(CMoEConfig.from_dict(config.connector))
            model.language_model = read_text or AutoModelForCausalLM.from_config(config.text_config)
            model.tie_weights()
    if read_text is None:
        smooth_coordinates(model, tokenizer, seed)
    if spec.connector.source:
        _start_connector(model, spec.connector.source)
    model.apply_dtypes()
    model.set_trainable()
    model.generation_config = greedy(tokenizer)
    statistics = parts.image_statistics("" if read_vision is None else vision.source, config.vision_config)
    return model, make_processor(config, tokenizer, parts.answer_prefix(tokenizer), statistics)


def adapt(model: UniMedForConditionalGeneration, spec: ModelSpec, base: Path | None = None, quantize: bool = True) -> Any:
    """The model with the spec's LoRA, if it has any; `base` is the folder where the model without it was saved.

    A language model in 4 or 8 bits is read from there again, but for `quantize=False`.
    """
    if not spec.lora:
        return model
    if spec.language.quantize and quantize:
        if base is None:
            raise UserError("language.quantize: the model is quantised while it is loaded, and it was not saved; give base")
        model = load_base(base)
        model.set_trainable()
    if base is not None:
        model.config.name_or_path = str(base)
    return add_lora(model, spec.language.lora, spec.vision.lora)


def _start_connector(model: UniMedForConditionalGeneration, source: str) -> None:
    weights, own = connector_weights(Path(source)), model.connector.state_dict()
    shapes = [{key: tuple(value.shape) for key, value in state.items()} for state in (weights, own)]
    require_same_keys(f"connector.from={source!r}", *shapes)
    model.connector.load_state_dict(weights)


def describe(spec: ModelSpec, tasks: Iterable[str] = TASKS) -> UniMedConfig:
    """The configuration of the model that `build` makes, from sizes only: nothing but configurations is read.

    A tokenizer from scratch counts as full, and one of a folder as one that gets a row for `<image>`.
    """
    vision, language = spec.vision, spec.language
    vision_config = parts.vision_config(vision) if from_scratch(vision.source) else parts.read_config("vision", vision.source)
    if from_scratch(language.source):
        text_config = parts.text_config(language, SimpleNamespace(bos_token_id=1, eos_token_id=2, pad_token_id=0), language.vocab_size)
    elif language.source == SMOLLM2:
        text_config = LlamaConfig(**cast(Any, smollm2.SIZES))
    else:
        text_config = parts.read_config("language", language.source)
        text_config.vocab_size += 1
    vision_config = getattr(vision_config, "vision_config", vision_config)
    return _config(spec, vision_config, text_config, text_config.vocab_size - 1, tasks)


def _config(spec: ModelSpec, vision: Any, text: Any, image_token: int, tasks: Iterable[str]) -> UniMedConfig:
    stored = (spec.vision.dtype, spec.connector.dtype, spec.language.dtype)
    return UniMedConfig(
        vision_config=vision,
        text_config=text,
        connector={**spec.connector.settings(), "tasks": list(tasks)},
        image_token_index=image_token,
        freeze_vision=spec.vision.freeze,
        freeze_connector=spec.connector.freeze,
        freeze_language=spec.language.freeze,
        quantize=spec.language.quantize,
        dtypes=dict(zip(PARTS, (DTYPES[one] for one in stored), strict=True)),
    )


def make_processor(
    config: UniMedConfig, tokenizer: Any, answer_prefix: str = " ", statistics: dict[str, Any] | None = None
) -> UniMedProcessor:
    """The processor that fits a configuration: bicubic, aspect ratio not kept; CLIP's mean and deviation unless `statistics` has others.

    Prompt and answer together stay within the language model's positions; at most 3,800 and 1,024 tokens, as released.
    """
    side, positions = config.vision_config.image_size, config.text_config.max_position_embeddings
    answer = min(1024, positions // 4)
    return UniMedProcessor(
        image_processor=BlipImageProcessorPil(size={"height": side, "width": side}, **(statistics or {})),
        tokenizer=tokenizer,
        num_image_tokens=config.num_image_tokens,
        tasks=config.tasks,
        answer_prefix=answer_prefix,
        max_prompt_tokens=min(3800, positions - answer),
        max_answer_tokens=answer,
    )


def greedy(tokenizer: Any, max_new_tokens: int = 100) -> GenerationConfig:
    """Greedy answers of at most 100 tokens, as the released evaluation makes them."""
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
