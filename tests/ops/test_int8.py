"""int8_experts and int8_router: the native kernels against their twin in plain PyTorch, with activations of both kinds where both run."""

import itertools
import math

import pytest
import torch

from cmoe_kernels import backends, native
from cmoe_kernels.ops import int8
from cmoe_kernels.ops.int8 import quantise, reference

pytestmark = pytest.mark.skipif(native.library is None, reason=str(native.error))
PRODUCTS = native.library is not None and native.int8_kernels() is not None and native.int8_kernels().products
# 0: all rows are quantised. FEW: those of experts with more rows.
FLOAT_ROWS = [int8.MANY, 0, int8.FEW] if PRODUCTS else [int8.MANY]
CPU = torch.device("cpu")


def packed(w: torch.Tensor, parts: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    q, scale = quantise.quantise_weight("w", w)
    return quantise.pack(q, quantise.layout(CPU, w.shape[-1]), parts), scale


class Layers:
    def __init__(self, experts: int, inputs: int, hidden: int, outputs: int, gated: bool, bias: bool, single: bool = False) -> None:
        first = outputs if single else 2 * hidden if gated else hidden
        self.w1, self.scale1 = packed(torch.randn(experts, first, inputs) * inputs**-0.5, 2 if gated else 1)
        self.b1 = torch.randn(experts, first) if bias else None
        self.w2, self.scale2 = (None, None) if single else packed(torch.randn(experts, outputs, hidden) * hidden**-0.5)
        self.b2 = torch.randn(experts, outputs) if bias and not single else None
        self.gated = gated

    def run(self, backend, x, weights, indices, group_ids=None, activation="gelu", float_rows=int8.MANY):
        arguments = x, weights, indices, self.w1, self.scale1, self.b1, self.w2, self.scale2, self.b2, group_ids, activation, self.gated
        return backends.run("int8_experts", backend, CPU, *arguments, float_rows)

    def check(self, x, weights, indices, group_ids=None, activation="gelu", float_rows=int8.MANY):
        got = self.run("cpu", x, weights, indices, group_ids, activation, float_rows)
        want = self.run("reference", x, weights, indices, group_ids, activation, float_rows)
        assert got.dtype == x.dtype
        # A value of h that rounds to the other of two integers costs half a step.
        share = {torch.float32: 1e-5 if float_rows == int8.MANY else 3e-3, torch.bfloat16: 4e-3, torch.float16: 3e-3}[x.dtype]
        assert (got.float() - want.float()).norm() <= share * want.float().norm() + 1e-6
        return got


@pytest.mark.parametrize("float_rows", FLOAT_ROWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("tokens", "sizes"),
    [(1, (3, 70, 37, 50)), (2, (5, 64, 64, 64)), (33, (3, 20, 70, 33)), (70, (2, 600, 130, 7)), (6, (2, 20, 1100, 1030))],
)
@pytest.mark.parametrize("single", [False, True])
def test_all_experts(tokens, sizes, dtype, float_rows, single):
    torch.manual_seed(0)
    layers = Layers(*sizes, gated=False, bias=True, single=single)
    x, gates = torch.randn(tokens, sizes[1]).to(dtype), torch.rand(tokens, sizes[0])
    layers.check(x, gates, None, float_rows=float_rows)
    layers.check(x, gates[:1], None, float_rows=float_rows)
    layers.check(x, gates[:1].expand(2, -1), None, torch.arange(tokens) % 2, float_rows=float_rows)


@pytest.mark.parametrize("float_rows", FLOAT_ROWS)
@pytest.mark.parametrize(("gated", "bias"), itertools.product((False, True), (False, True)))
@pytest.mark.parametrize("tokens", [1, 3, 60])
def test_chosen_experts(tokens, gated, bias, float_rows):
    torch.manual_seed(1)
    layers = Layers(4, 70, 37, 50, gated=gated, bias=bias)
    x, weights, indices = torch.randn(tokens, 70), torch.rand(tokens, 3), torch.randint(-1, 5, (tokens, 3))
    layers.check(x, weights, indices, activation="silu", float_rows=float_rows)
    layers.check(x, None, indices % 2, activation="relu", float_rows=float_rows)  # experts without a row; one expert twice
    layers.check(x, weights[:1], indices[:1], torch.zeros(tokens, dtype=torch.int64), float_rows=float_rows)
    with pytest.raises(RuntimeError, match=r"indices holds 9, must be in -1..4 \(4 experts"):
        layers.run("cpu", x, weights, torch.full_like(indices, 9))


@pytest.mark.parametrize("float_rows", FLOAT_ROWS)
@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_router(tokens, float_rows):
    torch.manual_seed(2)
    w1, scale1 = packed(torch.randn(90, 70) / 8)
    x, bias, w2 = torch.randn(tokens, 70), torch.randn(3, 90), torch.randn(5, 90)
    for group_ids, b2 in ((None, None), (torch.arange(tokens) % 3, torch.randn(5))):
        rest = x, w1, scale1[None], bias if group_ids is not None else bias[:1], w2, b2, group_ids, "gelu", float_rows
        got, want = backends.run("int8_router", "cpu", CPU, *rest), reference.int8_router(*rest)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)


