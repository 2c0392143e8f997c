"""Med-MoE's scores as released, by data set: those of its visual questions, and the accuracy of classes.

    open_recall      open questions: TP / (TP + FN) with the counts of `overlap.f1` on normalised text; repeats count
    closed_accuracy  closed questions: the lower-cased reference is a substring of the answer, so "no" is in "normal"
    exact_match      all questions: words of the answer that the reference has, by words of the answer
    bleu1..4         all questions: sentence BLEU of n-grams of one length each, with nltk's smoothing 1
    accuracy         classes: equal after normalisation

Every score is a mean over answers, from 0 to 1; an empty answer scores 0. `count_open`, `count_closed`, `count_cls` say over how many.
"""

from collections import Counter
from collections.abc import Sequence

from unimed.tasks import overlap
from unimed.tasks.answers import spoken
from unimed.tasks.item import Item
from unimed.tasks.metrics import released
from unimed.tasks.metrics.released import mean

NAMES = ("open_recall", "closed_accuracy", "exact_match", "bleu1", "bleu2", "bleu3", "bleu4", "accuracy")


def score(items: Sequence[Item], predictions: Sequence[str]) -> dict[str, dict[str, float]]:
    """Data set -> score -> value, of the sets that have visual questions or classes."""
    found: dict[str, dict[str, float]] = {}
    both = list(zip(items, predictions, strict=True))
    for dataset in sorted({item.dataset for item in items if item.task in ("vqa", "cls")}):
        of = {task: [(item, text) for item, text in both if (item.dataset, item.task) == (dataset, task)] for task in ("vqa", "cls")}
        found[dataset] = _vqa(of["vqa"]) | _cls(of["cls"])
    return found


def _vqa(pairs: Sequence[tuple[Item, str]]) -> dict[str, float]:
    if not pairs:
        return {}
    texts = released.normalised([text for _, text in pairs], [item for item, _ in pairs])
    kinds = [item.answer_type for item, _ in pairs]
    recalls = [recall(given, wanted) for (given, wanted), kind in zip(texts, kinds, strict=True) if kind == "OPEN"]
    closed = [float(item.answer.lower() in spoken(text).lower()) for item, text in pairs if item.answer_type == "CLOSED"]
    bleus = [overlap.smoothed_bleu(given, wanted) for given, wanted in texts]
    found = {"count_open": float(len(recalls)), "count_closed": float(len(closed))}
    found |= {"open_recall": mean(recalls)} if recalls else {}
    found |= {"closed_accuracy": mean(closed)} if closed else {}
    found["exact_match"] = mean([exact_match(given, wanted) for given, wanted in texts])
    return found | {f"bleu{n}": mean([one[n - 1] for one in bleus]) for n in (1, 2, 3, 4)}


def _cls(pairs: Sequence[tuple[Item, str]]) -> dict[str, float]:
    if not pairs:
        return {}
    return {"count_cls": float(len(pairs))} | released.cls([text for _, text in pairs], [item for item, _ in pairs])


def recall(prediction: str, reference: str) -> float:
    """TP / (TP + FN): predicted words, with repeats, that the reference has, beside reference words that were not predicted."""
    predicted, wanted = Counter(prediction.split()), Counter(reference.split())
    hit = sum(count for word, count in predicted.items() if word in wanted)
    missed = sum(count for word, count in wanted.items() if word not in predicted)
    return hit / (hit + missed) if hit else 0.0


def exact_match(prediction: str, reference: str) -> float:
    """Share of the predicted words, with repeats, that the reference has."""
    words, wanted = prediction.split(), set(reference.split())
    return sum(word in wanted for word in words) / len(words) if words else 0.0
