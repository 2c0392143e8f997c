"""Errors, forecasts without learning, and the measures of what pictures are worth."""

import numpy as np
import pytest
import torch

from examples.vnnet import evaluate as e
from examples.vnnet import generate
from examples.vnnet.data import targets
from examples.vnnet.evaluate import Scores
from examples.vnnet.model import Settings, build


def test_scores():
    truth = np.asarray([2.0, 4.0, 0.0, 9.0]).reshape(4, 1, 1, 1)
    forecast = np.asarray([3.0, 2.0, 1.0, 99.0]).reshape(4, 1, 1, 1)
    valid = np.asarray([True, True, True, False]).reshape(4, 1, 1, 1)
    s = Scores.of(forecast, truth, valid)
    assert s.mae[0, 0] == pytest.approx(4 / 3)
    assert s.rmse[0, 0] == pytest.approx(np.sqrt(2))
    assert s.mape[0, 0] == pytest.approx(50)  # the truth of 0 is left out
    assert s.count[0, 0] == 3
    assert Scores.from_lists(s.lists()).mae == s.mae


def test_gain_and_reliance():
    one, two = (Scores.of(np.full((1, 2, 1, 1), v), np.zeros((1, 2, 1, 1)), np.ones((1, 2, 1, 1), bool)) for v in (3.0, 4.0))
    assert e.gain(one, two) == pytest.approx(0.25)
    assert e.reliance(two, one) == pytest.approx(1 / 3)
    assert e.span(np.arange(12.0)[:, None], 6, 12)[0] == 8


def test_persistence_takes_the_last_observed(weather, windows):
    weather.stations[11, 0, 4] = np.nan
    weather.stations[:12, 1, 4] = np.nan
    w = windows()
    got = e.persistence(w, np.asarray([0]))
    assert (got[0, :, 0, 0] == weather.stations[10, 0, 4]).all()
    assert (got[0, :, 1, 0] == w.tables.mean[4]).all()
    assert (got[0, :, 2, 1] == weather.stations[11, 2, 8]).all()


def test_climatology_is_the_training_mean_of_the_hour(weather, windows):
    stop = weather.splits["train"][0][1]
    weather.stations[stop:] = 1e6
    w = windows("test")
    got = e.climatology(w, np.asarray([0]))
    first = int(w.starts[0]) + 12
    hour = weather.hours[first] % 24
    same = [i for i in range(stop) if weather.hours[i] % 24 == hour]
    np.testing.assert_allclose(got[0, 0], weather.stations[same][:, :, targets(w.factors)].mean(axis=0), rtol=1e-5)


def test_autoregression_finds_a_linear_law(weather, windows):
    rng = np.random.default_rng(0)
    for column in (4, 8, 16, 21):
        series = np.zeros((400, 5))
        for i in range(2, 400):
            series[i] = 1.6 * series[i - 1] - 0.8 * series[i - 2] + rng.normal(size=5)
        weather.stations[:, :, column] = 20 + series
    training, test = windows("train"), windows("test")
    which = np.arange(len(test))
    observed, valid = e.truth(test, which)
    linear, last = (Scores.of(f, observed, valid) for f in (e.autoregression(test, training, which), e.persistence(test, which)))
    assert (linear.mae[5] < 0.8 * last.mae[5]).all()  # half a swing of the law ahead


def test_shuffled_pictures_are_of_other_hours():
    which = np.arange(200)
    other = e.other_windows(which, 12)
    assert sorted(other) == sorted(which)
    assert (np.abs(other - which) >= 12).all()
    assert np.array_equal(other, e.other_windows(which, 12))


@pytest.fixture
def model(weather):
    return build(Settings.small(stations=5, vision_width=4, state=8, frames=3), torch.from_numpy(weather.positions), [4, 8, 21, 16]).eval()


def test_changed_pictures_change_the_forecasts_of_a_model_that_sees(model, windows):
    w = windows("validation")
    which = np.arange(len(w))
    true, shuffled, shifted = (e.forecasts(model, w, which, p) for p in e.PICTURES)
    assert true.shape == (len(w), 12, 5, 4)
    assert not np.allclose(true, shuffled)
    assert not np.allclose(true, shifted)
    with torch.no_grad():
        model.projection.connector.experts.w2.zero_()
        model.projection.connector.experts.b2.zero_()
    np.testing.assert_allclose(e.forecasts(model, w, which), e.forecasts(model, w, which, "shuffled"), rtol=1e-5, atol=1e-4)
    with pytest.raises(ValueError, match="true, shuffled, shifted"):
        e.forecasts(model, w, which, "none")


def test_attention_spread_evenly_has_the_mass_of_chance(model, windows, made):
    w = windows("validation")
    with torch.no_grad():
        for part in (model.fusion.query, model.fusion.key):
            part.weight.zero_()
            part.bias.zero_()
        model.fusion.spread.fill_(8.0)
    spots = generate.places(generate.Settings(hours=400, stations=5, size=16, seed=3))
    mass, chance = e.attention_on_upwind(model, w, np.arange(0, len(w), 4), made[1], spots)
    assert mass.shape == (12,)
    np.testing.assert_allclose(mass, chance, rtol=1e-3)
    # Narrow attention that stays at the station is over the air of the first hour, not of the last.
    with torch.no_grad():
        model.fusion.spread.fill_(-2.5)
        model.fusion.drift[-1].weight.zero_()
        model.fusion.drift[-1].bias.zero_()
    mass, chance = e.attention_on_upwind(model, w, np.arange(0, len(w), 4), made[1], spots)
    assert mass[0] > 0.9
    assert mass[-1] < 0.5 * mass[0]


def test_gates_by_hour(model, windows):
    w = windows("validation")
    got = e.gates_by_hour(model, w, np.arange(len(w)))
    assert got.shape == (4, 24, 4)
    np.testing.assert_allclose(got.sum(-1), 1, rtol=1e-5)
