from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
from accelerate.data_loader import skip_first_batches
from torch.utils.data import DataLoader

from unimed.errors import UserError
from unimed.train.sampler import TaskRatioSampler, by_set, group


@dataclass
class Item:
    task: str
    dataset: str = "slake"


ITEMS = [Item("vqa")] * 10 + [Item("refer")] * 7 + [Item("qa", "facts")] * 3 + [Item("vqa", "pathvqa")] * 5


def sampler(ratios=None, batches=400, mode="homogeneous", seed=0, batch_size=4):
    members, probabilities = group(ITEMS, ratios or {"vqa": 5, "refer": 4, "qa": 1})
    return TaskRatioSampler(members, probabilities, batch_size, batches, seed, mode)


def tasks(batch):
    return [ITEMS[index].task for index, _ in batch]


@pytest.mark.parametrize("mode", ["homogeneous", "mixed"])
def test_tasks_come_by_ratio(mode):
    batches = list(sampler(mode=mode))
    counts = Counter(task for batch in batches for task in tasks(batch))
    shares = {task: counts[task] / sum(counts.values()) for task in counts}
    assert shares == pytest.approx({"vqa": 0.5, "refer": 0.4, "qa": 0.1}, abs=0.08)
    homogeneous = all(len(set(tasks(batch))) == 1 for batch in batches)
    assert homogeneous == (mode == "homogeneous")
    assert all(len(batch) == 4 for batch in batches)


@pytest.mark.parametrize("mode", ["homogeneous", "mixed"])
def test_one_seed_is_one_stream_and_another_seed_another(mode):
    assert list(sampler(mode=mode)) == list(sampler(mode=mode))
    assert list(sampler(mode=mode)) != list(sampler(mode=mode, seed=1))


@pytest.mark.parametrize("mode", ["homogeneous", "mixed"])
def test_a_longer_run_begins_like_a_shorter_one(mode):
    assert list(sampler(mode=mode, batches=50))[:20] == list(sampler(mode=mode, batches=20))


def test_skipping_as_the_trainer_does_gives_the_rest_of_the_stream():
    whole = list(sampler(batches=30))
    loader = DataLoader(range(len(ITEMS)), batch_sampler=sampler(batches=30))
    assert list(skip_first_batches(loader, 11).batch_sampler) == whole[11:]


def test_every_item_comes_once_before_any_comes_twice():
    drawn = [index for batch in sampler({"refer": 1}, batches=7, batch_size=3) for index, _ in batch]
    for turn in range(3):
        assert sorted(drawn[turn * 7 : turn * 7 + 7]) == list(range(10, 17))
    assert drawn[:7] != drawn[7:14]


def test_a_source_can_be_one_dataset_of_a_task():
    members, probabilities = group(ITEMS, {"pathvqa/vqa": 3, "slake/vqa": 1})
    assert [len(m) for m in members] == [5, 10]
    assert np.allclose(probabilities, [0.75, 0.25])


@pytest.mark.parametrize("order", [("ct", "ct-new"), ("ct-new", "ct")])
def test_a_set_whose_name_begins_as_another_s_has_its_own_ratio(order):
    items = [Item("vqa", name) for name in ("ct", "ct-new", "ct-new-parts")]
    ratios = {"ct": 1.0, "ct-new": 0.0}
    divided = by_set({"vqa": 1.0}, items, {name: ratios[name] for name in order})
    assert divided == {"ct/vqa": 1.0, "ct-new/vqa": 0.0, "ct-new-parts/vqa": 0.0}


def test_a_task_without_items_is_left_out_but_a_named_dataset_must_exist():
    members, _ = group(ITEMS, {"vqa": 1, "caption": 1})
    assert len(members) == 1
    with pytest.raises(UserError, match=r"slake2/vqa: no training item .* datasets that have: pathvqa, slake"):
        group(ITEMS, {"vqa": 1, "slake2/vqa": 1})
    with pytest.raises(UserError, match="mimic/caption"):
        group(ITEMS, {"vqa": 1, "mimic/caption": 1})
    with pytest.raises(UserError, match="none of the tasks"):
        group(ITEMS, {"caption": 1})


@pytest.mark.parametrize(
    ("ratios", "lines"),
    [
        ({"vqa": 5, "refer": 4, "qa": 1}, []),
        ({"vqa": 5, "refer": 4, "qa": 0}, []),
        (
            {"vqa": 5, "refer": 4, "qa": 1, "caption": 2, "cls": 3},
            ["sampler.ratios: no training item of caption, cls; the other sources share what it had"],
        ),
        (
            {"slake/vqa": 5, "refer": 4},
            ["sampler.ratios: no ratio for facts/qa (3 items), pathvqa/vqa (5 items); they are not used in training"],
        ),
    ],
)
def test_a_ratio_without_items_and_items_without_a_ratio_are_named(ratios, lines, caplog):
    group(ITEMS, ratios)
    assert [record.getMessage() for record in caplog.records] == lines
