"""Station series and pictures in the layout of Weather2K with Himawari-8: what is read, checked, split, normalised and cut into windows.

A data set is a folder:

    stations.npy   (T, N, 23) float, NaN where a value is missing; columns as in COLUMNS, positions first
    pictures.npy   (T, H, W, C) float, optional, NaN where an hour has no picture; row 0 is the northern edge
    data.json      {"start": first hour, UTC, "bounds": pictures' [west, south, east, north], "hours": optional, hours since start}

T is hours, N stations, F factors. Times are UTC. The places of positions and targets are Weather2K's; the other columns' names are ours.
"""

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from examples.vnnet.files import UserError, read_array, read_json, write_array, write_json

COLUMNS = (
    *("latitude", "longitude", "altitude", "pressure", "temperature", "temperature_max", "temperature_min", "dew_point"),
    *(
        "humidity",
        "humidity_min",
        "vapour_pressure",
        "precipitation",
        "precipitation_3h",
        "precipitation_6h",
        "wind_direction",
        "wind_east",
    ),
    *("wind", "wind_max", "wind_north", "gust", "cloud", "visibility", "visibility_min"),
)
FACTORS = ("temperature", "humidity", "visibility", "wind")
UNITS = {"temperature": "°C", "humidity": "%", "visibility": "km", "wind": "m/s"}
SPLITS = ("train", "validation", "test")
Ranges = list[tuple[int, int]]


@dataclass
class Weather:
    """One data set in memory (stations) and on disk (pictures), with the split by time."""

    name: str
    stations: np.ndarray  # (T, N, 23)
    pictures: np.ndarray | None  # (T, H, W, C)
    hours: np.ndarray  # (T,) whole hours since 1970
    bounds: tuple[float, float, float, float] | None  # west, south, east, north
    splits: dict[str, Ranges]
    notes: dict[str, int] = field(default_factory=dict)  # what was missing, counted

    @property
    def positions(self) -> np.ndarray:
        """(N, 2): x to the east and y to the south in the picture, each in -1..1; without pictures, in the box around the stations."""
        latitude, longitude = (np.nanmedian(self.stations[:, :, i], axis=0) for i in (0, 1))
        if self.bounds is None:
            west, east, south, north = longitude.min(), longitude.max(), latitude.min(), latitude.max()
        else:
            west, south, east, north = self.bounds
        x = 2 * (longitude - west) / max(east - west, 1e-9) - 1
        y = 2 * (north - latitude) / max(north - south, 1e-9) - 1
        return np.stack([x, y], axis=1).astype(np.float32)


def targets(factors: tuple[str, ...]) -> list[int]:
    return [COLUMNS.index(name) for name in factors]


def by_time(hours: int, validation: float = 0.15, test: float = 0.15) -> dict[str, Ranges]:
    """The last share is the test, the one before it validation: as in the released split, whose parts are 8,760 of 40,896 hours each."""
    last, middle = round(hours * (1 - test)), round(hours * (1 - test - validation))
    return {"train": [(0, middle)], "validation": [(middle, last)], "test": [(last, hours)]}


