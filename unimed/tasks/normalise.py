"""Two ways to make answers comparable: the VQA challenge's, as the release applies it, and a strict one that keeps every word."""

import re
import unicodedata

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_DIGIT_COMMA = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_PERIODS_REMOVED = 32  # the release passes the flag re.UNICODE, whose value is 32, where re.sub takes a count
_NUMBERS = {
    word: str(i) for i, word in enumerate(("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"))
} | {"none": "0"}  # fmt: skip
_ARTICLES = ("a", "an", "the")


def _contractions() -> dict[str, str]:
    negated = (
        "ai", "are", "ca", "could", "did", "does", "do", "had", "has", "have", "is", "might", "must", "need", "ought", "sha", "should",
        "was", "were", "wo", "would",
    )  # fmt: skip
    full = [f"{word}n't" for word in negated]
    full += [f"{word}'ve" for word in ("could", "might", "must", "not", "should", "they", "we", "what", "where", "who", "would", "you")]
    full += [
        f"{word}'d"
        for word in ("he", "how", "it", "somebody", "someone", "something", "that", "there", "they", "where", "who", "why", "you")
    ]
    full += [f"{word}'ll" for word in ("how", "it", "somebody", "someone", "something", "they", "what", "who", "why", "you", "y'all")]
    full += [
        f"{word}'s" for word in ("he", "how", "somebody", "someone", "something", "that", "there", "what", "when", "where", "who", "why")
    ]
    full += ["they're", "you're", "what're", "there're", "ma'am", "o'clock", "y'all", "let's"]
    return {word.replace("'", ""): word for word in full if "'" in word}


CONTRACTIONS = _contractions()


def normalise(text: str) -> str:
    """Punctuation, periods, case, number words, articles, contractions and commas, in the release's order.

    A punctuation mark is removed where it touches a space anywhere in the text, or when the text holds digit-comma-digit; else it becomes a
    space. Only the first 32 periods that no digit follows are removed: kept as released. "none" and "zero" are both "0".
    """
    out = text
    has_number_with_comma = _DIGIT_COMMA.search(text) is not None
    for mark in _PUNCTUATION:
        removed = mark + " " in text or " " + mark in text or has_number_with_comma
        out = out.replace(mark, "" if removed else " ")
    out = _PERIOD.sub("", out, count=_PERIODS_REMOVED)
    words = (_NUMBERS.get(word, word) for word in out.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES).replace(",", "")


_AROUND = "\"'`\u2018\u2019\u201c\u201d()[]{}"
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_COUNTS = {word: digit for word, digit in _NUMBERS.items() if word != "none"}


def strict(text: str) -> str:
    """Case, whitespace, quotes and brackets round words, marks that end words, thousands' commas and number words; nothing else.

    Articles stay, since "A" is an answer; so do "none", which is not zero, and the sign of "HER2+".
    """
    plain = _THOUSANDS.sub("", unicodedata.normalize("NFKC", text).casefold())
    words = (word.lstrip(_AROUND).rstrip(_AROUND + ".,;:!?") for word in plain.split())
    return " ".join(_COUNTS.get(word, word) for word in words if word)
