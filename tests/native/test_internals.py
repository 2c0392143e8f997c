"""What no op shows: how panels are packed, products of panels, conversions bit by bit, activations, the pool of memory, the self-test.

By a pybind11 module over the library's own object files, internals.cpp, compiled where these tests run.
"""

import importlib.util
import os
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch

from cmoe_kernels import native
from cmoe_kernels.ops.activation import activate
from tests.builds import CORE, ROOT, alone_in, build_script, emulated_tiers, need_compiler, product_objects, tiers_with_emulation

pytestmark = pytest.mark.skipif(native.library is None, reason=str(native.error))
SIDES = {"rows": 0, "columns": 1}
DTYPES = ("float32", "bfloat16")
ACTIVATIONS = ("none", "gelu", "gelu_tanh", "silu", "relu", "relu2")  # in the order of csrc/types.h


def tiers():
    here = native.instruction_sets().available if native.library else ["generic"]
    return tiers_with_emulation(dict.fromkeys([*here, *emulated_tiers()]))


@pytest.fixture(scope="module")
def internals():
    pybind11 = pytest.importorskip("pybind11", reason="pybind11 is not installed")
    script, compiler = build_script(), need_compiler()
    headers = sysconfig.get_paths()["include"]
    if not Path(headers, "Python.h").exists():
        pytest.skip(f"Python's headers are not in {headers}")
    used = [path for source, path in product_objects(emulate=True).items() if "/gemm/" in source or Path(source).stem in CORE]
    os.chdir(ROOT)
    build = script.Build(Path("build", "programs", "internals"))
    flags = ["-c", "-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-Icsrc/cpu", f"-I{headers}", f"-I{pybind11.get_include()}"]
    here = script.flags_of("csrc/cpu/dispatch.cpp", tiers_with_emulation(script.tiers_of_compiler()))
    with alone_in(build.folder):
        objects = [*used, build.compile("tests/native/internals.cpp", [*compiler, *flags, *here])]
        module = build.link("internals.so", [*compiler, "-shared", "-pthread"], objects)
        build.run()
    spec = importlib.util.spec_from_file_location("internals", ROOT / module)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture(params=tiers())
def tier(request, internals):
    return request.param


@pytest.fixture(params=DTYPES)
def kernel(request, internals, tier):
    try:
        return internals.Kernel(tier, request.param)
    except ValueError as reason:
        pytest.skip(str(reason))