def check(weather: Weather) -> Weather:
    """Raises one line about what cannot be used; counts what is masked."""
    s, where = weather.stations, weather.name
    if s.ndim != 3 or s.shape[2] != len(COLUMNS) or s.dtype.kind != "f":
        raise UserError(f"{where}: stations are {s.shape} of {s.dtype}, must be (hours, stations, {len(COLUMNS)}) of float")
    if len(weather.hours) != len(s):
        raise UserError(f"{where}: {len(weather.hours)} hours for {len(s)} rows of stations, must be as many")
    if (steps := np.diff(weather.hours)).size and steps.min() < 1:
        at = int(np.argmax(steps < 1))
        raise UserError(f"{where}: hour {at + 1} does not come after hour {at}; hours must rise")
    if np.isinf(s).any():
        raise UserError(f"{where}: stations hold {int(np.isinf(s).sum())} infinite values; missing values must be NaN")
    for i in (0, 1):
        seen = s[:, :, i]
        lost = np.isnan(seen).all(axis=0)
        if lost.any():
            raise UserError(f"{where}: station {int(lost.argmax())} has no {COLUMNS[i]}; each station needs its position")
        moved = np.nanmax(seen, axis=0) - np.nanmin(seen, axis=0) > 1e-3
        if moved.any():
            raise UserError(f"{where}: station {int(moved.argmax())} changes its {COLUMNS[i]}; a station must keep its place")
    weather.notes = {
        "hours": len(s),
        "stations": s.shape[1],
        "missing values of factors": int(np.isnan(s[:, :, targets(FACTORS)]).sum()),
        "gaps in time": int((steps > 1).sum()),
    }
    if weather.pictures is not None:
        p = weather.pictures
        if p.ndim != 4 or p.dtype.kind not in "fu":
            raise UserError(f"{where}: pictures are {p.shape} of {p.dtype}, must be (hours, height, width, channels) of float or unsigned")
        if len(p) != len(s):
            raise UserError(f"{where}: {len(p)} pictures for {len(s)} hours of stations, must be as many (NaN for an hour without)")
        if weather.bounds is None:
            raise UserError(f"{where}: pictures without bounds; data.json must hold [west, south, east, north]")
        outside = (np.abs(weather.positions) > 1).any(axis=1)
        if outside.any():
            raise UserError(f"{where}: station {int(outside.argmax())} lies outside the pictures' bounds {list(weather.bounds)}")
        # A frame is read once here, so that memory holds one at a time.
        weather.notes["hours without a whole picture"] = sum(not np.isfinite(frame).all() for frame in p)
    for name, ranges in weather.splits.items():
        for start, stop in ranges:
            if not 0 <= start < stop <= len(s):
                raise UserError(f"{where}: split {name} has the range {start}..{stop}, must lie in 0..{len(s)}")
    marks = np.zeros(len(s), dtype=int)
    for ranges in weather.splits.values():
        for start, stop in ranges:
            marks[start:stop] += 1
    if marks.max() > 1:
        raise UserError(f"{where}: hour {int(marks.argmax())} is in two parts of the split; parts must not overlap")
    for name in FACTORS:
        lost = ~np.isfinite(np.concatenate([s[a:b, :, COLUMNS.index(name)] for a, b in weather.splits["train"]])).any(axis=0)
        if lost.any():
            raise UserError(f"{where}: station {int(lost.argmax())} has no {name} in the training part; leave it out")
    return weather


def save(weather: Weather, folder: Path, extra: dict[str, Any] | None = None) -> None:
    """data.json comes last: a folder that has it is whole."""
    write_array(folder / "stations.npy", weather.stations.astype(np.float32))
    if weather.pictures is not None:
        write_array(folder / "pictures.npy", weather.pictures.astype(np.float32))
    start = datetime(1970, 1, 1) + timedelta(hours=int(weather.hours[0]))
    offsets = weather.hours - weather.hours[0]
    described = {"start": start.isoformat(), "bounds": weather.bounds, **(extra or {})}
    if (np.diff(offsets) != 1).any():
        described["hours"] = offsets.tolist()
    write_json(folder / "data.json", described)


