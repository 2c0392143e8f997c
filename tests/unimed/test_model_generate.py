import pytest
import torch
from model_samples import QA, REFER, VQA, lively, picture, small

MODEL, PROCESSOR = small()
lively(MODEL)
PROMPTS, IMAGES = [REFER, QA, VQA, "[INST] <Img><ImageHere></Img> [caption] describe [/INST]"], [picture(1), None, picture(2), picture(3)]


def generate(texts, images, **settings):
    rows = PROCESSOR(text=texts, images=images)
    out = MODEL.generate(**rows, **{"max_new_tokens": 12, **settings})
    return out[:, rows.input_ids.shape[1] :].tolist()


def trimmed(ids):
    """Without what follows the first end of an answer."""
    end = PROCESSOR.tokenizer.eos_token_id
    return ids[: ids.index(end) + 1] if end in ids else ids


def test_the_comparisons_below_see_different_answers():
    answers = [tuple(ids) for ids in generate(PROMPTS, IMAGES)]
    assert len(set(answers)) == len(answers)
    assert all(len(set(ids)) > 3 for ids in answers)
    assert generate([REFER], [picture(8)]) != generate([REFER], [picture(9)])


def test_cached_equals_uncached():
    assert generate(PROMPTS, IMAGES, use_cache=True) == generate(PROMPTS, IMAGES, use_cache=False)


def test_a_batch_answers_as_its_samples_alone():
    together = generate(PROMPTS, IMAGES)
    for prompt, image, ids in zip(PROMPTS, IMAGES, together, strict=True):
        assert trimmed(generate([prompt], [image])[0]) == trimmed(ids)


def test_generated_tokens_are_the_forward_argmax():
    rows = PROCESSOR(text=[REFER], images=[picture(1)])
    ids = MODEL.generate(**rows, max_new_tokens=6)
    logits = MODEL(input_ids=ids[:, :-1], pixel_values=rows.pixel_values, task_ids=rows.task_ids).logits
    start = rows.input_ids.shape[1]
    assert logits[0, start - 1 :].argmax(-1).tolist() == ids[0, start:].tolist()


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_beams_and_caches(cache):
    rows = generate(PROMPTS[:3], IMAGES[:3], num_beams=2, cache_implementation=cache)
    assert len(rows) == 3
    alone = generate(PROMPTS[:1], IMAGES[:1], num_beams=2, cache_implementation=cache)
    assert trimmed(alone[0]) == trimmed(rows[0])


def test_generation_settings_come_with_the_model():
    settings = MODEL.generation_config
    assert (settings.max_new_tokens, settings.do_sample) == (100, False)
    assert settings.eos_token_id == PROCESSOR.tokenizer.eos_token_id
    assert settings.pad_token_id == PROCESSOR.tokenizer.pad_token_id


def test_text_alone_meets_no_connector(monkeypatch):
    monkeypatch.setattr(MODEL.connector, "forward", None)
    assert len(generate([QA], None)[0]) > 0


def test_pipeline_answers():
    from transformers import pipeline

    ask = pipeline("image-text-to-text", model=MODEL, processor=PROCESSOR)
    user = {
        "role": "user",
        "content": [{"type": "image", "image": picture(1)}, {"type": "text", "text": "[refer] give me the location of liver"}],
    }
    (answer,) = ask(text=[user], max_new_tokens=12, return_full_text=False)
    rows = PROCESSOR(text=[REFER], images=[picture(1)])
    direct = MODEL.generate(**rows, max_new_tokens=12)
    assert answer["generated_text"].strip() == PROCESSOR.decode_answers(direct, rows.input_ids.shape[1])[0]


def test_answers_do_not_depend_on_grad_mode():
    with torch.inference_mode():
        inference = generate([REFER], [picture(1)])
    assert inference == generate([REFER], [picture(1)])


@pytest.mark.parametrize("name", ["cache", "past_key_values"])  # the second is transformers' name before 5.24
def test_a_cache_continues_the_prompt(name):
    rows = PROCESSOR(text=[REFER], images=[picture(1)])
    ids = MODEL.generate(**rows, max_new_tokens=4)
    images = {"pixel_values": rows.pixel_values, "task_ids": rows.task_ids}
    start = rows.input_ids.shape[1]
    whole = MODEL(input_ids=ids, **images).logits
    first = MODEL(input_ids=ids[:, :start], use_cache=True, **images)
    rest = MODEL(input_ids=ids[:, start:], **{name: first.cache}).logits
    assert first.cache.get_seq_length() == ids.shape[1]
    torch.testing.assert_close(rest, whole[:, start:])
