"""Scores without the release's generosity: every answer counts, and as what it is (see `answers`).

vqa       f1 (a word counts as often as both texts have it), bleu1..4, each also _open and _closed; accuracy: the answer is the reference;
          closed_accuracy: it names the reference as whole words, maybe among others, and no other answer of the list
refer     miou (the usual IoU) of the one box that the answer holds, wherever it stands; 0 for none, several or an inverted one;
          accuracy: IoU above one half
identify  accuracy, f1, bleu1..4
cls, qa   accuracy
caption   rouge1, rouge2, rougeL, f1 on text with all its words; an empty answer scores 0. Corpus BLEU and METEOR are in `released`:
          given every pair, they need no other form
"""

from collections.abc import Sequence

from unimed.records import box as boxes
from unimed.records.example import Example
from unimed.tasks import overlap
from unimed.tasks.answers import is_it, read, says_it, spoken
from unimed.tasks.metrics.released import Pairs, bleu, box_overlap, mean
from unimed.tasks.normalise import strict
from unimed.tasks.reading import INVERTED, UNPARSABLE


def words(pairs: Pairs) -> dict[str, float]:
    return {"f1": mean([overlap.min_count_f1(given, wanted) for given, wanted in pairs])} | bleu(pairs)


def accuracy(predictions: Sequence[str], examples: Sequence[Example]) -> dict[str, float]:
    return {"accuracy": mean([float(is_it(example, given)) for given, example in zip(predictions, examples, strict=True)])}


def _pairs(predictions: Sequence[str], examples: Sequence[Example]) -> list[tuple[str, str]]:
    return [(strict(spoken(given)), strict(example.answer)) for given, example in zip(predictions, examples, strict=True)]


def identify(predictions: Sequence[str], examples: Sequence[Example]) -> dict[str, float]:
    return accuracy(predictions, examples) | words(_pairs(predictions, examples))


def vqa(predictions: Sequence[str], examples: Sequence[Example]) -> dict[str, float]:
    found = identify(predictions, examples)
    for kind in ("OPEN", "CLOSED"):
        part = [(given, example) for given, example in zip(predictions, examples, strict=True) if example.answer_type == kind]
        if part:
            given, asked = [text for text, _ in part], [example for _, example in part]
            found |= {f"{name}_{kind.lower()}": value for name, value in words(_pairs(given, asked)).items()}
            if kind == "CLOSED":
                found["closed_accuracy"] = mean([float(says_it(example, text)) for text, example in part])
    return found


def refer(predictions: Sequence[str], examples: Sequence[Example]) -> dict[str, float]:
    overlaps = [box_iou(example, given) for given, example in zip(predictions, examples, strict=True)]
    return {"miou": mean(overlaps), "accuracy": mean([float(boxes.is_hit(value)) for value in overlaps])}


def box_iou(example: Example, prediction: str) -> float:
    reading = read(example, prediction)
    return 0.0 if reading.kind in (UNPARSABLE, INVERTED) else box_overlap(reading.box, example, plus_one=False)


def captions(pairs: Pairs) -> dict[str, float]:
    plain = [(strict(given), strict(wanted)) for given, wanted in pairs]
    scores = overlap.rouge([given for given, _ in plain], [wanted for _, wanted in plain])
    return scores | {"f1": mean([overlap.min_count_f1(given, wanted) for given, wanted in plain])}
