"""cls: the class of the image, out of those that the question lists."""

from collections.abc import Sequence

from unimed.tasks import answers
from unimed.tasks.asked import Asked
from unimed.tasks.baselines import MostFrequent
from unimed.tasks.item import Item
from unimed.tasks.metrics import released, standard, strictly
from unimed.tasks.normalise import strict
from unimed.tasks.task import Task

NOTHING = "no finding"


def joint(names: Sequence[str]) -> str:
    """The separator of the names in a list."""
    return "; " if any("," in name for name in names) else ", "


def class_question(what: str, names: Sequence[str], several: bool = False) -> str:
    """The question that lists the classes, of which one or several are right."""
    listed = joint(names).join(names)
    return f"Which {what}s are in the image: {listed}, or {NOTHING}?" if several else f"Which {what} is in the image: {listed}?"


def ask(asked: Asked) -> Item:
    """One class of a set."""
    what, listed = asked.annotation.set, asked.label()
    return asked.item("cls", class_question(what, listed), asked.text(asked.annotation.value, "value"), f"cls/{what}")


def ask_several(asked: Asked) -> Item:
    """Any number of the classes of a set."""
    one = asked.annotation
    listed = asked.labels()
    answer = joint(listed).join(name for name in listed if name in one.present) or NOTHING
    return asked.item("cls", class_question(one.set or "finding", listed, several=True), answer, f"cls/{one.set or 'finding'}")


def ask_as_given(asked: Asked) -> Item:
    return asked.question("cls")


def listed(item: Item) -> Sequence[str]:
    """ "Which organ is in the image: liver, spleen?"; by ";" where a name holds a comma."""
    classes = item.question.rpartition(": ")[2].rstrip(" ?.")
    return [strict(name).removeprefix("or ") for name in classes.split(";" if ";" in classes else ",")]


def score(predictions: Sequence[str], items: Sequence[Item], coco: bool | None) -> dict[str, float]:
    return released.cls(predictions, items) | strictly(standard.cls(predictions, items))


TASK = Task(
    tag="cls",
    about="class of the image",
    wordings={"": ("{}",)},
    asks="classes",
    makes={"label": ask, "labels": ask_several, "qa": ask_as_given},
    named=frozenset({"labels", "qa"}),
    listed=listed,
    read=answers.read_text,
    kinds=answers.LISTED,
    score=score,
    is_right=answers.is_it,
    majority=MostFrequent,
    headline="accuracy",
    strict="accuracy_strict",
    nature=("equal without case, articles and punctuation", "equal without case and punctuation"),
)
