"""What every op promises, over every form of every op and every backend that serves it here."""

import threading

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import cmoe_kernels as cmoe
from benchmarks.compare import grads
from cmoe_kernels import backends
from tests.emulation import library
from tests.ops.cases import CASES, DEVICE, DTYPES, ONE_PER_OP, Case, backends_of, leaves, on_backends, widest
from tests.ops.larger import check, results
from tests.sampling import FULL

# Interpreted and emulated kernels are slow: there CI checks one form per op where the numbers of a form do not matter.
SLOW = (backends.INTERPRETED or library.WANTED) and not FULL
SAMPLED = ONE_PER_OP if SLOW else CASES
# Inputs of a compiled call, and whether its shapes are dynamic; the graph is the same Python whatever serves the op.
COMPILED = [
    (torch.float32, "dynamic"),
    *([] if SLOW else [(torch.bfloat16, "static"), (torch.float32, "static"), (torch.bfloat16, "dynamic")]),
]
# Where kernels are slow: what a kernel itself returns. Schemas, autograd and tracing are the same Python for every backend.
OPCHECKS = {"test_utils": ("test_schema", "test_faketensor")} if SLOW else {}


def output_grad(y: Tensor) -> Tensor:
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64, device="cpu").to(y.device)


def run(case: Case, arguments: dict) -> tuple[Tensor, list[Tensor]]:
    y = case.call(arguments)
    return y, grads(y, [arguments[n] for n in leaves(arguments)], output_grad(y))


