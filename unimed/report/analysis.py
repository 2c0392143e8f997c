"""Plots of an analysis, as PNG files: how tasks pull, what changed, what the experts do, how far apart the tasks lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from unimed import io
from unimed.inference.gates import heat
from unimed.report.plots import EXPERT_COLOURS, INK, MUTED, STYLE, plt, task_colour
from unimed.tasks import TASKS

LOOK = {**STYLE, "figure.facecolor": "white"}
PLAIN = {**LOOK, "axes.grid": False}
MODULES = ("connector", "router", "lora", "language", "vision")
Points = Sequence[Mapping[str, Any]]


def save(figure: Figure, path: Path) -> None:
    with io.beside(path) as partial:
        figure.savefig(partial, format="png", dpi=120)
    plt.close(figure)


def modules_in(points: Points) -> list[str]:
    there = {name for point in points for name in point["modules"]}
    return [name for name in MODULES if name in there] + sorted(there - set(MODULES))


def over_points(points: Points, module: str, name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one number of a module, where it has one."""
    found = [(point["step"], point["modules"][module][name]) for point in points if module in point["modules"]]
    return [step for step, value in found if value is not None], [value for _, value in found if value is not None]


def mean_matrix(points: Points, module: str, name: str) -> tuple[list[str], np.ndarray]:
    """Tasks, and the mean over the points of direction or magnitude of each pair [T, T]; the split halves on the diagonal."""
    parts = [point["modules"][module] for point in points if module in point["modules"]]
    tasks = [task for task in TASKS if any(task in part["tasks"] for part in parts)]
    sums, counts = np.zeros((len(tasks), len(tasks))), np.zeros((len(tasks), len(tasks)))
    for part in parts:
        cells = [(*pair["tasks"], pair[name]) for pair in part["pairs"]]
        cells += [(task, task, one["split"][name]) for task, one in part["tasks"].items()]
        for one, other, value in cells:
            if value is not None and one in tasks and other in tasks:
                a, b = tasks.index(one), tasks.index(other)
                for place in {(a, b), (b, a)}:
                    sums[place] += value
                    counts[place] += 1
    return tasks, np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def pulls(runs: Mapping[str, Points], path: Path) -> None:
    """Interference and statistics of every module over the points; a line a run. Runs of one name before a space share a colour."""
    modules = list(dict.fromkeys(name for points in runs.values() for name in modules_in(points)))
    names = list(dict.fromkeys(run.partition(" ")[0] for run in runs))
    with plt.rc_context(LOOK):
        figure, axes = plt.subplots(
            2,
            max(len(modules), 1),
            figsize=(2.6 * max(len(modules), 1) + 0.6, 4.2),
            sharex=True,
            sharey="row",
            squeeze=False,
            layout="constrained",
        )
        for column, module in enumerate(modules):
            for row, name in enumerate(("interference", "statistics")):
                axis = axes[row][column]
                for run, points in runs.items():
                    steps, values = over_points(points, module, name)
                    label = run.partition(" ")[0]
                    colour = EXPERT_COLOURS[(0, 5, 2, 6)[names.index(label) % 4]]
                    first = label not in {line.get_label() for line in axis.get_lines()}
                    axis.plot(steps, values, "o-", color=colour, markersize=3, linewidth=1.2, alpha=0.8, label=label if first else "_")
                axis.axhline((0.5, 0)[row], color=MUTED, linewidth=0.8, linestyle=":")
            axes[0][column].set_title(module, loc="left")
        axes[0][0].set_ylabel("interference")
        axes[1][0].set_ylabel("statistics score")
        if len(names) > 1:
            axes[0][0].legend(frameon=False, fontsize=8)
        figure.supxlabel("optimiser step", color=MUTED, fontsize=9)
        save(figure, path)


