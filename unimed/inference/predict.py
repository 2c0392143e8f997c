"""Greedy answers of a model, in batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image

from unimed.errors import UserError
from unimed.records.example import Example
from unimed.records.pixels import load_image
from unimed.tasks import prompts


def blank(image: Image.Image) -> Image.Image:
    """A black image of the same size: what is left when the model may not look."""
    return Image.new("RGB", image.size)


@torch.inference_mode()
def answers(
    model: Any,
    processor: Any,
    examples: Sequence[Example],
    batch_size: int = 40,
    max_new_tokens: int = 100,
    blank_images: bool = False,
    progress: Callable[[int], None] | None = None,
) -> list[str]:
    """One greedy answer an example, in order: one beam, no sampling, the evaluation form of the prompt, left padding.

    `progress` is called with the number of examples just answered.
    """
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    found: list[str] = []
    try:
        for start in range(0, len(examples), batch_size):
            part = examples[start : start + batch_size]
            images = [load_image(example) for example in part if example.image is not None]
            batch = processor(
                text=[prompts.chat(prompts.instruction(example, None)) for example in part],
                images=([blank(image) for image in images] if blank_images else images) or None,
                task=[example.task for example in part],
                padding_side="left",
            )
            inputs = {name: value.to(device) for name, value in batch.items()}
            length, positions = inputs["input_ids"].shape[1], model.config.text_config.max_position_embeddings
            if length + max_new_tokens > positions:
                what = f"a prompt of {length} tokens and an answer of up to {max_new_tokens}"
                raise UserError(f"{what} do not fit the model's {positions} positions; shorten the question or evaluate.max_new_tokens")
            sequences = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1)
            found += processor.decode_answers(sequences, prompt_length=length)
            if progress:
                progress(len(part))
    finally:
        model.train(was_training)
    return found
