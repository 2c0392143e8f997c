"""pydantic's faults in words of ours, and the keys to offer for a wrong one."""

from __future__ import annotations

import difflib
from typing import Any


def must(fault: Any) -> str:
    """What would be right, of one of `ValidationError.errors()`."""
    context = fault.get("ctx", {})
    match fault["type"]:
        case "greater_than_equal":
            return {0: "must be zero or more", 1: "must be 1 or more"}.get(context["ge"], f"must be {context['ge']} or more")
        case "less_than_equal":
            return f"must be at most {context['le']}"
        case "less_than":
            return f"must be below {context['lt']}"
        case "finite_number":
            return "must be a finite number"
        case "literal_error":
            return f"must be one of {context['expected']}"
        case "int_parsing" | "int_type" | "int_from_float":
            return "must be a whole number"
        case "float_parsing" | "float_type":
            return "must be a number"
        case "bool_parsing" | "bool_type":
            return "must be true or false"
        case "too_short" | "too_long":
            count = context.get("min_length", context.get("max_length"))
            return f"must have {count} entries"
        case _:
            return " ".join(fault["msg"].split()).replace("Input should be", "must be")


def nearest_keys(key: str, candidates: list[str]) -> str:
    """Valid keys to offer for a wrong one: by the whole key, or by its last word."""
    last = {candidate: candidate.rpartition(".")[2] for candidate in candidates}
    tail = key.rpartition(".")[2]

    def ratio(a: str, b: str) -> float:
        return difflib.SequenceMatcher(None, a, b).ratio()

    similar = {candidate: max(ratio(key, candidate), ratio(tail, last[candidate])) for candidate in candidates}
    best = sorted((c for c in candidates if similar[c] >= 0.6 or tail in last[c]), key=lambda c: -similar[c])[:3]
    return ", ".join(best or sorted({c.partition(".")[0] for c in candidates}))
