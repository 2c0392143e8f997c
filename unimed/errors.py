"""The one error a user is meant to see."""


class UserError(Exception):
    """Something the user gave cannot be used: one line that says what, where and what would be right.

    The command line prints it without a traceback and exits with code 2 (`--debug` shows the traceback).
    """

    def __init__(self, text: str = "") -> None:
        # torch's loader raises the error of a worker process again, with its traceback as the text; the text is that one's last line.
        if text.startswith("Caught ") and "DataLoader worker process" in text.splitlines()[0]:
            text = text.rstrip().splitlines()[-1].partition(": ")[2]
        super().__init__(text)


class TooLong(UserError):
    """A prompt, alone or with its answer, has more tokens than the model takes. place: which one of the batch."""

    def __init__(self, text: str = "", place: int = 0) -> None:
        super().__init__(text)
        self.place = place


class NoItems(UserError):
    """There is data, but no item of the split or of the tasks that were named."""
