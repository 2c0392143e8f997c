"""Reading an answer: the one thing it says, and its kind where that is not simply the answer.

    empty       no text
    unparsable  refer: no box, or several different ones; where the answers are listed: several of the list
    inverted    refer: one box whose corners are in the wrong order
    off_list    the answers are listed (cls, yes or no, options) and it names none of them
    chatty      it says one thing, among other words; a text without a list: the reference stands among other words

Each answer has at most one kind, the first that fits. The release knows none of them: its scores are in `released`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from unimed.records import box as boxes
from unimed.tasks.item import Item
from unimed.tasks.normalise import strict
from unimed.tasks.reading import CHATTY, EMPTY, INVERTED, OFF_LIST, UNPARSABLE, Reading
from unimed.tasks.task import task_of

LISTED = (EMPTY, UNPARSABLE, OFF_LIST, CHATTY)
_JOINTS = re.compile(r"[\s,;]+|\band\b")


def spoken(prediction: str) -> str:
    """The text of an answer: without the unknown token, which the release removes, and space around."""
    return prediction.replace("<unk>", "").strip()


def read(item: Item, prediction: str) -> Reading:
    """What a prediction says as an answer to this item."""
    text = spoken(prediction)
    if not text:
        return Reading(EMPTY)
    return task_of(item).read(item, text)


def read_whole(item: Item, text: str) -> Reading:
    """All of it is the answer."""
    return Reading(says=frozenset([strict(text)]))


def read_text(item: Item, text: str, several: bool = False) -> Reading:
    """One of the listed answers (``several``: or more), or any text where none are listed."""
    given, wanted, listed = strict(text), strict(item.answer), options(item)
    if given == wanted or not listed:
        kind = CHATTY if given != wanted and f" {wanted} " in f" {given} " else ""
        return Reading(kind, _named(wanted, listed)[0] if given == wanted and listed else frozenset([given]))
    found, rest = _named(given, listed)
    if not found:
        return Reading(OFF_LIST)
    if not several and len(found) > 1 and len(_named(wanted, listed)[0]) == 1:
        return Reading(UNPARSABLE)
    return Reading(CHATTY if rest else "", found)


def says_it(item: Item, prediction: str) -> bool:
    """Whether the prediction says what the reference says and nothing else of a list, be it among other words. Not for boxes."""
    reading = read(item, prediction)
    return reading.says is not None and reading.says == read(item, item.answer).says


def is_it(item: Item, prediction: str) -> bool:
    """Whether the prediction is the reference, neither less nor more. Not for boxes."""
    return says_it(item, prediction) and read(item, prediction).kind != CHATTY


def options(item: Item) -> tuple[str, ...]:
    """The answers to choose from, in the strict form; () where they are open or unknown."""
    wanted, found = strict(item.answer), task_of(item).listed(item)
    return tuple(filter(None, found)) if _named(wanted, found)[0] else ()


def _named(text: str, listed: Iterable[str]) -> tuple[frozenset[str], bool]:
    """The options that stand in a text as whole words, longest first, and whether other words are left."""
    found = set()
    rest = f" {_JOINTS.sub(' ', text)} "
    for option in sorted(filter(None, set(listed)), key=len, reverse=True):
        mark = f" {_JOINTS.sub(' ', option)} "
        if mark in rest:
            found.add(option)
            rest = rest.replace(mark, "  ", 1)
    return frozenset(found), bool(rest.strip())


def read_box(item: Item, text: str) -> Reading:
    """The one box of the text, in the right order."""
    found, around = boxes.find(text)
    if len(set(found)) != 1:
        return Reading(UNPARSABLE, box=found[0] if found else None)
    if boxes.is_inverted(found[0]):
        return Reading(INVERTED, box=found[0])
    return Reading(CHATTY if any(map(str.isalnum, around)) else "", box=found[0])
