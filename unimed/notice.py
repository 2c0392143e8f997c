"""Two lines that all parts show."""

NOTICE = "Research use, not for diagnosis"


def install(extra: str) -> str:
    """The command that brings an extra."""
    return f'pip install "cmoe-kernels[{extra}]"'


INSTALL = install("unimed")
