"""Planted bugs of the CPU products, of the router's backward pass and of the self-test of instruction sets."""

import sys
from dataclasses import replace

from tests.mutants import Mutant, Suite

# Compiled before the tests, which would do it themselves: a mutant that does not compile is no bug that was caught.
PRODUCTS = Suite(before=((sys.executable, "-m", "tests.builds", "program", "products", "-O1"),))
ALL_TIERS = replace(PRODUCTS, environment={"CMOE_TEST_FULL": "1"})  # without it the best emulated one, and the best of this machine
FEW_ROWS = ("tests/native/test_tiers.py::test_emulated[amx]",)  # AVX2 has no such kernel
LIBRARY = Suite(before=((sys.executable, "setup.py", "-q", "build_ext", "--inplace"),), environment={"CMOE_CUDA": "0"})


def products(file: str, kind: str, old: str, new: str, tier: str = "amx") -> Mutant:
    suite = PRODUCTS if tier == "amx" else ALL_TIERS
    return Mutant(kind, f"csrc/cpu/{file}", old, new, (f"tests/native/test_programs.py::test_products_to_the_bit[{tier}]",), suite)


def router(kind: str, old: str, new: str) -> Mutant:
    # Elsewhere a block is no wider than a strip.
    return Mutant(kind, "csrc/cpu/task_router.cpp", old, new, ("tests/native/test_tiers.py::test_emulated[amx]",), LIBRARY)


def accumulate(file: str, old: str, new: str) -> Mutant:
    return Mutant(
        "accumulate",
        f"csrc/cpu/{file}",
        old,
        new,
        ("tests/ops/test_accumulate_grads.py::test_micro_batches_give_the_gradients_that_autograd_adds",),
        LIBRARY,
    )


def int8(kind: str, old: str, new: str, test: str = "tests/ops/test_int8.py") -> Mutant:
    return Mutant(kind, "csrc/cpu/int8_layers.cpp", old, new, (test,), LIBRARY)


def self_test(kind: str, old: str, new: str, test: str) -> Mutant:
    return Mutant(kind, "csrc/cpu/self_test.cpp", old, new, (f"tests/native/test_self_test.py::test_{test}",), LIBRARY)


