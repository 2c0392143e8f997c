"""How the gradients of two tasks agree at shared parameters, in direction and in size; `unimed study interference`.

Source: the tug-of-war of Uni-Med (NeurIPS 2024), section 3; its statistics in full are not public, these two are the usual ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unimed import io
from unimed.errors import UserError

Grads = Tensor | Iterable[Tensor | None]


def _dots(a: Grads, b: Grads) -> tuple[float, float, float]:
    """<a, b>, <a, a>, <b, b>, summed in fp64 over the tensors; None is a gradient of zero."""
    pairs = [(a, b)] if isinstance(a, Tensor) and isinstance(b, Tensor) else list(zip(a, b, strict=True))
    ab = aa = bb = 0.0
    for one, other in pairs:
        if one is not None and other is not None and one.shape != other.shape:
            raise ValueError(f"gradients of shape {list(one.shape)} and {list(other.shape)}: expected the same parameters")
        x = None if one is None else one.detach().double().flatten()
        y = None if other is None else other.detach().double().flatten()
        ab += float(torch.dot(x, y)) if x is not None and y is not None else 0.0
        aa += float(torch.dot(x, x)) if x is not None else 0.0
        bb += float(torch.dot(y, y)) if y is not None else 0.0
    return ab, aa, bb


def direction(a: Grads, b: Grads) -> float:
    """Cosine of two gradients: 1 where they pull one way, -1 where one undoes the other. NaN where one is zero.

    a, b: tensors of one shape, or sequences of them, as `torch.autograd.grad` gives for the same parameters.

    Example::

        >>> direction(torch.tensor([1.0, 0.0]), torch.tensor([-2.0, 0.0]))
        -1.0
    """
    ab, aa, bb = _dots(a, b)
    return ab / math.sqrt(aa * bb) if aa and bb else math.nan


def magnitude(a: Grads, b: Grads) -> float:
    """2 |a| |b| / (|a|^2 + |b|^2): 1 where two gradients are of one size, near 0 where one outweighs the other. NaN where both are zero.

    Example::

        >>> round(magnitude(torch.tensor([3.0]), torch.tensor([1.0])), 6)
        0.6
    """
    _, aa, bb = _dots(a, b)
    return 2 * math.sqrt(aa * bb) / (aa + bb) if aa or bb else math.nan


# The study: one MLP and the paper's CMoE, from the runs of `unimed study connectors`

ROWS = ("mlp", "cmoe-soft")
NUMBERS = ("interference", "statistics", "direction", "direction of halves", "magnitude", "magnitude of halves")


def study(source: Path, out: Path) -> dict[str, Any]:
    """Compares the probes of the rows in ``source``, a folder of `unimed study connectors`; writes table.json, .csv, .md and two plots.

    They go to ``out``, or to its folder interference/ where it is ``source`` itself.
    """
    from unimed.studies.analyze import read_points, summary

    place = place_of(source, out)
    runs = _runs(source)
    seeds = sorted(set.intersection(*(set(found) for found in runs.values())))
    if not seeds:
        there = "; ".join(f"{row}: {', '.join(map(str, found)) or 'none'}" for row, found in runs.items())
        raise UserError(
            f"{source}: no seed has finished runs of {' and '.join(ROWS)} with their probe ({there}); "
            f"make them with: unimed study connectors --out {source} --rows {','.join(ROWS)}"
        )
    if place.exists() and not (place / "table.json").is_file() and any(place.iterdir()):
        raise UserError(f"{place}: exists and is no result of this study; choose another --out")
    points = {row: {seed: read_points(found[seed] / "probe.jsonl") for seed in seeds} for row, found in runs.items()}
    table: dict[str, Any] = {
        "study": "interference",
        "steps": io.read_json(source / "study.json")["steps"],
        "seeds": seeds,
        "modules": {row: {str(seed): summary(found) for seed, found in by_seed.items()} for row, by_seed in points.items()},
        "features": {row: {str(seed): _features(source, runs[row][seed]) for seed in seeds} for row in ROWS},
    }
    io.write_json(place / "table.json", table)
    io.write_text(place / "table.csv", _csv(table))
    io.write_text(place / "table.md", _markdown(table))
    _plot(points, place)
    return table


def place_of(source: Path, out: Path) -> Path:
    """Where the study's files go."""
    return out / "interference" if out.resolve() == source.resolve() else out


