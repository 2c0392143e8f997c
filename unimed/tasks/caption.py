"""caption: the report or caption of the image."""

from collections.abc import Sequence

from unimed.tasks import answers, overlap, reading
from unimed.tasks.asked import Asked
from unimed.tasks.baselines import MostFrequent
from unimed.tasks.item import Item
from unimed.tasks.metrics import released, standard, strictly
from unimed.tasks.task import Task


def ask(asked: Asked) -> Item:
    return asked.item("caption", "", asked.text(asked.annotation.text, "text"), "caption/report")


def score(predictions: Sequence[str], items: Sequence[Item], coco: bool | None) -> dict[str, float]:
    coco = overlap.has_coco() if coco is None else coco
    pairs = [(answers.spoken(given.lower()), item.answer) for given, item in zip(predictions, items, strict=True)]
    kept = [(given, wanted) for given, wanted in pairs if given and wanted]
    every = released.captions(pairs, coco)
    some = every if len(kept) == len(pairs) else released.captions(kept, coco)
    found = {"scored": float(len(kept)), "ptb_tokenizer": float(coco), **every}
    found |= {f"{name}_released": value for name, value in some.items()}
    return found | strictly(standard.captions(pairs))


TASK = Task(
    tag="caption",
    about="report or caption",
    wordings={
        "mimic-cxr": (
            "Describe the findings of this chest X-ray.", "Write the report of this chest X-ray.", "What does this chest X-ray show?",
            "Report this chest radiograph.", "Summarise what you see in this chest radiograph.",
        ),
        "medpix": (
            "Describe this image.", "Write a caption for this image.", "What does this image show?", "Caption this medical image.",
            "Summarise this image.", "What can be seen here?", "Give a short description of the image.", "Explain what the image shows.",
            "Tell me what you see in this image.", "Write what this medical image shows.",
        ),
        "": (
            "Describe the findings of this image.", "Write the findings of this slice.", "What does this slice show?", "Report this image.",
            "Summarise what is visible.",
        ),
    },
    asks="nothing",
    makes={"report": ask},
    read=answers.read_whole,
    kinds=(reading.EMPTY,),
    score=score,
    is_right=answers.is_it,
    majority=MostFrequent,
    headline="rougeL",
    strict="rougeL_strict",
    nature=("longest common word sequence, without articles; an empty answer is 0", "with every word"),
    graded=True,
)  # fmt: skip
