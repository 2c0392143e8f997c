import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from unimed.errors import UserError
from unimed.tasks.item import Item
from unimed.train import recipe as recipes
from unimed.train.collate import Collator, TrainingSet
from unimed.train.recipe import Augment
from unimed.train.run import build, items
from unimed.train.trainer import UniMedTrainer


def noise(seed, size):
    return np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)


def on_disk(folder, count, size):
    """Items whose images are files."""
    found = []
    for index in range(count):
        path = folder / f"{index}.png"
        Image.fromarray(noise(index, size)).save(path)
        found.append(Item(str(index), "caption", "d", "", "normal", path, size, None, "t"))
    return found


def test_kept_images_are_bounded_by_bytes_after_they_were_reduced(tmp_path, monkeypatch):
    found = on_disk(tmp_path, 10, (200, 160))
    opened = []
    monkeypatch.setattr(Item, "open", lambda item: opened.append(item.id) or Image.open(item.image).convert("RGB"))
    data = TrainingSet(found, Augment(), side=32, cache_mb=4 * 32 * 32 * 3 / 2**20)
    for index in range(10):
        assert data[index, 0].image.size == (32, 32)
        assert data.cached_bytes <= data.cache_bytes
    assert data.cached_bytes == 4 * 32 * 32 * 3
    for index in (6, 7, 8, 9, 6):
        data[index, 0]
    assert opened == [str(index) for index in range(10)]
    data[0, 0]
    data[7, 0]  # the one that was not used for longest made room
    data[6, 0]
    assert opened[10:] == ["0", "7"]
    nothing = TrainingSet(found, Augment(), side=32, cache_mb=0)
    assert nothing[3, 0].image.size == (32, 32)
    assert nothing.cached_bytes == 0


def test_questions_about_one_file_share_its_image(tmp_path):
    one = on_disk(tmp_path, 1, (64, 48))[0]
    data = TrainingSet([one, one, one], Augment(), side=32)
    assert data[0, 0].image is data[2, 1].image
    assert data.cached_bytes == 32 * 32 * 3


def test_without_augmentation_the_model_sees_what_it_saw_before(small_overrides, tmp_path):
    recipe = recipes.load("tiny", small_overrides)
    _, processor = build(recipe, items(recipe, "train")[:50])
    found = on_disk(tmp_path, 3, (301, 77))
    whole, reduced = (Collator(processor)([TrainingSet(found, Augment(), side)[index, 5] for index in range(3)]) for side in (None, 32))
    assert torch.equal(whole["pixel_values"], reduced["pixel_values"])


def test_the_box_goes_along_with_a_reduced_image():
    pixels = np.zeros((1000, 800), np.uint8)
    pixels[300:600, 200:700] = 255
    item = Item("a", "refer", "d", "liver", "{<25><30><87><60>}", pixels, (800, 1000), (200.0, 300.0, 700.0, 600.0), "t")
    data, moved = TrainingSet([item], Augment(zoom=0.2, shift=0.1), side=40), 0
    for seed in range(20):
        sample = data[0, seed]
        white = np.argwhere(np.asarray(sample.image)[..., 0] > 127)
        (y1, x1), (y2, x2) = white.min(0), white.max(0) + 1
        width, height = sample.image.size
        assert max(width, height) <= 4 * 40 * 1.2
        shown = [int(number) for number in sample.answer.strip("{<>}").split("><")]
        assert shown == pytest.approx([100 * x1 / width, 100 * y1 / height, 100 * x2 / width, 100 * y2 / height], abs=1.5)
        moved += sample.answer != item.answer
    assert moved > 10


def test_workers_change_no_batch(small_overrides, tmp_path):
    batches = {}
    for workers in (0, 2):
        recipe = recipes.load("tiny", [*small_overrides, f"data.workers={workers}", "train.max_steps=3"])
        found = items(recipe, "train")[::40]
        model, processor = build(recipe, found)
        trainer = UniMedTrainer(recipe, model, processor, TrainingSet(found, recipe.augment, 32), tmp_path / str(workers))
        loader = trainer.get_train_dataloader()
        assert loader.num_workers == workers
        batches[workers] = list(loader)
    assert len(batches[0]) == 3
    for one, two in zip(batches[0], batches[2], strict=True):
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_item_that_is_too_long_is_named_in_one_line(small_overrides, workers):
    """Also from a process that prepares batches, whose error torch raises again with a traceback as its text."""
    recipe = recipes.load("tiny", small_overrides)
    found = list(items(recipe, "train"))[:2]
    found[1] = replace(found[1], question="which plane is shown " * 400, max_words=0)
    _, processor = build(recipe, items(recipe, "train"))
    data = DataLoader(TrainingSet(found, Augment()), collate_fn=Collator(processor), batch_sampler=[[(0, 0), (1, 0)]], num_workers=workers)
    with pytest.raises(UserError) as caught:
        next(iter(data))
    assert re.fullmatch(
        rf"{re.escape(found[1].id)}: prompt 1 has \d+ tokens, .* allowed; shorten it, or leave it out of the data", str(caught.value)
    )
