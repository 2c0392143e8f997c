"""Plots of a run, as inline SVG."""

from __future__ import annotations

import io
import re
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from unimed.tasks import TASKS

INK, MUTED, GRID = "#1c2733", "#66758a", "#e3e8ee"
TASK_COLOURS = ("#0b6e99", "#d55e00", "#009e73", "#8a5fbf", "#c9a100", "#66758a", "#56b4e9", "#cc79a7", "#e69f00")
EXPERT_COLOURS = ("#0b6e99", "#56b4e9", "#009e73", "#e69f00", "#cc79a7", "#d55e00", "#8a5fbf", "#66758a")
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": GRID,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "svg.fonttype": "path",
    "svg.hashsalt": "unimed",
}


def svg(figure: Figure, label: str) -> str:
    """The figure as an <svg> element that scales with its place and refers to nothing outside."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    plt.close(figure)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    # Several figures share one page: their ids must not meet.
    prefix = re.sub(r"\W", "", label.title())
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}", text)
    return re.sub(r"<svg [^>]*?viewBox=\"([^\"]*)\"[^>]*>", rf'<svg viewBox="\1" role="img" aria-label="{label}">', text, count=1)


def series(log: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    found = [(entry["step"], entry[name]) for entry in log if isinstance(entry.get(name), int | float)]
    return [step for step, _ in found], [value for _, value in found]


def task_colour(task: str) -> str:
    """By the task's place in TASKS."""
    return TASK_COLOURS[list(TASKS).index(task) % len(TASK_COLOURS)]


def smooth(values: list[float], share: float = 0.8) -> list[float]:
    """Exponential running mean, corrected for its start."""
    result, mean, weight = [], 0.0, 0.0
    for value in values:
        mean, weight = share * mean + (1 - share) * value, share * weight + (1 - share)
        result.append(mean / weight)
    return result


