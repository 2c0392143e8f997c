"""The emulator's own tests: what it must compute, and what it must report of a kernel that is wrong."""

import platform

import pytest

from tests.builds import compile_emulated, run_emulated, runtime_of

needs_fibers = pytest.mark.skipif(
    (platform.system(), platform.machine()) != ("Linux", "x86_64"), reason="the emulator switches stacks on x86-64 Linux"
)
pytestmark = [needs_fibers, pytest.mark.costly]
ORDERS = ("forward", "reverse", "shuffled")

# case -> what is printed, with right kernels
VALUES = {
    "products": "0 0 0 0\n",
    "collectives": "32\n",
    "copy": "0 0 0\n",
    "conflicts": "4 4 1 1\n",
    "turns": "8 0 7\n",
    "exit_before_a_barrier": "1\n",
    "halves": "0\n",
    "no_race": "12\n",
}
FAULTS = {
    "barrier_at_two_places": "__syncthreads reached at two places: emulator_test.cpp:",
    "barrier_not_reached": "deadlock, no thread can run:",
    "shuffle_in_a_branch": "the mask names a lane that has exited",
    "two_collectives": "other lanes of the warp are in another collective",
    "lane_not_in_mask": "the calling lane is not in its own mask",
    "too_much_shared": "shared memory: 240000 bytes in one block, at most 232448",
    "misaligned_copy": "cp.async: the global address is not aligned to 16 bytes",
    "misaligned_matrix": "ldmatrix: shared address",
    "not_shared": "not an address of shared memory",
    "empty_grid": "launch: a grid of 0 blocks",
    "too_many_threads": "1025 threads",
}
# case, options -> what is printed: not what the kernel's author meant
WRONG = {
    ("unwritten_shared",): "1 nan",
    ("copy_without_wait",): "nan",
    ("copy_without_wait", "eager"): "3",  # a copy that takes effect at once hides it
    ("copy_over_what_is_read",): "64",
    ("copy_over_what_is_read", "eager", "reverse"): "192",  # and shows this, which the late one hides
    ("order_dependent", "forward"): "63",
    ("order_dependent", "reverse"): "0",
}
SANITIZED = {
    ("address", "overrun_of_shared"): "AddressSanitizer: use-after-poison",
    ("address", "overrun_of_global"): "AddressSanitizer: heap-buffer-overflow",
    ("thread", "race_in_shared"): "ThreadSanitizer: data race",
    ("thread", "race_between_blocks"): "ThreadSanitizer: data race",
    ("thread", "race_with_a_copy"): "ThreadSanitizer: data race",
}


@pytest.fixture(scope="module")
def plain():
    return compile_emulated("emulator_test")


@pytest.mark.parametrize("eager", [(), ("eager",)], ids=["lazy", "eager"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("case", VALUES)
def test_values(plain, case, order, eager):
    assert run_emulated(plain, case, order, *eager).stdout == VALUES[case] + "done\n"


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("case", FAULTS)
def test_faults_are_reported(plain, case, order):
    run = run_emulated(plain, case, order)
    assert run.stdout.startswith("fault: test: ")
    assert FAULTS[case] in run.stdout


@pytest.mark.parametrize("case", WRONG)
def test_what_a_gpu_might_forgive_shows_in_the_numbers(plain, case):
    assert run_emulated(plain, *case).stdout.replace("-nan", "nan") == WRONG[case] + "\ndone\n"


def test_a_stack_that_overruns_stops_there(plain):
    assert run_emulated(plain, "stack_overrun").returncode < 0


@pytest.fixture(scope="module")
def sanitized():
    for name in ("asan", "ubsan", "tsan"):
        runtime_of(name)
    return {sanitizer: compile_emulated("emulator_test", sanitizer) for sanitizer in ("address", "thread")}


@pytest.mark.parametrize(("sanitizer", "case"), SANITIZED)
def test_sanitizers_see_through_the_fibers(sanitized, sanitizer, case):
    run = run_emulated(sanitized[sanitizer], case)
    assert run.returncode != 0
    assert SANITIZED[sanitizer, case] in run.stderr
    assert case in run.stderr, "the report names the kernel"


@pytest.mark.parametrize("case", VALUES)
@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_sanitizers_find_nothing_in_right_kernels(sanitized, sanitizer, case):
    run = run_emulated(sanitized[sanitizer], case, "shuffled")
    assert (run.returncode, run.stdout) == (0, VALUES[case] + "done\n"), run.stderr[-3000:]
