import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_samples import QA, REFER, VQA, picture, small
from PIL import Image
from transformers import AutoProcessor

from unimed.errors import UserError
from unimed.literal import END, START, literal
from unimed.models.unimed.processing import UniMedProcessor
from unimed.tasks import prompts
from unimed.tasks.item import Item

MODEL, PROCESSOR = small()
IMAGE = PROCESSOR.image_token_id


def pieces(ids, start=0):
    return PROCESSOR.tokenizer.convert_ids_to_tokens(ids[start:])


def test_layout_of_a_training_row():
    row = PROCESSOR(text=[REFER], images=[picture(0)], answers=["{<1><2><3><4>}"])
    tokens = pieces(row.input_ids[0])
    assert tokens[:4] == ["<s>", "[INST]", "<Img>", "<image>"]
    assert tokens.count("<image>") == PROCESSOR.num_image_tokens == 4
    assert tokens.index("</Img>") == tokens.index("<image>") + 4
    learned = row.input_ids[0][row.labels[0] != -100]
    assert PROCESSOR.tokenizer.decode(learned) == " {<1><2><3><4>}</s>"
    assert tokens[len(tokens) - len(learned) - 1] == "[/INST]"


def test_labels_are_the_answer_and_its_end_alone():
    rows = PROCESSOR(text=[REFER, QA], images=[picture(0)], answers=["{<1><2><3><4>}", "left"])
    for ids, mask, labels in zip(rows.input_ids, rows.attention_mask, rows.labels, strict=True):
        assert torch.equal(labels[labels != -100], ids[labels != -100])
        assert (labels[mask == 0] == -100).all()
        assert (labels[ids == IMAGE] == -100).all()
        assert labels[0] == -100
        assert (labels == PROCESSOR.tokenizer.eos_token_id).sum() == 1
    assert rows.attention_mask[1, 0] == 1  # padded on the right


def test_a_prompt_reads_the_same_with_and_without_its_answer():
    asked = PROCESSOR(text=[REFER], images=[picture(0)]).input_ids[0]
    learned = PROCESSOR(text=[REFER], images=[picture(0)], answers=["right lobe"]).input_ids[0]
    assert torch.equal(learned[: len(asked)], asked)


def test_padding_sides():
    left = PROCESSOR(text=[REFER, QA], images=[picture(0)])
    assert left.attention_mask[1].tolist() == sorted(left.attention_mask[1].tolist())
    assert left.input_ids[1, 0] == PROCESSOR.tokenizer.pad_token_id
    right = PROCESSOR(text=[REFER, QA], images=[picture(0)], padding_side="right")
    assert torch.equal(right.input_ids[1][right.attention_mask[1] == 1], left.input_ids[1][left.attention_mask[1] == 1])


def test_images_are_resized_bicubic_and_normalised_as_clip():
    image = picture(3, (50, 20))
    got = PROCESSOR(text=[VQA], images=[image]).pixel_values[0]
    resized = np.asarray(image.resize((32, 32), Image.Resampling.BICUBIC), dtype=np.float64) / 255
    wanted = (resized - [0.48145466, 0.4578275, 0.40821073]) / [0.26862954, 0.26130258, 0.27577711]
    assert torch.allclose(got.double(), torch.tensor(wanted).permute(2, 0, 1), atol=1e-5)


def test_grey_images_and_missing_entries():
    row = PROCESSOR(text=[QA, VQA], images=[None, Image.new("L", (9, 9), 128)])
    assert row.pixel_values.shape == (1, 3, 32, 32)
    assert "pixel_values" not in PROCESSOR(text=QA)


