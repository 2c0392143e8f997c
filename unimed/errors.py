"""The one error a user is meant to see."""


class UserError(Exception):
    """Something the user gave cannot be used: one line that says what, where and what would be right.

    The command line prints it without a traceback and exits with code 2 (`--debug` shows the traceback).
    """


class NoItems(UserError):
    """There is data, but no item of the split or of the tasks that were named."""
