"""The released metrics on strings made by hand; numbers worked out on paper from the definitions."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unimed.datasets import load_items, medmnist
from unimed.errors import UserError
from unimed.tasks import TASKS, answers, metrics, overlap, reading
from unimed.tasks.answers import options
from unimed.tasks.item import Item
from unimed.tasks.metrics import standard
from unimed.tasks.normalise import normalise, strict

WORDS = st.lists(st.sampled_from(["liver", "left", "lung", "no", "3"]), max_size=8).map(" ".join)


def item(task, answer, box=None, size=None, answer_type=None, question="?"):
    return Item("e", task, "d", question, answer, None, size, box, task, answer_type)


def kinds(found):
    """The kinds of answers that occur, with their counts."""
    return {kind: found[kind] for kind in reading.KINDS if found.get(kind)}


@pytest.mark.each
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


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  Liver.", "the liver"),
        ("A", "a"),
        ("none", "none"),
        ("Two of 1,000", "2 of 1000"),
        ("3.5 cm, (left)", "3.5 cm left"),
        ("left/right", "left/right"),
        ("HER2+", "her2+"),
        ("\u201cyes\u201d!", "yes"),
        (" . ", ""),
    ],
)
def test_the_strict_form_keeps_every_word(text, normal):
    assert strict(text) == normal
    assert strict(normal) == normal


@given(st.text(max_size=60))
def test_the_strict_form_takes_any_text(text):
    assert strict(text) == " ".join(strict(text).split())


def test_f1_counts_repeats_its_own_way():
    assert overlap.f1("liver", "liver") == 1
    assert overlap.f1("liver liver liver", "liver") == 1  # three hits, nothing wrong, nothing missed; the usual F1 would be 0.5
    assert overlap.f1("liver", "liver liver") == 1
    assert overlap.f1("left lung", "right lung") == 0.5
    assert overlap.f1("lung", "left left lung") == 0.5  # 1 hit, 2 missed
    assert overlap.f1("", "liver") == overlap.f1("liver", "") == overlap.f1("", "") == 0


def test_the_usual_f1_counts_a_word_as_often_as_both_have_it():
    assert overlap.min_count_f1("liver liver liver", "liver") == 0.5
    assert overlap.min_count_f1("lung left", "left left lung") == pytest.approx(0.8)
    assert overlap.min_count_f1("", "liver") == overlap.min_count_f1("liver", "") == 0


@given(WORDS, WORDS)
def test_f1_is_a_share(a, b):
    for f1 in (overlap.f1, overlap.min_count_f1):
        assert 0 <= f1(a, b) <= 1
        assert f1(a, a) == (1 if a else 0)


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
        item("vqa", "CT", answer_type="OPEN"),
        item("vqa", "yes", answer_type="CLOSED"),
        item("vqa", "no", answer_type="CLOSED"),
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


@pytest.mark.parametrize(
    ("text", "released", "right", "kind"),
    [
        ("no", 1, 1, ""),
        ("No.", 1, 1, ""),
        ("No, there is not", 1, 1, "chatty"),
        ("normal", 1, 0, "off_list"),
        ("unknown", 1, 0, "off_list"),
        ("yes and no", 1, 0, "unparsable"),
        ("yes", 0, 0, ""),
        ("none", 0, 0, "off_list"),  # the release makes it 0
        ("<unk> ", 0, 0, "empty"),
    ],
)
def test_a_closed_answer_is_strictly_the_one_it_names(text, released, right, kind):
    found = metrics.score("vqa", [text], [item("vqa", "no", answer_type="CLOSED")])
    assert (found["closed_accuracy"], found["closed_accuracy_strict"]) == (released, right)
    assert kinds(found) == ({kind: 1} if kind else {})


def test_strict_vqa_scores():
    found = metrics.score("vqa", ["A", "yes yes yes"], [item("vqa", "A", answer_type="OPEN"), item("vqa", "yes", answer_type="CLOSED")])
    assert (found["f1_open"], found["f1_open_strict"]) == (0, 1)  # the release takes "A" for an article
    assert (found["f1_closed"], found["f1_closed_strict"]) == (1, 0.5)
    assert (found["bleu1_open"], found["bleu1_open_strict"]) == (0, pytest.approx(1))
    assert (found["closed_accuracy"], found["closed_accuracy_strict"]) == (1, 1)
    assert (found["accuracy"], found["accuracy_strict"]) == (0.5, 0.5)  # "A", which the normalisation makes empty on both sides
    assert kinds(found) == {"chatty": 1}
    assert not metrics.is_right(item("vqa", "yes"), "yes yes yes")
    strictly_wrong = metrics.score("vqa", ["kidney"], [item("vqa", "A kidney")])
    assert (strictly_wrong["accuracy"], strictly_wrong["accuracy_strict"]) == (1, 0)


def test_refer():
    target = item("refer", "{<10><10><20><20>}", (10, 10, 20, 20), (100, 100))
    given_boxes = ["{<10><10><20><20>}", " { <10><10><20><20> } yes", "liver", "{<60><60><70><70>}"]
    found = metrics.score("refer", given_boxes, [target] * 4)
    assert (found["count"], found["miou"], found["accuracy"]) == (4, pytest.approx(0.5), 0.5)
    assert (found["unparsable_released"], kinds(found)) == (1, {"unparsable": 1, "chatty": 1})
    half = item("refer", "", (0, 0, 9, 9), (100, 100))  # 100 pixels
    found = metrics.score("refer", ["{<0><0><9><4>}"], [half])  # 50 of them: exactly a half is not enough
    assert found["miou"] == 0.5
    assert found["accuracy"] == 0
    wide = item("refer", "", (20, 5, 40, 10), (200, 50))
    assert metrics.score("refer", ["{<10><10><20><20>}"], [wide])["miou"] == 1  # each axis by its own size
    apart = item("refer", "", (0, 0, 9, 9), (100, 100))
    found = metrics.score("refer", ["{<9><0><18><9>}"], [apart])
    assert found["miou"] == pytest.approx(10 / 190)  # corners touch: one column shared
    assert found["miou_strict"] == 0


@pytest.mark.parametrize(
    ("text", "released", "strictly", "kind"),
    [
        ("{<10><10><20><20>}", 1, 1, ""),
        ("liver {<10><10><20><20>}", 0, 1, "chatty"),
        ("{<10><10><20><20>} is the liver", 1, 1, "chatty"),
        ("{<10><10><20><20>}{<10><10><20><20>}", 1, 1, ""),
        ("{<10><10><20><20>} or {<50><50><60><60>}", 1, 0, "unparsable"),
        ("{<20><20><10><10>}", 0, 0, "inverted"),
        ("liver {<20><10><10><20>}", 0, 0, "inverted"),
        ("{<10><10><20><200>}", 0, 0, "unparsable"),
        ("liver", 0, 0, "unparsable"),
        (" ", 0, 0, "empty"),
    ],
)
def test_a_box_counts_as_what_it_is(text, released, strictly, kind):
    target = item("refer", "", (10, 10, 20, 20), (100, 100))
    found = metrics.score("refer", [text], [target])
    assert (found["miou"], found["miou_strict"]) == (released, strictly)
    assert kinds(found) == ({kind: 1} if kind else {})
    assert metrics.is_right(target, text) == bool(strictly)


def test_one_rule_says_when_a_box_is_found():
    half = item("refer", "", (0, 0, 100, 100), (100, 100))
    assert metrics.score("refer", ["{<0><0><100><50>}"], [half])["miou_strict"] == 0.5
    assert metrics.score("refer", ["{<0><0><100><50>}"], [half])["accuracy_strict"] == 0
    assert not metrics.is_right(half, "{<0><0><100><50>}")
    assert metrics.is_right(half, "{<0><0><100><51>}")


def test_identify_and_cls_and_qa():
    wanted = [item("identify", "Left kidney"), item("identify", "liver")]
    found = metrics.score("identify", ["the left kidney", "liver lobe"], wanted)
    assert found["accuracy"] == 0.5
    assert found["f1"] == pytest.approx((1 + 2 / 3) / 2)
    assert found["bleu1"] == pytest.approx((1 + 0.5) / 2)
    assert (found["accuracy_strict"], kinds(found)) == (0, {"chatty": 2})
    found = metrics.score("cls", ["Liver.", "lung"], [item("cls", "liver"), item("cls", "left lung")])
    assert (found["count"], found["accuracy"], found["accuracy_strict"], kinds(found)) == (2, 0.5, 0.5, {})
    assert metrics.score("qa", ["Yes."], [item("qa", "yes")])["accuracy"] == 1
    assert metrics.score("qa", ["vitamin", "Vitamin a."], [item("qa", "Vitamin A")] * 2)["accuracy"] == 0.5
    assert metrics.score("qa", ["the", "A"], [item("qa", "A")] * 2)["accuracy"] == 0.5
    found = metrics.score("qa", ["maybe not: no", "Maybe", "perhaps", ""], [item("qa", "maybe")] * 4)
    assert (found["accuracy"], kinds(found)) == (0.25, {"empty": 1, "unparsable": 1, "off_list": 1})


def test_text_questions_score_options_and_yes_no_maybe_apart():
    asked = item("qa", "bed rest", question="What is next? (A) bed rest (B) surgery (C) drugs")
    right = ["bed rest", "A", "(A)", "A. bed rest", "A) of course", "The answer is A", "Answer: (A) bed rest", "so, bed rest"]
    wrong = ["B", "(B) bed rest", "A patient rests", "surgery", "bed rest or surgery", "D", "a", ""]
    found = metrics.score("qa", right + wrong, [asked] * 16)
    assert (found["accuracy"], found["option_accuracy"]) == (1 / 16, 8 / 16)
    assert "yes_no_maybe_accuracy" not in found
    for text, expected in [*((one, 1) for one in right), *((one, 0) for one in wrong)]:
        assert metrics.score("qa", [text], [asked])["option_accuracy"] == expected, text
    wanted = [item("qa", one) for one in ("yes", "yes", "no", "maybe")]
    found = metrics.score("qa", ["Yes.", "no", "No, never", "perhaps"], wanted)
    assert (found["accuracy"], found["yes_no_maybe_accuracy"]) == (0.25, 0.5)  # "No, never" is chatty
    # yes: one of two named, so 2/3; no: two named and one wanted, 2/3; maybe: never named, 0.
    assert found["yes_no_maybe_macro_f1"] == pytest.approx((2 / 3 + 2 / 3 + 0) / 3)
    assert "option_accuracy" not in found


@pytest.mark.parametrize(
    ("said", "letter"),
    [
        ("Bed rest (A) does not help here; the answer is B", "B"),
        ("(A) is wrong. The answer is B.", "B"),
        ("A. bed rest is tempting, but the correct answer is (C).", "C"),
        ("After (A) and (B) fail, the answer is C because drugs act.", "C"),
        ("The answer is option B, since bed rest is not enough.", "B"),
        ("Answer: B. Bed rest is not enough.", "B"),
        ("The best choice is (A), not surgery", "A"),
        ("The answer is A: bed rest", "A"),
        ("The answer is A because the patient is weak", "A"),
        ("The answer is B: bed rest", None),  # letter and text differ
        ("The answer is A. No, the answer is B.", None),
        ("The answer is A patient who rests", None),  # an article
        ("the answer is not B", None),
        ("The answer is D, so surgery", "B"),  # there is no D
        ("surgery (A)", "B"),  # a letter in the middle is not stated
        ("The answer is vitamin B", None),
    ],
)
def test_an_option_is_chosen_where_the_answer_states_it(said, letter):
    asked = item("qa", "bed rest", question="What is next? (A) bed rest (B) surgery (C) drugs")
    assert standard.chosen(asked, said) == standard.options_in(asked.question).get(letter)


def test_macro_f1_of_classes():
    wanted = [item("cls", name, question=CLASSES) for name in ("basophil", "basophil", "cell")]
    found = metrics.score("cls", ["basophil", "ghost", "basophil"], wanted)
    # basophil: one of two found, one named too often: 2 * 1 / (2 + 2); cell: never named.
    assert found["macro_f1_strict"] == pytest.approx((1 / 2 + 0) / 2)


CLASSES = "Which cell is in the image: basophil; immature granulocytes (myelocytes, metamyelocytes); erythroblast; cell?"


@pytest.mark.parametrize(
    ("text", "answer", "right", "kind"),
    [
        ("Basophil.", "basophil", True, ""),
        ("the basophil", "basophil", False, "chatty"),
        ("platelet", "basophil", False, "off_list"),
        ("basophil or erythroblast", "basophil", False, "unparsable"),
        ("immature granulocytes (myelocytes, metamyelocytes)", "immature granulocytes (myelocytes, metamyelocytes)", True, ""),
        ("immature granulocytes (myelocytes, metamyelocytes)", "basophil", False, ""),
        ("erythroblasts", "erythroblast", False, "off_list"),  # whole words
    ],
)
def test_a_class_is_one_of_the_list(text, answer, right, kind):
    asked = item("cls", answer, question=CLASSES)
    found = metrics.score("cls", [text], [asked])
    assert (found["accuracy_strict"], metrics.is_right(asked, text)) == (float(right), right)
    assert kinds(found) == ({kind: 1} if kind else {})


@pytest.mark.each
@pytest.mark.parametrize("name", medmnist.KNOWN)
def test_the_list_of_every_known_class_set_is_read_back(tmp_path, name):
    names = [medmnist.class_name(one) for one in medmnist.KNOWN[name][1]]
    several = name == "chestmnist"
    labels = np.eye(len(names), dtype=np.uint8) if several else np.arange(len(names))[:, None]
    np.savez(tmp_path / f"{name}.npz", test_images=np.ones((len(names), 8, 8), np.uint8) * 9, test_labels=labels)
    items = load_items(tmp_path, "test")
    assert [one.answer for one in items] == names
    for one in items:
        assert set(options(one)) == {strict(text) for text in names} | ({"no finding"} if several else set())
        assert metrics.is_right(one, one.answer)
        assert sum(metrics.is_right(one, text) for text in names) == 1
        assert [answers.read(one, text).kind for text in (*names, "ghost")] == [""] * len(names) + ["off_list"]


def test_options_of_a_text_question_are_its_list():
    asked = item("qa", "bed rest", question="What is next? (A) bed rest (B) surgery (C) no rest")
    found = metrics.score("qa", ["Bed rest.", "A", "surgery", "surgery or bed rest"], [asked] * 4)
    assert (found["accuracy"], kinds(found)) == (0.25, {"unparsable": 1, "off_list": 1})
    assert kinds(metrics.score("qa", ["pills"], [item("qa", "bed rest")])) == {}  # no list: nothing is off it


def test_several_labels_are_right_together():
    asked = item("cls", "effusion, mass", question="Which findings are there: effusion; infiltration, old; mass; or no finding?")
    found = metrics.score("cls", ["Mass and effusion", "effusion", "mass, no finding", "effusion with mass"], [asked] * 4)
    assert (found["accuracy_strict"], kinds(found)) == (0.25, {"chatty": 1})
    assert options(asked) == ("effusion", "infiltration old", "mass", "no finding")


@given(st.lists(st.text(max_size=30), min_size=1, max_size=4), st.sampled_from(sorted(TASKS)))
@settings(max_examples=60, deadline=None)
def test_any_prediction_can_be_scored(predictions, task):
    answer = "0.48" if task == "calculation" else "The liver is visible."
    wanted = [item(task, answer, (0, 0, 5, 5), (10, 10), "CLOSED")] * len(predictions)
    found = metrics.score(task, predictions, wanted, coco=False)
    assert found["count"] == len(predictions)
    assert all(math.isfinite(value) for value in found.values())
    assert all(0 <= found[name] <= 1 for name in (TASKS[task].headline, TASKS[task].strict))
    assert sum(kinds(found).values()) <= len(predictions)
    assert all(isinstance(metrics.is_right(one, text), bool) for one, text in zip(wanted, predictions, strict=True))


def test_what_is_asked_of_score():
    assert metrics.score("vqa", [], []) == {"count": 0}
    with pytest.raises(UserError, match="1 predictions for 0"):
        metrics.score("vqa", ["x"], [])
    with pytest.raises(UserError, match="unknown task"):
        metrics.score("vqs", [], [])
    with pytest.raises(UserError, match="needs a box"):
        metrics.score("refer", ["x"], [item("refer", "x")])