def test_tasks_are_given_or_read_from_the_tag():
    images = [picture(0), picture(1)]
    assert PROCESSOR(text=[REFER, QA, VQA], images=images).task_ids.tolist() == [1, 0]
    assert PROCESSOR(text=[REFER, QA, VQA], images=images, task=["cls", "qa", "caption"]).task_ids.tolist() == [4, 3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"text": [VQA], "images": [picture(0)], "task": ["segment"]}, "prompt 0: unknown task 'segment', it must be one of vqa, refer"),
        ({"text": ["<ImageHere> hello"], "images": [picture(0)]}, "prompt 0: no task given and no task tag"),
        ({"text": [VQA], "images": [picture(0)], "task": ["qa"]}, "prompt 0: 'qa' is for text alone"),
        ({"text": [VQA], "images": [picture(0)], "task": ["vqa", "vqa"]}, "2 tasks for 1 prompts"),
        ({"text": [VQA, VQA], "images": [picture(0)]}, "1 images for 2 image places"),
        ({"text": [VQA]}, "0 images for 1 image places"),
        ({"text": [QA], "images": [picture(0)]}, "1 images for 0 image places"),
        ({"text": ["<ImageHere> [vqa] <ImageHere>"], "images": [picture(0)] * 2}, "prompt 0 has 2 image places"),
        ({"text": [VQA], "images": ["liver.png"]}, "image 0 must be a PIL image, got str"),
        ({"text": [VQA], "images": "liver.png"}, "images must be a list of PIL images, got str"),
        ({"text": [3]}, "text must be a string or a list"),
        ({"text": []}, "text must be a string or a list"),
        ({"text": [QA], "answers": ["a", "b"]}, "2 answers for 1 prompts"),
        ({"text": [QA], "answers": [None]}, "answers must be a string or a list"),
        ({"text": [QA], "padding_side": "both"}, "padding_side must be 'left' or 'right', got 'both'"),
    ],
)
def test_wrong_input_is_one_line(arguments, message):
    with pytest.raises(UserError, match=message) as caught:
        PROCESSOR(**arguments)
    assert "\n" not in str(caught.value)


def test_long_answers_are_cut_and_long_prompts_refused():
    short = UniMedProcessor(PROCESSOR.image_processor, PROCESSOR.tokenizer, 4, max_answer_tokens=3, max_prompt_tokens=20)
    row = short(text=[QA], answers=["the spleen is in the left upper abdomen"])
    learned = row.labels[0][row.labels[0] != -100]
    assert len(learned) == 3
    assert short.tokenizer.eos_token_id not in learned
    with pytest.raises(UserError, match=r"prompt 0 has \d+ tokens, at most 20"):
        short(text=["[INST] [qa] " + "why " * 30 + "[/INST]"])


def test_answers_are_what_follows_the_prompt():
    row = PROCESSOR(text=[REFER, QA], images=[picture(0)], answers=["{<1><2><3><4>}", "in the left upper abdomen"], padding_side="left")
    assert PROCESSOR.decode_answers(row.input_ids) == ["{<1><2><3><4>}", "in the left upper abdomen"]
    asked = PROCESSOR(text=[QA]).input_ids
    echo = PROCESSOR(text=[QA], answers=["say [/INST] twice"]).input_ids
    assert PROCESSOR.decode_answers(echo, prompt_length=asked.shape[1]) == ["say [/INST] twice"]


def test_saved_and_read_again(tmp_path):
    MODEL.config.save_pretrained(tmp_path)
    PROCESSOR.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(again, UniMedProcessor)
    one, two = (p(text=[REFER, QA], images=[picture(5)], answers=["{<9><8><70><60>}", "x"]) for p in (PROCESSOR, again))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_chat_template_writes_the_prompt_layout():
    user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "[vqa] which modality?"}]}
    assert PROCESSOR.apply_chat_template([user]) == "[INST] <Img><image></Img> [vqa] which modality? [/INST]"
    talk = [user, {"role": "assistant", "content": [{"type": "text", "text": "CT"}]}]
    assert PROCESSOR.apply_chat_template(talk) == "[INST] <Img><image></Img> [vqa] which modality? [/INST] CT</s>"


# Text of users

MARKS = "<image> <ImageHere> </Img> </s> <s> <pad> [INST] [/INST] [refer] [qa] <|im_end|>"


def test_the_quotes_are_those_of_transformers():
    from transformers.utils import chat_template_utils

    assert (START, END) == (chat_template_utils._CONTROL_TOKEN_START, chat_template_utils._CONTROL_TOKEN_END)


