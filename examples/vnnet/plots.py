"""The pictures of a run: forecasts against truth, error by horizon, station map, gates by factor and hour, attention over the picture."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from examples.vnnet.data import UNITS, Weather
from examples.vnnet.files import write

matplotlib.rcParams["svg.hashsalt"] = "vnnet"  # the same figure gives the same bytes
COLOURS = ("#0b6e4f", "#c1442d", "#5b5b9f", "#b08900", "#777777")


def save(figure: Figure, path: Path) -> None:
    held = io.BytesIO()
    metadata = {"Date": None} if path.suffix == ".svg" else {"Software": None}
    figure.savefig(held, format=path.suffix[1:], dpi=110, metadata=metadata)
    write(path, lambda file: file.write(held.getvalue()))


def _axes(count: int, width: float = 3.2, height: float = 2.6, columns: int | None = None) -> tuple[Figure, list]:
    columns = columns or count
    rows = -(-count // columns)
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    return figure, list(np.atleast_1d(figure.subplots(rows, columns, squeeze=False)).reshape(-1))


def _legend(figure: Figure, axis: Any) -> None:
    """Below the axes, where it covers no line."""
    handles, names = axis.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(len(names), 5), fontsize=8, frameon=False)


def error_by_horizon(lines: dict[str, np.ndarray], factors: Sequence[str], path: Path) -> None:
    """``lines``: name -> MAE (H, F)."""
    figure, axes = _axes(len(factors))
    for f, (factor, axis) in enumerate(zip(factors, axes, strict=True)):
        for i, (name, mae) in enumerate(lines.items()):
            axis.plot(np.arange(1, len(mae) + 1), mae[:, f], color=COLOURS[i % 5], label=name, linestyle="-" if i < 5 else "--")
        axis.set_title(factor)
        axis.set_xlabel("hours ahead")
        axis.set_xticks([1, 3, 6, 9, 12])
        axis.set_ylabel(f"MAE, {UNITS[factor]}")
        axis.set_ylim(bottom=0)
    _legend(figure, axes[0])
    save(figure, path)


def forecast_against_truth(
    hours: np.ndarray, truth: np.ndarray, lines: dict[str, np.ndarray], factors: Sequence[str], ahead: int, path: Path
) -> None:
    """One station: truth (T, F) and forecasts made ``ahead`` hours before, name -> (T, F)."""
    figure, axes = _axes(len(factors), 7.5, 1.9, 1)
    for f, (factor, axis) in enumerate(zip(factors, axes, strict=True)):
        axis.plot(hours, truth[:, f], color="black", linewidth=1, label="observed")
        for i, (name, values) in enumerate(lines.items()):
            axis.plot(hours, values[:, f], color=COLOURS[i], linewidth=1, label=f"{name}, {ahead} h ahead")
        axis.set_ylabel(f"{factor}, {UNITS[factor]}", fontsize=8)
    _legend(figure, axes[0])
    axes[-1].set_xlabel("hour of the test part")
    save(figure, path)


def station_map(weather: Weather, gain: np.ndarray | None, path: Path, hour: int) -> None:
    """Stations on a picture; coloured by their vision gain at 6-12 hours where there is one."""
    figure, (axis,) = _axes(1, 4.6, 3.9)
    x, y = weather.positions.T
    if weather.pictures is not None:
        axis.imshow(weather.pictures[hour, :, :, 0], cmap="Greys_r", extent=(-1, 1, 1, -1))
    colour = {"color": COLOURS[1]} if gain is None else {"c": 100 * gain, "cmap": "viridis"}
    dots = axis.scatter(x, y, s=45, edgecolors="white", **colour)
    if gain is not None:
        figure.colorbar(dots, label="vision gain at 6-12 h, %")
    axis.set_xlabel("west - east")
    axis.set_ylabel("south - north")
    axis.set_xticks([])
    axis.set_yticks([])
    save(figure, path)


def gates(by_hour: np.ndarray, factors: Sequence[str], path: Path) -> None:
    """(F, 24, E)."""
    figure, axes = _axes(len(factors))
    for f, (factor, axis) in enumerate(zip(factors, axes, strict=True)):
        image = axis.imshow(by_hour[f].T, aspect="auto", cmap="viridis", vmin=np.nanmin(by_hour), vmax=np.nanmax(by_hour))
        axis.set_title(factor)
        axis.set_xlabel("hour of the day, UTC")
        axis.set_ylabel("expert")
        axis.set_yticks(range(by_hour.shape[2]))
    figure.colorbar(image, ax=axes, label="mean gate")
    save(figure, path)


def attention(
    picture: np.ndarray, weights: np.ndarray, station: np.ndarray, air: np.ndarray | None, ahead: Sequence[int], path: Path
) -> None:
    """One station: picture (H, W), attention (len(ahead), h, w), the station and the air that arrives after each of ``ahead``; pixels."""
    figure, axes = _axes(len(ahead), 2.7, 2.7)
    size = picture.shape[0]
    for i, (hours, axis) in enumerate(zip(ahead, axes, strict=True)):
        axis.imshow(picture, cmap="Greys_r", extent=(0, size, size, 0))
        axis.imshow(weights[i], cmap="inferno", alpha=0.55, extent=(0, size, size, 0), interpolation="bilinear")
        axis.plot(*station, "o", color="white", markersize=5)
        if air is not None:
            axis.plot(*air[i], "x", color="cyan", markersize=8)
        axis.set_xlim(0, size)
        axis.set_ylim(size, 0)
        axis.set_title(f"{hours} h ahead", fontsize=9)
        axis.set_xticks([])
        axis.set_yticks([])
    save(figure, path)


def study(rows: dict[str, np.ndarray], factors: Sequence[str], path: Path) -> None:
    """MAE by horizon (seeds, H, F) of each arm: means as lines, seeds as bands."""
    figure, axes = _axes(len(factors))
    for f, (factor, axis) in enumerate(zip(factors, axes, strict=True)):
        for i, (name, mae) in enumerate(rows.items()):
            ahead = np.arange(1, mae.shape[1] + 1)
            axis.plot(ahead, mae[:, :, f].mean(axis=0), color=COLOURS[i % 5], label=name)
            axis.fill_between(ahead, mae[:, :, f].min(axis=0), mae[:, :, f].max(axis=0), color=COLOURS[i % 5], alpha=0.15)
        axis.set_title(factor)
        axis.set_xlabel("hours ahead")
        axis.set_xticks([1, 3, 6, 9, 12])
        axis.set_ylabel(f"MAE, {UNITS[factor]}")
    _legend(figure, axes[0])
    save(figure, path)
