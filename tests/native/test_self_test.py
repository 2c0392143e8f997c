"""Instruction sets that trap or are wrong: planted in the best one that this machine has, in a library that is linked for these tests."""

import platform
import shutil
import signal

import pytest

from cmoe_kernels import native
from tests import forked
from tests.builds import ROOT, alone_in, build_script, copy_of_tree, product_objects

HERE = list(sets.available) if (sets := native.instruction_sets()) else []
pytestmark = [
    pytest.mark.skipif(native.library is None, reason=str(native.error)),
    pytest.mark.skipif(platform.system() != "Linux", reason="links the library as Linux does"),
    pytest.mark.skipif(len(HERE) == 1, reason=f"there is no instruction set here but {', '.join(HERE)}"),
]
BEST, NEXT = [*HERE, "", ""][:2]

# Two layers, so that a wrong sum shows; fp32, whose kernel is planted.
CALL = """
import sys, threading, warnings
import torch
import cmoe_kernels as c
from cmoe_kernels import native
torch.manual_seed(0)
x, gates, w1, w2 = torch.randn(20, 30), torch.rand(20, 2), torch.randn(2, 40, 30), torch.randn(2, 50, 40)
def right():
    with c.use_backend("reference"):
        expected = c.soft_experts(x, gates, w1, None, w2)
    return torch.allclose(c.soft_experts(x, gates, w1, None, w2), expected, rtol=1e-4, atol=1e-3)
"""


@pytest.fixture(scope="module")
def planted():
    tree, script = copy_of_tree("planted"), build_script()
    objects, tiers = product_objects(), script.tiers_of_compiler()
    table, folder = f"isa_{BEST}", ROOT / "build" / "planted" / "objects"
    source = f"csrc/cpu/gemm/{BEST}.cpp"
    build, command = script.Build(folder), [*script.compile_command(script.torch_folder()), "-Icsrc/cpu"]
    objects[source] = build.compile(source, [*command, *script.flags_of(source, tiers), f"-D{table}={table}_sound"])
    names = [f"-DPLANTED={table}", f"-DSOUND={table}_sound"]
    objects["planted"] = build.compile("tests/native/planted.cpp", [*command, *names])
    library = script.link_library(build, objects.values(), script.torch_folder())
    with alone_in(folder):
        build.run()
        shutil.copyfile(library, tree / "cmoe_kernels" / script.LIBRARY)
    return tree


FAULTHANDLER = "import faulthandler; faulthandler.enable()\n"


def run(tree, code, fault, before="", **environment):
    return forked.run(before + CALL + code, cwd=tree, **{"CMOE_PLANTED": fault, "CMOE_CPU_ISA": ""} | environment)


FAULTS = {
    "wrong": "wrong products of fp32",
    "activation": "wrong activations",
    "wrong int8 weights": "wrong products of int8 weights",
    "wrong wide weights": "wrong products of int8 weights as fp32",
    "illegal instruction": "SIGILL in products of fp32",
    "illegal access": "SIGSEGV in products of fp32",
    **({"wrong int8": "wrong products of int8"} if BEST == "amx" or "_" in BEST else {}),
    **({"wrong few rows": "wrong products of int8 weights in few rows"} if BEST == "amx" or "avx512_" in BEST else {}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_next_instruction_set_serves(planted, fault):
    """With one warning; and the handlers of others, here Python's, are as they were."""
    code = """
print(right(), right(), native.instruction_sets())
from cmoe_kernels import doctor
print(doctor.report())
sys.stdout.flush()
import faulthandler
assert faulthandler.is_enabled()
faulthandler._sigsegv()
"""
    done = run(planted, code, fault, FAULTHANDLER)
    said = f"{BEST} ({FAULTS[fault]})"
    first = done.stdout.splitlines()[0]
    assert first == f"True True {native.InstructionSets(NEXT, HERE[1:], said, '')}"
    assert f"{NEXT} (CMOE_CPU_ISA chooses among {', '.join(HERE[1:])}); left out, failed the self-test: {said}" in done.stdout
    assert done.stderr.count(said) == 1
    assert done.returncode == -signal.SIGSEGV
    assert done.stderr.count("Fatal Python error") == 1
    assert "Fatal Python error: Segmentation fault" in done.stderr


@pytest.mark.parametrize("fault", ["wrong", "illegal instruction"])
def test_an_instruction_set_that_is_named_is_not_replaced(planted, fault):
    done = run(planted, "right()", fault, CMOE_CPU_ISA=BEST)
    assert done.returncode == 1
    assert (
        f"CMOE_CPU_ISA is '{BEST}', which failed its self-test: {BEST} ({FAULTS[fault]}); must be one of {', '.join(HERE[1:])}"
        in done.stderr
    )


def test_the_test_can_be_turned_off(planted):
    done = run(planted, "print(native.instruction_sets().used, right())", "wrong", CMOE_SELF_TEST="0")
    assert done.stdout == f"{BEST} False\n"


def test_a_sound_instruction_set_says_nothing(planted):
    done = run(planted, "print(right(), native.instruction_sets())", "", "import warnings; warnings.simplefilter('error')\n")
    assert (done.stdout, done.stderr) == (f"True {native.InstructionSets(BEST, HERE, '', '')}\n", "")


def test_first_use_from_two_threads(planted):
    code = """
barrier, results = threading.Barrier(2), []
def first():
    barrier.wait()
    results.append(c.soft_experts(x, gates, w1, None, w2))
threads = [threading.Thread(target=first) for _ in range(2)]
[t.start() for t in threads], [t.join() for t in threads]
print(right(), torch.equal(*results), native.instruction_sets().used)
"""
    done = run(planted, code, "illegal instruction")
    assert done.stdout == f"True True {NEXT}\n", done.stderr
    assert done.stderr.count("SIGILL") == 1


# A handler with SA_SIGINFO that says which address trapped.
ADDRESS = """
import ctypes, os
class Action(ctypes.Structure):
    _fields_ = [("handler", ctypes.c_void_p), ("mask", ctypes.c_byte * 128), ("flags", ctypes.c_int), ("restorer", ctypes.c_void_p)]
@ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.POINTER(ctypes.c_int64), ctypes.c_void_p)
def handler(signal, info, context):
    print("trap at", info[2], flush=True)
    os._exit(7)
ctypes.CDLL(None).sigaction(11, ctypes.byref(Action(ctypes.cast(handler, ctypes.c_void_p), flags=4)), None)
"""


@pytest.mark.parametrize(
    ("before", "status", "said"),
    [("", -signal.SIGSEGV, ""), (FAULTHANDLER, -signal.SIGSEGV, "Fatal Python error: Segmentation fault"), (ADDRESS, 7, "trap at 4656")],
    ids=["no_handler", "faulthandler", "address"],
)
def test_a_trap_in_another_thread_is_no_trap_of_the_test(planted, before, status, said, tmp_path):
    """While it runs: the process ends, or a handler that was there before is called."""
    code = """
import ctypes, os, time
def trap():
    while not os.path.exists(os.environ["CMOE_PLANTED_REACHED"]):
        time.sleep(0.01)
    ctypes.string_at(4656)
threading.Thread(target=trap).start()
right()
"""
    done = run(planted, code, "long", before, CMOE_PLANTED_REACHED=str(tmp_path / "reached"))
    assert done.returncode == status, done.stderr
    assert said in done.stdout + done.stderr
    assert ("Fatal" in done.stderr) == (before == FAULTHANDLER)