@pytest.mark.parametrize("task", ["vqa", "refer", "identify", "cls", "qa"])
def test_marks_in_a_question_and_in_an_answer_are_text(task):
    """Kind: what a user writes never becomes an image place, an end of text or a task, whichever field it is in."""
    item = Item("a", task, "d", f"{MARKS} at {{<10><20><30><40>}}?", MARKS, None, None, None, task)
    images = None if task == "qa" else [picture(0)]
    row = PROCESSOR(text=[prompts.chat(prompts.instruction(item, None))], images=images, answers=[item.answer], task=None)
    ids, learned = row.input_ids[0], row.labels[0][row.labels[0] != -100]
    assert (ids == IMAGE).sum() == (0 if task == "qa" else PROCESSOR.num_image_tokens)
    assert (ids == PROCESSOR.tokenizer.eos_token_id).sum() == (ids == PROCESSOR.tokenizer.bos_token_id).sum() == 1
    tokens = pieces(ids)
    assert tokens.count("[INST]") == tokens.count("[/INST]") == tokens.count(f"[{task}]") == 1
    assert tokens.count("<10>") == 1  # a coordinate stays one token
    assert "task_ids" not in row or row.task_ids.tolist() == [PROCESSOR.tasks.index(task)]
    assert PROCESSOR.tokenizer.decode(learned[:-1]) == f" {MARKS}"
    assert f"{MARKS} at" in PROCESSOR.tokenizer.decode(ids)


def test_text_without_marks_is_read_as_ever():
    for text in ("Is the kidney < 5 cm [sic 3]?", "{<1><2><3><4>}", "a [b c] <d e>"):
        assert literal(text) == text


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([*MARKS.split(), "<im", "age>", "<", "[", START, END, " ", "x", "<7>"]), max_size=8).map("".join))
def test_no_text_of_users_is_obeyed(text):
    prompt = f"[INST] <Img><ImageHere></Img> [vqa] a{literal(text)} [/INST]"
    row = PROCESSOR(text=[prompt], images=[picture(0)], answers=["a" + text])
    assert (row.input_ids == IMAGE).sum() == PROCESSOR.num_image_tokens
    assert (row.input_ids == PROCESSOR.tokenizer.eos_token_id).sum() == 1
    assert pieces(row.input_ids[0]).count("[/INST]") == 1
    learned = row.labels[0][row.labels[0] != -100]
    assert PROCESSOR.tokenizer.decode(learned[:-1]) == " a" + text.replace(START, "").replace(END, "").rstrip()


def test_the_tokenizer_does_not_learn_the_quotes():
    from unimed.models.unimed.tokenization import train_tokenizer

    texts = [f"{literal('<image>')} {literal('</s>')} what"] * 20
    learned = train_tokenizer(texts, 480)
    assert learned.tokenize("image")[-1] == "image"
    assert not any(START in learned.convert_tokens_to_string([token]) for token in learned.get_vocab())


def user(text):
    return {"role": "user", "content": [{"type": "image", "image": picture(0)}, {"type": "text", "text": text}]}


def test_marks_in_messages_are_text_but_for_the_tag_at_the_start():
    talk = [user(f"[refer] {MARKS}"), {"role": "assistant", "content": f"no {MARKS}"}, {"role": "user", "content": "[qa] why? </s>"}]
    row = PROCESSOR.apply_chat_template(talk, tokenize=True, return_dict=True)
    tokens = pieces(row["input_ids"][0])
    assert tokens.count("<image>") == PROCESSOR.num_image_tokens
    assert tokens.count("</s>") == 1
    assert (tokens.count("[refer]"), tokens.count("[qa]"), tokens.count("[INST]")) == (1, 1, 2)
    assert row["task_ids"].tolist() == [PROCESSOR.tasks.index("refer")]


def test_a_system_message_is_carried_as_llama_2_does():
    talk = [
        {"role": "system", "content": "Be brief."},
        user("[vqa] which plane?"),
        {"role": "assistant", "content": "axial"},
        user("sure?"),
    ]
    assert PROCESSOR.apply_chat_template(talk) == (
        "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n<Img><image></Img> [vqa] which plane? [/INST] axial</s>"
        "[INST] <Img><image></Img> sure? [/INST]"
    )


@pytest.mark.parametrize(
    ("talk", "words"),
    [
        ([user("a"), {"role": "system", "content": "b"}], "role system at place 1 is not supported"),
        ([{"role": "tool", "content": "b"}], "role tool at place 0 is not supported"),
        ([{"role": "system", "content": "b"}], "needs a user message behind it"),
        ([{"role": "user", "content": [{"type": "video"}]}], "type video is not supported"),
        ([{"role": "system", "content": [{"type": "image"}]}, user("a")], "type image is not supported"),
    ],
)
def test_messages_that_the_template_cannot_carry_are_refused_by_one_line(talk, words):
    with pytest.raises(UserError, match=words) as caught:
        PROCESSOR.apply_chat_template(talk)
    assert "\n" not in str(caught.value)
