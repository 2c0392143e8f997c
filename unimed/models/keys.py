"""Saved weights must be those of the model, key by key and shape by shape."""

import difflib

from unimed.errors import UserError

MOST = 12  # keys of a kind that a message names


def require_same_keys(where: str, saved: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]]) -> None:
    """Raise one UserError that lists what is missing, extra (with the missing key that is nearest to it), or of another shape."""
    wrong = [
        f"{key} is {list(saved[key])} and must be {list(wanted[key])}"
        for key in sorted(saved.keys() & wanted.keys())
        if saved[key] != wanted[key]
    ]
    missing, extra = sorted(wanted.keys() - saved.keys()), sorted(saved.keys() - wanted.keys())
    shown = [_with_nearest(key, missing or sorted(wanted)) for key in extra[:MOST]] + extra[MOST:]
    parts = {"missing": missing, "extra": shown, "wrong shape": wrong}
    report = "; ".join(f"{kind}: {_listed(keys)}" for kind, keys in parts.items() if keys)
    if report:
        raise UserError(f"{where}: the weights do not fit the model: {report}")


def nearest(key: str, among: list[str]) -> str:
    """The key that is most like `key`, or ""."""
    return next(iter(difflib.get_close_matches(key, among, n=1, cutoff=0.7)), "")


def _with_nearest(key: str, among: list[str]) -> str:
    found = nearest(key, among)
    return f"{key} (nearest: {found})" if found else key


def _listed(keys: list[str], most: int = MOST) -> str:
    return ", ".join(keys[:most]) + (f" and {len(keys) - most} more" if len(keys) > most else "")