def loss_per_task(log: list[dict[str, Any]]) -> str:
    """One panel a task, logarithmic: the logged values faint, their running mean on top."""
    tasks = [task for task in TASKS if series(log, f"loss/{task}")[0]]
    with plt.rc_context(STYLE):
        columns = min(3, max(len(tasks), 1))
        rows = max(-(-len(tasks) // columns), 1)
        figure, axes = plt.subplots(rows, columns, figsize=(3.3 * columns, 2.1 * rows), sharex=True, squeeze=False, layout="constrained")
        for axis, task in zip(axes.flat, tasks, strict=False):
            steps, values = series(log, f"loss/{task}")
            axis.plot(steps, values, color=task_colour(task), alpha=0.3, linewidth=0.8)
            axis.plot(steps, smooth(values), color=task_colour(task), linewidth=1.8)
            axis.set_title(task, loc="left", color=task_colour(task))
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.yaxis.set_minor_formatter(NullFormatter())
        for axis in list(axes.flat)[len(tasks) :]:
            axis.set_visible(False)
        figure.supxlabel("optimiser step", color=MUTED, fontsize=9)
        figure.supylabel("cross-entropy a token", color=MUTED, fontsize=9)
        return svg(figure, "loss per task")


def learning_rate(log: list[dict[str, Any]]) -> str:
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(4.6, 1.9), layout="constrained")
        axis.plot(*series(log, "learning_rate"), color=INK, linewidth=1.6)
        axis.set_title("learning rate", loc="left")
        axis.set_xlabel("optimiser step")
        axis.ticklabel_format(axis="y", scilimits=(0, 0))
        return svg(figure, "learning rate")


def differences(splits: dict[str, Any], names: dict[str, str], metrics: dict[str, str]) -> str:
    """A line a task: the difference of two runs with its interval, one colour a task, a panel a split."""
    shown = {split: tasks for split, tasks in splits.items() if tasks}
    tasks = [task for task in TASKS if any(task in found for found in shown.values())]
    with plt.rc_context(STYLE):
        size = (2.2 + 2.4 * max(len(shown), 1), 0.9 + 0.32 * len(tasks))
        figure, axes = plt.subplots(1, max(len(shown), 1), figsize=size, sharex=True, sharey=True, squeeze=False, layout="constrained")
        for axis, (split, found) in zip(axes.flat, shown.items(), strict=False):
            axis.axvline(0, color=MUTED, linewidth=1)
            for place, task in enumerate(tasks):
                if task in found:
                    one = found[task][metrics[task]]
                    if one["interval"]:
                        axis.plot(one["interval"], (place, place), color=task_colour(task), linewidth=2)
                    axis.plot(one["difference"], place, "o", color=task_colour(task), markersize=6)
            axis.set_yticks(range(len(tasks)), [f"{task} {metrics[task].removesuffix('_strict')}" for task in tasks])
            axis.set_title(names[split], loc="left")
        axes[0][0].set_ylim(len(tasks) - 0.5, -0.5)
        figure.supxlabel("difference of the strict scores, 95 % interval", color=MUTED, fontsize=9)
        return svg(figure, "differences to the other run")


def gate_heat_map(entry: dict[str, Any], title: str) -> str:
    """Mean gate of every expert for every task; white is an even share, blue more and red less."""
    tasks = [task for task in TASKS if task in entry["tasks"]]
    gates = [entry["tasks"][task]["gates"] for task in tasks]
    experts = len(gates[0])
    with plt.rc_context({**STYLE, "axes.grid": False}):
        figure, axis = plt.subplots(figsize=(0.8 + 0.62 * experts, 0.6 + 0.42 * len(tasks)), layout="constrained")
        even = 1 / experts
        span = max(max(abs(gate - even) for row in gates for gate in row), 0.5 * even)
        axis.imshow(gates, cmap="RdBu", norm=TwoSlopeNorm(even, even - span, even + span), aspect="auto")
        for y, row in enumerate(gates):
            for x, gate in enumerate(row):
                axis.text(
                    x, y, f"{gate:.2f}", ha="center", va="center", fontsize=8, color="white" if abs(gate - even) > 0.7 * span else INK
                )
        axis.set_xticks(range(experts), [f"expert {i + 1}" for i in range(experts)], fontsize=8)
        axis.set_yticks(range(len(tasks)), tasks)
        axis.tick_params(length=0)
        for spine in axis.spines.values():
            spine.set_visible(False)
        axis.set_title(title, loc="left")
        return svg(figure, f"router gates {title}")


def gates_over_training(history: list[dict[str, Any]]) -> str:
    """One panel a task: how its image tokens' mean gates divide among the experts, step by step."""
    tasks = [task for task in TASKS if any(task in entry["tasks"] for entry in history)]
    with plt.rc_context({**STYLE, "axes.grid": False}):
        figure, axes = plt.subplots(1, len(tasks), figsize=(2.0 * len(tasks) + 0.8, 2.0), sharey=True, squeeze=False, layout="constrained")
        experts = 0
        for axis, task in zip(axes.flat, tasks, strict=True):
            found = [(entry["step"], entry["tasks"][task]["gates"]) for entry in history if task in entry["tasks"]]
            experts = max(experts, len(found[0][1]))
            colours = [EXPERT_COLOURS[i % len(EXPERT_COLOURS)] for i in range(experts)]
            shares = [[gates[expert] for _, gates in found] for expert in range(experts)]
            axis.stackplot([step for step, _ in found], shares, colors=colours, linewidth=0.4, edgecolor="white")
            axis.set_title(task, loc="left", color=task_colour(task))
            axis.set_ylim(0, 1)
            axis.margins(x=0)
        handles = [plt.Rectangle((0, 0), 1, 1, color=EXPERT_COLOURS[i % len(EXPERT_COLOURS)]) for i in range(experts)]
        figure.legend(handles, [f"expert {i + 1}" for i in range(experts)], loc="outside right center", frameon=False, fontsize=8)
        figure.supxlabel("optimiser step", color=MUTED, fontsize=9)
        axes[0][0].set_ylabel("mean gate")
        return svg(figure, "gates over training")
