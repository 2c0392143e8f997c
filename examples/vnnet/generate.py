"""Generated weather: clouds and fog banks carried by the wind, seen by stations where they pass and by pictures everywhere.

Cells (rotated Gaussians) are born at random, grow, turn, drift with the wind and decay. Cloud cells cool, moisten and bring gusts; fog
cells moisten and take the visibility. A station sees a cell only while it lies over it; the picture also shows the cells upwind, between
stations, that arrive hours later. A daily cycle, a season and a slow regional part come on top: stations tell these without pictures.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from examples.vnnet.data import COLUMNS, Weather, by_time, check, load, save
from examples.vnnet.files import read_array, read_json, write_array

BOUNDS = (110.0, 30.0, 116.4, 36.4)
START = np.datetime64("2017-01-01T00", "h")
LIFETIME = 60.0  # hours
MARGIN = 20.0  # cells are born this many pixels outside the picture, too


@dataclass(frozen=True)
class Settings:
    hours: int = 3000
    stations: int = 24
    size: int = 32
    seed: int = 0
    radius: float = 1.7  # pixels
    density: float = 0.03  # cells of a kind per pixel
    speed: float = 0.75  # pixels per hour


def _wander(rng: np.random.Generator, hours: int, hold: float, deviation: float) -> np.ndarray:
    """An Ornstein-Uhlenbeck series: mean 0, the given deviation, remembered for about ``hold`` hours."""
    keep = np.exp(-1 / hold)
    steps = rng.normal(size=hours) * deviation * np.sqrt(1 - keep**2)
    steps[0] = rng.normal() * deviation
    out = np.empty(hours)
    value = 0.0
    for i, step in enumerate(steps):
        value = value * keep + step if i else step
        out[i] = value
    return out


def wind(settings: Settings) -> np.ndarray:
    """(T, 2): east and south, in pixels an hour; a prevailing direction that wanders."""
    rng = np.random.default_rng([settings.seed, 1])
    direction = rng.uniform(0, 2 * np.pi) + _wander(rng, settings.hours, 60, 0.35)
    speed = settings.speed * np.exp(_wander(rng, settings.hours, 36, 0.15))
    return np.stack([speed * np.cos(direction), speed * np.sin(direction)], axis=1)


class Cells:
    """All cells of one kind: where each is at each hour, how strong, how turned."""

    def __init__(self, settings: Settings, drift: np.ndarray, kind: int) -> None:
        rng = np.random.default_rng([settings.seed, 2, kind])
        side = settings.size + 2 * MARGIN
        living = settings.density * side**2
        lead = int(4 * LIFETIME)
        count = rng.poisson(living * (settings.hours + lead) / LIFETIME)
        self.birth = np.sort(rng.uniform(-lead, settings.hours, count))
        self.place = rng.uniform(-MARGIN, settings.size + MARGIN, (count, 2))
        self.strength = rng.gamma(4, 0.25, count)
        self.radii = settings.radius * rng.uniform(0.7, 1.4, (count, 2))
        self.angle, self.spin = rng.uniform(0, np.pi, count), rng.normal(0, 0.08, count)
        self.path = np.concatenate([np.zeros((1, 2)), np.cumsum(drift, axis=0)])
        self.before = drift[0]  # the wind before the first hour
        self.side, self.size = side, settings.size

    def at(self, hour: int, points: np.ndarray) -> np.ndarray:
        """Field at (P, 2) points, x then y in pixels."""
        age = hour - self.birth
        living = np.flatnonzero((age > 0) & (age < 4 * LIFETIME))
        age, birth = age[living], self.birth[living]
        steps = np.arange(len(self.path))
        start = np.stack([np.interp(birth, steps, self.path[:, i]) + np.minimum(birth, 0) * self.before[i] for i in range(2)], axis=1)
        # A cell that leaves one side of the wide area comes back on the other: the density stays.
        centre = (self.place[living] + self.path[hour] - start + MARGIN) % self.side - MARGIN
        strength = self.strength[living] * (1 - np.exp(-age / 4)) * np.exp(-age / LIFETIME)
        near = (np.abs(centre - self.size / 2) < self.size / 2 + 6).all(axis=1)
        angle = (self.angle[living] + self.spin[living] * age)[near]
        centre, radii = centre[near] - self.size / 2, self.radii[living][near]
        # exp of a quadratic form in x and y, as one product of monomials (P, 6) and coefficients (6, cells).
        along, across = 0.5 / radii[:, 0] ** 2, 0.5 / radii[:, 1] ** 2
        cos, sin = np.cos(angle), np.sin(angle)
        xx, yy = along * cos**2 + across * sin**2, along * sin**2 + across * cos**2
        xy = 2 * (along - across) * cos * sin
        cx, cy = centre.T
        form = np.stack([xx, yy, xy, -2 * xx * cx - xy * cy, -2 * yy * cy - xy * cx, xx * cx**2 + yy * cy**2 + xy * cx * cy])
        x, y = (points - self.size / 2).T
        monomials = np.stack([x * x, y * y, x * y, x, y, np.ones_like(x)], axis=1)
        shape = np.exp(-(monomials.astype(np.float32) @ form.astype(np.float32)))
        return shape @ strength[near].astype(np.float32)


def places(settings: Settings) -> np.ndarray:
    """(N, 2) stations, x and y in pixels: scattered, but no two close together and none near the edge."""
    rng = np.random.default_rng([settings.seed, 3])
    edge = settings.size * 0.2
    tries = rng.uniform(edge, settings.size - edge, (4000, 2))
    chosen = [tries[0]]
    for _ in range(settings.stations - 1):
        gaps = np.min(np.linalg.norm(tries[:, None] - np.asarray(chosen), axis=2), axis=1)
        # Not the farthest: one of the fifth that is far, so that the map looks like a network.
        chosen.append(tries[rng.choice(np.argsort(gaps)[-800:])])
    return np.asarray(chosen)


def generate(settings: Settings) -> tuple[Weather, np.ndarray]:
    """The data set and the wind (T, 2) in pixels an hour that made it."""
    s = settings
    drift = wind(s)
    cells = [Cells(s, drift, kind) for kind in range(2)]
    spots = places(s)
    grid = np.stack(np.meshgrid(np.arange(s.size) + 0.5, np.arange(s.size) + 0.5), axis=-1).reshape(-1, 2)
    points = np.concatenate([grid, spots])
    fields = np.stack([np.stack([kind.at(hour, points) for kind in cells], axis=-1) for hour in range(s.hours)])
    rng = np.random.default_rng([s.seed, 4])
    seen, (cloud, fog) = fields[:, : s.size**2], np.moveaxis(fields[:, s.size**2 :], -1, 0)
    pictures = np.stack([290 - 35 * seen[..., 0], 270 - 30 * seen[..., 1]], axis=-1).reshape(s.hours, s.size, s.size, 2)
    pictures = pictures + rng.normal(0, 0.7, pictures.shape)

    hours = START.astype(np.int64) + np.arange(s.hours)
    daily = np.cos(2 * np.pi * (hours % 24 - 7) / 24)[:, None]  # warmest at 07 UTC, 15 h at 120 E
    season = -np.cos(2 * np.pi * (hours / 24 % 365.25 - 15) / 365.25)[:, None]
    regional = {name: _wander(rng, s.hours, 60, 1.0)[:, None] for name in ("temperature", "humidity", "wind")}
    altitude = rng.uniform(20, 600, s.stations)
    noise = {name: rng.normal(0, 1, cloud.shape) for name in ("temperature", "humidity", "visibility", "wind", "pressure")}
    temperature = 13 + 4 * season + 4 * daily - 0.0065 * altitude + 0.8 * regional["temperature"] - 6 * cloud + 0.2 * noise["temperature"]
    humidity = 45 - 6 * daily + 4 * regional["humidity"] + 14 * cloud + 22 * fog + 0.8 * noise["humidity"]
    humidity = np.clip(humidity, 3, 100)
    visibility = 25 * np.exp(-1.1 * fog - 0.25 * cloud) * np.exp(0.03 * noise["visibility"])
    speed = np.hypot(drift[:, 0], drift[:, 1])[:, None] * 3 + 0.4 * regional["wind"] + 3.5 * cloud + 0.2 * noise["wind"]
    speed = np.maximum(speed, 0.1)
    heading = np.arctan2(drift[:, 1], drift[:, 0])[:, None] + 0.05 * noise["pressure"]
    pressure = 1013 - 0.12 * altitude + 3 * regional["humidity"] + 0.2 * noise["pressure"]
    rain = np.maximum(cloud - 0.8, 0) * 2
    vapour = humidity / 100 * 6.11 * np.exp(17.3 * temperature / (237.3 + temperature))
    west, south, east, north = BOUNDS
    filled = {
        "latitude": np.broadcast_to(north - spots[:, 1] / s.size * (north - south), cloud.shape),
        "longitude": np.broadcast_to(west + spots[:, 0] / s.size * (east - west), cloud.shape),
        "altitude": np.broadcast_to(altitude, cloud.shape),
        "pressure": pressure,
        "temperature": temperature,
        "temperature_max": temperature + 0.3,
        "temperature_min": temperature - 0.3,
        "dew_point": 237.3 * np.log(vapour / 6.11) / (17.3 - np.log(vapour / 6.11)),
        "humidity": humidity,
        "humidity_min": humidity - 1,
        "vapour_pressure": vapour,
        "precipitation": rain,
        "precipitation_3h": _last(rain, 3),
        "precipitation_6h": _last(rain, 6),
        "wind_direction": np.degrees(np.arctan2(-np.cos(heading), np.sin(heading))) % 360,
        "wind_east": speed * np.cos(heading),
        "wind": speed,
        "wind_max": speed + 0.5,
        "wind_north": -speed * np.sin(heading),
        "gust": speed * 1.3,
        "cloud": np.clip(cloud, 0, 1.5) / 1.5 * 8,
        "visibility": visibility,
        "visibility_min": visibility * 0.9,
    }
    stations = np.stack([filled[name] for name in COLUMNS], axis=-1).astype(np.float32)
    weather = Weather(f"generated weather, seed {s.seed}", stations, pictures.astype(np.float32), hours, BOUNDS, by_time(s.hours))
    return check(weather), drift


def _last(values: np.ndarray, hours: int) -> np.ndarray:
    total = np.cumsum(values, axis=0)
    total[hours:] -= total[:-hours].copy()
    return total


def stored(settings: Settings, cache: Path) -> tuple[Weather, np.ndarray]:
    """Generated once per settings, then read from ``cache`` with the pictures memory-mapped."""
    made = {name: getattr(settings, name) for name in settings.__dataclass_fields__}
    folder = cache / f"generated-{settings.hours}h-{settings.stations}st-{settings.size}px-seed{settings.seed}"
    if not (folder / "data.json").is_file() or read_json(folder / "data.json").get("settings") != made:
        (folder / "data.json").unlink(missing_ok=True)
        weather, drift = generate(settings)
        write_array(folder / "wind.npy", drift)
        save(weather, folder, {"settings": made})
    weather = load(folder)
    weather.name = f"generated weather, seed {settings.seed}"
    return weather, read_array(folder / "wind.npy")


def upwind(drift: np.ndarray, spots: np.ndarray, hour: int, horizon: int) -> np.ndarray:
    """(horizon, N, 2): where the air is at ``hour`` that reaches each station 1, 2, ... hours later; pixels."""
    way = np.cumsum(drift[hour : hour + horizon], axis=0)
    return spots[None] - way[:, None]
