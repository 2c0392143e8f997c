"""Instructions: a task tag and a sentence, drawn from a pool in training and fixed in evaluation.

The release's tags and structure, our sentences. Image tasks start with `<Img><ImageHere></Img>`; the processor puts the image there.
Marks in a question are quoted (`unimed.literal`): "<image>" in a question is text.
"""

import random

from unimed.literal import literal
from unimed.records.text import clean
from unimed.tasks.item import Item
from unimed.tasks.task import task_of

IMAGE = "<Img><ImageHere></Img>"


def instruction(item: Item, rng: random.Random | None) -> str:
    """Image wrapper, tag and sentence of an item; ``rng`` None gives the evaluation form, else one is drawn from the training pool."""
    task = task_of(item)
    pool = task.pool(item.layout or item.dataset)
    sentence = (pool[0] if rng is None else rng.choice(pool)).replace("{}", literal(item.question))
    if not task.needs_image:  # the release cuts the whole text-QA instruction to 50 words, lead-in included
        return f"[{task.tag}] {clean(sentence, item.max_words)}"
    return f"{IMAGE} [{task.tag}] {sentence}"


def chat(instruction: str) -> str:
    """The Llama-2 chat wrapper, the same in training and evaluation.

    The release puts two spaces before `[/INST]` in training and one in most of its evaluations, and begins evaluation with two BOS: we
    do neither.
    """
    return f"[INST] {instruction} [/INST]"
