"""Random views of one training item: a shifted, scaled window and changed intensities, with the box moved along."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from PIL import Image

from unimed.records import box as boxes
from unimed.tasks.item import Item
from unimed.tasks.task import task_of
from unimed.train.recipe import Augment

LEAST_VISIBLE = 0.9  # share of a box that must stay inside, or the item keeps its whole image


def augment(item: Item, image: Image.Image, settings: Augment, rng: np.random.Generator) -> tuple[Item, Image.Image]:
    """The item and image to train on. Nothing is mirrored or turned: side and plane are labels."""
    if settings.zoom or settings.shift:
        item, image = _window(item, image, settings, rng)
    if settings.brightness or settings.contrast or settings.noise:
        image = _intensity(image, settings, rng)
    return item, image


def _window(item: Item, image: Image.Image, settings: Augment, rng: np.random.Generator) -> tuple[Item, Image.Image]:
    width, height = image.size
    side = 1 + settings.zoom * rng.uniform(-1, 1, 2)
    centre = 0.5 + settings.shift * rng.uniform(-1, 1, 2)
    window_w, window_h = max(round(width * side[0]), 1), max(round(height * side[1]), 1)
    left, top = round(width * centre[0] - window_w / 2), round(height * centre[1] - window_h / 2)
    if item.box is not None:
        moved = _move_box(item, (left, top, window_w, window_h))
        if moved is None:
            return item, image
        item = moved
    return item, image.crop((left, top, left + window_w, top + window_h))  # outside is black


def _move_box(item: Item, window: tuple[int, int, int, int]) -> Item | None:
    left, top, width, height = window
    assert item.box is not None
    x1, y1, x2, y2 = item.box
    inside = (max(x1 - left, 0.0), max(y1 - top, 0.0), min(x2 - left, float(width)), min(y2 - top, float(height)))
    area = max(inside[2] - inside[0], 0.0) * max(inside[3] - inside[1], 0.0)
    if area < LEAST_VISIBLE * (x2 - x1) * (y2 - y1):
        return None
    text = boxes.to_text(inside, (width, height))
    changed: dict[str, Any] = {"box": inside, "size": (width, height)}
    if where := task_of(item).box:
        changed[where] = text
    return dataclasses.replace(item, **changed)


def _intensity(image: Image.Image, settings: Augment, rng: np.random.Generator) -> Image.Image:
    pixels = np.asarray(image, dtype=np.float32)
    gain, offset = 1 + settings.contrast * rng.uniform(-1, 1), 255 * settings.brightness * rng.uniform(-1, 1)
    pixels = (pixels - 127.5) * gain + 127.5 + offset
    if settings.noise:
        pixels = pixels + 255 * settings.noise * rng.standard_normal(pixels.shape[:2], dtype=np.float32)[..., None]
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
