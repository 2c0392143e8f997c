"""identify: the name of what lies in a given box."""

from collections.abc import Sequence

from unimed.records import box as boxes
from unimed.tasks import answers, reading
from unimed.tasks.asked import Asked
from unimed.tasks.baselines import MostFrequent
from unimed.tasks.item import Item
from unimed.tasks.metrics import released, standard, strictly
from unimed.tasks.task import Task


def ask(asked: Asked) -> Item:
    name, (box, size) = asked.text(asked.annotation.name, "name"), asked.box
    return asked.item("identify", boxes.to_text(box, size), name, "identify", box)


def score(predictions: Sequence[str], items: Sequence[Item], coco: bool | None) -> dict[str, float]:
    return released.identify(predictions, items) | strictly(standard.identify(predictions, items))


TASK = Task(
    tag="identify",
    about="object in a given box",
    wordings={
        "": (
            "what object is in this location {}", "{}", "what is at {}?", "name the object in the box {}", "which structure lies in {}?",
            "identify {}", "what does the box {} show?",
        ),
    },
    makes={"box": ask},
    box="question",
    read=answers.read_text,
    kinds=(reading.EMPTY, reading.CHATTY),
    score=score,
    is_right=answers.is_it,
    majority=MostFrequent,
    headline="accuracy",
    strict="accuracy_strict",
    nature=("equal without case, articles and punctuation", "equal without case and punctuation"),
    shown="What is in {}?",
)  # fmt: skip
