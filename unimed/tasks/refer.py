"""refer: the box of a named object, written as text."""

from collections.abc import Sequence

from unimed.errors import UserError
from unimed.records import box as boxes
from unimed.tasks import answers, reading
from unimed.tasks.asked import Asked
from unimed.tasks.baselines import MeanBox
from unimed.tasks.item import Item
from unimed.tasks.metrics import released, standard, strictly
from unimed.tasks.task import Task


def ask(asked: Asked) -> Item:
    name, (box, size) = asked.text(asked.annotation.name, "name"), asked.box
    return asked.item("refer", name, boxes.to_text(box, size), f"refer/{name.lower()}", box)


def score(predictions: Sequence[str], items: Sequence[Item], coco: bool | None) -> dict[str, float]:
    for item in items:
        _check_box(item)
    found = released.refer(predictions, items)
    found["unparsable_released"] = found.pop("unparsable")
    return found | strictly(standard.refer(predictions, items))


def is_right(item: Item, prediction: str) -> bool:
    """By IoU, wherever the box stands in the answer."""
    _check_box(item)
    return boxes.is_hit(standard.box_iou(item, prediction))


def _check_box(item: Item) -> None:
    if item.box is None or item.size is None:
        raise UserError(f"{item.id}: a {item.task} item needs a box and the image's size")


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
    majority=MeanBox,
    headline="miou",
    strict="miou_strict",
    nature=("the answer must begin with the box; sides are one pixel longer", "usual IoU, the box may stand anywhere"),
    shown="Where is {}?",
    graded=True,
)  # fmt: skip
