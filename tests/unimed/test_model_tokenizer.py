import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from model_samples import TEXTS

from unimed.errors import UserError
from unimed.models.unimed.tokenization import COORDINATES, MARKS, train_tokenizer
from unimed.tasks.item import Item
from unimed.train import run as training

TOKENIZER = train_tokenizer(TEXTS, 480)


def test_same_texts_same_tokenizer():
    assert train_tokenizer(TEXTS * 2, 480).backend_tokenizer.to_str() == train_tokenizer(iter(TEXTS * 2), 480).backend_tokenizer.to_str()


def test_many_items_are_read_by_a_slice_that_spreads_over_all(monkeypatch):
    class Indexed(list):
        """One item at a time, as from an index on disk, would take long."""

        def __getitem__(self, at):
            assert isinstance(at, slice)
            return super().__getitem__(at)

    some = Indexed(Item(id=str(n), task="qa", dataset="own", question="why?", answer=str(n)) for n in range(25))
    for most, answers in ((100, range(25)), (25, range(25)), (24, range(0, 25, 2)), (10, range(0, 25, 3))):
        monkeypatch.setattr(training, "MOST_TEXTS", most)
        assert list(training.texts(some))[2::3] == [str(n) for n in answers]
    assert list(training.texts([])) == []


def test_the_vocabulary_is_as_large_as_asked_for():
    assert len(train_tokenizer([" ".join(a + b + c for a in "aeiou" for b in "bcdfg" for c in "aeiou")], 400)) == 400
    with pytest.raises(UserError, match="vocab_size is 300, it must be at least"):
        train_tokenizer(TEXTS, 300)


def test_a_box_is_six_tokens_and_every_coordinate_one():
    assert TOKENIZER.tokenize("{<7><20><34><100>}") == ["{", "<7>", "<20>", "<34>", "<100>", "}"]
    ids = TOKENIZER.convert_tokens_to_ids(list(COORDINATES))
    assert len(set(ids)) == 101
    assert TOKENIZER.unk_token_id not in ids
    assert "<101>" not in TOKENIZER.tokenize("<101>")


def test_marks_are_one_token_whatever_the_blanks_before_them():
    ids = TOKENIZER.convert_tokens_to_ids(list(MARKS))
    assert len(set(ids)) == len(MARKS)
    assert TOKENIZER("where? [/INST]")["input_ids"] == TOKENIZER("where?  [/INST]")["input_ids"]


def test_digits_outside_boxes_are_single():
    assert [token for token in TOKENIZER.tokenize("size 1234") if token.strip("Ġ").isdigit()] == ["1", "2", "3", "4"]


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_every_text_without_marks_survives(text):
    ids = TOKENIZER("a" + text, add_special_tokens=False)["input_ids"]
    if not any(mark in text for mark in (*MARKS, "<pad>", "<s>", "</s>", "<image>")):
        assert TOKENIZER.decode(ids) == "a" + text


def test_saved_and_read_again(tmp_path):
    from transformers import AutoTokenizer

    TOKENIZER.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert again(text)["input_ids"] == TOKENIZER(text)["input_ids"]
    assert (again.bos_token, again.eos_token, again.pad_token) == ("<s>", "</s>", "<pad>")
