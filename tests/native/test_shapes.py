"""Random shapes on the native kernels, in the instruction set of this process: values against the reference, and the same bits again.

Tails of panels, whole panels, several stretches of k, and blocks of several panels: what the small calls of tests/ops do not reach.
CMOE_CPU_ISA names another instruction set. The reference in fp64 is the truth, the reference at the tested dtype the baseline.
"""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import cmoe_kernels as cmoe
from benchmarks.compare import assert_close, grads
from cmoe_kernels import native
from tests.sampling import FULL

pytestmark = pytest.mark.skipif(native.library is None, reason=str(native.error))
# Hundreds of random cases find one in which the baseline's largest error is small by luck; in a few numbers it may be right to the last
# bit, and then unity is the scale; of what has no row per token, that of a sum over all tokens, which may cancel.
LUCK, FEW = 3 if FULL else 1, 32
some_shapes = settings(
    max_examples=300 if FULL else 14, deadline=None, derandomize=not FULL, database=None, suppress_health_check=list(HealthCheck)
)

near_panels = st.builds(lambda n, d: max(1, n + d), st.sampled_from([6, 8, 14, 16, 28, 32, 48, 64, 96]), st.integers(-1, 1))
sizes = st.one_of(st.integers(1, 20), near_panels)
depths = st.one_of(sizes, st.sampled_from([255, 256, 257, 258, 511, 513, 600]))
tokens = st.one_of(st.just(0), sizes, st.sampled_from([130, 257]))
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
activations = st.sampled_from(["gelu", "gelu_tanh", "silu", "relu", "relu2"])
experts = st.sampled_from([1, 2, 3, 5, 7])


class Arguments:
    """Random tensors in a dtype, scaled so that every layer's outputs are near unity; and a number of threads."""

    def __init__(self, data, dtype):
        self.generator, self.dtype = torch.Generator().manual_seed(data.draw(st.integers(0, 1 << 20))), dtype
        torch.set_num_threads(data.draw(st.sampled_from([1, 2])))

    def normal(self, *shape, scale=1.0, dtype=None):
        return (torch.randn(shape, generator=self.generator) * scale).to(dtype or self.dtype).requires_grad_()

    def layer(self, data, *shape):
        """A weight, in torch's layout or with its two last dimensions swapped in memory."""
        w = self.normal(*shape, scale=shape[-1] ** -0.5).detach()
        return (w if data.draw(st.booleans()) else w.mT.contiguous().mT).requires_grad_()

    def bias(self, data, *shape):
        return self.normal(*shape) if data.draw(st.booleans()) else None

    def ids(self, high, *shape):
        return torch.randint(high, shape, generator=self.generator)


def check(op, arguments):
    """Forward and all gradients: right, and the same bits when computed again."""
    dtype = next(v.dtype for v in arguments.values() if isinstance(v, torch.Tensor) and v.is_floating_point())

    def call(backend, inputs):
        names = [n for n, v in inputs.items() if isinstance(v, torch.Tensor) and v.requires_grad]
        with cmoe.use_backend(backend):
            y = getattr(cmoe, op)(**inputs)
            upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
            return ["output", *names], [y.detach(), *grads(y, [inputs[n] for n in names], upstream)]

    def double(value):
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            return value
        return value.detach().double().requires_grad_(value.requires_grad)

    names, ours = call("cpu", arguments)
    _, again = call("cpu", arguments)
    _, baseline = call("reference", arguments)
    _, exact = call("reference", {n: double(v) for n, v in arguments.items()})
    for name, got, repeated, base, true in zip(names, ours, again, baseline, exact, strict=True):
        assert torch.equal(got, repeated), f"{name}: other bits again"
        assert got.dtype == base.dtype
        if FULL and true.numel() < FEW:
            summed = 1 if len(true) == len(exact[0]) else len(exact[0])
            scale = max([1, summed**0.5, *true.abs().flatten().tolist()])
            torch.testing.assert_close(got.double(), true, rtol=0, atol=64 * torch.finfo(dtype).eps * scale)
        else:
            assert_close(name, got, true, base, dtype, LUCK)


