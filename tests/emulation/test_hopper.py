"""The emulator's own tests of sm_90a's instructions: what it must compute, what it must report, and its layouts against CuTe's."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.builds import ROOT, compile_emulated, need_compiler, run_emulated, runtime_of
from tests.emulation.test_emulator import ORDERS, pytestmark  # noqa: F401

# case -> what is printed, with right kernels
VALUES = {
    "products": "0 0 0 0 0 0\n",
    "copies": "0 0 0 0\n",
    "outside": "0\n",
    "ring": "0\n",
    "gathered": "0\n",
    "handed_over": "3 3\n",
}
FAULTS = {
    "product_without_fence": "no wgmma.fence since the accumulators were waited for",
    "different_operands": "threads of one warpgroup differ in its operands",
    "half_a_warpgroup": "fewer than the 128 threads of a warpgroup",
    "parted_warpgroup": "other threads of the warpgroup are at",
    "ring_of_wrong_bytes": "deadlock, no thread can run:",
    "not_initialised": "used before mbarrier.init",
    "too_many_arrivals": "more arrivals in a phase than its count, 2",
    "too_many_registers": "registers in one block, more than 65536",
    "misaligned_tile": "a swizzled tile at shared address 128, not a multiple of 1024",
    "misaligned_map": "sizes, strides or alignment that it refuses",
    "map_of_odd_rows": "sizes, strides or alignment that it refuses",
}
# case, when asynchronous instructions take effect -> how many numbers are wrong, or whether any is
WRONG = {
    ("product_without_wait", "late"): "1",
    ("product_without_wait", "eager"): "0",  # a product that is done at once hides it
    ("store_without_wait", "late"): "4096",
    ("gathered_too_soon", "late"): "1",
    ("ring_of_one_phase", "late"): "1",
    ("ring_without_turns", "late"): "fault: test: mbarrier: more arrivals in a phase than its count, 1",
    ("early_hand_back", "late"): "0",  # the copy lands when all is done
    ("early_hand_back", "early"): "1",  # and here before the product
}


@pytest.fixture(scope="module")
def plain():
    return compile_emulated("hopper_test")


@pytest.mark.parametrize("when", ["late", "early", "eager"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("case", VALUES)
def test_values(plain, case, order, when):
    assert run_emulated(plain, case, order, when).stdout == VALUES[case] + "done\n"


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("case", FAULTS)
def test_faults_are_reported(plain, case, order):
    run = run_emulated(plain, case, order)
    assert run.stdout.startswith("fault: ")
    assert FAULTS[case] in run.stdout


@pytest.mark.parametrize(("case", "when"), WRONG)
def test_what_a_gpu_might_forgive_shows_in_the_numbers(plain, case, when):
    assert run_emulated(plain, case, when).stdout.split("\ndone")[0].strip() == WRONG[case, when]


@pytest.mark.full  # a minute of compiling; the products of sm_90a run under sanitizers in CI, too (test_gemm_sm90.py)
@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_sanitizers_find_nothing_in_right_kernels(sanitizer):
    runtime_of({"address": "asan", "thread": "tsan"}[sanitizer])
    program = compile_emulated("hopper_test", sanitizer)
    for case in ("copies", "ring", "gathered", "handed_over"):
        run = run_emulated(program, case, "shuffled")
        assert (run.returncode, run.stdout) == (0, VALUES[case] + "done\n"), run.stderr[-3000:]


def cutlass() -> Path | None:
    """The headers of CuTe: of the package nvidia-cutlass, or where CUTLASS_PATH says."""
    found = [Path(os.environ["CUTLASS_PATH"], "include")] if "CUTLASS_PATH" in os.environ else []
    try:
        import cutlass_library

        found.append(Path(cutlass_library.__file__).parent / "source" / "include")
    except ImportError:
        pass
    return next((folder for folder in found if (folder / "cute" / "tensor.hpp").exists()), None)


def test_layouts_are_those_of_cute(tmp_path):
    headers, toolkit = cutlass(), Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "include")
    if headers is None:
        pytest.skip("CuTe's headers are not here: pip install nvidia-cutlass, or set CUTLASS_PATH")
    if not (toolkit / "cuda_runtime_api.h").exists():
        pytest.skip("CuTe includes headers of the CUDA toolkit, which was not found: set CUDA_HOME")
    program = tmp_path / "cute_layouts"
    system = [f"-isystem{folder}" for folder in (headers, toolkit, toolkit / "cccl")]
    source = ["-Icsrc/cuda", "-Itests/emulation", *system, "-o", str(program), "tests/emulation/cute_layouts.cpp"]
    subprocess.run([*need_compiler(), "-std=c++20", "-O0", *source], cwd=ROOT, check=True)
    output = subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout
    assert [line for line in output.splitlines() if line and "cast_smem_ptr" not in line] == [
        "fragments 0",
        "accumulators 0 0 0",
        "k-major 0 0 0",
        "mn-major 0 0 0",
    ]
