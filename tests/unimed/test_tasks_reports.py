"""Scores of captions and reports: the released ones, those of the libraries, odd texts."""

import math

import pytest

from tests.unimed.test_tasks_metrics import item, kinds
from unimed.tasks import metrics, overlap


def test_standard_scores_of_reports_are_those_of_the_libraries():
    """Worked out on paper: five of six words, three of five pairs; brevity is 1."""
    pairs = [("The liver is big , yes", "the liver was big , yes")]
    found = metrics.score("caption", [one for one, _ in pairs], [item("caption", other) for _, other in pairs], coco=False)
    assert found["bleu1_strict"] == pytest.approx(5 / 6)
    assert found["bleu2_strict"] == pytest.approx(math.sqrt(5 / 6 * 3 / 5))
    assert found["rouge1_strict"] == pytest.approx(4 / 5)  # rouge-score reads letters and digits only
    assert found["rouge2_strict"] == pytest.approx(2 / 4)
    assert found["rougeL_strict"] == pytest.approx(4 / 5)
    empty = metrics.score("caption", [""], [item("caption", "liver")], coco=False)
    assert all(empty[f"{name}_strict"] == 0 for name in ("bleu1", "bleu4", "rouge1", "rougeL", "f1"))


def test_cider_is_that_of_the_coco_code():
    pytest.importorskip("pycocoevalcap")
    texts = ["the liver is big", "a small left kidney", "no spleen is seen here"]
    found = metrics.score("caption", texts, [item("caption", text) for text in texts], coco=False)
    assert found["cider_strict"] == pytest.approx(10)  # CIDEr-D of equal texts with words of their own
    found = metrics.score("caption", texts[::-1], [item("caption", text) for text in texts], coco=False)
    assert 0 < found["cider_strict"] < 10


def test_captions_without_java():
    wanted = [item("caption", "The liver is visible. No kidney."), item("caption", "The spleen is visible."), item("caption", "x")]
    found = metrics.score("caption", ["the liver is visible. no kidney.", "The colon is visible.", " "], wanted, coco=False)
    assert (found["count"], found["scored"], found["ptb_tokenizer"]) == (3, 2, 0)
    assert "meteor" not in found
    assert kinds(found) == {"empty": 1}
    # As released, the empty answer is left out.
    assert found["bleu1_released"] == pytest.approx(9 / 10)
    assert found["bleu2_released"] == pytest.approx(math.sqrt(9 / 10 * 6 / 8))
    for name in ("f1", "rougeL", "rouge1"):
        assert found[f"{name}_released"] == pytest.approx((1 + 2 / 3) / 2, abs=1e-6)
        assert found[name] == pytest.approx((1 + 2 / 3) / 3, abs=1e-6)
    assert found["f1_strict"] == pytest.approx((1 + 3 / 4) / 3)
    assert found["bleu1"] == pytest.approx(9 / 10 * math.exp(1 - 11 / 10))  # one word short of the references


def test_an_empty_report_counts():
    wanted = [item("caption", "no acute disease")] * 2
    found = metrics.score("caption", ["no acute disease", ""], wanted, coco=False)
    for name in ("rouge1", "rouge2", "rougeL", "f1"):
        assert found[name] == pytest.approx(0.5, abs=1e-6)
        assert found[f"{name}_released"] == pytest.approx(1, abs=1e-6)
        assert found[f"{name}_strict"] == pytest.approx(0.5, abs=1e-6)
    assert found["bleu1"] == pytest.approx(math.exp(1 - 6 / 3))  # over the corpus: half as long as the references
    assert found["bleu1_released"] == pytest.approx(1)
    assert (found["count"], found["scored"], found["empty"]) == (2, 1, 1)


def test_captions_with_java():
    if not overlap.has_coco():
        pytest.skip("pycocoevalcap or Java is missing")
    wanted = [item("caption", "The liver is visible. No kidney."), item("caption", "The spleen is visible.")]
    texts = ["the liver is visible. no kidney.", "The colon is visible."]
    with_java, without = (metrics.score("caption", texts, wanted, coco=coco) for coco in (None, False))
    assert with_java["ptb_tokenizer"] == 1
    assert 0.3 < with_java["meteor"] == with_java["meteor_released"] < 1
    with_empty = metrics.score("caption", [*texts, ""], [*wanted, wanted[0]])
    assert with_empty["meteor"] < with_empty["meteor_released"] == with_java["meteor"]
    assert {name: with_java[name] for name in without if name != "ptb_tokenizer"} == pytest.approx(
        {name: value for name, value in without.items() if name != "ptb_tokenizer"}
    )


def test_long_reports_can_be_scored():
    words = [f"w{i * i % 701}" for i in range(1500)]
    found = overlap.rouge([" ".join(words[:100])], [" ".join(words)])
    assert 0.1 < found["rougeL"] < 0.5


def test_odd_captions():
    wanted = [item("caption", "...")] * 2
    found = metrics.score("caption", ["the", "."], wanted, coco=False)
    assert found["rougeL"] == found["f1"] == 0
    assert metrics.score("caption", [""], wanted[:1], coco=False)["scored"] == 0
