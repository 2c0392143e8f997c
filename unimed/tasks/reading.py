"""What an answer says, and its kind where it is not simply the answer; `answers.py` reads and explains them."""

from dataclasses import dataclass

from unimed.records import box as boxes

EMPTY, UNPARSABLE, INVERTED, OFF_LIST, CHATTY = KINDS = ("empty", "unparsable", "inverted", "off_list", "chatty")


@dataclass(frozen=True)
class Reading:
    kind: str = ""  # one of KINDS, or "" for an answer that simply is one
    says: frozenset[str] | None = None  # the answer in the strict form, or the listed ones that it names; None without one answer
    box: boxes.Box | None = None  # refer, 0..100: the first one found, also when it is inverted or not the only one