def as_panel(kernel, side, matrix):
    """[lanes, k] in the order of a panel, zeros around it: written down from csrc/cpu/gemm/isa.h and amx.cpp."""
    width, k = kernel.width(side), kernel.padded(matrix.shape[1])
    whole = np.zeros((width, k), matrix.dtype)
    whole[: matrix.shape[0], : matrix.shape[1]] = matrix
    if kernel.row_major[side]:
        return whole.tobytes()
    if side == 1 and kernel.k_step == 32:  # AMX: tiles of 16 lanes, pairs along k
        return whole.reshape(width // 16, 16, k // 32, 16, 2).transpose(2, 0, 3, 1, 4).tobytes()
    return whole.reshape(width, k // kernel.k_step, kernel.k_step).transpose(1, 0, 2).tobytes()


def elements(kernel, numbers):
    """Numbers as elements of a panel: fp32, or the bits of bf16."""
    wide = numbers.astype(np.float32)
    return wide if kernel.element == 4 else torch.from_numpy(wide).bfloat16().view(torch.uint16).numpy()


@pytest.mark.parametrize("along_lanes", [False, True], ids=["along_k", "along_lanes"])
@pytest.mark.parametrize("side", SIDES.values(), ids=SIDES.keys())
def test_each_value_lies_where_a_product_reads_it(kernel, side, along_lanes):
    generator = np.random.default_rng(0)
    for lanes in sorted({1, max(kernel.width(side) - 1, 1), kernel.width(side)}):
        for k in (1, kernel.k_step, kernel.k_step + 1, 61):
            matrix = elements(kernel, generator.integers(-99, 100, (lanes, k)))
            packed = kernel.pack(side, np.ascontiguousarray(matrix.T) if along_lanes else matrix, along_lanes)
            assert packed == as_panel(kernel, side, matrix), (lanes, k)


@pytest.mark.parametrize("resident", [0, 1], ids=["rows_resident", "columns_resident"])
def test_a_product_of_panels(kernel, resident):
    """Of integers, whose sums are exact; and once more on top of the first."""
    generator = np.random.default_rng(1)
    rows, columns = kernel.width(0), kernel.width(1)
    for k in (1, kernel.k_step + 1, 61):
        a, b = generator.integers(-3, 4, (rows, k)), generator.integers(-3, 4, (columns, k))
        panels = [as_panel(kernel, side, elements(kernel, m)) for side, m in enumerate((a, b))]
        for times in (1, 2):
            sums = kernel.multiply(*panels, k, rows if resident == 0 else columns, resident, times)
            assert (sums == times * (a @ b.T)).all(), (k, times)


def same_bits(ours, theirs):
    """NaN for NaN, whatever its payload."""
    return bool(((ours.view(torch.int32) == theirs.view(torch.int32)) | (torch.isnan(ours) & torch.isnan(theirs))).all())


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_conversions_are_those_of_torch(internals, tier, half):
    name = str(half).removeprefix("torch.")
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16)
    wide = torch.from_numpy(internals.convert(tier, name, every.numpy(), "float32"))
    assert same_bits(wide, every.view(half).float())
    # Each half, those between two of them, and any bits.
    generator = torch.Generator().manual_seed(0)
    between = (wide[1:].double() + wide[:-1].double()).div(2).float()
    values = torch.cat([wide, between, torch.randint(-(1 << 31), 1 << 31, (1 << 16,), generator=generator).int().view(torch.float32)])
    ours = torch.from_numpy(internals.convert(tier, "float32", values.numpy(), name)).view(half)
    if half == torch.bfloat16 and tier in ("avx512_bf16", "amx"):  # the instruction takes subnormal numbers for zeros
        values = torch.where(values.abs() < torch.finfo(torch.float32).tiny, 0 * values, values)
    assert same_bits(ours.float(), values.to(half).float())


@pytest.mark.parametrize("activation", ACTIVATIONS[1:])
def test_activations(internals, tier, activation):
    """Within four roundings of what goes in, over all numbers of bf16 up to 3e4."""
    u = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16).float()
    u = u[u.abs() < 3e4]
    h, again, slope = (torch.from_numpy(x) for x in internals.activate(tier, ACTIVATIONS.index(activation), u.numpy()))
    exact = u.double().requires_grad_()
    value = activate(activation, exact, False)
    (derivative,) = torch.autograd.grad(value.sum(), exact)
    limit = 4 * torch.finfo(torch.float32).eps * (1 + u.double().abs())
    limit = limit * (1 + u.double().abs()) if activation == "relu2" else limit
    assert torch.equal(h, again)
    assert ((h - value).abs() <= limit).all()
    assert ((slope - derivative).abs() <= limit).all()


def test_the_self_test_passes(internals, tier):
    assert internals.self_test(tier) == ""


def test_memory_of_the_pool(internals):
    """Memory that is held is given to no other request. Memory that was given back serves the next one."""
    if not internals.pool_serves():
        pytest.skip("the pool is off here")
    size = 40 << 20
    first, length = internals.take(size)
    second, _ = internals.take(size)
    assert length >= size
    assert abs(first - second) >= size
    assert first % 64 == 0
    internals.give_back(first, length)
    third, again = internals.take(size - (1 << 20))
    assert (third, again >= size - (1 << 20)) == (first, True)
    internals.give_back(third, again)
    internals.give_back(second, length)


@pytest.mark.parametrize("threads", [1, 2, 3, 7, 64])
def test_shares_cover_all_once(internals, threads):
    for n in (0, 1, 5, 64, 1000):
        shares = [internals.share(n, i, threads) for i in range(threads)]
        assert [i for first, last in shares for i in range(first, last)] == list(range(n))
        assert max(last - first for first, last in shares) - min(last - first for first, last in shares) <= 1
