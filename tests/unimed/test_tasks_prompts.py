import random

import pytest

from unimed.errors import UserError
from unimed.tasks import TASKS, prompts
from unimed.tasks.item import Item


def item(task, question="liver", dataset="d"):
    return Item("e", task, dataset, question, "answer", None, None, None, task)


@pytest.mark.parametrize(
    ("task", "question", "text"),
    [
        ("refer", "liver", "<Img><ImageHere></Img> [refer] give me the location of liver"),
        ("identify", "{<1><2><3><4>}", "<Img><ImageHere></Img> [identify] what object is in this location {<1><2><3><4>}"),
        ("vqa", "Which plane?", "<Img><ImageHere></Img> [vqa] Based on the image, give a short answer to this question: Which plane?"),
        ("cls", "Which organ: a, b?", "<Img><ImageHere></Img> [cls] Which organ: a, b?"),
        ("caption", "", "<Img><ImageHere></Img> [caption] Describe the findings of this image."),
        ("qa", "Which side?", "[qa] You are a doctor. Answer this question briefly: Which side?"),
    ],
)
def test_evaluation_forms(task, question, text):
    assert prompts.instruction(item(task, question), None) == text


@pytest.mark.parametrize(
    ("task", "dataset", "count"),
    [
        ("refer", "", 7),
        ("identify", "", 7),
        ("vqa", "", 2),
        ("qa", "medqa", 2),
        ("cls", "", 1),
        ("caption", "mimic-cxr", 5),
        ("caption", "medpix", 10),
    ],
)
def test_training_pools(task, dataset, count):
    rng = random.Random(0)
    drawn = {prompts.instruction(item(task, "{<1><2><3><4>}", dataset), rng) for _ in range(300)}
    assert len(drawn) == count
    assert prompts.instruction(item(task, "{<1><2><3><4>}", dataset), None) in drawn
    assert all(text.count(f"[{task}] ") == 1 and text.startswith("[qa]" if task == "qa" else prompts.IMAGE) for text in drawn)
    assert all("{}" not in text for text in drawn)
    if task not in ("caption",):
        assert all("{<1><2><3><4>}" in text for text in drawn)


def test_the_same_seed_draws_the_same():
    assert [prompts.instruction(item(task), random.Random(3)) for task in TASKS] == [
        prompts.instruction(item(task), random.Random(3)) for task in TASKS
    ]


def test_a_question_is_not_read_as_a_format():
    assert prompts.instruction(item("vqa", "What is {0} or %s {x}?"), None).endswith("What is {0} or %s {x}?")


def test_text_questions_are_cut_with_their_lead_in():
    text = prompts.instruction(item("qa", "word " * 60, "pubmedqa"), None)
    assert len(text.removeprefix("[qa] ").split()) == 50
    assert text.startswith("[qa] You are a doctor. Answer this question with yes, no or maybe: word")


def test_text_questions_of_the_standard_protocol_are_whole():
    whole = Item("e", "qa", "d", "word " * 60, "answer", None, None, None, "qa", max_words=0)
    assert len(prompts.instruction(whole, None).split()) == 69


def test_prompts_go_by_the_layout_where_a_data_set_is_named_by_its_folder():
    named = Item("e", "qa", "north", "Is it?", "yes", None, None, None, "qa", layout="pubmedqa")
    assert "yes, no or maybe" in prompts.instruction(named, None)


def test_chat():
    assert prompts.chat("[qa] why?") == "[INST] [qa] why? [/INST]"


def test_unknown_task():
    with pytest.raises(UserError, match="unknown task"):
        prompts.instruction(item("vqs"), None)
