"""The strict layer sees what it says it sees: planted faults are caught, and bfloat16 rounds as torch does."""

import pytest
import torch

from cmoe_kernels import backends

if not backends.INTERPRETED:
    pytest.skip("for the interpreter's process (TRITON_INTERPRET=1)", allow_module_level=True)

import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

from tests.triton import strict


@triton.jit
def _copy(x, y, N, SHIFT: tl.constexpr, MASKED: tl.constexpr, OTHER: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if MASKED:
        v = tl.load(x + i, i < N, other=0.0) if OTHER else tl.load(x + i, i < N)
    else:
        v = tl.load(x + i)
    tl.store(y + i + SHIFT, v, i < N - SHIFT if MASKED else None)
    if MASKED and not OTHER:
        tl.store(y + i, v, i < BLOCK)


def copy(n, size, shift=0, masked=True, other=True):
    x, y = torch.ones(n), torch.zeros(size)
    _copy[(triton.cdiv(n, 8),)](x, y, n, shift, masked, other, 8)
    return y


def test_a_load_past_the_end_is_an_error():
    copy(13, 13)
    with pytest.raises(InterpreterError, match=r"load out of bounds by program \(1, 0, 0\): 3 of 8 lanes"):
        copy(13, 16, masked=False)


def test_a_store_past_the_end_is_an_error():
    with pytest.raises(InterpreterError, match="store out of bounds"):
        copy(16, 15, masked=False)


def test_lanes_without_other_are_poisoned():
    assert copy(5, 8, other=False)[5:].isnan().all()


@triton.jit
def _overlap(y, STEP: tl.constexpr):
    tl.store(y + tl.program_id(0) * STEP + tl.arange(0, 4), tl.zeros((4,), tl.float32))


def test_two_programs_on_the_same_bytes_are_a_race():
    _overlap[(3,)](torch.zeros(12), 4)
    with pytest.raises(InterpreterError, match="race: store by program"):
        _overlap[(3,)](torch.zeros(12), 3)


@triton.jit
def _add(y, v):
    tl.atomic_add(y, tl.load(v))


def test_atomics_are_for_integers():
    y = torch.zeros(1, dtype=torch.int32)
    _add[(5,)](y, torch.ones(1, dtype=torch.int32))
    assert y == 5
    with pytest.raises(InterpreterError, match="an atomic on floats"):
        _add[(5,)](torch.zeros(1), torch.ones(1))


@triton.jit
def _in_turn(turn, order):
    me = tl.program_id(0)
    while tl.atomic_add(turn, 0) != me:
        pass
    tl.store(order + me, me)
    tl.atomic_add(turn, 1)


@pytest.mark.parametrize("seed", range(3))
def test_programs_that_wait_for_each_other_finish(seed):
    turn, order = torch.zeros(1, dtype=torch.int32), torch.full((5,), -1, dtype=torch.int32)
    with strict.schedule("shuffle", seed):
        _in_turn[(5,)](turn, order)
    assert order.tolist() == list(range(5))


@triton.jit
def _multiply(x, y, z, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(z + i, tl.load(x + i) * tl.load(y + i))


@triton.jit
def _matmul(x, y, z, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)[:, None]
    j = tl.arange(0, BLOCK)[None, :]
    product = tl.dot(tl.load(x + i * BLOCK + j), tl.load(y + i * BLOCK + j))
    tl.store(z + i * BLOCK + j, product.to(z.dtype.element_ty))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_floats_round_as_in_torch(dtype):
    x, y = torch.randn(2, 1024).to(dtype)
    z = torch.empty_like(x)
    _multiply[(1,)](x, y, z, 1024)
    assert torch.equal(z, x * y)
    a, b = x.view(32, 32), y.view(32, 32)
    c = torch.empty_like(a)
    _matmul[(1,)](a, b, c, 32)
    exact = (a.double() @ b.double()).to(dtype)
    assert (c == exact).float().mean() > 0.99
    torch.testing.assert_close(c, exact)
