"""Planted bugs of the CUDA products and of what lies between them, caught through the emulator."""

import sys

from tests.mutants import Mutant, Suite

PRODUCTS = ("grouped_gemm", "dact_gemm", "wgrad")

# Compiled before the tests, which would do it themselves: a mutant that does not compile is no bug that was caught.
EMULATED = Suite(before=((sys.executable, "-m", "tests.builds", "emulated", "gemm_test", *PRODUCTS, "without_sm90"),))
_gemm = "tests/emulation/test_gemm.py::test_"


def _values(scenario: str, dtype: str = "bf16") -> str:
    return f"{_gemm}values_and_bank_conflicts[{scenario}-{dtype}]"


def _orders(scenario: str, dtype: str = "bf16") -> str:
    return f"{_gemm}no_order_of_threads_and_no_moment_of_copies_changes_a_bit[{scenario}-{dtype}]"


def _in(file: str, *tests: str):
    """A mutant of one file, with its tests."""
    return lambda kind, old, new, *others: Mutant(kind, f"csrc/cuda/{file}", old, new, others or tests, EMULATED)


tile = _in("gemm/tile.cuh", _values("sparse"))
ring = _in("gemm/ring.cuh", _values("sparse"))
schedule = _in("gemm/schedule.cuh", _values("sparse"))
rows = _in("gemm/row_gemm.cuh", _values("sparse"))
epilogue = _in("gemm/epilogue.cuh", _values("sparse"))
weight = _in("gemm/wgrad.cu", _values("sparse"))
activation = _in("activation.cuh", _values("sparse"))

MUTANTS = [
    tile("swizzle", "(chunk ^ (lane >> 1 & 3))", "(chunk ^ (lane & 3))"),
    tile("swizzle", "((chunk ^ (k & 7)) << 4)", "((chunk ^ (k & 3)) << 4)", _values("transposed")),
    tile("fragment", "(wm + 16 * i) / 8 + (lane >> 3 & 1)", "(wm + 16 * i) / 8 + (lane >> 4)"),
    tile("tail", "left >= per_chunk<T> ? 16 :", "left > 0 ? 16 :", _values("padded")),
    tile("dtype", "v[4 * i + 3] = from_float<T>(f.w)", "v[4 * i + 3] = from_float<T>(f.z)", _values("wide")),
    ring("wait", "cp_async_wait<Tile::stages - 2>();", "cp_async_wait<Tile::stages - 1>();"),
    ring("sync", "    __syncthreads();\n    if (step + ahead < steps)", "    if (step + ahead < steps)"),
    ring(
        "ring too short",
        "constexpr int ahead = Tile::stages - 1;",
        "constexpr int ahead = Tile::stages;",
        _values("deep"),
    ),
    ring("sync", "  cp_async_wait<0>();\n  __syncthreads();\n}", "  cp_async_wait<0>();\n}", _orders("large")),
    ring("index", "if (i < 0 || i >= rows) return -1;", "", _values("bad")),
    schedule("empty expert", "if (before_[middle] <= row)", "if (before_[middle] < row)"),
    schedule("carry", "v += carry;", "", _values("many")),
    schedule(
        "rows of none",
        "e < groups_.experts ? groups_.offsets[e + 1] : static_cast<int>(groups_.rows)",
        "groups_.offsets[e < groups_.experts ? e + 1 : e]",
    ),
    schedule("tail", "height = min(together, rows - first)", "height = together", _values("transposed")),
    rows(
        "tail",
        "read_ >> i & 1 ? chunk_bytes<T>(left - per_chunk<T> * chunk) : 0);\n      a_[i]",
        "read_ >> i & 1 ? 16 : 0);\n      a_[i]",
        _values("padded"),
    ),
    rows("gated", "column + (is_up(p.gated, lane) ? p.width : 0);", "column;", _values("gated")),
    rows(
        "next expert",
        "b_[i] += p_.w.expert - (b_along_lanes ? k_ * p_.w.input : k_);",
        "b_[i] += p_.w.expert - k_;",
        _values("sum_transposed"),
    ),
    rows("alignment", "&& (!p.gated || p.width % 8 == 0)", "", _values("gated_in_fours")),
    epilogue("rows of none", "row.served ? v[0] * by : 0.0f", "b ? 1.0f : v[0] * by"),
    epilogue("tail", "rows[h].live = r < tile.end;", "rows[h].live = true;", _values("dense")),
    epilogue("last column", "if (left >= 2) to[1] = from_float<V>(v1);", "to[1] = from_float<V>(v1);", _values("odd")),
    epilogue("column", "if (at == j)", "if (at == (j ^ 1))"),
    epilogue("rounding", "v[c] = row.served ? rounded<T>(v[c]) : 0.0f;", "v[c] = row.served ? v[c] : 0.0f;", _values("large", "f16")),
    epilogue("reduction", "sum += __shfl_xor_sync(~0u, sum, 2);", ""),
    epilogue("sync", "Tile::warps_n == 1) return;\n    __syncthreads();", "Tile::warps_n == 1) return;"),
    epilogue("weights of the bias", "* b(e, n);\n    return total;", "* b(0, n);\n    return total;", _values("sum")),
    weight("empty expert", "a.groups.offsets ? a.groups.offsets[e] : 0", "a.groups.offsets ? a.groups.offsets[e ? e - 1 : 0] : 0"),
    weight("halves of db", "sum + sums[lane]", "sum"),
    weight("weights of db", "step * k_step<T> + half * (k_step<T> / 2);", "step * k_step<T>;"),
    weight("prefetch", "    r_ += k_step<T>;\n    prefetch();", "    prefetch();\n    r_ += k_step<T>;", _values("large")),
    activation("epilogue", "s.value * (1.0f + u * s.rest)};", "s.value * (1.0f + u * s.value)};"),
    activation("epilogue", "case Activation::silu: return u * sigmoid(u);", "case Activation::silu: return sigmoid(u);"),
]
