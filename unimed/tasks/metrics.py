"""The scores of each task, under three kinds of names.

    f1            the release's formula over every answer; an empty one scores 0. Text QA, which the release does not score: strict
    f1_strict     the same quantity without the release's generosity
    f1_released   caption, and refer's unparsable: the release's own number, where it leaves answers out or reads fewer of them

`released` and `strict` say what each quantity is. Beside them stand `count`, count_open and count_closed (vqa), scored (captions with text
on both sides, which the _released names average), ptb_tokenizer (caption), and how many answers are empty, unparsable, inverted, off the
list or chatty, as far as the task can have them (`answers`). All shares are between 0 and 1.
"""

from collections import Counter
from collections.abc import Sequence

from unimed.data.example import Example
from unimed.errors import UserError
from unimed.records import box as boxes
from unimed.tasks import answers, overlap, released, strict

HEADLINE = {"vqa": "f1", "refer": "miou", "identify": "accuracy", "caption": "rougeL", "cls": "accuracy", "qa": "accuracy"}
STRICT = {task: name if task == "qa" else f"{name}_strict" for task, name in HEADLINE.items()}
# What a reader must know of a headline number, and of the strict one beside it.
NATURE = {
    "vqa": ("words in common; repeats count, so “yes yes yes” has all of “yes”", "each word counts once"),
    "refer": ("the answer must begin with the box; sides are one pixel longer", "usual IoU, the box may stand anywhere"),
    "identify": ("equal without case, articles and punctuation", "equal without case and punctuation"),
    "caption": ("longest common word sequence, without articles; an empty answer is 0", "with every word"),
    "cls": ("equal without case, articles and punctuation", "equal without case and punctuation"),
    "qa": ("equal without case and punctuation; not scored by the release", "the same"),
}


def score(task: str, predictions: Sequence[str], examples: Sequence[Example], coco: bool | None = None) -> dict[str, float]:
    """All scores of one task. ``coco`` (captions only) False leaves out what needs Java; None takes it when it is there."""
    if len(predictions) != len(examples):
        raise UserError(f"{task}: {len(predictions)} predictions for {len(examples)} examples")
    if task not in HEADLINE:
        raise UserError(f"unknown task {task!r}: expected one of {', '.join(HEADLINE)}")
    if not examples:
        return {"count": 0.0}
    if task == "caption":
        found = _captions(predictions, examples, overlap.has_coco() if coco is None else coco)
    elif task == "qa":
        found = strict.qa(predictions, examples)
    else:
        found = _both(task, predictions, examples)
    kinds = Counter(answers.read(example, given).kind for given, example in zip(predictions, examples, strict=True))
    return {"count": float(len(examples)), **found, **{kind: float(kinds[kind]) for kind in answers.KINDS_OF[task]}}


def is_right(example: Example, prediction: str) -> bool:
    """Whether one answer is right, strictly: a box by its IoU, anything else when it is the reference."""
    if example.task == "refer":
        _check_box(example)
        return boxes.is_hit(strict.box_iou(example, prediction))
    return answers.is_it(example, prediction)


def _check_box(example: Example) -> None:
    if example.box is None or example.size is None:
        raise UserError(f"{example.id}: a refer example needs a box and the image's size")


def _both(task: str, predictions: Sequence[str], examples: Sequence[Example]) -> dict[str, float]:
    if task == "refer":
        for example in examples:
            _check_box(example)
    by = {"vqa": (released.vqa, strict.vqa), "refer": (released.refer, strict.refer), "identify": (released.identify, strict.identify)}
    as_released, strictly = by.get(task, (released.cls, strict.cls))
    found = as_released(predictions, examples)
    if task == "refer":
        found["unparsable_released"] = found.pop("unparsable")
    if task == "vqa":
        types = Counter(example.answer_type for example in examples)
        found |= {f"count_{kind.lower()}": float(types[kind]) for kind in ("OPEN", "CLOSED") if types[kind]}
    return found | {f"{name}_strict": value for name, value in strictly(predictions, examples).items()}


def _captions(predictions: Sequence[str], examples: Sequence[Example], coco: bool) -> dict[str, float]:
    pairs = [(answers.spoken(given.lower()), example.answer) for given, example in zip(predictions, examples, strict=True)]
    kept = [(given, wanted) for given, wanted in pairs if given and wanted]
    every = released.captions(pairs, coco)
    some = every if len(kept) == len(pairs) else released.captions(kept, coco)
    found = {"scored": float(len(kept)), "ptb_tokenizer": float(coco), **every}
    found |= {f"{name}_released": value for name, value in some.items()}
    return found | {f"{name}_strict": value for name, value in strict.captions(pairs).items()}
