"""Text of users is never read as a mark of the prompt or as a special token of the tokenizer."""

import re

# The characters that transformers puts around a control token in user text (`sanitize_control_tokens`): tokenizers spell what is between.
START, END = "\U000f0000", "\U000f0001"

# All that a tokenizer of ours or of a language model may know as one token: <image>, </s>, <|im_start|>, [INST], [vqa]. Coordinates such as
# <10> are answers' own words and stay tokens.
_MARK = re.compile(r"<[^<>\s\d][^<>\s]*>|\[/?[A-Za-z]\w*\]")
_QUOTED = re.compile(f"({START}[^{START}{END}]*{END})")


def literal(text: str) -> str:
    """``text`` with everything that looks like a mark quoted, so that it is spelled out and stays what the user wrote."""
    return _MARK.sub(rf"{START}\g<0>{END}", plain(text))


def plain(text: str) -> str:
    """``text`` without the quotes of `literal`."""
    return text.replace(START, "").replace(END, "")


def split(text: str) -> list[str]:
    """``text`` in pieces: those at even places are ours, those at odd places were quoted by `literal`."""
    return _QUOTED.split(text)


def is_quoted(text: str) -> bool:
    """Whether `literal` found a mark in this text."""
    return START in text