@on_backends(CASES, torch.float64)
def test_value_and_gradients_equal_the_naive_formula_in_fp64(case, backend):
    arguments = case.make()
    expected = case.naive(arguments)
    names = leaves(arguments)
    expected_grads = grads(expected, [arguments[n] for n in names], output_grad(expected))
    with cmoe.use_backend(backend):
        y, got = run(case, arguments)
    assert y.dtype == torch.float64
    torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-11)
    for name, ours, theirs in zip(names, got, expected_grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11, msg=lambda m, n=name: f"gradient of {n}: {m}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@on_backends(CASES)
def test_precision(case, backend, dtype):
    arguments = case.make(dtype)
    with cmoe.use_backend(backend):
        found = results(case.op, arguments)
    for name, ours in zip(leaves(arguments), found[1:], strict=True):
        assert ours.dtype == arguments[name].dtype
    check(case.op, arguments, dtype, found)


class Recorder(TorchDispatchMode):
    """Collects the calls of cmoe ops, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "cmoe":
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


@on_backends(SAMPLED)
def test_opcheck(case, backend):
    with cmoe.use_backend(backend), Recorder() as recorder:
        run(case, case.make(torch.float32))
    assert [f._schema.name for f, _, _ in recorder.calls] == [f"cmoe::{case.op}", f"cmoe::{case.op}_backward"]
    for op, args, kwargs in recorder.calls:
        forward = not op._schema.name.endswith("_backward")
        args = tuple(a.detach().clone().requires_grad_(forward and a.is_floating_point()) if isinstance(a, Tensor) else a for a in args)
        torch.library.opcheck(op, args, kwargs, **OPCHECKS)


@on_backends(CASES, torch.float64)
def test_gradcheck(case, backend):
    arguments = case.make()
    names = leaves(arguments)

    def call(*tensors):
        return case.call({**arguments, **dict(zip(names, tensors, strict=True))})

    with cmoe.use_backend(backend):
        torch.autograd.gradcheck(call, tuple(arguments[n] for n in names), fast_mode=True)
        if case in ONE_PER_OP:
            torch.autograd.gradcheck(call, tuple(arguments[n] for n in names))


@pytest.mark.parametrize(("dtype", "shapes"), COMPILED, ids=str)
@on_backends(ONE_PER_OP)
def test_compile_fullgraph(case, backend, dtype, shapes):
    # An op is opaque to Inductor, whatever serves it: one backend meets Inductor, the others Dynamo and AOTAutograd.
    ordinary = not backends.INTERPRETED and not library.WANTED and backend == backends_of(case.op)[0]
    inductor = FULL or (ordinary and (dtype, shapes) in COMPILED[:2])
    torch._dynamo.reset()
    compiled = torch.compile(case.call, fullgraph=True, dynamic=shapes == "dynamic", backend="inductor" if inductor else "aot_eager")
    with cmoe.use_backend(backend):
        for seed in (0, 1):
            arguments = case.make(dtype, seed=seed)
            names = leaves(arguments)
            y, expected = run(case, arguments)
            z = compiled(arguments)
            assert torch.equal(y, z)
            for name, ours, theirs in zip(names, grads(z, [arguments[n] for n in names], output_grad(y)), expected, strict=True):
                assert torch.equal(ours, theirs), name


@on_backends([case for case in SAMPLED if case not in ONE_PER_OP])
def test_every_form_traces_without_a_graph_break(case, backend):
    torch._dynamo.reset()
    arguments = case.make(torch.float32)
    with cmoe.use_backend(backend):
        y, expected = run(case, arguments)
        z = torch.compile(case.call, fullgraph=True, dynamic=True, backend="aot_eager")(arguments)
        assert torch.equal(y, z)
        for ours, theirs in zip(grads(z, [arguments[n] for n in leaves(arguments)], output_grad(y)), expected, strict=True):
            assert torch.equal(ours, theirs)


@on_backends(ONE_PER_OP)
def test_export(case, backend):
    arguments = case.make(torch.float32, grad=False)
    tensors = {n: v for n, v in arguments.items() if isinstance(v, Tensor)}
    settings = {n: v for n, v in arguments.items() if not isinstance(v, Tensor)}

    class Module(torch.nn.Module):
        def forward(self, tensors):
            return case.call({**tensors, **settings})

    with cmoe.use_backend(backend):
        program = torch.export.export(Module(), (tensors,))
        assert any(str(node.target).startswith(f"cmoe.{case.op}") for node in program.graph.nodes)
        assert torch.equal(program.module()(tensors), case.call(arguments))


SAVING = [case for case in CASES if case.op in ("task_router", "grouped_linear", "soft_experts", "sparse_experts")]


@on_backends(SAVING)
def test_gradients_that_forward_did_not_foresee(case, backend):
    """A program that was exported for inputs without gradients saves nothing for backward."""
    arguments = case.make(torch.float32)
    with cmoe.use_backend(backend):
        y, expected = run(case, arguments)
        with torch.no_grad(), Recorder() as recorder:
            case.call(arguments)
        ((op, args, _),) = recorder.calls
        z = op(*args)[0]
        got = grads(z, [arguments[n] for n in leaves(arguments)], output_grad(z))
    assert torch.equal(z, y)
    for name, ours, theirs in zip(leaves(arguments), got, expected, strict=True):
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("backend", backends_of("grouped_linear"))
def test_gradients_through_vmap(backend):
    x, w = torch.randn(3, 5, 4, requires_grad=True), torch.randn(2, 6, 4)
    offsets = torch.tensor([0, 2, 5], dtype=torch.int32)
    with cmoe.use_backend(backend):
        got, expected = (
            torch.autograd.grad(many(lambda x: cmoe.grouped_linear(x, w, None, offsets, activation="gelu")).square().sum(), x)[0]
            for many in (lambda call: torch.vmap(call)(x), lambda call: torch.stack([call(sample) for sample in x]))
        )
    assert torch.equal(got, expected)


@on_backends(CASES)
def test_same_bits_again(case, backend):
    with cmoe.use_backend(backend):
        first = run(case, case.make(torch.float32))
        second = run(case, case.make(torch.float32))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


@on_backends(CASES)
def test_backward_twice_and_saved_tensors_untouched(case, backend):
    arguments = case.make(torch.float32)
    names = leaves(arguments)
    before = {n: v.detach().clone() for n, v in arguments.items() if isinstance(v, Tensor)}
    with cmoe.use_backend(backend):
        y = case.call(arguments)
        inputs = [arguments[n] for n in names]
        first = torch.autograd.grad(y, inputs, torch.ones_like(y), retain_graph=True, allow_unused=True)
        second = torch.autograd.grad(y, inputs, torch.ones_like(y), allow_unused=True)
    for name, a, b in zip(names, first, second, strict=True):
        assert (a is None and b is None) or torch.equal(a, b), name
    assert all(torch.equal(before[n], arguments[n]) for n in before)


@on_backends(CASES)
def test_expanded_gradient(case, backend):
    with cmoe.use_backend(backend):
        arguments = case.make(torch.float32)
        names = leaves(arguments)
        y = case.call(arguments)
        expanded = torch.autograd.grad(y.sum(), [arguments[n] for n in names], retain_graph=True, allow_unused=True)
        plain = torch.autograd.grad(y, [arguments[n] for n in names], torch.ones_like(y), allow_unused=True)
    for name, a, b in zip(names, expanded, plain, strict=True):
        assert (a is None and b is None) or torch.allclose(a, b, rtol=1e-5, atol=1e-6), name


@on_backends(CASES)
def test_non_contiguous_inputs(case, backend):
    plain = case.make(torch.float32)
    strided = case.make(torch.float32)
    for name, value in plain.items():
        if isinstance(value, Tensor) and value.dim() > 1:
            apart = value.detach().transpose(0, -1).contiguous().transpose(0, -1)
            wide = torch.empty(*apart.shape[:-1], 2 * apart.shape[-1], dtype=apart.dtype)[..., ::2].copy_(apart) if name == "x" else apart
            strided[name] = wide.requires_grad_(value.requires_grad)
    with cmoe.use_backend(backend):
        y, expected = run(case, plain)
        z, got = run(case, strided)
    torch.testing.assert_close(z, y)
    assert z.is_contiguous()
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@on_backends([case for case in SAMPLED if len(leaves(case.make())) > 1])
def test_only_the_gradients_asked_for(case, backend):
    """Each argument alone asks for its gradient: it is the same as when all do."""
    dtype = widest(case.op, backend)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    with cmoe.use_backend(backend):
        together = case.make(dtype)
        names = leaves(together)
        _, expected = run(case, together)
        for name, theirs in zip(names, expected, strict=True):
            alone = case.make(dtype)
            for other in names:
                alone[other].requires_grad_(other == name)
            _y, (ours,) = run(case, alone)
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


@on_backends([case for case in CASES if case.op in ("task_router", "grouped_linear", "soft_experts", "sparse_experts")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.full)], ids=str)
def test_fp32_weights_with_half_products(case, backend, dtype):
    """fp32 weights are rounded to the dtype of x; their gradients come back in fp32. The same under autocast, from an fp32 x."""
    rounded = case.make(dtype)
    master = {
        n: v.detach().float().requires_grad_() if n in leaves(rounded) and n not in ("x", "gates", "weights") else v
        for n, v in rounded.items()
    }
    source = "x" if rounded.get("x") is not None else "task"
    master[source] = rounded[source]
    with cmoe.use_backend(backend):
        y, expected = run(case, rounded)
        z, got = run(case, master)
        assert z.dtype == y.dtype
        torch.testing.assert_close(z, y, rtol=2e-2, atol=2e-2)
        for name, ours, theirs in zip(leaves(rounded), got, expected, strict=True):
            assert ours.dtype == master[name].dtype
            torch.testing.assert_close(ours, theirs.to(ours.dtype), rtol=5e-2, atol=5e-2, msg=lambda m, n=name: f"{n}: {m}")
        full = {**master, source: rounded[source].detach().float().requires_grad_()}
        with torch.autocast(DEVICE, dtype=dtype):
            a = case.call(full)
        assert a.dtype == y.dtype
        assert torch.equal(a, z)
        for name, ours, theirs in zip(leaves(rounded), grads(a, [full[n] for n in leaves(rounded)], output_grad(a)), got, strict=True):
            assert ours.dtype == full[name].dtype
            torch.testing.assert_close(ours, theirs.to(ours.dtype), rtol=1e-6, atol=1e-6)


@on_backends(ONE_PER_OP)
def test_second_derivative_is_refused(case, backend):
    arguments = case.make(widest(case.op, backend))
    with cmoe.use_backend(backend):
        first = torch.autograd.grad(case.call(arguments).square().sum(), arguments[leaves(arguments)[0]], create_graph=True)[0]
    with pytest.raises(RuntimeError, match=f"cmoe::{case.op}_backward has no second derivative"):
        first.sum().backward()


FORWARD = "has no forward-mode derivative"


@on_backends(ONE_PER_OP)
def test_forward_mode_is_refused(case, backend):
    arguments = case.make(torch.float32)
    name = leaves(arguments)[0]
    with cmoe.use_backend(backend), forward_ad.dual_level():
        arguments[name] = forward_ad.make_dual(arguments[name].detach(), torch.ones_like(arguments[name]))
        with pytest.raises(RuntimeError, match=f"cmoe::{case.op} {FORWARD}"):
            case.call(arguments)


def test_transforms_of_forward_mode_are_refused():
    x = torch.randn(3, 4)
    rows = torch.vmap(lambda row: cmoe.soft_gate(row[None])[0])
    leaf = x.clone().requires_grad_()
    y = cmoe.soft_gate(leaf)
    for call in (cmoe.soft_gate, rows, torch.compile(cmoe.soft_gate, backend="aot_eager")):
        with pytest.raises(RuntimeError, match=f"soft_gate {FORWARD}"):
            torch.func.jvp(call, (x,), (x,))
    for transform in (torch.func.jacfwd(cmoe.soft_gate), lambda x: torch.func.linearize(cmoe.soft_gate, x)):
        with pytest.raises(RuntimeError, match=f"soft_gate {FORWARD}"):
            transform(x)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=f"soft_gate_backward {FORWARD}"):
        torch.autograd.grad(y, leaf, forward_ad.make_dual(x, x))
    of_another, tangent = torch.func.jvp(lambda t: t * rows(x), (torch.tensor(2.0),), (torch.tensor(1.0),))
    assert torch.equal(2 * tangent, of_another)


@pytest.mark.parametrize("case", ONE_PER_OP, ids=str)
def test_backward_runs_on_the_backend_of_its_forward(case, monkeypatch):
    """Also outside the context, and on another thread. The Triton slot is lent to a counting copy of the reference."""
    calls = []

    def counting(name):
        kernel = backends._kernels[name, "reference"]

        def count(*arguments):
            calls.append((name, threading.current_thread().name))
            return kernel(*arguments)

        return count

    monkeypatch.setitem(backends.DEVICE_ORDER, DEVICE, ("reference", "triton"))
    for name in (case.op, f"{case.op}_backward"):
        monkeypatch.setitem(backends._kernels, (name, "triton"), counting(name))
    arguments = case.make(torch.float32)
    inputs = [arguments[n] for n in leaves(arguments)]
    with cmoe.use_backend("triton"):
        y = case.call(arguments)
    torch.autograd.grad(y.sum(), inputs, retain_graph=True, allow_unused=True)

    def elsewhere():
        with cmoe.use_backend("reference"):
            torch.autograd.grad(y.sum(), inputs, allow_unused=True)

    thread = threading.Thread(target=elsewhere, name="elsewhere")
    thread.start()
    thread.join()
    assert calls == [(case.op, "MainThread"), (f"{case.op}_backward", "MainThread"), (f"{case.op}_backward", "elsewhere")]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_fakes_on_a_device_that_is_not_there(case):
    """What the fakes of both directions say of shape, dtype, stride and device is what the ops return."""
    with Recorder() as recorder:
        run(case, case.make(torch.bfloat16))
    for op, args, _ in recorder.calls:
        real = op(*args)
        with FakeTensorMode():
            fake = op(*(torch.empty(a.shape, dtype=a.dtype, device="cuda") if isinstance(a, Tensor) else a for a in args))
        for r, f in zip(*((v,) if isinstance(v, Tensor) else v for v in (real, fake)), strict=True):
            assert (f.shape, f.dtype, f.stride(), f.device.type) == (r.shape, r.dtype, r.stride(), "cuda")
