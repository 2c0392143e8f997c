"""What the harnesses share: their prompts and pictures as requests, their stop strings."""

import logging
from collections.abc import Sequence
from typing import Any

from unimed.inference.request import Request
from unimed.tasks import TASKS

log = logging.getLogger("unimed.harnesses")
MARKS = ("<image>", "<image 1>", "<video>")


def request(prompt: str, images: Sequence[Any], task: str, max_new_tokens: int | None = None) -> Request:
    """One question. Image marks in the prompt go; a prompt without a picture is a text question, whatever the task.

    A prompt may begin with the tag of a task, as in "[cls] Which organ ...": that task answers it.
    """
    text = prompt
    for mark in MARKS:
        text = text.replace(mark, " ")
    text = text.strip()
    tag, bracket, rest = text.removeprefix("[").partition("]")
    if text.startswith("[") and bracket and tag in TASKS:
        task, text = tag, rest.strip()
    if len(images) > 1:
        log.warning("%d pictures in one question: the first one is shown", len(images))
    options: dict[str, Any] = {} if max_new_tokens is None else {"max_new_tokens": max_new_tokens}
    return Request(images[0] if images else None, text, task if images else "qa", **options)


def until(text: str, stops: str | Sequence[str] | None) -> str:
    """The text up to the first of the strings that end it."""
    for stop in [stops] if isinstance(stops, str) else stops or ():
        if stop:
            text = text.partition(stop)[0]
    return text
