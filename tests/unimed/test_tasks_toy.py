"""A task that no file of the package knows: one object, put into TASKS."""

from collections.abc import Sequence

import numpy as np
import pytest
from PIL import Image

import unimed
from unimed.errors import UserError
from unimed.evaluate import evaluate
from unimed.evaluate.run import answer_table, odd_answers
from unimed.inference.session import Generated
from unimed.report import gallery, page, plots
from unimed.tasks import Task, answers, metrics, prompts, reading
from unimed.tasks.baselines import MajorityAnswers, MostFrequent
from unimed.tasks.item import Item
from unimed.train import recipe as recipes


def score(predictions: Sequence[str], items: Sequence[Item], coco: bool | None) -> dict[str, float]:
    right = [answers.is_it(item, text) for item, text in zip(items, predictions, strict=True)]
    return {"share": sum(right) / len(right)}


COUNT = Task(
    tag="count",
    about="how many of a thing",
    wordings={"": ("how many {} are there?", "count the {}")},
    listed=lambda item: ("1", "2", "3"),
    read=answers.read_text,
    kinds=(reading.EMPTY, reading.OFF_LIST),
    score=score,
    is_right=answers.is_it,
    majority=MostFrequent,
    headline="share",
    strict="share",
    nature=("equal", "the same"),
    shown="How many {}?",
)


@pytest.fixture
def count(monkeypatch):
    monkeypatch.setitem(unimed.TASKS, "count", COUNT)


def item(number, answer, thing="kidneys"):
    return Item(f"c{number}", "count", "toy", thing, answer, np.zeros((8, 8, 3), np.uint8), (8, 8), None, f"count/{thing}")


def test_prompt_reading_and_score(count):
    asked = item(0, "2")
    assert prompts.instruction(asked, None) == f"{prompts.IMAGE} [count] how many kidneys are there?"
    assert [answers.read(asked, text).kind for text in ("2", "Two.", "", "many")] == ["", "", "empty", "off_list"]
    found = metrics.score("count", ["two", "3", "", "many"], [asked] * 4)
    assert found == {"count": 4, "share": 0.25, "empty": 1, "off_list": 1}
    assert metrics.is_right(asked, "2")
    assert MajorityAnswers.fit([asked, item(1, "1"), item(2, "2")]).predict(asked) == "2"


class Speaks:
    """Stands for a session: gives these answers, others where images are blanked."""

    def __init__(self, texts):
        self.texts = texts

    def generate(self, items, batch_size, max_new_tokens, blank_images):
        return [Generated(text, 1.0, ()) for text in self.texts[blank_images][: len(items)]]


def test_it_is_compared_and_reported(count):
    held_out = [item(number, answer) for number, answer in enumerate(("1", "2", "2", "3"))]
    texts = {False: ["1", "2", "two", "many"], True: [""] * 4}
    rows = evaluate.compare(None, Speaks(texts), [item(9, "2")], held_out)
    assert {row: part["metrics"]["count"]["share"] for row, part in rows.items()} == {
        evaluate.MAJORITY: 0.5,
        evaluate.BLANKED: 0,
        evaluate.TRAINED: 0.75,
    }
    assert evaluate.verdict(rows) == {"count": True}
    part = {"counts": {"count": 4}, "rows": {row: found["metrics"] for row, found in rows.items()}}
    header, lines = answer_table({"splits": {"test": part}, "headline": {"count": "share"}, "strict": {"count": "share"}})
    assert header == ["answers by", "count\nshare"]
    assert lines["test"][-1] == ["trained", "0.750"]
    assert odd_answers(part, evaluate.TRAINED) == {"count": {"off_list": 1}}
    (block,) = gallery.right_and_wrong(held_out, texts[False], lambda one: Image.fromarray(one.image))
    assert block["share"] == "3 of 4 right"
    assert [one["question"] for one in block["shown"]] == ["How many kidneys?"] * 2
    assert "How many kidneys?" in page.macro("answer", block["shown"][0])
    assert plots.task_colour("count") in plots.TASK_COLOURS
    assert "count" in plots.loss_per_task([{"step": 1, "loss/count": 1.0}, {"step": 2, "loss/count": 0.5}])


def test_a_recipe_may_name_it(count):
    assert recipes.load("tiny", ["data.tasks=[count,vqa]"]).data.tasks == ["count", "vqa"]


def test_without_it_the_tag_is_unknown():
    for call in (prompts.instruction, answers.read, metrics.is_right):
        with pytest.raises(UserError, match="c0: unknown task 'count'; valid are vqa, refer, identify, caption, cls, qa, severity"):
            call(item(0, "2"), None if call is prompts.instruction else "2")
    with pytest.raises(UserError, match=r"data\.tasks: no task 'count'"):
        recipes.load("tiny", ["data.tasks=[count]"])
