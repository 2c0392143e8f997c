"""Scores as the field computes them, of every answer, and each answer as what it is (see `answers`).

vqa       f1 (a word counts as often as both texts have it), bleu1..4, each also _open and _closed; accuracy: the answer is the reference;
          closed_accuracy: it names the reference as whole words, maybe among others, and no other answer of the list
refer     miou (the usual IoU) of the one box that the answer holds, wherever it stands; 0 for none, several or an inverted one;
          accuracy: IoU above one half
identify  accuracy, f1, bleu1..4
cls       accuracy; macro_f1: the mean of each class's F1, over the classes that the references or the answers name
qa        accuracy; option_accuracy where the question lists options: by letter or by text; yes_no_maybe_accuracy and
          yes_no_maybe_macro_f1 where the reference is one of the three, as PubMedQA scores them
caption   bleu1..4, rouge1, rouge2, rougeL, f1 on text with all its words; an empty answer scores 0; cider (CIDEr-D, 0 to 10) where
          pycocoevalcap is installed, without Java

BLEU is that of the corpus by sacrebleu (13a tokens, lower case, its own smoothing), ROUGE the F measure of rouge-score without stemming.
"""

import re
from collections.abc import Sequence

from unimed.records import box as boxes
from unimed.tasks import overlap
from unimed.tasks.answers import is_it, options, read, says_it, spoken
from unimed.tasks.item import Item
from unimed.tasks.metrics.released import Pairs, box_overlap, mean
from unimed.tasks.normalise import strict
from unimed.tasks.reading import INVERTED, UNPARSABLE

_OPTION = re.compile(r"(?:^|\s)\(([A-Z])\)\s")
_FIRST = re.compile(r"\s*(?:\(([A-Z])\)|([A-Z])(?:[.):]|\s*$))")
# "A" and "I" are words as well: bare, they are letters before a mark or the end.
_STATED = re.compile(
    r"\b(?i:answer|choice|option)(?: is|:)\s*(?i:option\s+)?(?:\(([A-Z])\)|([B-HJ-Z])\b(?![-'])|([AI])(?=\s*(?:$|[.,;:)])|\s+because\b))"
)
YES_NO_MAYBE = ("yes", "no", "maybe")


def words_in_common(pairs: Pairs) -> dict[str, float]:
    return {"f1": mean([overlap.min_count_f1(given, wanted) for given, wanted in pairs])}


def words(pairs: Pairs) -> dict[str, float]:
    return words_in_common(pairs) | overlap.standard_bleu(pairs)


def accuracy(predictions: Sequence[str], items: Sequence[Item]) -> dict[str, float]:
    return {"accuracy": mean([float(is_it(item, given)) for given, item in zip(predictions, items, strict=True)])}


def _pairs(predictions: Sequence[str], items: Sequence[Item]) -> list[tuple[str, str]]:
    return [(strict(spoken(given)), strict(item.answer)) for given, item in zip(predictions, items, strict=True)]


def identify(predictions: Sequence[str], items: Sequence[Item]) -> dict[str, float]:
    return accuracy(predictions, items) | words(_pairs(predictions, items))


def vqa(predictions: Sequence[str], items: Sequence[Item]) -> dict[str, float]:
    found = identify(predictions, items)
    for kind in ("OPEN", "CLOSED"):
        part = [(given, item) for given, item in zip(predictions, items, strict=True) if item.answer_type == kind]
        if part:
            given, asked = [text for text, _ in part], [item for _, item in part]
            found |= {f"{name}_{kind.lower()}": value for name, value in words(_pairs(given, asked)).items()}
            if kind == "CLOSED":
                found["closed_accuracy"] = mean([float(says_it(item, text)) for text, item in part])
    return found


def named(item: Item, prediction: str) -> str | None:
    """The one answer of the list that a prediction names, maybe among other words."""
    says = read(item, prediction).says or frozenset()
    return next(iter(says)) if len(says) == 1 and says <= set(options(item)) else None


def macro_f1(pairs: Sequence[tuple[str | None, str | None]]) -> float:
    """Mean F1 of each class, of (given, wanted) pairs; None names no class, so it lowers the recall of the class that was wanted."""
    classes = {name for pair in pairs for name in pair} - {None}
    scores = []
    for name in classes:
        hits = sum(given == wanted == name for given, wanted in pairs)
        scores.append(2 * hits / sum((given == name) + (wanted == name) for given, wanted in pairs))
    return mean(scores)


def cls(predictions: Sequence[str], items: Sequence[Item]) -> dict[str, float]:
    pairs = [(named(item, text), named(item, item.answer)) for item, text in zip(items, predictions, strict=True)]
    return accuracy(predictions, items) | {"macro_f1": macro_f1(pairs)}


def options_in(question: str) -> dict[str, str]:
    """Letter and text of "(A) rest (B) surgery", the text in the strict form."""
    parts = _OPTION.split(question)
    return {letter: strict(text) for letter, text in zip(parts[1::2], parts[2::2], strict=True)}


def chosen(item: Item, prediction: str) -> str | None:
    """The option that a prediction chooses; None without one.

    "The answer is B" counts wherever it stands, unless two letters are stated or the text of another option follows. Else it is the letter
    at the start or the text of an option; where both are there, they must agree.
    """
    said, by_letter = spoken(prediction), options_in(item.question)
    stated = {by_letter[letter]: found.end() for found in _STATED.finditer(said) if (letter := _letter(found)) in by_letter}
    if stated:
        ((option, end),) = stated.items() if len(stated) == 1 else ((None, 0),)
        beside = strict(re.split(r"[.;\n]", said[end:].lstrip(" .):,"))[0])
        return None if beside in set(by_letter.values()) - {option} else option
    first = _FIRST.match(said)
    letter, text = _letter(first) if first else "", named(item, prediction)
    if letter in by_letter:
        return by_letter[letter] if text in (None, by_letter[letter]) else None
    return text


def _letter(found: re.Match[str]) -> str:
    return next(filter(None, found.groups()))


def qa(predictions: Sequence[str], items: Sequence[Item]) -> dict[str, float]:
    found = accuracy(predictions, items)
    both = list(zip(predictions, items, strict=True))
    choices = [float(chosen(item, text) == strict(item.answer)) for text, item in both if options_in(item.question)]
    if choices:
        found["option_accuracy"] = mean(choices)
    pairs = [(named(item, text), strict(item.answer)) for text, item in both if strict(item.answer) in YES_NO_MAYBE]
    if pairs:
        found["yes_no_maybe_accuracy"] = mean([float(given == wanted) for given, wanted in pairs])
        found["yes_no_maybe_macro_f1"] = macro_f1(pairs)
    return found


def refer(predictions: Sequence[str], items: Sequence[Item]) -> dict[str, float]:
    overlaps = [box_iou(item, given) for given, item in zip(predictions, items, strict=True)]
    return {"miou": mean(overlaps), "accuracy": mean([float(boxes.is_hit(value)) for value in overlaps])}


def box_iou(item: Item, prediction: str) -> float:
    reading = read(item, prediction)
    return 0.0 if reading.kind in (UNPARSABLE, INVERTED) else box_overlap(reading.box, item, plus_one=False)


def captions(pairs: Pairs) -> dict[str, float]:
    plain = [(strict(given), strict(wanted)) for given, wanted in pairs]
    return overlap.standard_bleu(pairs) | overlap.standard_rouge(plain) | words_in_common(plain) | overlap.cider(plain)