def agreement(columns: Mapping[str, tuple[Points, str]], path: Path) -> None:
    """Direction and magnitude of every pair of tasks, the mean over the points; on the diagonal, the two halves of one task.

    ``columns``: by title the points of a run and the module.
    """
    count = max(len(columns), 1)
    with plt.rc_context(PLAIN):
        figure, axes = plt.subplots(2, count, figsize=(2.7 * count + 0.8, 5.2), squeeze=False, layout="constrained")
        for row, (name, low, colours) in enumerate((("direction", -1, "RdBu"), ("magnitude", 0, "Blues"))):
            for column, (title, (points, module)) in enumerate(columns.items()):
                axis = axes[row][column]
                tasks, values = mean_matrix(points, module, name)
                if tasks:
                    axis.imshow(values, vmin=low, vmax=1, cmap=colours)
                for (y, x), value in np.ndenumerate(values):
                    if np.isfinite(value):
                        bold = "bold" if x == y else "normal"
                        dark = abs(value) > 0.65
                        axis.text(
                            x, y, f"{value:.2f}", ha="center", va="center", fontsize=6.5, fontweight=bold, color="white" if dark else INK
                        )
                axis.set_xticks(range(len(tasks)), tasks, rotation=90, fontsize=7)
                axis.set_yticks(range(len(tasks)), tasks, fontsize=7)
                axis.tick_params(length=0)
                axis.set_title(f"{title}: {name}", loc="left", fontsize=9)
        save(figure, path)


def changes(points: Points, path: Path) -> None:
    """Change of every layer from point to point, and whom the last change served."""
    last = points[-1]
    layers = [(one["module"], one["name"]) for one in last["layers"]]
    tasks = [task for task in TASKS if any(task in one["served"] for one in last["layers"])]
    table = np.full((len(layers), len(points)), np.nan)
    for column, point in enumerate(points):
        for one in point["layers"]:
            if (one["module"], one["name"]) in layers and one["change"] is not None:
                table[layers.index((one["module"], one["name"])), column] = one["change"]
    served = np.array([[one["served"].get(task, np.nan) for task in tasks] for one in last["layers"]], dtype=float).reshape(
        len(layers), len(tasks)
    )
    with plt.rc_context(PLAIN):
        size = (4.2 + 0.34 * (len(points) + len(tasks)), 1.5 + 0.2 * len(layers))
        figure, axes = plt.subplots(1, 2, figsize=size, sharey=True, layout="constrained", width_ratios=(len(points), max(len(tasks), 1)))
        logs = np.log10(np.where(table > 0, table, np.nan))
        if np.isfinite(logs).any():
            image = axes[0].imshow(logs, cmap="viridis", aspect="auto")
            figure.colorbar(image, ax=axes[0], location="bottom", shrink=0.9).set_label("log10 of relative change", fontsize=8)
        axes[0].set_xticks(range(len(points)), [str(point["step"]) for point in points], rotation=90, fontsize=7)
        axes[0].set_yticks(range(len(layers)), [name for _, name in layers], fontsize=7)
        axes[0].set_title("change", loc="left")
        if len(tasks):
            image = axes[1].imshow(served, cmap="RdBu", vmin=-0.5, vmax=0.5, aspect="auto")
            figure.colorbar(image, ax=axes[1], location="bottom", shrink=0.9).set_label("cosine with the step that helps", fontsize=8)
        axes[1].set_xticks(range(len(tasks)), tasks, rotation=90, fontsize=7)
        axes[1].set_title(f"whom it served, step {last['step']}", loc="left")
        for axis in axes:
            axis.tick_params(length=0)
        save(figure, path)


