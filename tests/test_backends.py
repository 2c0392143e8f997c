"""The registry, the environment variable, the doctor."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import cmoe_kernels as cmoe
from cmoe_kernels import backends, doctor, native
from tests import forked


def test_every_op_has_a_reference_forward_and_backward():
    for op in backends.OPS:
        for name in (op, f"{op}_backward"):
            assert (name, "reference") in backends._kernels
        assert "reference" in backends.serving(op, "cpu")
        assert backends.serving(op, "xpu") == ["reference"]


def test_a_backend_brings_both_directions_or_neither():
    for op, backend in list(backends._kernels):
        if op.startswith("int8_"):  # for inference
            continue
        other = op.removesuffix("_backward") if op.endswith("_backward") else f"{op}_backward"
        assert (other, backend) in backends._kernels


def test_environment_variable():
    code = "import cmoe_kernels, torch; from cmoe_kernels import backends; print(backends.choose('soft_gate', 'cpu'))"
    assert forked.run(code, CMOE_BACKEND="reference").stdout.strip() == "reference"
    assert forked.run(code, CMOE_BACKEND="").stdout.strip() == backends.serving("soft_gate", "cpu")[0]
    wrong = forked.run(code, CMOE_BACKEND="gpu")
    assert wrong.returncode != 0
    assert "ValueError: CMOE_BACKEND: 'gpu' is not a backend; choose one of reference, cpu, triton, cuda or auto" in wrong.stderr


def test_check_on_device_is_read_from_the_environment():
    code = "import cmoe_kernels.ops.arguments as a; print(a.CHECK_ON_DEVICE)"
    assert [forked.run(code, CMOE_CHECK=v).stdout.strip() for v in ("0", "1", "")] == ["False", "True", "False"]


def test_the_base_package_needs_torch_alone():
    """transformers, numpy and the rest belong to unimed."""
    code = (
        "import sys, cmoe_kernels, cmoe_kernels.doctor; "
        "print([m for m in ('transformers', 'peft', 'safetensors', 'PIL', 'unimed', 'triton', 'omegaconf') if m in sys.modules])"
    )
    assert forked.run(code).stdout.strip() == "[]"


def test_doctor_names_every_op_and_its_backend():
    text = doctor.report()
    for op in backends.OPS:
        line = next(line for line in text.splitlines() if line.startswith(f"{op} "))
        assert backends.choose(op, "cpu") in line
    assert torch.__version__ in text
    with cmoe.use_backend("reference"):
        assert "chosen by use_backend" in doctor.report()


def test_doctor_names_the_instruction_set():
    line = next(line for line in doctor.report().splitlines() if line.startswith("instruction set "))
    sets = native.instruction_sets()
    assert (f"{sets.used} (CMOE_CPU_ISA chooses among {', '.join(sets.available)})" if sets else "none: there is no native library") in line


@pytest.fixture
def gpu(monkeypatch):
    """A GPU that is not there, of the capability asked for."""

    def of(capability, preferred=None):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Some GPU")
        monkeypatch.setattr(native, "cuda_kernels", lambda: native.CudaKernels("sm_80, sm_90a, PTX of compute_80; CUDA 13.0", ""))
        monkeypatch.setattr(backends, "PREFERRED", {"sm_{}{}".format(*capability): preferred or {}})
        monkeypatch.setitem(backends.DEVICE_ORDER, "cuda", ("triton", "cuda", "reference"))
        for name in ("triton", "cuda"):
            monkeypatch.setitem(backends._kernels, ("soft_gate", name), backends._kernels["soft_gate", "reference"])

    uncached = native.gpu_error, backends.preferred
    for function in uncached:
        function.cache_clear()
    yield of
    for function in uncached:
        function.cache_clear()


@pytest.mark.parametrize(("capability", "runs"), [((7, 5), False), ((8, 0), True), ((8, 9), True), ((9, 0), True), ((12, 0), True)])
def test_gpu_kernels_serve_the_capabilities_they_were_made_for(gpu, capability, runs):
    gpu(capability)
    assert backends.serving("soft_gate", "cuda") == (["triton", "cuda", "reference"] if runs else ["reference"])
    with cmoe.use_backend("cuda"):
        if runs:
            assert backends.choose("soft_gate", "cuda") == "cuda"
        else:
            with pytest.raises(RuntimeError, match=r"compute capability 7\.5, the CUDA kernels were compiled for sm_80"):
                backends.choose("soft_gate", "cuda")
    assert ("compute capability" in backends.missing_reason("cuda")) == (not runs)
    if not runs:
        with cmoe.use_backend("triton"), pytest.raises(RuntimeError, match=r"compute capability 7\.5, the Triton kernels need 8\.0"):
            backends.choose("soft_gate", "cuda")


@pytest.mark.parametrize(
    ("built", "capability", "runs"),
    [
        ("sm_90a; CUDA 13.0", (9, 0), True),
        ("sm_90a; CUDA 13.0", (10, 0), False),
        ("sm_86, PTX of compute_86; CUDA 13.0", (8, 0), False),
        ("sm_86, PTX of compute_86; CUDA 13.0", (10, 3), True),
        ("sm_80; CUDA 12.4", (9, 0), False),
        ("sm_100, PTX of compute_100; CUDA 13.0", (10, 0), True),
    ],
)
def test_where_code_runs(built, capability, runs):
    assert native.runs_on(built, *capability) == runs


@pytest.mark.parametrize(("said", "first"), [("unmeasured", "triton"), ("triton", "triton"), ("cuda", "cuda")])
def test_auto_takes_the_gpu_backend_that_was_measured_to_be_faster(gpu, said, first):
    gpu((9, 0), {"soft_gate": {"few": "triton", "many": said}})
    assert [backends.choose("soft_gate", "cuda", tokens=t) for t in (0, 64, 65, None)] == ["triton", "triton", first, first]
    assert backends.serving("soft_gate", "cuda", torch.float64) == ["reference"]
    assert ("triton up to 64 tokens" in doctor._ops("cuda")) == (first == "cuda")


@pytest.mark.parametrize(("many", "graphs"), [("triton", 1), ("cuda", 2)])
def test_compiled_code_asks_for_the_number_of_tokens_only_where_it_decides(gpu, monkeypatch, many, graphs):
    gpu((9, 0), {"soft_gate": {"few": "triton", "many": many}})
    backends.choose("soft_gate", "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # the compiler looks for GPUs itself
    torch._dynamo.reset()
    counter = CompileCounter()

    def f(x):
        return x + ("triton", "cuda").index(backends.choose("soft_gate", "cuda", tokens=x.shape[0]))

    compiled = torch.compile(f, fullgraph=True, backend=counter, dynamic=True)
    for tokens in (8, 40, 100, 3000):
        assert compiled(torch.zeros(tokens))[0] == float(many == "cuda" and tokens > 64)
    assert counter.frame_count == graphs


def test_the_choice_on_a_gpu_is_a_constant_of_a_compiled_function(gpu, monkeypatch):
    gpu((9, 0), {"soft_gate": {"few": "cuda", "many": "cuda"}})
    backends.choose("soft_gate", "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # the compiler looks for GPUs itself
    torch._dynamo.reset()

    def f(x):
        return x + ("cuda", "triton").index(backends.choose("soft_gate", "cuda"))

    x = torch.zeros(2)
    assert torch.equal(torch.compile(f, fullgraph=True, backend="aot_eager")(x), x)


def test_the_table_of_preferred_backends():
    for table in backends.PREFERRED.values():
        assert table.keys() <= set(backends.OPS)
        for of in table.values():
            assert of.keys() <= {"few", "many"}
            assert set(of.values()) <= {"cuda", "triton"}


def test_doctor_names_what_the_cuda_kernels_were_built_for():
    line = next(line for line in doctor.report().splitlines() if line.startswith("CUDA kernels "))
    built, error = native.cuda_kernels()
    assert (built or f"none: {error}") in line
    assert bool(built) != bool(error)
    registered = {op for op, backend in backends._kernels if backend == "cuda"}
    assert bool(registered) == bool(built)


@pytest.mark.parametrize(
    ("built", "wanted", "said"),
    [("sm_80, sm_90a", "", "of sm_90a where rows"), ("sm_80", "", "built without sm_90a"), ("sm_80, sm_90a", "0", "CMOE_CUDA_SM90=0")],
)
def test_doctor_says_whose_products_run_on_sm90(monkeypatch, built, wanted, said):
    monkeypatch.setattr(native, "cuda_kernels", lambda: native.CudaKernels(built, ""))
    monkeypatch.setenv("CMOE_CUDA_SM90", wanted)
    assert said in doctor._products_of_sm90()


def test_doctor_command():
    run = subprocess.run([sys.executable, "-m", "cmoe_kernels"], capture_output=True, text=True, check=False)
    assert run.returncode == 0
    assert "soft_gate" in run.stdout
    wrong = forked.run("import runpy; runpy.run_module('cmoe_kernels', run_name='__main__')", "--all")
    assert wrong.returncode == 2
    assert "takes no arguments, got --all" in wrong.stdout + wrong.stderr


def test_use_backend_inside_a_compiled_function():
    def f(logits):
        with cmoe.use_backend("reference"):
            return cmoe.soft_gate(logits)

    torch._dynamo.reset()
    logits = torch.randn(3, 4)
    assert torch.equal(torch.compile(f, fullgraph=True, backend="aot_eager")(logits), f(logits))
    assert backends._selected == "auto"


def test_a_compiled_function_follows_the_backend(monkeypatch):
    """The choice is guarded on: another backend means another graph, not the old one in silence."""
    used = []

    def recording(logits):
        used.append("triton")
        return backends._kernels["soft_gate", "reference"](logits)

    monkeypatch.setitem(backends.DEVICE_ORDER, "cpu", ("reference", "triton"))
    monkeypatch.setitem(backends._kernels, ("soft_gate", "triton"), recording)
    torch._dynamo.reset()
    compiled = torch.compile(cmoe.soft_gate, fullgraph=True, backend="aot_eager")
    logits = torch.randn(3, 4)
    compiled(logits)
    assert used == []
    with cmoe.use_backend("triton"):
        compiled(logits)
    assert used == ["triton"]
    compiled(logits)
    assert used == ["triton"]


def test_triton_leaves_fp64_to_the_others(monkeypatch):
    logits = torch.randn(3, 4, dtype=torch.float64)
    monkeypatch.setitem(backends.DEVICE_ORDER, "cpu", ("triton", "reference"))
    monkeypatch.setitem(backends._kernels, ("soft_gate", "triton"), lambda logits: logits.new_zeros(logits.shape))
    assert not cmoe.soft_gate(logits.float()).any()
    torch.testing.assert_close(cmoe.soft_gate(logits).sum(-1), torch.ones(3, dtype=torch.float64))
    message = "backend 'triton' has no soft_gate in torch.float64 for device 'cpu'; it is served there by reference"
    with cmoe.use_backend("triton"), pytest.raises(RuntimeError, match=message):
        cmoe.soft_gate(logits)


def test_autocast_around_an_op_does_not_reach_inside():
    """Products of the fp32 logits stay fp32 inside the op, whatever autocast would do to a plain matmul."""
    x, w1, w2 = torch.randn(5, 4), torch.randn(6, 4), torch.randn(3, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16), cmoe.use_backend("reference"):
        under = cmoe.task_router(x, None, w1, None, w2, inputs="token")
    with cmoe.use_backend("reference"):
        plain = cmoe.task_router(x.bfloat16(), None, w1.bfloat16(), None, w2.bfloat16(), inputs="token")
    assert under.dtype == torch.float32
    assert torch.equal(under, plain)


@pytest.mark.parametrize("op", backends.OPS)
def test_public_functions_say_what_they_promise(op):
    text = getattr(cmoe, op).__doc__
    for part in ("Args:", "Returns:", "Raises:", "Deterministic"):
        assert part in text, f"{op} says nothing under {part}"


def test_a_library_of_other_sources_is_left_out(monkeypatch):
    """One from before the schemas were Python's lists no operations: its kernels might take other arguments."""
    for name, value in {"library": None, "error": None, "stale": False, "_module": object}.items():
        monkeypatch.setattr(native, name, value)
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    monkeypatch.setattr(native.importlib.util, "find_spec", lambda name: SimpleNamespace(origin="_C.abi3.so"))
    with pytest.warns(UserWarning, match=r"_C\.abi3\.so was built from other sources, and must be built again; CPU ops run"):
        native._load()
    assert native.stale
    assert native.library is None
