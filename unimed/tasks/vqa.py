"""vqa: a question about the image, open or closed, with a short answer."""

from collections import Counter
from collections.abc import Sequence

from unimed.tasks import answers
from unimed.tasks.asked import Asked
from unimed.tasks.baselines import MostFrequent
from unimed.tasks.item import Item
from unimed.tasks.metrics import released, standard, strictly
from unimed.tasks.normalise import strict
from unimed.tasks.task import Task


def listed(item: Item) -> Sequence[str]:
    return ("yes", "no") if strict(item.answer) in ("yes", "no") else ()


def ask(asked: Asked) -> Item:
    return asked.question("vqa")


def score(predictions: Sequence[str], items: Sequence[Item], coco: bool | None) -> dict[str, float]:
    types = Counter(item.answer_type for item in items)
    counts = {f"count_{kind.lower()}": float(types[kind]) for kind in ("OPEN", "CLOSED") if types[kind]}
    return released.vqa(predictions, items) | counts | strictly(standard.vqa(predictions, items))


TASK = Task(
    tag="vqa",
    about="questions about the image",
    wordings={"": ("Based on the image, give a short answer to this question: {}", "{}")},
    makes={"qa": ask},
    listed=listed,
    read=answers.read_text,
    kinds=answers.LISTED,
    score=score,
    is_right=answers.is_it,
    majority=MostFrequent,
    headline="f1",
    strict="f1_strict",
    nature=("words in common; repeats count, so “yes yes yes” has all of “yes”", "each word counts once"),
)