def load(folder: Path, validation: float = 0.15, test: float = 0.15) -> Weather:
    """A folder of your own, memory-mapped pictures, split by time."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; it must hold stations.npy, data.json and, for vision, pictures.npy")
    described = read_json(folder / "data.json")
    try:
        start = datetime.fromisoformat(described["start"])
        start = start if start.tzinfo else start.replace(tzinfo=UTC)
        first = int(start.timestamp()) // 3600
        bounds = described.get("bounds")
        bounds = None if bounds is None else tuple(float(value) for value in bounds)
        offsets = described.get("hours")
        hours = None if offsets is None else first + np.asarray(offsets, dtype=np.int64)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{folder / 'data.json'}: needs start (ISO time) and bounds [west, south, east, north] ({error})") from None
    if bounds is not None and (len(bounds) != 4 or bounds[0] >= bounds[2] or bounds[1] >= bounds[3]):
        raise UserError(
            f"{folder / 'data.json'}: bounds are {list(bounds)}, must be [west, south, east, north] with west < east, south < north"
        )
    stations = read_array(folder / "stations.npy")
    pictures = read_array(folder / "pictures.npy", memory_mapped=True) if (folder / "pictures.npy").is_file() else None
    hours = first + np.arange(len(stations)) if hours is None else hours
    return check(Weather(str(folder), stations, pictures, hours, bounds, by_time(len(stations), validation, test)))


@dataclass
class Tables:
    """Means and deviations of stations, least and greatest of pictures: from the training part only."""

    mean: np.ndarray  # (23,)
    deviation: np.ndarray  # (23,)
    low: np.ndarray | None  # (C,)
    high: np.ndarray | None

    @classmethod
    def fit(cls, weather: Weather) -> "Tables":
        parts = weather.splits["train"]
        flat = np.concatenate([weather.stations[a:b] for a, b in parts]).reshape(-1, len(COLUMNS)).astype(np.float64)
        known = np.isfinite(flat)
        count = np.maximum(known.sum(axis=0), 1)
        mean = np.where(known, flat, 0).sum(axis=0) / count
        deviation = np.sqrt(np.where(known, (flat - mean) ** 2, 0).sum(axis=0) / count)
        # A constant column says nothing: it becomes zeros.
        deviation = np.where(deviation < 1e-6, 1.0, deviation)
        low = high = None
        if weather.pictures is not None:
            frames = [frame for a, b in parts for frame in weather.pictures[a:b] if np.isfinite(frame).any()]
            if not frames:
                raise UserError(f"{weather.name}: no picture in the training part")
            low = np.min([np.nanmin(frame, axis=(0, 1)) for frame in frames], axis=0).astype(np.float32)
            high = np.max([np.nanmax(frame, axis=(0, 1)) for frame in frames], axis=0).astype(np.float32)
        return cls(mean.astype(np.float32), deviation.astype(np.float32), low, high)

    def state(self) -> dict[str, Tensor]:
        return {name: torch.from_numpy(value) for name, value in vars(self).items() if value is not None}

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> "Tables":
        return cls(*(state[name].numpy() if name in state else None for name in ("mean", "deviation", "low", "high")))  # type: ignore[arg-type]


@dataclass
class Batch:
    x: Tensor  # (B, history, N, 23), normalised, 0 for missing
    time: Tensor  # (B, history + horizon, 3): month 0..11, day 0..30, hour 0..23
    pictures: Tensor | None  # (B, C, frames, H, W) in 0..1, 0 for missing
    y: Tensor  # (B, horizon, N, F) in physical units, 0 for missing
    valid: Tensor  # (B, horizon, N, F)


class Windows:
    """``history`` hours in, ``horizon`` hours out, at every hour: inside one range of the split, and never across a gap."""

    def __init__(
        self,
        weather: Weather,
        tables: Tables,
        split: str,
        factors: tuple[str, ...] = FACTORS,
        history: int = 12,
        horizon: int = 12,
        frames: int = 4,
    ) -> None:
        self.weather, self.tables, self.split = weather, tables, split
        self.factors, self.history, self.horizon, self.frames = factors, history, horizon, frames
        self.columns = targets(factors)
        length = history + horizon
        whole = [(a, i) for a, b in weather.splits[split] for i in range(a, b - length + 1)]
        kept = [i for _, i in whole if weather.hours[i + length - 1] - weather.hours[i] == length - 1]
        self.starts = np.asarray(kept, dtype=np.int64)
        self.dropped = len(whole) - len(kept)  # windows across a gap
        if not len(self.starts):
            raise UserError(f"{weather.name}: split {split} holds no {length} hours in a row; give more hours or a larger share")
        z = (weather.stations.astype(np.float32) - tables.mean) / tables.deviation
        self.x = torch.from_numpy(np.nan_to_num(z, nan=0.0))
        y = weather.stations[:, :, self.columns].astype(np.float32)
        self.valid = torch.from_numpy(np.isfinite(y))
        self.y = torch.from_numpy(np.nan_to_num(y, nan=0.0))
        stamps = weather.hours.astype("datetime64[h]")
        month = stamps.astype("datetime64[M]")
        day = stamps.astype("datetime64[D]")
        parts = [
            month.astype(int) % 12,
            (day - month.astype("datetime64[D]")).astype(int),
            (stamps - day.astype("datetime64[h]")).astype(int),
        ]
        self.time = torch.from_numpy(np.stack(parts, axis=1).astype(np.int64))

    def __len__(self) -> int:
        return len(self.starts)

    def batch(self, which: np.ndarray, pictures: np.ndarray | None = None, shift: tuple[int, int] = (0, 0)) -> Batch:
        """The windows ``which``. ``pictures`` names other windows whose pictures are shown; ``shift`` rolls them by rows and columns."""
        starts = torch.from_numpy(self.starts[which])
        past, future = starts[:, None] + torch.arange(self.history), starts[:, None] + self.history + torch.arange(self.horizon)
        shown = None
        if self.weather.pictures is not None and self.tables.low is not None:
            ends = self.starts[which if pictures is None else pictures] + self.history
            shown = self.frames_before(ends, shift)
        time = self.time[torch.cat([past, future], dim=1)]
        return Batch(self.x[past], time, shown, self.y[future], self.valid[future])

    def frames_before(self, ends: np.ndarray, shift: tuple[int, int] = (0, 0)) -> Tensor:
        assert self.weather.pictures is not None
        assert self.tables.low is not None
        assert self.tables.high is not None
        clips = np.stack([self.weather.pictures[end - self.frames : end] for end in ends]).astype(np.float32)
        clips = np.nan_to_num((clips - self.tables.low) / np.maximum(self.tables.high - self.tables.low, 1e-6), nan=0.0)
        if shift != (0, 0):
            clips = np.roll(clips, shift, axis=(2, 3))
        return torch.from_numpy(clips).permute(0, 4, 1, 2, 3).contiguous()
