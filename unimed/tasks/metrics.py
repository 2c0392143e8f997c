"""The released metrics of each task.

    vqa       f1, bleu1..4, each also _open and _closed; closed_accuracy (the normalised reference is a substring of the normalised
              prediction); accuracy (ours, for orientation: equal after normalisation)
    refer     miou (+1 pixel convention, 0 when there is no box), accuracy (IoU > 0.5), unparsable (how many answers held no box)
    identify  accuracy (equal after normalisation), f1, bleu1..4
    cls       accuracy (equal after normalisation)
    caption   bleu1..4 (corpus), rouge1, rouge2, rougeL, f1, meteor where Java and pycocoevalcap are; ptb_tokenizer says whether BLEU used
              the PTB tokenizer (1) or our regular expression (0); scored (pairs with text on both sides)
    qa        accuracy (ours, since the release scores no text QA: equal after normalisation)

Every result also holds `count`. All shares are between 0 and 1.
"""

from collections.abc import Sequence

from unimed.data import boxes
from unimed.data.example import Example
from unimed.errors import UserError
from unimed.tasks import overlap
from unimed.tasks.normalise import normalise

HEADLINE = {"vqa": "f1", "refer": "miou", "identify": "accuracy", "caption": "rougeL", "cls": "accuracy", "qa": "accuracy"}


def score(task: str, predictions: Sequence[str], examples: Sequence[Example], coco: bool | None = None) -> dict[str, float]:
    """Metrics of one task. ``coco`` (captions only) False leaves out what needs Java; None takes it when it is there."""
    if len(predictions) != len(examples):
        raise UserError(f"{task}: {len(predictions)} predictions for {len(examples)} examples")
    if task not in HEADLINE:
        raise UserError(f"unknown task {task!r}: expected one of {', '.join(HEADLINE)}")
    if not examples:
        return {"count": 0.0}
    if task == "refer":
        found = _refer(predictions, examples)
    elif task == "caption":
        found = _caption(predictions, examples, overlap.has_coco() if coco is None else coco)
    elif task == "vqa":
        found = _vqa(predictions, examples)
    else:
        pairs = _normalised(predictions, examples)
        found = {"accuracy": _mean([float(given == wanted) for given, wanted in pairs])}
        if task == "identify":
            found |= _words(pairs)
    return {"count": float(len(examples)), **found}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _spoken(prediction: str) -> str:
    return prediction.lower().replace("<unk>", "").strip()


def _normalised(predictions: Sequence[str], examples: Sequence[Example]) -> list[tuple[str, str]]:
    return [(normalise(_spoken(given)), normalise(example.answer)) for given, example in zip(predictions, examples, strict=True)]


def _words(pairs: Sequence[tuple[str, str]], suffix: str = "") -> dict[str, float]:
    found = {f"f1{suffix}": _mean([overlap.f1(given, wanted) for given, wanted in pairs])}
    bleus = [overlap.sentence_bleu(given, wanted) for given, wanted in pairs]
    return found | {f"bleu{n}{suffix}": _mean([bleu[n - 1] for bleu in bleus]) for n in (1, 2, 3, 4)}


def _vqa(predictions: Sequence[str], examples: Sequence[Example]) -> dict[str, float]:
    pairs = _normalised(predictions, examples)
    found = _words(pairs)
    found["accuracy"] = _mean([float(given == wanted) for given, wanted in pairs])
    for kind in ("OPEN", "CLOSED"):
        part = [pair for pair, example in zip(pairs, examples, strict=True) if example.answer_type == kind]
        if part:
            found |= _words(part, f"_{kind.lower()}") | {f"count_{kind.lower()}": float(len(part))}
        if part and kind == "CLOSED":
            found["closed_accuracy"] = _mean([float(wanted in given) for given, wanted in part])
    return found


def _refer(predictions: Sequence[str], examples: Sequence[Example]) -> dict[str, float]:
    overlaps, unparsable = [], 0
    for given, example in zip(predictions, examples, strict=True):
        if example.box is None or example.size is None:
            raise UserError(f"{example.id}: a refer example needs a box and the image's size")
        box = boxes.from_text(given)
        unparsable += box is None
        overlaps.append(0.0 if box is None else boxes.iou(boxes.to_pixels(box, example.size), example.box))
    return {"miou": _mean(overlaps), "accuracy": _mean([float(value > 0.5) for value in overlaps]), "unparsable": float(unparsable)}


def _caption(predictions: Sequence[str], examples: Sequence[Example], coco: bool) -> dict[str, float]:
    pairs = [(_spoken(given), example.answer) for given, example in zip(predictions, examples, strict=True)]
    pairs = [(given, wanted) for given, wanted in pairs if given and wanted]
    found = {"scored": float(len(pairs)), "ptb_tokenizer": float(coco)}
    if not pairs:
        return found | dict.fromkeys(("bleu1", "bleu2", "bleu3", "bleu4", "rouge1", "rouge2", "rougeL", "f1"), 0.0)
    tokens = overlap.tokenise([text for pair in pairs for text in pair], coco)
    found |= {f"bleu{n}": value for n, value in enumerate(overlap.corpus_bleu(tokens[::2], tokens[1::2]), 1)}
    once = [(normalise(given), normalise(wanted)) for given, wanted in pairs]
    if coco:
        found["meteor"] = overlap.meteor([given for given, _ in once], [wanted for _, wanted in once])
    # The release overwrites its texts when it normalises them for METEOR, so ROUGE and F1 see text normalised twice.
    twice = [(normalise(given), normalise(wanted)) for given, wanted in once]
    found |= overlap.rouge([given for given, _ in twice], [wanted for _, wanted in twice])
    return found | {"f1": _mean([overlap.f1(given, wanted) for given, wanted in twice])}
