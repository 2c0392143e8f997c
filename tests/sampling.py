"""Which cases of a parametrised test run under `pytest --sample N`: at most N, and each value of each parameter where N allows."""

import os
from collections.abc import Hashable, Sequence
from random import Random

FULL = os.environ.get("CMOE_TEST_FULL", "0") not in ("", "0")  # `make test-full`
SAMPLE = () if FULL else ("--sample", "16")  # of tests that run on another build or instruction set


def chosen(name: str, cases: Sequence[Sequence[Hashable]], n: int) -> list[int]:
    """The places of n cases, in order; a case is the values of its parameters.

    The same for the same name and cases, so that all workers agree. Cases are taken in an order that the name seeds: first those that bring
    the most values not yet met, then others.

    >>> chosen("test_sum", [("fp32", 1), ("fp32", 2), ("bf16", 1), ("bf16", 2)], 2) in ([0, 3], [1, 2])
    True
    """
    order = Random(name).sample(range(len(cases)), len(cases))
    values = [set(enumerate(case)) for case in cases]
    taken: list[int] = []
    met: set[tuple[int, Hashable]] = set()
    while len(taken) < min(n, len(cases)):
        best = max(order, key=lambda i: len(values[i] - met))  # the first of equals
        if not values[best] - met:
            taken += order[: n - len(taken)]
            break
        order.remove(best)
        taken.append(best)
        met |= values[best]
    return sorted(taken)
