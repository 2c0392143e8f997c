"""The released metrics on strings made by hand; numbers worked out on paper from the definitions."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unimed.data.example import Example
from unimed.errors import UserError
from unimed.tasks import metrics, overlap
from unimed.tasks.normalise import normalise

WORDS = st.lists(st.sampled_from(["liver", "left", "lung", "no", "3"]), max_size=8).map(" ".join)


def example(task, answer, box=None, size=None, answer_type=None):
    return Example("e", task, "d", "?", answer, None, size, box, task, answer_type)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The Liver.", "liver"),
        ("a CT of an abdomen", "ct of abdomen"),
        ("Two lungs, none left", "2 lungs 0 left"),
        ("zero", "0"),
        ("left/right", "left right"),  # touches no space: becomes one
        ("left / right", "left right"),
        ("(left) lung", "left lung"),
        ("x-ray and - more", "xray and more"),  # one mark beside a space: all of its kind are removed
        ("1,000 cells", "1000 cells"),
        ("1,000 left/right", "1000 leftright"),  # digit-comma-digit anywhere: every mark is removed
        ("3.5 cm. large.", "3.5 cm large"),
        (".5 cm", ".5 cm"),
        ("dont isnt cant", "don't isn't can't"),
        ("wouldve hes whats", "would've he's what's"),
        ("", ""),
        ("   ", ""),
        ("the a an", ""),
    ],
)
def test_normalise(text, normal):
    assert normalise(text) == normal


def test_only_the_first_32_periods_go():
    assert normalise("a. " * 40) == " ".join(["a."] * 8)  # 32 times "a" is an article; "a." is not
    assert normalise("b." * 40) == "b" * 32 + "b." * 8


@given(st.text(max_size=60))
def test_normalise_takes_any_text(text):
    assert "," not in normalise(text)


def test_f1_counts_repeats_its_own_way():
    assert overlap.f1("liver", "liver") == 1
    assert overlap.f1("liver liver liver", "liver") == 1  # three hits, nothing wrong, nothing missed; the usual F1 would be 0.5
    assert overlap.f1("liver", "liver liver") == 1
    assert overlap.f1("left lung", "right lung") == 0.5
    assert overlap.f1("lung", "left left lung") == 0.5  # 1 hit, 2 missed
    assert overlap.f1("", "liver") == overlap.f1("liver", "") == overlap.f1("", "") == 0


@given(WORDS, WORDS)
def test_f1_is_a_share(a, b):
    assert 0 <= overlap.f1(a, b) <= 1
    assert overlap.f1(a, a) == (1 if a else 0)


def test_sentence_bleu_is_not_smoothed():
    one, two, three, four = overlap.sentence_bleu("left lung", "left lung")
    assert (one, two) == (1, 1)
    assert three < 1e-100  # no three-gram: zero, not a smoothed value
    assert four < 1e-70
    one, two, _, _ = overlap.sentence_bleu("the left lung here", "the right lung here")
    assert one == pytest.approx(3 / 4)
    assert two == pytest.approx(math.sqrt(3 / 4 * 1 / 3))
    assert overlap.sentence_bleu("lung", "left lung")[0] == pytest.approx(math.exp(1 - 2))  # brevity
    assert overlap.sentence_bleu("", "lung") == (0, 0, 0, 0)


def test_corpus_bleu_sums_before_dividing():
    predictions, references = [["a", "b", "c", "d"], ["x"]], [["a", "b", "c", "d"], ["y"]]
    one, two, three, four = overlap.corpus_bleu(predictions, references)
    assert one == pytest.approx(4 / 5)
    assert two == pytest.approx(math.sqrt(4 / 5 * 3 / 3))
    assert four == pytest.approx((4 / 5) ** 0.25, rel=1e-6)
    assert three == pytest.approx((4 / 5) ** (1 / 3), rel=1e-6)
    assert overlap.corpus_bleu([["a", "a", "a"]], [["a", "b", "c"]])[0] == pytest.approx(1 / 3)  # clipped
    assert overlap.corpus_bleu([["a"]], [["a", "b", "c"]])[0] == pytest.approx(math.exp(1 - 3))
    assert overlap.corpus_bleu([["q"]], [["a"]])[0] < 1e-8


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(WORDS.filter(bool), WORDS.filter(bool)), min_size=1, max_size=5))
def test_corpus_bleu_is_that_of_the_coco_code(pairs):
    bleu = pytest.importorskip("pycocoevalcap.bleu.bleu")
    predictions, references = [given.split() for given, _ in pairs], [wanted.split() for _, wanted in pairs]
    theirs, _ = bleu.Bleu(4).compute_score(
        {i: [b] for i, (_, b) in enumerate(pairs)}, {i: [a] for i, (a, _) in enumerate(pairs)}, verbose=0
    )
    assert overlap.corpus_bleu(predictions, references) == pytest.approx(theirs, abs=1e-9)


def test_our_tokens_are_those_of_the_ptb_tokenizer():
    texts = [
        "Axial CT of the abdomen. The liver, spleen and colon are visible. Both kidneys are visible.",
        "No 3.5 cm mass; left/right symmetric?",
        'PA and lateral views: heart-size is normal (5 mm) [see "above"].',
        "",
    ]
    ours = overlap.tokenise(texts, coco=False)
    assert ours[0][:6] == ["axial", "ct", "of", "the", "abdomen", "the"]
    if not overlap.has_coco():
        pytest.skip("pycocoevalcap or Java is missing")
    assert overlap.tokenise(texts, coco=True) == ours
    assert overlap.tokenise(["two\nlines\u2028here", "one"], coco=True) == [["two", "lines", "here"], ["one"]]


def test_vqa():
    wanted = [
        example("vqa", "CT", answer_type="OPEN"),
        example("vqa", "yes", answer_type="CLOSED"),
        example("vqa", "no", answer_type="CLOSED"),
    ]
    found = metrics.score("vqa", ["<unk>CT.", "Yes, it is", "none"], wanted)
    assert found["count"] == 3
    assert (found["count_open"], found["count_closed"]) == (1, 2)
    assert found["f1_open"] == found["bleu1_open"] == 1
    assert found["closed_accuracy"] == 0.5  # "yes" is inside "yes it is"; "none" is "0"
    assert found["f1_closed"] == pytest.approx(0.25)
    assert found["f1"] == pytest.approx((1 + 0.5 + 0) / 3)
    assert found["accuracy"] == pytest.approx(1 / 3)
    assert metrics.score("vqa", ["nothing"], wanted[2:])["closed_accuracy"] == 1  # a substring is enough, as released


def test_refer():
    target = example("refer", "{<10><10><20><20>}", (10, 10, 20, 20), (100, 100))
    given_boxes = ["{<10><10><20><20>}", " { <10><10><20><20> } yes", "liver", "{<60><60><70><70>}"]
    found = metrics.score("refer", given_boxes, [target] * 4)
    assert found == {"count": 4, "miou": pytest.approx(0.5), "accuracy": 0.5, "unparsable": 1}
    half = example("refer", "", (0, 0, 9, 9), (100, 100))  # 100 pixels
    found = metrics.score("refer", ["{<0><0><9><4>}"], [half])  # 50 of them: exactly a half is not enough
    assert found["miou"] == 0.5
    assert found["accuracy"] == 0
    wide = example("refer", "", (20, 5, 40, 10), (200, 50))
    assert metrics.score("refer", ["{<10><10><20><20>}"], [wide])["miou"] == 1  # each axis by its own size
    apart = example("refer", "", (0, 0, 9, 9), (100, 100))
    assert metrics.score("refer", ["{<9><0><18><9>}"], [apart])["miou"] == pytest.approx(10 / 190)  # corners touch: one column shared


def test_identify_and_cls_and_qa():
    wanted = [example("identify", "Left kidney"), example("identify", "liver")]
    found = metrics.score("identify", ["the left kidney", "liver lobe"], wanted)
    assert found["accuracy"] == 0.5
    assert found["f1"] == pytest.approx((1 + 2 / 3) / 2)
    assert found["bleu1"] == pytest.approx((1 + 0.5) / 2)
    assert metrics.score("cls", ["Liver.", "lung"], [example("cls", "liver"), example("cls", "left lung")]) == {"count": 2, "accuracy": 0.5}
    assert metrics.score("qa", ["Yes."], [example("qa", "yes")]) == {"count": 1, "accuracy": 1}


def test_captions_without_java():
    wanted = [example("caption", "The liver is visible. No kidney."), example("caption", "The spleen is visible."), example("caption", "x")]
    found = metrics.score("caption", ["the liver is visible. no kidney.", "The colon is visible.", " "], wanted, coco=False)
    assert (found["count"], found["scored"], found["ptb_tokenizer"]) == (3, 2, 0)
    assert "meteor" not in found
    assert found["bleu1"] == pytest.approx(9 / 10)
    assert found["bleu2"] == pytest.approx(math.sqrt(9 / 10 * 6 / 8))
    assert found["f1"] == pytest.approx((1 + 2 / 3) / 2)
    assert found["rougeL"] == pytest.approx((1 + 2 / 3) / 2, abs=1e-6)
    assert found["rouge1"] == pytest.approx((1 + 2 / 3) / 2, abs=1e-6)


def test_captions_with_java():
    if not overlap.has_coco():
        pytest.skip("pycocoevalcap or Java is missing")
    wanted = [example("caption", "The liver is visible. No kidney."), example("caption", "The spleen is visible.")]
    texts = ["the liver is visible. no kidney.", "The colon is visible."]
    with_java, without = (metrics.score("caption", texts, wanted, coco=coco) for coco in (None, False))
    assert with_java["ptb_tokenizer"] == 1
    assert 0.3 < with_java["meteor"] < 1
    assert {name: with_java[name] for name in without if name != "ptb_tokenizer"} == pytest.approx(
        {name: value for name, value in without.items() if name != "ptb_tokenizer"}
    )


def test_odd_captions():
    wanted = [example("caption", "...")] * 2
    found = metrics.score("caption", ["the", "."], wanted, coco=False)
    assert found["rougeL"] == found["f1"] == 0
    assert metrics.score("caption", [""], wanted[:1], coco=False)["scored"] == 0


@given(st.lists(st.text(max_size=30), min_size=1, max_size=4), st.sampled_from(sorted(metrics.HEADLINE)))
@settings(max_examples=60, deadline=None)
def test_any_prediction_can_be_scored(predictions, task):
    wanted = [example(task, "The liver is visible.", (0, 0, 5, 5), (10, 10), "CLOSED")] * len(predictions)
    found = metrics.score(task, predictions, wanted, coco=False)
    assert found["count"] == len(predictions)
    assert all(math.isfinite(value) for value in found.values())
    assert 0 <= found[metrics.HEADLINE[task]] <= 1


def test_what_is_asked_of_score():
    assert metrics.score("vqa", [], []) == {"count": 0}
    with pytest.raises(UserError, match="1 predictions for 0"):
        metrics.score("vqa", ["x"], [])
    with pytest.raises(UserError, match="unknown task"):
        metrics.score("vqs", [], [])
    with pytest.raises(UserError, match="needs a box"):
        metrics.score("refer", ["x"], [example("refer", "x")])
