"""qa: a medical question without an image. The release does not score it, so both protocols have the same metric."""

from collections.abc import Sequence

from unimed.tasks import answers
from unimed.tasks.asked import Asked
from unimed.tasks.baselines import MostFrequent
from unimed.tasks.item import Item
from unimed.tasks.metrics import standard
from unimed.tasks.normalise import strict
from unimed.tasks.task import Task


def listed(item: Item) -> Sequence[str]:
    """Of "... What next? (A) rest (B) surgery", or yes, no and maybe."""
    words = standard.YES_NO_MAYBE
    return words if strict(item.answer) in words else list(standard.options_in(item.question).values())


def ask(asked: Asked) -> Item:
    return asked.question("qa")


def score(predictions: Sequence[str], items: Sequence[Item], coco: bool | None) -> dict[str, float]:
    return standard.qa(predictions, items)


TASK = Task(
    tag="qa",
    about="text questions, no image",
    needs_image=False,
    makes={"qa": ask},
    wordings={
        "pubmedqa": ("You are a doctor. Answer this question with yes, no or maybe: {}", "{}"),
        "": ("You are a doctor. Answer this question briefly: {}", "{}"),
    },
    listed=listed,
    read=answers.read_text,
    kinds=answers.LISTED,
    score=score,
    is_right=answers.is_it,
    majority=MostFrequent,
    headline="accuracy",
    strict="accuracy",
    nature=("equal without case and punctuation; not scored by the release", "the same"),
)
