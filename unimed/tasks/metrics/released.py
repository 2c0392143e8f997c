"""Scores by the release's formulas, its normalisation and its way to read an answer. Text QA is not here: the release does not score it.

    vqa       f1, bleu1..4, each also _open and _closed; closed_accuracy: the normalised reference is a substring of the normalised
              prediction, so "normal" is right for "no"; accuracy (ours, for orientation): equal after normalisation
    refer     miou (corners are pixels: sides are one longer), 0 without a box at the start of the answer; accuracy: IoU above one half;
              unparsable: answers without a box at their start
    identify  accuracy (equal after normalisation), f1, bleu1..4
    cls       accuracy (equal after normalisation)
    caption   bleu1..4 (corpus), rouge1, rouge2, rougeL, f1, meteor where Java and pycocoevalcap are; ptb_tokenizer: whether BLEU used the
              PTB tokenizer (1) or our regular expression (0). The release leaves out pairs without text on both sides; `captions` scores
              the pairs it is given.

The normalisation drops articles and maps "none" to 0, so that "A" is empty text and scores 0 against "A".
"""

from collections.abc import Sequence

from unimed.records import box as boxes
from unimed.tasks import overlap
from unimed.tasks.answers import spoken
from unimed.tasks.item import Item
from unimed.tasks.normalise import normalise

Pairs = Sequence[tuple[str, str]]


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def normalised(predictions: Sequence[str], items: Sequence[Item]) -> list[tuple[str, str]]:
    return [(normalise(spoken(given.lower())), normalise(item.answer)) for given, item in zip(predictions, items, strict=True)]


def words(pairs: Pairs) -> dict[str, float]:
    """F1 and sentence BLEU, means over pairs of normalised text."""
    return {"f1": mean([overlap.f1(given, wanted) for given, wanted in pairs])} | bleu(pairs)


def bleu(pairs: Pairs) -> dict[str, float]:
    scores = [overlap.sentence_bleu(given, wanted) for given, wanted in pairs]
    return {f"bleu{n}": mean([score[n - 1] for score in scores]) for n in (1, 2, 3, 4)}


def accuracy(pairs: Pairs) -> dict[str, float]:
    return {"accuracy": mean([float(given == wanted) for given, wanted in pairs])}


def vqa(predictions: Sequence[str], items: Sequence[Item]) -> dict[str, float]:
    pairs = normalised(predictions, items)
    found = words(pairs) | accuracy(pairs)
    for kind in ("OPEN", "CLOSED"):
        part = [pair for pair, item in zip(pairs, items, strict=True) if item.answer_type == kind]
        if part:
            found |= {f"{name}_{kind.lower()}": value for name, value in words(part).items()}
        if part and kind == "CLOSED":
            found["closed_accuracy"] = mean([float(wanted in given) for given, wanted in part])
    return found


def identify(predictions: Sequence[str], items: Sequence[Item]) -> dict[str, float]:
    pairs = normalised(predictions, items)
    return accuracy(pairs) | words(pairs)


def cls(predictions: Sequence[str], items: Sequence[Item]) -> dict[str, float]:
    return accuracy(normalised(predictions, items))


def refer(predictions: Sequence[str], items: Sequence[Item]) -> dict[str, float]:
    found = [boxes.from_text(given) for given in predictions]
    overlaps = [box_overlap(box, item, plus_one=True) for box, item in zip(found, items, strict=True)]
    hits = [float(boxes.is_hit(value)) for value in overlaps]
    return {"miou": mean(overlaps), "accuracy": mean(hits), "unparsable": float(found.count(None))}


def box_overlap(box: boxes.Box | None, item: Item, plus_one: bool) -> float:
    """IoU of a box in hundredths with the item's; 0 without one."""
    assert item.box is not None
    assert item.size is not None
    return 0.0 if box is None else boxes.iou(boxes.to_pixels(box, item.size), item.box, plus_one)


def captions(pairs: Pairs, coco: bool) -> dict[str, float]:
    """Scores of pairs of text as it was given."""
    if not pairs:
        return dict.fromkeys(("bleu1", "bleu2", "bleu3", "bleu4", "rouge1", "rouge2", "rougeL", "f1"), 0.0)
    tokens = overlap.tokenise([text for pair in pairs for text in pair], coco)
    found = {f"bleu{n}": value for n, value in enumerate(overlap.corpus_bleu(tokens[::2], tokens[1::2]), 1)}
    once = [(normalise(given), normalise(wanted)) for given, wanted in pairs]
    if coco:
        found["meteor"] = overlap.meteor([given for given, _ in once], [wanted for _, wanted in once])
    # The release overwrites its texts when it normalises them for METEOR, so ROUGE and F1 see text normalised twice.
    twice = [(normalise(given), normalise(wanted)) for given, wanted in once]
    found |= overlap.rouge([given for given, _ in twice], [wanted for _, wanted in twice])
    return found | {"f1": mean([overlap.f1(given, wanted) for given, wanted in twice])}
