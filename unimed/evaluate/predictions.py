"""predictions.jsonl of a run: a first line that says which data and model, then a line an answer, written as they come.

An evaluation of the same data and model goes on with the answers that are there; of any other, it begins the file anew.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unimed import io
from unimed.errors import UserError
from unimed.tasks.item import Item

PREDICTIONS_FILE = "predictions.jsonl"
FORMAT = 1


class Predictions:
    """The file while it is written. ``about`` must be plain JSON."""

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self.path = path
        about = json.loads(json.dumps({"format": FORMAT, **about}))
        lines = io.written_lines(path)
        self._head: dict[str, Any] | None = None  # to be written with the first answer: until then the answers of an earlier call stay
        if not lines or lines[0] != about:
            lines, self._head = [about], about
        self._there: dict[tuple[str, str], dict[int, str]] = {}
        for line in lines[1:]:
            self._there.setdefault((line["split"], line["row"]), {})[line["place"]] = line["text"]

    def there(self, split: str, row: str) -> dict[int, str]:
        """Answers by the item's place in its split."""
        return self._there.get((split, row), {})

    def add(self, split: str, row: str, places: Sequence[int], items: Sequence[Item], texts: Sequence[str]) -> None:
        """Writes the answers of one batch, in one write."""
        lines = [
            {"split": split, "row": row, "place": place, "id": item.id, "task": item.task, "text": text}
            for place, item, text in zip(places, items, texts, strict=True)
        ]
        if self._head is not None:
            io.write_text(self.path, io.json_line(self._head))
            self._head = None
        with self.path.open("ab", buffering=0) as file:
            file.write("".join(map(io.json_line, lines)).encode())


def read_predictions(run: Path) -> dict[str, dict[str, Any]]:
    """Split -> {"data": what it was read from, "rows": {row: {place: text}}} of a run that was evaluated."""
    path = run / PREDICTIONS_FILE
    lines = io.written_lines(path)
    if not lines or lines[0].get("format") != FORMAT:
        raise UserError(f"{path}: not a file of answers that this version reads; make it again with: unimed evaluate {run}")
    about = lines[0]
    found: dict[str, dict[str, Any]] = {}
    for split, one in about["splits"].items():
        found[split] = {"data": {**about["data"], "split": split, **one}, "rows": {}}
    for line in lines[1:]:
        found[line["split"]]["rows"].setdefault(line["row"], {})[line["place"]] = line["text"]
    return found
