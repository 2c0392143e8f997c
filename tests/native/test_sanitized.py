"""The op tests on a library built with AddressSanitizer and UndefinedBehaviorSanitizer.

Both end the process at the first fault. Leaks are not looked for: Python and torch hold what they have until the process ends, and
test_native.py measures that calls leak nothing. What rounding leaves behind the parts of our own blocks faults too (csrc/cpu/memory.h).
"""

import platform

import pytest

from tests.builds import build, copy_of_tree, output_of, run_tests, runtime_of, summary_of
from tests.sampling import SAMPLE

pytestmark = pytest.mark.skipif(platform.system() != "Linux", reason="loads the sanitizer's runtime as Linux does")
FLAGS = "-Og -g1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all"
LINK = "-fsanitize=address,undefined"
TESTS = ("tests/ops/test_promises.py", "tests/ops/test_edges.py", "tests/ops/test_int8.py")
TESTS += ("tests/native/test_shapes.py", "tests/test_native.py")
SELECTED = (
    "(cpu and ((test_precision and not torch.float16) or test_edges)) or test_shapes"
    " or (test_int8 and not bfloat16)"
    " or (test_native and (soft_gate or topk_gate or ties or strides))"
)


def run_sanitized(tree, selected=SELECTED):
    preloaded = " ".join(map(runtime_of, ("asan", "ubsan", "stdc++")))
    environment = {"LD_PRELOAD": preloaded, "ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1", "CMOE_TEST_FULL": ""}
    return run_tests(tree, *TESTS, *SAMPLE, "-k", selected, **environment)


@pytest.fixture(scope="module")
def sanitized():
    runtime_of("asan")
    tree = copy_of_tree("sanitized")
    build(tree, FLAGS, LINK)
    return tree


@pytest.mark.costly
def test_the_ops_touch_no_memory_but_their_own(sanitized, capsys):
    run = run_sanitized(sanitized)
    assert run.returncode == 0, output_of(run, 120)
    with capsys.disabled():
        print(f"\nAddressSanitizer and UndefinedBehaviorSanitizer: {summary_of(run)}")


# What is planted, where, and what is said about it. The tests' own values would not show the first.
FAULTS = {
    "scratch too small": ("sparse_experts.cpp", "scratch(threads, bytes + row_ld * size)", "scratch(threads, bytes)", "use-after-poison"),
    "overflow": (
        "sparse_experts.cpp",
        "const Weight& last = op.last();",
        "const Weight& last = op.last();\n  const volatile int64_t most = INT64_MAX;\n  if (most + op.tokens == 0) return;",
        "signed integer overflow",
    ),
}


@pytest.mark.full  # each compiles again
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(sanitized, fault):
    name, old, new, message = FAULTS[fault]
    file = sanitized / "csrc" / "cpu" / name
    text = file.read_text()
    assert text.count(old) == 1
    file.write_text(text.replace(old, new))
    try:
        build(sanitized, FLAGS, LINK)
        run = run_sanitized(sanitized, "test_precision and sparse_experts-mlp-cpu")
    finally:
        file.write_text(text)
    assert run.returncode != 0
    assert message in run.stdout + run.stderr, output_of(run)
