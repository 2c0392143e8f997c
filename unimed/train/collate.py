"""From examples to the batches a model learns from."""

from __future__ import annotations

import random
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from unimed.data.example import TASKS, Example
from unimed.data.images import load_image
from unimed.tasks import prompts
from unimed.train.augment import augment
from unimed.train.config import Augment
from unimed.train.sampler import Draw


class Sample(NamedTuple):
    task: str
    prompt: str
    answer: str
    image: Image.Image | None


class TrainingSet(Dataset[Sample]):
    """Draws (index, seed) in, samples out: the seed decides the prompt of the pool and the augmentation."""

    def __init__(self, examples: list[Example], settings: Augment, cache_images: int = 4096):
        self.examples, self.settings = examples, settings
        self._image = lru_cache(maxsize=cache_images)(lambda index: load_image(examples[index]))

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, draw: Draw) -> Sample:
        index, seed = draw
        example = self.examples[index]
        image = None
        if example.image is not None:
            example, image = augment(example, self._image(index), self.settings, np.random.default_rng(seed))
        prompt = prompts.chat(prompts.instruction(example, random.Random(seed)))
        return Sample(example.task, prompt, example.answer, image)


class Collator:
    """Samples to model inputs and labels, plus `sample_tasks` [B]: positions in TASKS, for the logs."""

    def __init__(self, processor: Any):
        self.processor = processor

    def __call__(self, samples: list[Sample]) -> dict[str, torch.Tensor]:
        images = [sample.image for sample in samples if sample.image is not None]
        batch = self.processor(
            text=[sample.prompt for sample in samples],
            images=images or None,
            task=[sample.task for sample in samples],
            answers=[sample.answer for sample in samples],
        )
        return {**batch, "sample_tasks": torch.tensor([TASKS.index(sample.task) for sample in samples])}
