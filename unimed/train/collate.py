"""From items to the batches a model learns from."""

from __future__ import annotations

import dataclasses
import random
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from unimed.errors import TooLong, UserError
from unimed.tasks import TASKS, prompts
from unimed.tasks.item import Item
from unimed.train.augment import augment
from unimed.train.recipe import Augment
from unimed.train.sampler import Draw

SPARE = 4  # an image that is augmented keeps at most four times the side of the model's


class Sample(NamedTuple):
    task: str
    prompt: str
    answer: str
    image: Image.Image | None
    id: str = ""


class TrainingSet(Dataset[Sample]):
    """Draws (index, seed) in, samples out: the seed decides the prompt of the pool and the augmentation.

    `side` is the model's image size: larger images are reduced before they are kept. `cache_mb` bounds the memory of the images kept,
    in each process that reads.
    """

    def __init__(self, items: Sequence[Item], settings: Augment, side: int | None = None, cache_mb: float = 2048):
        self.items, self.settings, self.side = items, settings, side
        self.cache_bytes, self.cached_bytes = int(cache_mb * 2**20), 0
        self._cache: OrderedDict[Any, tuple[Image.Image, tuple[int, int]]] = OrderedDict()  # the last used comes last

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, draw: Draw) -> Sample:
        index, seed = draw
        item = self.items[index]
        image = None
        if item.image is not None:
            image, size = self._image(index)
            item, image = augment(_resized(item, size, image.size), image, self.settings, np.random.default_rng(seed))
        prompt = prompts.chat(prompts.instruction(item, random.Random(seed)))
        return Sample(item.task, prompt, item.answer, image, item.id)

    def _image(self, index: int) -> tuple[Image.Image, tuple[int, int]]:
        """The image as it is kept, and its size in the file."""
        item = self.items[index]
        key = index if isinstance(item.image, np.ndarray) else item.image
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        image = item.open()
        opened = self._reduced(image), image.size
        if _bytes(opened[0]) <= self.cache_bytes:
            self._cache[key] = opened
            self.cached_bytes += _bytes(opened[0])
            while self.cached_bytes > self.cache_bytes:
                self.cached_bytes -= _bytes(self._cache.popitem(last=False)[1][0])
        return opened

    def _reduced(self, image: Image.Image) -> Image.Image:
        if self.side is None:
            return image
        if self.settings == Augment():  # nothing comes before the processor's own resizing, which this is
            size = (self.side, self.side)
        else:
            size = (min(image.width, SPARE * self.side), min(image.height, SPARE * self.side))
        return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)


def _resized(item: Item, size: tuple[int, int], new: tuple[int, int]) -> Item:
    """The item with its box in pixels of the resized image."""
    if item.box is None or size == new:
        return item
    x, y = new[0] / size[0], new[1] / size[1]
    x1, y1, x2, y2 = item.box
    return dataclasses.replace(item, box=(x1 * x, y1 * y, x2 * x, y2 * y), size=new)


def _bytes(image: Image.Image) -> int:
    return image.width * image.height * len(image.getbands())


class Collator:
    """Samples to model inputs and labels, plus `sample_tasks` [B]: positions in TASKS, for the logs."""

    def __init__(self, processor: Any):
        self.processor = processor

    def __call__(self, samples: list[Sample]) -> dict[str, torch.Tensor]:
        images = [sample.image for sample in samples if sample.image is not None]
        try:
            batch = self.processor(
                text=[sample.prompt for sample in samples],
                images=images or None,
                task=[sample.task for sample in samples],
                answers=[sample.answer for sample in samples],
            )
        except TooLong as error:
            raise UserError(f"{samples[error.place].id}: {error}, or leave it out of the data") from error
        places = list(TASKS)
        return {**batch, "sample_tasks": torch.tensor([places.index(sample.task) for sample in samples])}
