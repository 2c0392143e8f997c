"""Saved weights must be those of the model, key by key and shape by shape."""

from unimed.errors import UserError


def require_same_keys(where: str, saved: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]]) -> None:
    """Raise one UserError that lists what is missing, extra, or of another shape."""
    wrong = [
        f"{key} is {list(saved[key])} and must be {list(wanted[key])}"
        for key in sorted(saved.keys() & wanted.keys())
        if saved[key] != wanted[key]
    ]
    parts = {"missing": sorted(wanted.keys() - saved.keys()), "extra": sorted(saved.keys() - wanted.keys()), "wrong shape": wrong}
    report = "; ".join(f"{kind}: {_listed(keys)}" for kind, keys in parts.items() if keys)
    if report:
        raise UserError(f"{where}: the weights do not fit the model: {report}")


def _listed(keys: list[str], most: int = 12) -> str:
    return ", ".join(keys[:most]) + (f" and {len(keys) - most} more" if len(keys) > most else "")