def experts(history: Points, path: Path) -> None:
    """Entropy of the gates by task, and how often each expert is a token's first, over training."""
    tasks = [task for task in TASKS if any(task in entry["tasks"] for entry in history)]
    with plt.rc_context(LOOK):
        count = len(tasks) + 1
        figure, axes = plt.subplots(1, count, figsize=(2.1 * count + 1.2, 2.3), squeeze=False, layout="constrained")
        for task in tasks:
            found = [(entry["step"], entry["tasks"][task]) for entry in history if task in entry["tasks"]]
            axes[0][0].plot(
                [step for step, _ in found], [one["entropy"] for _, one in found], color=task_colour(task), linewidth=1.2, label=task
            )
        axes[0][0].set_title("entropy / log E", loc="left")
        axes[0][0].legend(frameon=False, fontsize=7)
        number = 0
        for axis, task in zip(axes[0][1:], tasks, strict=True):
            found = [(entry["step"], entry["tasks"][task]["load"]) for entry in history if task in entry["tasks"]]
            number = max(number, len(found[0][1]))
            colours = [EXPERT_COLOURS[i % len(EXPERT_COLOURS)] for i in range(number)]
            shares = [[load[expert] for _, load in found] for expert in range(len(found[0][1]))]
            axis.stackplot([step for step, _ in found], shares, colors=colours)
            axis.set_title(f"load, {task}", loc="left", color=task_colour(task))
            axis.set_ylim(0, 1)
            axis.margins(x=0)
        handles = [plt.Rectangle((0, 0), 1, 1, color=EXPERT_COLOURS[i % len(EXPERT_COLOURS)]) for i in range(number)]
        figure.legend(handles, [f"expert {i + 1}" for i in range(number)], loc="outside right center", frameon=False, fontsize=8)
        figure.supxlabel("optimiser step", color=MUTED, fontsize=9)
        save(figure, path)


def regions(pictures: Sequence[tuple[str, Any, np.ndarray]], path: Path) -> None:
    """Of each task a picture and its experts' gates over it: clear where the gate is lowest, strongest where highest, with the range.

    ``pictures``: task, image, gates by patch [rows, columns, E].
    """
    count = pictures[0][2].shape[2]
    with plt.rc_context(PLAIN):
        size = (1.5 * (count + 1) + 0.4, 1.65 * len(pictures) + 0.2)
        figure, axes = plt.subplots(len(pictures), count + 1, figsize=size, squeeze=False, layout="constrained")
        for row, (task, image, maps) in zip(axes, pictures, strict=True):
            row[0].imshow(image)
            row[0].set_title(task, loc="left", fontsize=8, color=task_colour(task))
            for expert, axis in enumerate(row[1:]):
                layer = heat(maps[..., expert], image.size, _rgb(EXPERT_COLOURS[expert % len(EXPERT_COLOURS)]))
                axis.imshow(image)
                axis.imshow(layer)
                low, high = float(maps[..., expert].min()), float(maps[..., expert].max())
                axis.set_title(f"expert {expert + 1}: {low:.2f}–{high:.2f}", loc="left", fontsize=7, fontweight="normal")
            for axis in row:
                axis.axis("off")
        save(figure, path)


def _rgb(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


def spread(panels: Mapping[str, tuple[np.ndarray, Sequence[str], Sequence[float], float | None]], path: Path) -> None:
    """Images on the first two principal components, coloured by task.

    ``panels``: by title coordinates [n, 2 or more], tasks, shares of variance and the silhouette.
    """
    with plt.rc_context(LOOK):
        figure, axes = plt.subplots(1, len(panels), figsize=(3.6 * len(panels), 3.4), squeeze=False, layout="constrained")
        for axis, (title, (places, tasks, shares, value)) in zip(axes[0], panels.items(), strict=True):
            for task in (task for task in TASKS if task in tasks):
                at = [i for i, one in enumerate(tasks) if one == task]
                across = places[at, 1] if places.shape[1] > 1 else np.zeros(len(at))
                axis.plot(places[at, 0], across, "o", color=task_colour(task), markersize=3, alpha=0.6, label=task)
            told = "" if value is None else f", silhouette {value:.2f}"
            axis.set_title(f"{title}{told}", loc="left", fontsize=9)
            axis.set_xlabel(f"component 1 ({shares[0]:.0%})" if shares else "component 1", fontsize=8)
            axis.set_ylabel(f"component 2 ({shares[1]:.0%})" if len(shares) > 1 else "", fontsize=8)
        axes[0][0].legend(frameon=False, fontsize=7)
        save(figure, path)