def test_no_token():
    layers = Layers(3, 20, 30, 40, gated=False, bias=True)
    assert layers.check(torch.randn(0, 20), torch.rand(0, 3), None).shape == (0, 40)
    assert layers.check(torch.randn(0, 20), torch.rand(0, 2), torch.zeros(0, 2, dtype=torch.int64)).shape == (0, 40)


@pytest.mark.parametrize("float_rows", FLOAT_ROWS)
@pytest.mark.parametrize(("tokens", "value"), [(9, torch.nan), (3, torch.nan), (3, torch.inf), (3, -torch.inf)])
def test_a_row_that_is_not_finite_spoils_itself_only(tokens, value, float_rows):
    torch.manual_seed(3)
    layers = Layers(2, 20, 30, 40, gated=False, bias=True)
    x = torch.randn(tokens, 20)
    x[1, 3] = value
    y = layers.run("cpu", x, torch.rand(tokens, 2), None, float_rows=float_rows)
    assert y.isfinite().all(1).tolist() == [t != 1 for t in range(tokens)]
    if math.isnan(value):
        assert y[1].isnan().all()


@pytest.mark.parametrize("size", [1, 1e30, 1e-30, 1e-42])
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5])
def test_few_rows_are_as_exact_as_fp32(tokens, size):
    """Some kernels multiply them as fixed point numbers, with a scale for some neighbours: these may differ in size."""
    torch.manual_seed(6)
    layers = Layers(2, 530, 1, 70, gated=False, bias=False, single=True)
    x = torch.randn(tokens, 530) * torch.rand(tokens, 530) ** 9 * size
    y = layers.run("cpu", x, torch.ones(tokens, 2), None)
    w = quantise.unpack(layers.w1, 70, 530).double() * layers.scale1.double()[..., None]
    error = (y - torch.einsum("td,eod->to", x.double(), w)).abs()
    most = torch.einsum("td,eod->to", x.double().abs(), w.abs())
    assert (error <= 2**-20 * most + 1e-41).all()


def test_the_number_of_threads_changes_nothing_of_experts():
    torch.manual_seed(4)
    layers = Layers(3, 70, 100, 130, gated=True, bias=True)
    x, weights, indices = torch.randn(40, 70), torch.rand(40, 2), torch.randint(0, 3, (40, 2))
    threads, found = torch.get_num_threads(), []
    for n in (1, 3):
        torch.set_num_threads(n)
        found.append([layers.run("cpu", x, weights, indices, float_rows=rows) for rows in FLOAT_ROWS])
    torch.set_num_threads(threads)
    assert all(map(torch.equal, *found))


def test_what_memory_would_suffer_from_is_refused():
    layers = Layers(2, 20, 30, 40, gated=False, bias=True)
    x, gates = torch.randn(3, 20), torch.rand(3, 2)
    whole = layers.w1
    for wrong in (whole[:, :-1], whole[:, :, :-1], whole[..., :-1, :], whole.to(torch.uint8)):
        layers.w1 = wrong.contiguous()
        with pytest.raises(RuntimeError, match="w1 has shape"):
            layers.run("cpu", x, gates, None)
    layers.w1, layers.scale1 = whole, layers.scale1[:, :-1]
    with pytest.raises(RuntimeError, match=r"bias has shape|w1 has shape"):
        layers.run("cpu", x, gates, None)
    if not PRODUCTS:
        with pytest.raises(RuntimeError, match=r"float_rows is 0, must be at least 3: the instruction set .* has no int8 products"):
            Layers(2, 20, 30, 40, gated=False, bias=True).run("cpu", x, gates, None, float_rows=0)
