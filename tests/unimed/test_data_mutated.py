"""Damaged files end in a counted skip or in one line, within 1 GB of address space: 500 cases here, 10,000 in `make test-full`."""

import os
import subprocess
import sys
from pathlib import Path

from tests.sampling import FULL

HERE = Path(__file__).parent


def test_damaged_files_end_in_a_count_or_in_one_line():
    paths = os.pathsep.join([str(HERE.parents[1]), str(HERE)])
    environment = {**os.environ, "PYTHONPATH": paths, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
    command = [sys.executable, str(HERE / "mutate.py"), "10000" if FULL else "500", "0"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3000 if FULL else 300, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    useful = int(done.stdout.split()[2])
    assert 50 < useful < 10000 if FULL else 50 < useful < 500  # some damage hurts nothing, most does
