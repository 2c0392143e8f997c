"""Text as the release cleans it."""


def clean(text: str, max_words: int = 50) -> str:
    """Runs of whitespace become one space; the first ``max_words`` words are kept; case and punctuation stay.

    The release applies the 50 words to questions, answers, reports (also as evaluation references), class names and whole text-QA
    instructions.
    """
    return " ".join(str(text).split()[:max_words])
