"""cls: the class of the image, out of those that the question lists."""

from collections.abc import Sequence

from unimed.records.example import Example
from unimed.tasks import answers
from unimed.tasks.baselines import most_frequent
from unimed.tasks.metrics import released, standard, strictly
from unimed.tasks.normalise import strict
from unimed.tasks.task import Task


def listed(example: Example) -> Sequence[str]:
    """ "Which organ is in the image: liver, spleen?"; by ";" where a name holds a comma."""
    classes = example.question.rpartition(": ")[2].rstrip(" ?.")
    return [strict(name).removeprefix("or ") for name in classes.split(";" if ";" in classes else ",")]


def score(predictions: Sequence[str], examples: Sequence[Example], coco: bool | None) -> dict[str, float]:
    return released.cls(predictions, examples) | strictly(standard.cls(predictions, examples))


TASK = Task(
    tag="cls",
    about="class of the image",
    wordings={"": ("{}",)},
    asks="classes",
    listed=listed,
    read=answers.read_text,
    kinds=answers.LISTED,
    score=score,
    is_right=answers.is_it,
    majority=most_frequent,
    headline="accuracy",
    strict="accuracy_strict",
    nature=("equal without case, articles and punctuation", "equal without case and punctuation"),
)
