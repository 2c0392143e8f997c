"""findings: which of the findings in the question the image shows. No release has it.

f1         mean over the images of the F1 of the findings that an answer names; 1 where there is none and the answer says so
accuracy   all of them and no other
"""

from collections.abc import Sequence

from unimed.tasks import answers, reading
from unimed.tasks.asked import Asked
from unimed.tasks.baselines import MostFrequent
from unimed.tasks.cls import NOTHING, class_question, joint, listed
from unimed.tasks.item import Item
from unimed.tasks.metrics import standard
from unimed.tasks.metrics.released import mean
from unimed.tasks.task import Task


def f1(item: Item, prediction: str) -> float:
    """The F1 of one answer. "no finding" beside a finding counts as one more, which is wrong."""
    given = answers.read(item, prediction).says or frozenset()
    wanted = answers.read(item, item.answer).says or frozenset()
    return 2 * len(given & wanted) / max(len(given) + len(wanted), 1)


def ask(asked: Asked) -> Item:
    """Asks about the findings that are certain."""
    names, present = ([asked.text(name, "present") for name in some] for some in (asked.certain(), sorted(asked.annotation.present)))
    question, answer = class_question("finding", names, several=True), joint(names).join(present) or NOTHING
    return asked.item("findings", question, answer, "findings")


def score(predictions: Sequence[str], items: Sequence[Item], coco: bool | None) -> dict[str, float]:
    shares = [f1(item, text) for item, text in zip(items, predictions, strict=True)]
    return {"f1": mean(shares)} | standard.accuracy(predictions, items)


def read(item: Item, text: str) -> reading.Reading:
    """Several findings are an answer here, also where one is wanted."""
    return answers.read_text(item, text, several=True)


TASK = Task(
    tag="findings",
    about="which findings the image shows",
    wordings={"": ("{}",)},
    asks="classes",
    makes={"labels": ask},
    listed=listed,
    read=read,
    kinds=(reading.EMPTY, reading.OFF_LIST, reading.CHATTY),
    score=score,
    is_right=answers.is_it,
    majority=MostFrequent,
    headline="f1",
    strict="f1",
    nature=("share of findings in common, as a set; not in the release", "the same"),
    graded=True,
)
