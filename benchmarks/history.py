"""Our side of every case under pytest-benchmark, which keeps a history and compares with the run before. Collected only when asked for:

    make bench-history ONLY="soft_connector and released and T256"
    python -m pytest_benchmark compare

The numbers of README and docs/ come from ``python -m benchmarks``, which times a peer beside ours.
"""

import pytest
import torch

from benchmarks.cases import CASES
from benchmarks.steps import Rule, Skipped
from cmoe_kernels import backends

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed")


@pytest.mark.parametrize("instance", [i for case in CASES.values() for i in case.instances()], ids=lambda i: i.key)
def test_time(instance, benchmark):
    try:
        work = instance.make()
    except Skipped as reason:
        pytest.skip(str(reason))
    step = work.ours()
    Rule(work).check(step)
    benchmark.extra_info |= {
        "threads": torch.get_num_threads(),
        "served_by": {op: backends.choose(op, "cpu", work.dtype) for op in work.ops},
    }
    benchmark.pedantic(step, rounds=7, warmup_rounds=1)
