"""Planted bugs of the products of sm_90a, caught through the emulator."""

import sys

from tests.mutants import Mutant, Suite
from tests.mutants.cuda_gemm import PRODUCTS

_build = (sys.executable, "-m", "tests.builds", "emulated")
# What a test runs is compiled before it: a mutant that does not compile is no bug that was caught.
MAIN_LOOP = Suite(before=((*_build, "gemm_sm90_test"),))
VALUES = Suite(before=((*_build, "gemm_test", *PRODUCTS, *(f"{product}_sm90" for product in PRODUCTS)),))
_tests = "tests/emulation/test_gemm_sm90.py::test_"
_early, _late, _eager = (f"{_tests}main_loop[{when}-reverse]" for when in ("early", "late", "eager"))


def _values(scenario: str) -> str:
    return f"{_tests}values[{scenario}-bf16]"


def _in(file: str, *tests: str):
    """A mutant of one file, with its tests."""

    def mutant(kind: str, old: str, new: str, *others: str) -> Mutant:
        run = others or tests
        return Mutant(kind, f"csrc/cuda/{file}", old, new, run, MAIN_LOOP if "main_loop" in run[0] else VALUES)

    return mutant


rows = _in("gemm/sm90.cuh", _late)
weight = _in("gemm/wgrad_sm90.cu", _values("large"))
hidden = _in("gemm/dact_gemm_sm90.cu", _values("large"))
descriptor = _in("device/descriptor.h", _late)
maps = _in("device/tensor_map.h", _values("sum"))

MUTANTS = [
    rows("phase", "return step / Tile::stages & 1;", "return 0;"),
    rows("phase", "mbarrier_wait(ring.freed(), ring.parity() ^ 1)", "mbarrier_wait(ring.freed(), ring.parity())"),
    rows("wait", "if (ring.step >= Tile::stages) mbarrier_wait(ring.freed(), ring.parity() ^ 1);", "", _eager),
    rows("wait", "    mbarrier_wait(ring.filled(), ring.parity());\n", ""),
    rows(
        "wait",
        "    wgmma_wait<1>();\n    pin(d);\n    if (i > 0 && speaks) mbarrier_arrive(ring.freed(1));",
        "    if (speaks) mbarrier_arrive(ring.freed());",
        _early,
    ),
    rows("wait", "  wgmma_wait<0>();\n  pin(d);\n", ""),
    rows("sync", "    wgmma_fence();\n", ""),
    rows("order", "  if (!Tile::common && (n > 0 || warpgroup > 0)) mbarrier_wait", "  if (false) mbarrier_wait"),
    rows("order", "      ring.step += steps;\n", ""),
    rows("bytes", "by_threads ? Tile::w_bytes : Tile::stage_bytes", "Tile::stage_bytes"),
    rows("arrivals", "ring.start(by_threads ? 1 + Tile::producers : 1)", "ring.start(1)"),
    rows("swizzle", "((chunk ^ (row & 7)) << 4)", "((chunk ^ (row & 3)) << 4)"),
    rows("index", "warpgroup * (64 * 128)", "warpgroup * (32 * 128)"),
    rows("index", "next = major == Major::k ? k16_along_k : k16_along_mn", "next = k16_along_k"),
    rows("index", "k, width + column, expert)", "k, width + column + 8, expert)"),
    rows("index", "gated && i >= n / 2 ? width - n / 2 : 0", "gated && i > n / 2 ? width - n / 2 : 0"),
    rows("index", "const int matrix = p.x.expert ? e : 0;", "const int matrix = 0;"),
    rows("tail", "left = chunk_bytes<T>(p.depth - at)", "left = 16"),
    rows("epilogue", "j / 2 + j % 2 * (Tile::tiles_n / 2)", "j / 2 + j % 2 * (Tile::tiles_n / 4)"),
    rows("epilogue", "known, place, sums, nullptr", "true, place, sums, nullptr", _values("empty")),
    weight("tail", "const bool last = tile.end - r < Tile::k,", "const bool last = false,", _values("sorted")),
    weight("tail", "row0 + row < end ? source_row", "true ? source_row"),
    weight("swizzle", "((chunk ^ (row & 7)) << 4)", "(chunk << 4)"),
    weight("wait", "mbarrier_wait(ring.filled(), ring.parity());", ""),
    weight(
        "sync",
        "      if (threadIdx.x >= Tile::m) sums[lane] = sum;\n      barrier_sync(1, Tile::consumers);",
        "      if (threadIdx.x >= Tile::m) sums[lane] = sum;",
    ),
    weight("sum", "sum + sums[lane]", "sum"),
    weight(
        "empty expert",
        "float d[Tile::n / 2] = {}, sum = 0.0f;",
        "float d[Tile::n / 2], sum = 0.0f;\n    if (tile.first < tile.end)\n      for (float& x : d) x = 0;",
    ),
    rows("partials", "(p.width + part - 1) / part", "p.width / part", _values("large")),
    descriptor("index", "uint64_t{blocks >> 4} << 16", "uint64_t{blocks >> 5} << 16"),
    descriptor("index", "k16_along_mn = 2048 >> 4", "k16_along_mn = 1024 >> 4"),
    maps("index", "t.matrices > 1 && t.matrix_stride < t.row_stride", "false"),
]
