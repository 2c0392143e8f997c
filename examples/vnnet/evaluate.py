"""Errors in physical units, forecasts without learning to stand beside, and what a model owes to its pictures."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from examples.vnnet.data import Windows
from examples.vnnet.model import VNNet
from examples.vnnet.train import scale_of

PICTURES = ("true", "shuffled", "shifted")
CHUNK = 96


@dataclass
class Scores:
    """By horizon and factor (H, F): masked MAE, RMSE and MAPE (%), and how many values each is of. MAPE leaves out a truth of 0."""

    mae: np.ndarray
    rmse: np.ndarray
    mape: np.ndarray
    count: np.ndarray

    @classmethod
    def of(cls, forecast: np.ndarray, truth: np.ndarray, valid: np.ndarray) -> "Scores":
        """(W, H, N, F) each."""
        error = np.where(valid, np.abs(forecast - truth), 0.0).astype(np.float64)
        count = valid.sum(axis=(0, 2))
        n = np.maximum(count, 1)
        nonzero = valid & (np.abs(truth) > 1e-6)
        share = np.where(nonzero, error / np.maximum(np.abs(truth), 1e-6), 0.0)
        mape = 100 * share.sum(axis=(0, 2)) / np.maximum(nonzero.sum(axis=(0, 2)), 1)
        return cls(error.sum(axis=(0, 2)) / n, np.sqrt((error**2).sum(axis=(0, 2)) / n), mape, count)

    def lists(self) -> dict[str, list]:
        return {name: value.tolist() for name, value in vars(self).items()}

    @classmethod
    def from_lists(cls, value: dict[str, list]) -> "Scores":
        return cls(**{name: np.asarray(value[name]) for name in ("mae", "rmse", "mape", "count")})


def truth(windows: Windows, which: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(W, H, N, F): values and which of them were observed."""
    at = windows.starts[which][:, None] + windows.history + np.arange(windows.horizon)
    return windows.y.numpy()[at], windows.valid.numpy()[at]


def other_windows(which: np.ndarray, history: int, seed: int = 0) -> np.ndarray:
    """For each window another one, whose history does not overlap its own: a random order whose overlaps are swapped away.

    Where the windows are too few for that, some overlap remains.
    """
    rng = np.random.default_rng([seed, 11])
    order = rng.permutation(len(which))
    for _ in range(100):
        near = np.flatnonzero(np.abs(which[order] - which) < history)
        for i in near:
            j = rng.integers(len(which))
            order[i], order[j] = order[j], order[i]
        if not len(near):
            break
    return which[order]