def _runs(source: Path) -> dict[str, dict[int, Path]]:
    """Folders of finished runs with a probe, by row and seed."""
    file = source / "study.json"
    if not file.is_file() or io.read_json(file).get("study") != "connectors":
        raise UserError(f"{source}: no runs of unimed study connectors; make them with: unimed study connectors --out {source}")
    found: dict[str, dict[int, Path]] = {}
    for row in ROWS:
        places = [path.parent for path in sorted((source / "runs").glob(f"{row}-*/result.json"))]
        numbers = {place.name.removeprefix(f"{row}-"): place for place in places if (place / "probe.jsonl").is_file()}
        found[row] = {int(name): place for name, place in numbers.items() if name.isdigit()}
    return found


def _features(source: Path, place: Path) -> dict[str, Any]:
    """Silhouettes by task before and after a run's connector; {} where --clean deleted its model or the data."""
    from unimed.inference.session import load
    from unimed.studies.analyze import held_out, spread_of
    from unimed.studies.features import features
    from unimed.train import recipe as recipes

    run = place / "run"
    if not (run / "model").is_dir() or not (source / "data" / "sample").is_dir():
        return {}
    recipe = recipes.load(run / "recipe.yaml", [f"data.root={source / 'data' / 'sample'}", "evaluate.splits=[subject]"])
    return spread_of(features(load(run, "cpu"), held_out(recipe)))


def _lines(table: Mapping[str, Any]) -> list[tuple[str, str, dict[str, list[float | None]]]]:
    """Module, number, and by row its value of every seed."""
    seeds = [str(seed) for seed in table["seeds"]]
    modules = list(dict.fromkeys(name for row in ROWS for seed in seeds for name in table["modules"][row][seed]))
    found = [
        (module, number, {row: [table["modules"][row][seed].get(module, {}).get(number) for seed in seeds] for row in ROWS})
        for module in modules
        for number in NUMBERS
    ]
    for side in ("before", "after"):
        of = {row: [table["features"][row][seed].get(side, {}).get("all") for seed in seeds] for row in ROWS}
        found.append(("images", f"silhouette {side} the connector", of))
    return found


def _csv(table: Mapping[str, Any]) -> str:
    lines = ["module,number,row,seed,value"]
    for module, number, by_row in _lines(table):
        for row, values in by_row.items():
            for seed, value in zip(table["seeds"], values, strict=True):
                lines.append(f"{module},{number},{row},{seed},{'' if value is None else f'{value:.6g}'}")
    return "\n".join([*lines, ""])


def _markdown(table: Mapping[str, Any]) -> str:
    from unimed.studies.run import cell

    lines = [
        "# Tug-of-war: one MLP and a mixture of projection experts",
        "",
        f"| module | number | {' | '.join(ROWS)} | difference | up, down |",
        "|---|---|---|---|---|---|",
    ]
    for module, number, by_row in _lines(table):
        first, second = (by_row[row] for row in ROWS)
        less = [None if a is None or b is None else b - a for a, b in zip(first, second, strict=True)]
        told = [one for one in less if one is not None]
        if not any(value is not None for value in (*first, *second)):
            continue
        signs = f"{sum(one > 0 for one in told)}, {sum(one < 0 for one in told)}" if told else ""
        lines.append(f"| {module} | {number} | {cell(first)} | {cell(second)} | {cell(less, '+.3f')} | {signs} |")
    seeds = ", ".join(map(str, table["seeds"]))
    return "\n".join(
        [
            *lines,
            "",
            f"Mean over the seeds {seeds}, then every seed; each is over the points of a training of {table['steps']} steps. "
            "Difference: cmoe-soft less mlp. Up and down count seeds.",
            "",
            "Direction and magnitude are means over the pairs of tasks. Those of halves compare the two halves of one task: what noise "
            "leaves. Interference: 0 where two tasks agree as well as each one with itself, 1/2 where they have nothing to do with each "
            "other, 1 where one undoes the other. Statistics: 1 where a change of the weights serves every task, -1 where it harms all. "
            "Interference and statistics are our definitions; those of the paper are not public. A connector of several experts has more "
            "parameters than one MLP, and each expert is a layer.",
            "",
        ]
    )


def _plot(points: Mapping[str, Mapping[int, Sequence[Mapping[str, Any]]]], place: Path) -> None:
    from unimed.report import analysis as draw

    draw.pulls({f"{row} {seed}": found for row, by_seed in points.items() for seed, found in by_seed.items()}, place / "plot.png")
    merged = {row: [point for found in by_seed.values() for point in found] for row, by_seed in points.items()}
    columns = {f"{row}, {module}": (found, module) for module in ("connector", "language") for row, found in merged.items()}
    draw.agreement({title: one for title, one in columns.items() if one[1] in draw.modules_in(one[0])}, place / "agreement.png")
