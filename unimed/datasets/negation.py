"""A small rule-based negation check: what a report denies. It finds contradictions to list for a person, and decides nothing.

A finding is denied where one of its names follows a word of denial in the same sentence, at most WORDS words behind it, with no "but" or
the like between them; or where the name is followed by "is not seen" or the like. It is affirmed where a name stands elsewhere. A finding
that is both, as in "no new effusion; small effusion on the left", is not reported as denied. English only.
"""

from __future__ import annotations

import re
from functools import cache

WORDS = 8
NAMES = {
    "pleural effusion": ("pleural effusions", "effusion", "effusions"),
    "effusion": ("pleural effusion", "pleural effusions", "effusions"),
    "edema": ("pulmonary edema", "oedema"),
    "lung opacity": ("opacity", "opacities", "lung opacities"),
    "cardiomegaly": ("enlarged heart", "cardiac enlargement"),
    "atelectasis": ("atelectases",),
    "consolidation": ("consolidations",),
    "fracture": ("fractures",),
    "pneumothorax": ("pneumothoraces",),
}
_DENIAL = r"(?:no|without|absence of|negative for|free of|neither|nor|denies|rule[sd]? out)"
_BREAK = r"(?:but|however|although|except|with the exception of)"
_BEHIND = r"(?:is|are|was|were)\s+(?:not|no longer)\s+(?:seen|identified|present|visualized|visualised|evident|appreciated)"
_SENTENCE = re.compile(r"(?<=[.;!?])\s+")


@cache
def _forms(finding: str) -> tuple[re.Pattern[str], re.Pattern[str]]:
    words = sorted((finding, *NAMES.get(finding, ())), key=len, reverse=True)
    named = rf"\b(?:{'|'.join(map(re.escape, words))})\b"
    between = rf"(?:(?!\b{_BREAK}\b)\S+\s+){{0,{WORDS}}}?"
    return re.compile(named), re.compile(rf"\b{_DENIAL}\s+{between}(?:\S*/)?{named}|{named}\s+{_BEHIND}")


def denied(finding: str, report: str) -> bool:
    """Whether a report denies a finding and affirms it nowhere."""
    named, negated = _forms(" ".join(finding.lower().split()))
    found = False
    for sentence in _SENTENCE.split(" ".join(report.lower().split())):
        if named.search(sentence):
            if not negated.search(sentence):
                return False
            found = True
    return found
