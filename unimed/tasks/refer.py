"""refer: the box of a named object, written as text."""

from collections.abc import Sequence

from unimed.errors import UserError
from unimed.records import box as boxes
from unimed.records.example import Example
from unimed.tasks import answers, reading
from unimed.tasks.baselines import mean_box
from unimed.tasks.item import Asked
from unimed.tasks.metrics import released, standard, strictly
from unimed.tasks.task import Task


def ask(asked: Asked) -> Example:
    name, (box, size) = asked.text(asked.annotation.name, "name"), asked.box
    return asked.item("refer", name, boxes.to_text(box, size), f"refer/{name.lower()}", box)


def score(predictions: Sequence[str], examples: Sequence[Example], coco: bool | None) -> dict[str, float]:
    for example in examples:
        _check_box(example)
    found = released.refer(predictions, examples)
    found["unparsable_released"] = found.pop("unparsable")
    return found | strictly(standard.refer(predictions, examples))


def is_right(example: Example, prediction: str) -> bool:
    """By IoU, wherever the box stands in the answer."""
    _check_box(example)
    return boxes.is_hit(standard.box_iou(example, prediction))


def _check_box(example: Example) -> None:
    if example.box is None or example.size is None:
        raise UserError(f"{example.id}: a {example.task} example needs a box and the image's size")


TASK = Task(
    tag="refer",
    about="box of a named object",
    wordings={
        "": (
            "give me the location of {}", "{}", "where is {}?", "where in the image is {}?", "find {} and give its box", "box the {}",
            "locate {}",
        ),
    },
    makes={"box": ask},
    box="answer",
    read=answers.read_box,
    kinds=(reading.EMPTY, reading.UNPARSABLE, reading.INVERTED, reading.CHATTY),
    score=score,
    is_right=is_right,
    majority=mean_box,
    headline="miou",
    strict="miou_strict",
    nature=("the answer must begin with the box; sides are one pixel longer", "usual IoU, the box may stand anywhere"),
    shown="Where is {}?",
    graded=True,
)  # fmt: skip
