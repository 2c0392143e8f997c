"""Med-MoE's scores on strings made by hand; numbers worked out on paper from the definitions."""

import math

import pytest

from unimed.tasks import overlap
from unimed.tasks.item import Item
from unimed.tasks.metrics import medmoe


def item(task, answer, kind=None, dataset="vqa-rad"):
    return Item("e", task, dataset, "?", answer, answer_type=kind)


@pytest.mark.parametrize(
    ("given", "wanted", "recall", "exact"),
    [
        ("left lung", "left lung", 1, 1),
        ("left", "left lung", 1 / 2, 1),
        ("left left", "left lung", 2 / 3, 1),  # repeats count: TP 2, FN 1
        ("in left lung here", "left lung", 1, 1 / 2),
        ("liver", "left lung", 0, 0),
        ("", "left lung", 0, 0),
        ("left", "", 0, 0),
    ],
)
def test_recall_and_exact_match(given, wanted, recall, exact):
    assert medmoe.recall(given, wanted) == pytest.approx(recall)
    assert medmoe.exact_match(given, wanted) == pytest.approx(exact)


def test_bleu_of_one_length_with_smoothing_1():
    # Two words: one unigram of two matches; no bigram of one does, and counts 0.1; longer ones have none, 0.1 of at least one.
    assert overlap.smoothed_bleu("left kidney", "left lung") == pytest.approx((0.5, 0.1, 0.1, 0.1))
    short = math.exp(1 - 2 / 1)  # the brevity penalty
    assert overlap.smoothed_bleu("left", "left lung") == pytest.approx((short, 0.1 * short, 0.1 * short, 0.1 * short))
    assert overlap.smoothed_bleu("", "left lung") == overlap.smoothed_bleu("liver", "left lung") == (0, 0, 0, 0)  # no word in common


def test_scores_by_data_set():
    items = [
        item("vqa", "Left lung", "OPEN"),
        item("vqa", "the liver", "OPEN"),
        item("vqa", "No", "CLOSED"),
        item("vqa", "Yes", "CLOSED"),
        item("vqa", "CT", "CLOSED", dataset="slake"),
        item("cls", "left kidney", dataset="medmnist-organcmnist_224"),
        item("cls", "pneumonia", dataset="medmnist-pneumoniamnist_224"),
        item("qa", "rest"),
    ]
    given = ["left", "Liver.", "Normal", "no", "an MR", "Left kidney.", "no pneumonia", "rest"]
    found = medmoe.score(items, given)
    assert list(found) == ["medmnist-organcmnist_224", "medmnist-pneumoniamnist_224", "slake", "vqa-rad"]
    rad = found["vqa-rad"]
    assert (rad["count_open"], rad["count_closed"]) == (2, 2)
    assert rad["open_recall"] == pytest.approx((1 / 2 + 1) / 2)  # the article of "the liver" is dropped
    assert rad["closed_accuracy"] == pytest.approx(1 / 2)  # "no" is in "normal"
    assert rad["exact_match"] == pytest.approx((1 + 1 + 0 + 0) / 4)
    assert rad["bleu1"] == pytest.approx((math.exp(-1) + 1 + 0 + 0) / 4)
    assert "accuracy" not in rad
    assert "open_recall" not in found["slake"]
    assert found["slake"]["closed_accuracy"] == 0
    assert found["medmnist-organcmnist_224"] == {"count_cls": 1, "accuracy": 1}
    assert found["medmnist-pneumoniamnist_224"]["accuracy"] == 0
