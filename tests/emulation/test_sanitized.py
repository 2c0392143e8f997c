"""Every kernel under sanitizers. Products have programs of their own (test_gemm.py, test_gemm_sm90.py), and so have kernels over rows here;
under `make test-full` the whole emulated library is built with each sanitizer, and the tests of its operations run on that.

AddressSanitizer with UndefinedBehaviorSanitizer: no access outside of a tensor, a shared array or a scratch. ThreadSanitizer: no two
threads of a grid touch the same memory without a barrier, a collective or a wait between them.
"""

import os
import subprocess
import sys

import pytest

from tests.builds import ROOT, compile_emulated, output_of, run_emulated, run_tests, runtime_of, summary_of
from tests.emulation.test_emulator import pytestmark  # noqa: F401
from tests.sampling import FULL

ROWS = ("soft_gate", "topk_gate", "sort_by_expert", "balance_loss")
RUNTIMES = {"address": ("asan", "ubsan", "stdc++"), "thread": ("tsan", "stdc++")}
OPTIONS = {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1", "TSAN_OPTIONS": "halt_on_error=1:exitcode=66"}
TESTS = ("tests/ops/test_promises.py", "tests/ops/test_edges.py", "tests/emulation")
SELECTED = {
    # Every form of every op in its smallest sizes, and what needs more than a tile or a block.
    "address": "(cuda and (test_precision or test_edges)) or test_rows or test_router or (test_experts and bf16)",
    # A launch of 256 threads costs a thousandfold here: what the programs of products and of rows do not launch, once.
    "thread": " or ".join(f"test_values_and_gradients[{form}-bf16]" for form in ("soft-recompute", "soft-merged", "sparse-gated", "hard"))
    + " or (test_odd_widths and gelu_tanh)",
}


@pytest.mark.costly
@pytest.mark.parametrize("sanitizer", RUNTIMES)
def test_kernels_over_rows(sanitizer):
    for name in RUNTIMES[sanitizer][:-1]:
        runtime_of(name)
    few = ["few"] if sanitizer == "thread" and not FULL else []  # a launch of 256 threads costs a thousandfold there
    run = run_emulated(compile_emulated("rows_test", sanitizer, ROWS), "shuffled", *few)
    assert (run.returncode, run.stdout) == (0, "done\n"), run.stderr[-3000:]


@pytest.mark.full  # some minutes of compiling
@pytest.mark.parametrize("sanitizer", RUNTIMES)
def test_the_library(sanitizer, capsys):
    preloaded = " ".join(map(runtime_of, RUNTIMES[sanitizer]))
    environment = {"CMOE_EMULATE_CUDA": "1", "CMOE_EMULATE_SANITIZER": sanitizer, "PYTHONPATH": str(ROOT), **OPTIONS}
    command = [sys.executable, "-m", "tests.emulation.library"]
    built = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-3000:]
    run = run_tests(ROOT, *TESTS, "-k", SELECTED[sanitizer], LD_PRELOAD=preloaded, CMOE_TEST_FULL="0", **environment)
    assert run.returncode == 0, output_of(run)
    with capsys.disabled():
        print(f"\nThe emulated library, {sanitizer} sanitizer: {summary_of(run)}")
