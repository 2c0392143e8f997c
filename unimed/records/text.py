"""Text as the release cleans it, and as the inside of one line."""

MAX_WORDS = 50


def clean(text: str, max_words: int = MAX_WORDS) -> str:
    """Runs of whitespace become one space; the first ``max_words`` words are kept (0: all); case and punctuation stay.

    The release applies the 50 words to questions, answers, reports (also as evaluation references), class names and whole text-QA
    instructions.
    """
    return " ".join(str(text).split()[: max_words or None])


def short(error: Exception, most: int = 160) -> str:
    """An error of a library as the inside of one line."""
    text = plain(error) or type(error).__name__
    return text if len(text) <= most else text[: most - 3] + "..."


def plain(text: object) -> str:
    """Words from a file without line ends and control characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
