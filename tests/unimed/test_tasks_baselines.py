from dataclasses import replace

import pytest

from unimed.datasets import load_examples
from unimed.errors import UserError
from unimed.records.example import Example
from unimed.tasks import RELEASED_TASKS, TASKS, metrics
from unimed.tasks.baselines import MajorityAnswers


def example(task, answer, template, box=None, size=None):
    return Example("e", task, "d", "?", answer, None, size, box, template)


def test_majority_per_template():
    fitted = MajorityAnswers.fit(
        [
            example("vqa", "CT", "vqa/modality"),
            example("vqa", "MRI", "vqa/modality"),
            example("vqa", "MRI", "vqa/modality"),
            example("vqa", "yes", "vqa/presence/liver"),
            example("vqa", "no", "vqa/presence/liver"),
            example("vqa", "no", "vqa/presence/colon"),
            example("caption", "b", "caption/report"),
            example("caption", "a", "caption/report"),
            example("caption", "a", "caption/report"),
        ]
    )
    assert fitted.predict(example("vqa", "", "vqa/modality")) == "MRI"
    assert fitted.predict(example("vqa", "", "vqa/presence/liver")) == "yes"  # a tie: the first seen
    assert fitted.predict(example("vqa", "", "vqa/never seen")) == "MRI"
    assert fitted.predict(example("caption", "", "caption/report")) == "a"
    assert fitted.tasks == {"vqa", "caption"}
    with pytest.raises(UserError, match="nothing was fitted for task 'qa'"):
        fitted.predict(example("qa", "", "qa/side"))


def test_mean_box_in_shares_of_each_image():
    fitted = MajorityAnswers.fit(
        [
            example("refer", "", "refer/liver", (10, 10, 30, 20), (100, 50)),  # 10 20 30 40
            example("refer", "", "refer/liver", (40, 0, 100, 90), (200, 300)),  # 20 0 50 30
            example("refer", "", "refer/spleen", (0, 0, 10, 10), (10, 10)),
        ]
    )
    assert fitted.predict(example("refer", "", "refer/liver")) == "{<15><10><40><35>}"
    assert fitted.predict(example("refer", "", "refer/colon")) == "{<10><6><60><56>}"


def test_it_does_not_look(sample_folder):
    train = load_examples(sample_folder, "train")
    fitted = MajorityAnswers.fit(train)
    for one in load_examples(sample_folder, "slab")[::7]:
        hidden = replace(one, image=None, answer="", box=None, size=None, id="")
        assert fitted.predict(hidden) == fitted.predict(one)


@pytest.mark.parametrize("split", ["slab", "subject"])
def test_there_is_something_to_gain_by_looking(sample_folder, split):
    fitted = MajorityAnswers.fit(load_examples(sample_folder, "train"))
    examples = load_examples(sample_folder, split)
    best = {"vqa": 0.7, "refer": 0.4, "identify": 0.4, "caption": 0.9, "cls": 0.4, "qa": 0.6}
    for task in RELEASED_TASKS:
        part = [one for one in examples if one.task == task]
        found = metrics.score(task, [fitted.predict(one) for one in part], part, coco=False)
        assert 0 < found[TASKS[task].headline] < best[task]
        perfect = metrics.score(task, [one.answer for one in part], part, coco=False)
        assert perfect[TASKS[task].headline] > 0.85 if task == "refer" else perfect[TASKS[task].headline] > 0.999
