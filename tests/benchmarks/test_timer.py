"""The timer's arithmetic, on a clock that the test turns."""

import pytest

from benchmarks.timer import Times, alternate, in_turn, ratio


class Clock:
    """Calls advance it by what each costs."""

    def __init__(self):
        self.now = 0.0
        self.calls = []

    def __call__(self):
        return self.now

    def call(self, name, *costs):
        turns = iter(range(10**6))

        def run():
            self.calls.append(name)
            self.now += costs[next(turns) % len(costs)]

        return run


def test_the_sides_take_turns_with_an_untimed_call_before_each_timed_one():
    clock = Clock()
    ours, peer = alternate(clock.call("ours", 100, 1), clock.call("peer", 200, 3), seconds=1, least=3, clock=clock)
    assert clock.calls == ["ours", "ours", "peer", "peer"] * 3
    assert (ours.seconds, peer.seconds) == ((1, 1, 1), (3, 3, 3))
    assert ratio(ours, peer) == 3


def test_when_it_stops():
    clock = Clock()
    ours, peer = alternate(clock.call("ours", 1), clock.call("peer", 1), seconds=22, least=2, clock=clock)
    assert len(ours.seconds) == len(peer.seconds) == 6
    ours, _ = alternate(clock.call("ours", 1), clock.call("peer", 1), seconds=1e9, least=2, most=9, clock=clock)
    assert len(ours.seconds) == 9
    ours, _ = alternate(clock.call("ours", 1000), clock.call("peer", 1), seconds=1, least=5, clock=clock)
    assert len(ours.seconds) == 3


def test_any_number_of_sides_take_turns_and_a_slow_one_has_a_single_turn():
    clock = Clock()
    sides = [clock.call("ours", 9), clock.call("slow", 8), clock.call("fast", 1)]
    times = in_turn(sides, seconds=1, least=3, clock=clock, once_above=7)
    assert clock.calls == ["ours", "ours", "slow", "fast", "fast", *["ours", "ours", "fast", "fast"] * 2]
    assert [t.seconds for t in times] == [(9, 9, 9), (8,), (1, 1, 1)]


def test_quantiles_interpolate():
    times = Times((5.0, 1.0, 2.0, 4.0, 3.0))
    assert [times.quantile(q) for q in (0, 0.2, 0.5, 0.8, 1)] == pytest.approx([1, 1.8, 3, 4.2, 5])
    assert Times((7.0,)).quantile(0.8) == 7
    assert times.summary() == {"p20_ms": 1800, "p50_ms": 3000, "p80_ms": 4200, "calls": 5}


def test_the_ratio_is_of_medians():
    assert ratio(Times((1.0, 2.0, 100.0)), Times((3.0, 5.0, 4.0))) == 2