@torch.no_grad()
def outputs(model: VNNet, windows: Windows, which: np.ndarray, pictures: str = "true") -> Iterator[tuple[np.ndarray, np.ndarray, object]]:
    """(windows of the chunk, forecasts in physical units (W, H, N, F), the model's Forecast), chunk after chunk.

    ``shuffled`` shows each window the pictures of another; ``shifted`` rolls them by half their height and width.
    """
    if pictures not in PICTURES:
        raise ValueError(f"pictures is {pictures!r}, must be one of {', '.join(PICTURES)}")
    model.eval()
    scale = scale_of(windows.tables, windows.factors)
    shift = (0, 0)
    if pictures == "shifted" and windows.weather.pictures is not None:
        shift = (windows.weather.pictures.shape[1] // 2, windows.weather.pictures.shape[2] // 2)
    shown = other_windows(which, windows.history) if pictures == "shuffled" else which
    for start in range(0, len(which), CHUNK):
        part = which[start : start + CHUNK]
        batch = windows.batch(part, shown[start : start + CHUNK], shift)
        out = model(batch.x, batch.time, batch.pictures)
        yield part, (out.values * scale[1] + scale[0]).numpy(), out


def forecasts(model: VNNet, windows: Windows, which: np.ndarray, pictures: str = "true") -> np.ndarray:
    return np.concatenate([values for _, values, _ in outputs(model, windows, which, pictures)])


# Forecasts without learning, or nearly: all fitted on the training part.


def persistence(windows: Windows, which: np.ndarray) -> np.ndarray:
    """The last observed value of the history stays; the training mean where nothing was observed."""
    at = windows.starts[which][:, None] + np.arange(windows.history)
    values, valid = windows.y.numpy()[at], windows.valid.numpy()[at]
    last = np.broadcast_to(windows.tables.mean[windows.columns], values[:, 0].shape).copy()
    for hour in range(windows.history):
        last = np.where(valid[:, hour], values[:, hour], last)
    return np.repeat(last[:, None], windows.horizon, axis=1)


def climatology(windows: Windows, which: np.ndarray) -> np.ndarray:
    """The training mean of the station at that hour of the day in that month; of that hour in all months where the month was not seen."""
    hours = np.concatenate([np.arange(a, b) for a, b in windows.weather.splits["train"]])
    y, valid, time = windows.y.numpy().astype(np.float64), windows.valid.numpy(), windows.time.numpy()
    stations, factors = y.shape[1:]
    total, count = np.zeros((12, 24, stations, factors)), np.zeros((12, 24, stations, factors))
    np.add.at(total, (time[hours, 0], time[hours, 2]), np.where(valid[hours], y[hours], 0))
    np.add.at(count, (time[hours, 0], time[hours, 2]), valid[hours])
    overall = total.sum(axis=0) / np.maximum(count.sum(axis=0), 1)
    table = np.where(count > 0, total / np.maximum(count, 1), overall)
    at = windows.starts[which][:, None] + windows.history + np.arange(windows.horizon)
    return table[time[at, 0], time[at, 2]].astype(np.float32)


def autoregression(windows: Windows, training: Windows, which: np.ndarray, ridge: float = 10.0) -> np.ndarray:
    """Linear in the station's own factors over the history and in the time of day: a ridge regression per station and hour ahead."""
    horizon, history = windows.horizon, windows.history
    stations, factors = windows.y.shape[1:]
    scale = scale_of(windows.tables, windows.factors).numpy()
    out = np.empty((len(which), horizon, stations, factors), dtype=np.float32)

    def features(w: Windows, chosen: np.ndarray) -> np.ndarray:
        at = w.starts[chosen][:, None] + np.arange(history)
        past = w.x.numpy()[at][..., w.columns]  # (W, history, N, F)
        hour = 2 * np.pi * w.time.numpy()[w.starts[chosen], 2] / 24
        clock = np.stack([np.cos(hour), np.sin(hour), np.cos(2 * hour), np.sin(2 * hour), np.ones_like(hour)], axis=1)
        clock = np.repeat(clock[:, None], stations, axis=1)
        return np.concatenate([past.transpose(0, 2, 1, 3).reshape(len(chosen), stations, -1), clock], axis=-1).astype(np.float64)

    all_training = np.arange(len(training))
    design, y_valid, shown = features(training, all_training), truth(training, all_training), features(windows, which)
    z = (y_valid[0] - scale[0]) / scale[1]
    for station in range(stations):
        a, b = design[:, station], shown[:, station]
        for factor in range(factors):
            for hour in range(horizon):
                keep = y_valid[1][:, hour, station, factor]
                x = a[keep]
                weights = np.linalg.solve(x.T @ x + ridge * np.eye(x.shape[1]), x.T @ z[keep, hour, station, factor])
                out[:, hour, station, factor] = (b @ weights) * scale[1, factor] + scale[0, factor]
    return out


# What vision is worth. These measures are ours.


def gain(full: Scores, without: Scores) -> np.ndarray:
    """Vision gain (H, F): 1 - MAE(full) / MAE(NNet)."""
    return 1 - full.mae / without.mae


def reliance(changed: Scores, full: Scores) -> np.ndarray:
    """Vision reliance (shuffled pictures) or location reliance (shifted pictures) (H, F): MAE(changed) / MAE(full) - 1."""
    return changed.mae / full.mae - 1


def span(values: np.ndarray, first: int, last: int) -> np.ndarray:
    """Mean over the horizons first..last, counted from 1."""
    return values[first - 1 : last].mean(axis=0)


@torch.no_grad()
def attention_on_upwind(
    model: VNNet, windows: Windows, which: np.ndarray, drift: np.ndarray, spots: np.ndarray, radius: float = 3.0
) -> tuple[np.ndarray, np.ndarray]:
    """Attention mass within ``radius`` pixels of the air that will reach the station, and the mass that attention spread evenly would have.

    The paper's version looks once for each hour ahead: (H,), for that hour's air. The repository's looks once: (1,), the air of all.
    ``drift`` (T, 2) is the wind in pixels an hour that made the data, ``spots`` (N, 2) the stations in pixels.
    """
    assert windows.weather.pictures is not None
    size = windows.weather.pictures.shape[1]
    s = model.settings
    mass, chance, seen = 0.0, 0.0, 0
    for part, _, out in outputs(model, windows, which):
        attention, grid = out.attention, out.grid  # type: ignore[attr-defined]
        y, x = ((np.arange(n) + 0.5) / n * size for n in grid)
        tokens = np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)
        now = windows.starts[part] + windows.history - 1
        way = np.stack([np.cumsum(drift[t : t + s.horizon], axis=0) for t in now])  # (W, H, 2)
        air = spots[None, None] - way[:, :, None]  # (W, H, N, 2)
        near = np.linalg.norm(air[..., None, :] - tokens, axis=-1) < radius  # (W, H, N, P)
        weights = attention.mean(dim=1).numpy()
        if s.version == "paper":
            weights = weights.reshape(len(part), 1 + s.horizon, s.stations, -1)[:, 1:]
        else:
            weights = weights.reshape(len(part), len(s.factors), s.layers, s.stations, -1).mean(axis=(1, 2))[:, None]
            near = near.any(axis=1, keepdims=True)
        mass = mass + (weights * near).sum(axis=-1).mean(axis=2).sum(axis=0)
        chance = chance + near.mean(axis=-1).mean(axis=2).sum(axis=0)
        seen += len(part)
    return np.asarray(mass) / seen, np.asarray(chance) / seen


@torch.no_grad()
def gates_by_hour(model: VNNet, windows: Windows, which: np.ndarray) -> np.ndarray | None:
    """(F, 24, E): mean gate of each expert, by factor and hour of the day (UTC) of the last picture; NaN: no such hour in ``which``."""
    total, count = None, np.zeros(24)
    for part, _, out in outputs(model, windows, which):
        gates = out.gates  # type: ignore[attr-defined]
        if gates is None:
            return None
        mean = gates.mean(dim=2).numpy()  # (W, F, E)
        hours = windows.time.numpy()[windows.starts[part] + windows.history - 1, 2]
        total = np.zeros((24, *mean.shape[1:])) if total is None else total
        np.add.at(total, hours, mean)
        np.add.at(count, hours, 1)
    return None if total is None else (total / np.where(count > 0, count, np.nan)[:, None, None]).transpose(1, 0, 2)
