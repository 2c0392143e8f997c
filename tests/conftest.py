"""For every test: one thread, a fixed seed, and memory that torch.empty leaves poisoned, so that an unwritten output shows as NaN."""

import time
from collections import defaultdict

import pytest
import torch

from cmoe_kernels import backends, native
from tests import passed, sampling
from tests.emulation import library
from tests.ops.cases import DEVICE

# Files that take a worker of `make test` longest, longest first. They are begun first, so that the last to end is a short one.
LONGEST = (
    *("test_wheel", "unimed/test_train_run", "unimed/test_serve", "native/test_programs", "unimed/test_cli", "native/test_tiers"),
    *("ops/test_promises", "benchmarks/test_gpu_check", "unimed/test_train_processes", "unimed/test_train_killed"),
    *("native/test_sanitized", "integrations/test_projectors", "integrations/test_projectors_training", "integrations/test_experts"),
    *("native/test_sass", "benchmarks/test_results", "unimed/test_data_sample", "unimed/test_report", "unimed/test_evaluate"),
)
SAMPLED = pytest.StashKey[str]()
BEGUN = pytest.StashKey[float]()

if DEVICE != "cpu":  # before the test files are imported: some make tensors for their parameters
    torch.set_default_device(DEVICE)
if backends.INTERPRETED:
    from tests.triton import strict

    strict.install()
if library.WANTED and not library.missing():
    library.install()
try:
    from hypothesis import settings
except ImportError:  # `make gpu-check` installs nothing: the tests that need it are skipped with that reason
    pass
else:
    settings.load_profile("ci")  # the same examples every time, and no limit of time for one


@pytest.fixture(autouse=True)
def _settled():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    # A naive formula may use an operation that has no deterministic form on a GPU; ours are compared bit for bit.
    torch.use_deterministic_algorithms(True, warn_only=DEVICE != "cpu")
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def pytest_make_parametrize_id(val, argname):
    # Not by content: a gzip header holds the second it was made in, and two workers must collect the same names.
    return argname if isinstance(val, bytes) else None


def pytest_addoption(parser):
    parser.addoption("--sample", type=int, metavar="N", help="run at most N cases of each parametrised test (tests/sampling.py)")
    parser.addoption("--part", metavar="I/N", help="run every N-th test from the I-th on: processes of `make gpu-check` share them out")
    parser.addoption("--seconds", type=float, metavar="S", help="begin no test after this time; the rest is skipped with that reason")


def pytest_configure(config):
    config.stash[BEGUN] = time.monotonic()


def pytest_runtest_setup(item):
    seconds = item.config.getoption("--seconds")
    if seconds is not None and time.monotonic() - item.config.stash[BEGUN] > seconds:
        pytest.skip("no time was left")


@pytest.hookimpl(trylast=True)  # after -k, so that its choice is sampled
def pytest_collection_modifyitems(items, config):
    unchanged = passed.reason()
    left = {"full": "" if sampling.FULL else "runs under `make test-full`", "costly": unchanged}
    for item in items:
        for mark, reason in left.items():
            if reason and mark in item.keywords:
                item.add_marker(pytest.mark.skip(reason=reason))
    if (most := config.getoption("--sample")) is not None:
        cases = defaultdict(list)
        for item in items:
            if hasattr(item, "callspec") and not any(map(item.get_closest_marker, ("full", "each"))):
                cases[item.nodeid.partition("[")[0]].append(item)
        left_out = set()
        for name, found in cases.items():
            n = max(2, most // 3) if unchanged and name.startswith(passed.SOURCES) else most
            keep = sampling.chosen(name, [item.callspec.id.split("-") for item in found], n)
            left_out |= set(found) - {found[i] for i in keep}
        _leave_out(items, config, left_out)
        config.stash[SAMPLED] = f"--sample {most}: {len(left_out)} further cases of tests with more are left to `make test-full`"
        if hasattr(config, "workeroutput"):  # a worker of xdist: its main process prints the line
            config.workeroutput["sampled"] = config.stash[SAMPLED]

    places = {f"tests/{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.nodeid.partition("::")[0], len(places)))
    if part := config.getoption("--part"):
        first, step = map(int, part.split("/"))
        _leave_out(items, config, {item for place, item in enumerate(items) if place % step != first - 1})


def _leave_out(items, config, left_out):
    config.hook.pytest_deselected(items=[item for item in items if item in left_out])
    items[:] = [item for item in items if item not in left_out]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    if said := getattr(node, "workeroutput", {}).get("sampled"):
        node.config.stash[SAMPLED] = said


def pytest_terminal_summary(terminalreporter, config):
    if said := config.stash.get(SAMPLED, None):
        terminalreporter.write_line(said)


def pytest_report_header():
    sets = native.instruction_sets()
    found = f"{native.library}, {sets.used or sets.error}" if sets else f"absent ({native.error})"
    return (
        f"cmoe_kernels: native library {found}; GPU: {torch.cuda.is_available()}; tests on {DEVICE}"
        + (
            "; Triton kernels interpreted: opcheck and tracing of one form per op, of all under `make test-full`"
            if backends.INTERPRETED
            else ""
        )
        + ("; CUDA kernels emulated on the CPU, they alone" if library.WANTED else "")
    )
