"""Instructions: a task tag and a sentence, drawn from a pool in training and fixed in evaluation.

The release's tags and structure, our sentences. Image tasks start with `<Img><ImageHere></Img>`; the processor puts the image there.
Marks in a question are quoted (`unimed.literal`): "<image>" in a question is text.
"""

import random

from unimed.data.example import Example
from unimed.data.text import clean
from unimed.errors import UserError
from unimed.literal import literal

IMAGE = "<Img><ImageHere></Img>"

# The first of each pool is the evaluation form, except vqa and qa, where evaluation always takes the lead-in.
REFER = (
    "give me the location of {}", "{}", "where is {}?", "where in the image is {}?", "find {} and give its box", "box the {}", "locate {}",
)  # fmt: skip
IDENTIFY = (
    "what object is in this location {}", "{}", "what is at {}?", "name the object in the box {}", "which structure lies in {}?",
    "identify {}", "what does the box {} show?",
)  # fmt: skip
CAPTION = {
    "mimic-cxr": (
        "Describe the findings of this chest X-ray.", "Write the report of this chest X-ray.", "What does this chest X-ray show?",
        "Report this chest radiograph.", "Summarise what you see in this chest radiograph.",
    ),
    "medpix": (
        "Describe this image.", "Write a caption for this image.", "What does this image show?", "Caption this medical image.",
        "Summarise this image.", "What can be seen here?", "Give a short description of the image.", "Explain what the image shows.",
        "Tell me what you see in this image.", "Write what this medical image shows.",
    ),
    "": (
        "Describe the findings of this image.", "Write the findings of this slice.", "What does this slice show?", "Report this image.",
        "Summarise what is visible.",
    ),
}  # fmt: skip
VQA = ("Based on the image, give a short answer to this question: {}", "{}")
QA = {
    "pubmedqa": ("You are a doctor. Answer this question with yes, no or maybe: {}", "{}"),
    "": ("You are a doctor. Answer this question briefly: {}", "{}"),
}


def instruction(example: Example, rng: random.Random | None) -> str:
    """Image wrapper, tag and sentence of an example; ``rng`` None gives the evaluation form, else one is drawn from the training pool."""
    kind = example.layout or example.dataset
    if example.task == "cls":
        pool: tuple[str, ...] = ("{}",)
    elif example.task in ("refer", "identify"):
        pool = REFER if example.task == "refer" else IDENTIFY
    elif example.task == "caption":
        pool = CAPTION.get(kind, CAPTION[""])
    elif example.task == "vqa":
        pool = VQA
    elif example.task == "qa":
        pool = QA.get(kind, QA[""])
    else:
        raise UserError(f"{example.id}: unknown task {example.task!r}")
    sentence = (pool[0] if rng is None else rng.choice(pool)).replace("{}", literal(example.question))
    if example.task == "qa":  # the release cuts the whole text-QA instruction to 50 words, lead-in included
        return f"[qa] {clean(sentence, example.max_words)}"
    return f"{IMAGE} [{example.task}] {sentence}"


def chat(instruction: str) -> str:
    """The Llama-2 chat wrapper, the same in training and evaluation.

    The release puts two spaces before `[/INST]` in training and one in most of its evaluations, and begins evaluation with two BOS: we
    do neither.
    """
    return f"[INST] {instruction} [/INST]"
