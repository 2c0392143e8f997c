"""The registry, the environment variable, the doctor."""

import subprocess
import sys

import pytest
import torch

import cmoe_kernels as cmoe
from cmoe_kernels import backends, doctor


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    import os

    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | environment, check=False)


def test_every_op_has_a_reference_forward_and_backward():
    for op in backends.OPS:
        for name in (op, f"{op}_backward"):
            assert (name, "reference") in backends._kernels
        assert "reference" in backends.serving(op, "cpu")
        assert backends.serving(op, "xpu") == ["reference"]


def test_a_backend_brings_both_directions_or_neither():
    for op, backend in list(backends._kernels):
        other = op.removesuffix("_backward") if op.endswith("_backward") else f"{op}_backward"
        assert (other, backend) in backends._kernels


def test_environment_variable():
    code = "import cmoe_kernels, torch; from cmoe_kernels import backends; print(backends.choose('soft_gate', 'cpu'))"
    assert python(code, CMOE_BACKEND="reference").stdout.strip() == "reference"
    assert python(code, CMOE_BACKEND="").stdout.strip() == backends.serving("soft_gate", "cpu")[0]
    wrong = python(code, CMOE_BACKEND="gpu")
    assert wrong.returncode != 0
    assert "ValueError: CMOE_BACKEND: 'gpu' is not a backend; choose one of reference, cpu, triton, cuda or auto" in wrong.stderr


def test_check_on_device_is_read_from_the_environment():
    code = "import cmoe_kernels.ops.arguments as a; print(a.CHECK_ON_DEVICE)"
    assert [python(code, CMOE_CHECK=v).stdout.strip() for v in ("0", "1", "")] == ["False", "True", "False"]


def test_the_base_package_needs_torch_alone():
    """transformers, numpy and the rest belong to unimed."""
    code = (
        "import sys, cmoe_kernels, cmoe_kernels.doctor; "
        "print([m for m in ('transformers', 'peft', 'safetensors', 'PIL', 'unimed', 'triton', 'omegaconf') if m in sys.modules])"
    )
    assert python(code).stdout.strip() == "[]"


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
    sets = backends.instruction_sets()
    assert (f"{sets.used} (CMOE_CPU_ISA chooses among {', '.join(sets.available)})" if sets else "none: there is no native library") in line


def test_doctor_command():
    run = subprocess.run([sys.executable, "-m", "cmoe_kernels"], capture_output=True, text=True, check=False)
    assert run.returncode == 0
    assert "soft_gate" in run.stdout
    wrong = subprocess.run([sys.executable, "-m", "cmoe_kernels", "--all"], capture_output=True, text=True, check=False)
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