@some_shapes
@given(st.data())
def test_soft_experts(data):
    a = Arguments(data, data.draw(dtypes))
    T, D, H, outputs, E = (data.draw(s) for s in (tokens, depths, depths, sizes, experts))
    two, grouped = data.draw(st.booleans()), data.draw(st.booleans())
    gate_rows = data.draw(st.integers(1, 4)) if grouped else T
    arguments = {"x": a.normal(T, D), "gates": a.normal(gate_rows, E, dtype=torch.float32)}
    if two:
        arguments |= {
            "w1": a.layer(data, E, H, D),
            "b1": a.bias(data, E, H),
            "w2": a.layer(data, E, outputs, H),
            "b2": a.bias(data, E, outputs),
        }
    else:
        arguments |= {"w1": a.layer(data, E, outputs, D), "b1": a.bias(data, E, outputs)}
    if grouped:
        arguments["group_ids"] = a.ids(gate_rows, T)
    check("soft_experts", arguments | {"activation": data.draw(activations), "recompute": data.draw(st.booleans())})


@some_shapes
@given(st.data())
def test_sparse_experts(data):
    a = Arguments(data, data.draw(dtypes))
    T, D, H, outputs, E = (data.draw(s) for s in (tokens, depths, depths, sizes, experts))
    k, gated = data.draw(st.integers(1, E)), data.draw(st.booleans())
    arguments = {
        "x": a.normal(T, D),
        "weights": a.normal(T, k, dtype=torch.float32) if data.draw(st.booleans()) else None,
        "indices": a.ids(E + 2, T, k) - 1,
        "w1": a.layer(data, E, 2 * H if gated else H, D),
        "b1": a.bias(data, E, 2 * H if gated else H),
        "w2": a.layer(data, E, outputs, H),
        "b2": a.bias(data, E, outputs),
        "gated": gated,
    }
    check("sparse_experts", arguments | {"activation": data.draw(activations), "recompute": data.draw(st.booleans())})


@some_shapes
@given(st.data())
def test_grouped_linear(data):
    a = Arguments(data, data.draw(dtypes))
    T, D, outputs, E = (data.draw(s) for s in (tokens, depths, depths, experts))
    k = data.draw(st.integers(1, 3))
    ends = sorted(data.draw(st.integers(0, T * k)) for _ in range(E))
    arguments = {
        "x": a.normal(T, D),
        "w": a.layer(data, E, outputs, D),
        "b": a.bias(data, E, outputs),
        "offsets": torch.tensor([0, *ends], dtype=torch.int32),
        "k": k,
        "activation": data.draw(st.one_of(st.none(), activations)),
    }
    for name in ("gather_idx", "scatter_idx"):
        arguments[name] = torch.randperm(T * k, generator=a.generator) if data.draw(st.booleans()) else None
    check("grouped_linear", arguments)


