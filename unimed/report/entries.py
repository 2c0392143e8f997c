"""The plot of `unimed data stats`: entries by task, and images by their number of tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from unimed import io
from unimed.errors import UserError
from unimed.report.plots import MUTED, STYLE, plt, task_colour


def draw(found: dict[str, Any], name: str, path: Path) -> None:
    """Draws what `Counts.as_json` says."""
    if path.suffix.lower() not in (".png", ".svg"):
        raise UserError(f"--plot {path}: must end in .png or .svg")
    with plt.rc_context({**STYLE, "figure.facecolor": "white"}):
        figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained", gridspec_kw={"width_ratios": (3, 2)})
        tasks = found["entries by task"]
        bars = left.barh(list(tasks), list(tasks.values()), color=[task_colour(task) for task in tasks])
        left.bar_label(bars, labels=[f" {count:,}" for count in tasks.values()], color=MUTED)
        left.invert_yaxis()
        left.grid(axis="y", visible=False)
        left.set_title(f"{name}: {found['entries']:,} entries", loc="left")
        numbers = found["images by number of tasks"]
        bars = right.bar(list(numbers), list(numbers.values()), color=MUTED)
        right.bar_label(bars, labels=[f"{count:,}" for count in numbers.values()], color=MUTED)
        right.grid(axis="x", visible=False)
        right.set_xlabel("tasks of an image")
        right.set_title(f"{found['images']:,} images, {found['tasks per image']:.2f} tasks each", loc="left")
        with io.beside(path) as partial:
            figure.savefig(partial, format=path.suffix.lower()[1:], dpi=120, metadata={"Date": None} if path.suffix == ".svg" else None)
        plt.close(figure)
