"""Our and a peer's call, timed alternately in one process.

On a shared machine speed drifts by tens of percent within minutes: two blocks of calls, one after the other, compare two machines. So
the two take turns, and before each timed call stands an untimed one of the same side: it finds the caches as that side leaves them.
What a call returns is freed inside the timed region, as a training step frees its gradients.
"""

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Call = Callable[[], Any]
FEW, PATIENCE = 3, 6


@dataclass(frozen=True)
class Times:
    """Seconds of each timed call."""

    seconds: tuple[float, ...]

    def quantile(self, q: float) -> float:
        """Linear interpolation between the sorted times."""
        ordered = sorted(self.seconds)
        place = q * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (place - low) * (ordered[high] - ordered[low])

    def summary(self) -> dict[str, float | int]:
        """p20, p50, p80 in milliseconds, and how many calls were timed."""
        return {**{f"p{q}_ms": round(1e3 * self.quantile(q / 100), 5) for q in (20, 50, 80)}, "calls": len(self.seconds)}


def alternate(
    ours: Call, peer: Call, seconds: float, least: int = 5, most: int = 200, clock: Call = time.perf_counter
) -> tuple[Times, Times]:
    """Times of ``ours`` and ``peer``, in turn, until ``seconds`` have passed.

    At least ``least`` calls of each are timed, at most ``most``; FEW are enough where they take PATIENCE times as long as asked for.
    """
    mine, theirs = in_turn((ours, peer), seconds, least, most, clock)
    return mine, theirs


def in_turn(
    sides: Sequence[Call],
    seconds: float,
    least: int = 5,
    most: int = 200,
    clock: Call = time.perf_counter,
    once_above: float = float("inf"),
) -> tuple[Times, ...]:
    """Times of any number of sides, as :func:`alternate` takes them of two. A later side whose first, untimed call takes longer than
    ``once_above`` seconds has that one call alone."""
    taken: tuple[list[float], ...] = tuple([] for _ in sides)
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        begin = clock()
        while True:
            for call, times in zip(sides, taken, strict=True):
                if times is not taken[0] and times and times[0] > once_above:
                    continue
                start = clock()
                call()
                if times is taken[0] or clock() - start <= once_above:
                    start = clock()
                    call()
                times.append(clock() - start)
            done, passed = len(taken[0]), clock() - begin
            if (passed >= seconds and done >= least) or done >= most or (passed >= PATIENCE * seconds and done >= FEW):
                break
    finally:
        if collecting:
            gc.enable()
    return tuple(Times(tuple(times)) for times in taken)


def ratio(ours: Times, peer: Times) -> float:
    """How many times faster ours is: p50 of the peer over p50 of ours. Below 1, ours is slower."""
    return peer.quantile(0.5) / ours.quantile(0.5)
