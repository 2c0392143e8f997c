import weakref
from dataclasses import replace

import numpy as np
import pytest

from unimed.datasets import load_items
from unimed.errors import UserError
from unimed.tasks import RELEASED_TASKS, TASKS, metrics
from unimed.tasks.baselines import MajorityAnswers
from unimed.tasks.item import Item


def item(task, answer, template, box=None, size=None):
    return Item("e", task, "d", "?", answer, None, size, box, template)


def test_majority_per_template():
    fitted = MajorityAnswers.fit(
        [
            item("vqa", "CT", "vqa/modality"),
            item("vqa", "MRI", "vqa/modality"),
            item("vqa", "MRI", "vqa/modality"),
            item("vqa", "yes", "vqa/presence/liver"),
            item("vqa", "no", "vqa/presence/liver"),
            item("vqa", "no", "vqa/presence/colon"),
            item("caption", "b", "caption/report"),
            item("caption", "a", "caption/report"),
            item("caption", "a", "caption/report"),
        ]
    )
    assert fitted.predict(item("vqa", "", "vqa/modality")) == "MRI"
    assert fitted.predict(item("vqa", "", "vqa/presence/liver")) == "yes"  # a tie: the first seen
    assert fitted.predict(item("vqa", "", "vqa/never seen")) == "MRI"
    assert fitted.predict(item("caption", "", "caption/report")) == "a"
    assert fitted.tasks == {"vqa", "caption"}
    with pytest.raises(UserError, match="nothing was fitted for task 'qa'"):
        fitted.predict(item("qa", "", "qa/side"))


def test_mean_box_in_shares_of_each_image():
    fitted = MajorityAnswers.fit(
        [
            item("refer", "", "refer/liver", (10, 10, 30, 20), (100, 50)),  # 10 20 30 40
            item("refer", "", "refer/liver", (40, 0, 100, 90), (200, 300)),  # 20 0 50 30
            item("refer", "", "refer/spleen", (0, 0, 10, 10), (10, 10)),
        ]
    )
    assert fitted.predict(item("refer", "", "refer/liver")) == "{<15><10><40><35>}"
    assert fitted.predict(item("refer", "", "refer/colon")) == "{<10><6><60><56>}"


def test_no_item_is_kept():
    seen = []

    def items():
        for number in range(20):
            image = np.zeros((2, 2, 3), np.uint8)
            seen.append(weakref.ref(image))
            box = (0, 0, 1, 1)
            for task, answer in (("vqa", "CT"), ("calculation", f"{number}"), ("refer", "")):
                yield Item("e", task, "d", "?", answer, image, (2, 2), box, task)
            del image
            assert sum(one() is not None for one in seen) <= 2

    assert MajorityAnswers.fit(items()).predict(item("calculation", "", "")) == "9"


def test_a_box_is_needed():
    with pytest.raises(UserError, match="e: a refer item needs a box and the image's size"):
        MajorityAnswers.fit([item("refer", "", "refer/liver")])


def test_it_does_not_look(sample_folder):
    train = load_items(sample_folder, "train")
    fitted = MajorityAnswers.fit(train)
    for one in load_items(sample_folder, "slab")[::7]:
        hidden = replace(one, image=None, answer="", box=None, size=None, id="")
        assert fitted.predict(hidden) == fitted.predict(one)


@pytest.mark.parametrize("split", ["slab", "subject"])
def test_there_is_something_to_gain_by_looking(sample_folder, split):
    fitted = MajorityAnswers.fit(load_items(sample_folder, "train"))
    items = load_items(sample_folder, split)
    best = {"vqa": 0.7, "refer": 0.4, "identify": 0.4, "caption": 0.9, "cls": 0.4, "qa": 0.6}
    for task in RELEASED_TASKS:
        part = [one for one in items if one.task == task]
        found = metrics.score(task, [fitted.predict(one) for one in part], part, coco=False)
        assert 0 < found[TASKS[task].headline] < best[task]
        perfect = metrics.score(task, [one.answer for one in part], part, coco=False)
        assert perfect[TASKS[task].headline] > 0.85 if task == "refer" else perfect[TASKS[task].headline] > 0.999