MUTANTS = [
    products("gemm/wgrad.h", "tail", "used(o), shared_.in_panel(s)};", "used(o), static_cast<int>(sl_)};"),
    products("gemm/wgrad.h", "tail", "std::min(shared_.lanes(), s1 * sl_) - s0 * sl_", "(s1 - s0) * sl_", "generic"),
    products("gemm/wgrad.h", "late store", "    store_finished();\n    if (gemm_.end)", "    if (gemm_.end)"),
    products("gemm/wgrad.h", "late store", "if (count_ > 1) store_finished();", "if (count_ < 1) store_finished();"),
    products("gemm/wgrad.h", "cells", "turn_++ % 2", "turn_ % 2"),
    products("gemm/wgrad.h", "cells", "sums(one_run ? 0 : o, s - s0)", "sums(0, s - s0)"),
    products("gemm/wgrad.h", "accumulate", "c > 0 || begin(o, s, to), next", "c > 0, next"),
    products(
        "gemm/wgrad.h",
        "accumulate",
        "kernels_.rows->load(type_, to, sum, columns);",
        "std::memset(sum, 0, sizeof(T) * columns);",
        "generic",
    ),
    accumulate("experts_backward.cpp", "if (g && !g.add) std::memset(", "if (g) std::memset("),
    accumulate("task_router.cpp", "                          grads.dw1.add)", "                          false)"),
    products("gemm/wgrad.h", "last run", "if (c1 == count_) store_rows(", "if (c0 == 0) store_rows(", "generic"),
    products("gemm/wgrad.h", "cells", "count_ <= p_.run ? 0 : o;", "0;", "generic"),
    products("gemm/panels.h", "prefetch", "  steps(k - lines * apart);", "  steps(0);", "generic"),
    products("gemm/wgrad.h", "packed again", "if (!packed_once_) pack(c0, c1);", "", "generic"),
    products("gemm/wgrad.h", "alignment", "% 64 == 0;", "% 32 == 0;"),
    products(
        "gemm/wgrad.h",
        "alignment",
        "(reinterpret_cast<uintptr_t>(to_) | static_cast<uintptr_t>(stride_))",
        "reinterpret_cast<uintptr_t>(to_)",
    ),
    products("gemm/wgrad.h", "dtype", "type_ == gemm_.panel && (reinterpret_cast", "(reinterpret_cast"),
    products("gemm/wgrad.h", "no token", "std::memset(to_ + r * stride_, 0,", "std::memset(to_, 0,", "generic"),
    products("gemm/wgrad.h", "scratch", "cell * std::max<int64_t>(2, p.shared_panels", "cell * std::max<int64_t>(1, p.shared_panels"),
    products("gemm/multiply.h", "in place", " && m.stride != packed_stride(kernels)", ""),
    products("gemm/multiply.h", "in place", "lanes_in(o) == ol && chunk.k == chunk.padded", "chunk.k == chunk.padded && lanes_in(o) > 1"),
    products("gemm/multiply.h", "gated", "lanes.second + (o - per_range) * ol", "lanes.second + o * ol"),
    products("gemm/multiply.h", "run", "multiply(panel, o, s, s0, chunks[c], c > 0,", "multiply(panel, o, s, s0, chunks[c], c > c0,"),
    products(
        "gemm/multiply.h",
        "packed",
        "+ chunk.k0 * ol * kernels.packed_element();",
        "+ chunk.k0 * kernels.packed_element();",
        "generic",
    ),
    products("gemm/amx.cpp", "stride", "a_stride == 2 * tile_k ? 4 * tile_values : 2 * tile_k", "4 * tile_values"),
    products("gemm/amx.cpp", "tail", "last < tile_lanes ? last : tile_lanes", "last"),
    products("gemm/amx.cpp", "tail", "(tile_lanes + steps - 1) / steps", "tile_lanes / steps"),
    products("gemm/amx.cpp", "tail", "return r < k ?", "return r <= k ?"),
    products("gemm/amx.cpp", "lanes", "if (used > 16)\n    multiply_tiles", "if (used > 31)\n    multiply_tiles"),
    products(
        "gemm/amx.cpp",
        "order",
        "_mm512_cvtne2ps_pbh(_mm512_loadu_ps(sums + 16), _mm512_loadu_ps(sums))",
        "_mm512_cvtne2ps_pbh(_mm512_loadu_ps(sums), _mm512_loadu_ps(sums + 16))",
    ),
    products("gemm/panels.h", "sums", "add ? load<V>(block) + sums : sums", "sums", "generic"),
    products("gemm/panels.h", "int8 order", "(four << (24 - 8 * at)) >> 24", "(four << (8 * at)) >> 24", "avx2"),
    products("gemm/panels.h", "int8 sign", "at == 3 ? four >> 24", "at == 3 ? (four >> 24) & 255", "avx2"),
    products("gemm/panels.h", "int8 sums", "for (int set = 1; set < sets; ++set)", "for (int set = 1; set < 1; ++set)", "avx2"),
    products(
        "gemm/panels.h", "int8 as fp32", "(2 * b_vectors + v) * width, weights_at<2>", "(2 * b_vectors + v) * width, weights_at<1>", "avx2"
    ),
    products("gemm/multiply.h", "int8 panels", "chunk.k0 * ol * kernels.packed_element();", "chunk.k0 * ol * kernels.element();", "avx2"),
    products("gemm/vnni.h", "offset", "four ^= 0x80808080u;", "", "avx_vnni"),
    products("gemm/vnni.h", "offset", "sums[r][v] - offset[v]", "sums[r][v]", "avx_vnni"),
    products("gemm/vnni.h", "sums", "sums[r][v] - offset[v], add", "sums[r][v] - offset[v], false", "avx512_vnni"),
    products("gemm/vnni.h", "few rows", "width, sums[r][v], add);", "width, sums[r][v], false);", "avx512_vnni"),
    products("gemm/vnni.h", "few rows", "row += stretch * mr) {", "row += stretch) {", "avx512_vnni"),
    products("gemm/vnni.h", "few rows", "products[r][0][v] - offset[v]", "products[r][0][v]", "avx512_vnni"),
    Mutant("low bits", "csrc/cpu/gemm/vnni.h", "at[8] = static_cast<uint8_t>(u);", "at[8] = 0;", FEW_ROWS, LIBRARY),
    Mutant("not finite", "csrc/cpu/gemm/vnni.h", "exponent == 255 ? 0x7fc00000 : ", "", FEW_ROWS, LIBRARY),
    products("gemm/amx.cpp", "int8 tiles", "_tile_loadd(5, b + 64, b_stride);", "_tile_loadd(5, b + 64, 64);"),
    products("gemm/amx.cpp", "int8 lanes", "if (used > 16)\n    multiply_i8_tiles<true>", "if (used > 31)\n    multiply_i8_tiles<true>"),
    int8("rounding", "+ shift - shift;", "+ 0;", "tests/native/test_tiers.py::test_emulated[amx]"),  # AVX2 quantises no rows
    int8("gated", "panels * width + lanes.first", "op_.hidden + lanes.first"),
    int8("scale", "w.scale + e * w.outputs + first", "w.scale + first"),
    int8("bias", "w.bias + e * w.outputs + first", "w.bias + e * w.outputs"),
    int8("router", "f.add(op.bias + group * op.hidden + block.first, row, n);", "f.add(op.bias + block.first, row, n);"),
    Mutant(
        "layout",
        "csrc/cpu/gemm/amx.cpp",
        "{16, 16, 16, 16, 16, 16, 16, 16}};",
        "{16, 16, 16, 16, 16, 16, 16}};",
        ("tests/native/test_tile_layout.py::test_the_library_loads_the_layout_that_is_meant",),
        LIBRARY,
    ),
    router("strip", "du_block + (t * block_width + in) * du_value", "du_block + t * block_width * du_value"),
    router("strip", "std::min(strip, block_width - in)", "strip"),
    self_test(
        "trap elsewhere", "testing && pthread_equal(tester, pthread_self())", "testing", "a_trap_in_another_thread_is_no_trap_of_the_test"
    ),
    self_test("handlers", "now.sa_sigaction == on_trap)", "now.sa_sigaction != on_trap)", "the_next_instruction_set_serves"),
    self_test("comparison", "sizeof memory.found) != 0) return;", "sizeof memory.found) < -9) return;", "the_next_instruction_set_serves"),
    self_test("signal", "    trapped = signal;\n", "", "the_next_instruction_set_serves"),
]
