"""A small generated data set, made once."""

import numpy as np
import pytest

from examples.vnnet import generate
from examples.vnnet.data import FACTORS, Tables, Windows


@pytest.fixture(scope="session")
def made():
    """400 hours, 5 stations, 16 x 16 pictures, and the wind that made them."""
    return generate.generate(generate.Settings(hours=400, stations=5, size=16, seed=3))


@pytest.fixture
def weather(made):
    """A copy to spoil."""
    from dataclasses import replace

    w = made[0]
    return replace(w, stations=w.stations.copy(), pictures=w.pictures.copy(), hours=w.hours.copy(), splits=dict(w.splits))


@pytest.fixture
def windows(weather):
    tables = Tables.fit(weather)
    return lambda split="train", factors=FACTORS, frames=3: Windows(weather, tables, split, factors, 12, 12, frames)


@pytest.fixture
def rng():
    return np.random.default_rng(0)
