"""Text as the release cleans it."""

MAX_WORDS = 50


def clean(text: str, max_words: int = MAX_WORDS) -> str:
    """Runs of whitespace become one space; the first ``max_words`` words are kept (0: all); case and punctuation stay.

    The release applies the 50 words to questions, answers, reports (also as evaluation references), class names and whole text-QA
    instructions.
    """
    return " ".join(str(text).split()[: max_words or None])