@some_shapes
@given(st.data())
def test_task_router(data):
    a = Arguments(data, data.draw(dtypes))
    T, D, R, S, E = (data.draw(s) for s in (tokens, depths, depths, sizes, experts))
    inputs, two, groups = (
        data.draw(st.sampled_from(["task_token", "token", "task"])),
        data.draw(st.booleans()),
        data.draw(st.integers(1, 4)),
    )
    width = {"task_token": S + D, "token": D, "task": S}[inputs]
    hidden = R if two else E
    arguments = {
        "x": None if inputs == "task" else a.normal(T, D),
        "task": None if inputs == "token" else a.normal(groups, S),
        "w1": a.normal(hidden, width, scale=width**-0.5),
        "b1": a.bias(data, hidden),
        "inputs": inputs,
    }
    if two:
        arguments |= {"w2": a.normal(E, R, scale=R**-0.5), "b2": a.bias(data, E)}
    if inputs == "task_token":
        arguments["group_ids"] = a.ids(groups, T)
    check("task_router", arguments | {"activation": data.draw(activations), "recompute": data.draw(st.booleans())})


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_wide_router(dtype, recompute):
    """Hidden units of several strips, whose gradients go to one product under AMX."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape, scale=1.0):
        return (torch.randn(shape, generator=generator) * scale).to(dtype).requires_grad_()

    T, D, S, R, E = 20, 33, 7, 600, 3
    arguments = {
        "x": draw(T, D),
        "task": draw(2, S),
        "w1": draw(R, S + D, scale=(S + D) ** -0.5),
        "b1": draw(R),
        "w2": draw(E, R, scale=R**-0.5),
    }
    check("task_router", arguments | {"group_ids": torch.arange(T) % 2, "recompute": recompute})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", ["soft_experts", "sparse_experts"])
def test_many_experts(op, dtype):
    """E = 256, most of them without a token; and K = E = 16."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(dtype).requires_grad_()

    for number, chosen in ((256, 2), (16, 16)):
        arguments = {"x": draw(9, 8), "w1": draw(number, 5, 8), "b1": draw(number, 5), "w2": draw(number, 6, 5), "b2": draw(number, 6)}
        if op == "soft_experts":
            arguments["gates"] = torch.rand(9, number, generator=generator).requires_grad_()
        else:
            arguments["weights"] = torch.rand(9, chosen, generator=generator).requires_grad_()
            arguments["indices"] = torch.rand(9, number, generator=generator).argsort(-1)[:, :chosen].contiguous()
        check(op, arguments)


@pytest.mark.parametrize("empty", ["T", "D", "H", "O"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", ["soft_experts", "sparse_experts", "grouped_linear"])
def test_a_size_of_zero(op, dtype, empty):
    """Sums over nothing are zero: outputs are the biases that are left, gradients are zero, nothing is unwritten."""
    T, D, H, outputs = (0 if letter == empty else size for letter, size in zip("TDHO", (7, 5, 6, 3), strict=True))
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(dtype).requires_grad_()

    if op == "grouped_linear":
        arguments = {
            "x": draw(T, D),
            "w": draw(2, outputs, D),
            "b": draw(2, outputs),
            "offsets": torch.tensor([0, T // 2, T], dtype=torch.int32),
        }
    else:
        arguments = {"x": draw(T, D), "w1": draw(2, H, D), "b1": draw(2, H), "w2": draw(2, outputs, H), "b2": draw(2, outputs)}
        if op == "soft_experts":
            arguments["gates"] = torch.rand(T, 2, generator=generator).requires_grad_()
        else:
            arguments |= {"weights": torch.rand(T, 1, generator=generator).requires_grad_(), "indices": torch.arange(T)[:, None] % 2}
    check(op, arguments)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_fp32_weights_are_rounded_as_torch_rounds(dtype):
    """To nearest, ties to even, through the largest numbers to infinity: y = 1 w is the rounded w itself, bit for bit."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(1 << 31), 1 << 31, (40_000,), generator=generator).to(torch.int32)
    shift = 16 if dtype == torch.bfloat16 else 13
    ties = (bits[:4000] >> shift << shift) | 1 << (shift - 1)
    values = torch.cat([bits, ties, ties - 1, ties + 1]).view(torch.float32)
    # Most of what fp16 can hold, subnormals among it.
    values = torch.cat(
        [
            values,
            values.frexp()[0].ldexp(torch.randint(-26, 18, values.shape, generator=generator)),
            torch.tensor([torch.inf, -torch.inf, 0.0]),
        ]
    )
    values = values[~values.isnan()]
    if dtype == torch.bfloat16:
        values = values[
            (values.abs() > 2.0**-125) | (values == 0)
        ]  # products of bf16 subnormals are zero where the processor multiplies them
    w = values.reshape(1, -1, 1)
    with cmoe.use_backend("cpu"):
        y = cmoe.soft_experts(torch.ones(1, 1, dtype=dtype), torch.ones(1, 1), w, None)
    assert torch.equal(y[0], values.to(dtype))
