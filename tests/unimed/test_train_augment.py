import random

import numpy as np
import pytest
from PIL import Image

from unimed.records import box as boxes
from unimed.tasks.item import Item
from unimed.train.augment import augment
from unimed.train.collate import TrainingSet
from unimed.train.recipe import Augment


def marked(task="refer", box=(20.0, 30.0, 60.0, 70.0), size=(120, 100)):
    """A black image whose box is white, so that where the box went can be read off the pixels."""
    pixels = np.zeros((size[1], size[0]), np.uint8)
    x1, y1, x2, y2 = map(int, box)
    pixels[y1:y2, x1:x2] = 255
    text = boxes.to_text(box, size)
    question, answer = ("liver", text) if task == "refer" else (text, "liver")
    return Item("a", task, "d", question, answer, pixels, size, box, "t"), Image.fromarray(pixels).convert("RGB")


@pytest.mark.parametrize("task", ["refer", "identify"])
def test_the_box_moves_with_the_pixels(task):
    item, image = marked(task)
    moved = 0
    for seed in range(50):
        new, view = augment(item, image, Augment(zoom=0.3, shift=0.2), np.random.default_rng(seed))
        white = np.argwhere(np.asarray(view)[..., 0] > 127)
        (y1, x1), (y2, x2) = white.min(0), white.max(0) + 1
        assert new.box == pytest.approx((x1, y1, x2, y2))
        assert new.size == view.size
        text = new.answer if task == "refer" else new.question
        assert text == boxes.to_text(new.box, view.size)
        assert (new.question if task == "refer" else new.answer) == "liver"
        moved += view.size != image.size
    assert moved > 10


def test_a_window_that_would_cut_the_box_leaves_the_image_whole():
    item, image = marked(box=(0.0, 0.0, 120.0, 100.0))
    views = [augment(item, image, Augment(zoom=0.5), np.random.default_rng(seed)) for seed in range(30)]
    assert any(view.size == image.size for _, view in views)
    for new, view in views:
        inside = (new.box[2] - new.box[0]) * (new.box[3] - new.box[1])
        assert inside >= 0.9 * 120 * 100 or new is item
        assert view.size == new.size


def test_nothing_is_mirrored_and_intensities_stay_in_range():
    ramp = np.tile(np.arange(100, dtype=np.uint8), (50, 1))
    item = Item("a", "vqa", "d", "q", "a", ramp, (100, 50), None, "t")
    for seed in range(20):
        settings = Augment(brightness=0.1, contrast=0.3, noise=0.01)
        new, view = augment(item, Image.fromarray(ramp).convert("RGB"), settings, np.random.default_rng(seed))
        assert new is item
        columns = np.asarray(view, float)[..., 0].mean(0)
        assert columns[-10:].mean() > columns[:10].mean()
        assert np.ptp(np.asarray(view), axis=2).max() == 0


def test_no_augmentation_gives_the_item_back():
    item, image = marked()
    assert augment(item, image, Augment(), np.random.default_rng(0)) == (item, image)


def test_one_draw_is_one_sample():
    item, _ = marked()
    data = TrainingSet([item], Augment(zoom=0.2, shift=0.1, contrast=0.2))
    first, again, other = data[0, 7], data[0, 7], data[0, 8]
    assert first.prompt == again.prompt
    assert np.array_equal(np.asarray(first.image), np.asarray(again.image))
    assert first.answer == again.answer
    assert not np.array_equal(np.asarray(first.image), np.asarray(other.image))
    assert len({data[0, random.Random(i).getrandbits(40)].prompt for i in range(40)}) > 3
