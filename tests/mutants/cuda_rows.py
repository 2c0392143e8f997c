"""Planted bugs of the CUDA kernels over rows (gates, losses, the order of assignments) and of the router. Caught through the emulator."""

import functools
import sys

from tests.mutants import Mutant, Suite

EMULATED = Suite(before=((sys.executable, "-m", "tests.emulation.library"),), environment={"CMOE_EMULATE_CUDA": "1"}, crashes=True)
_rows = "tests/emulation/test_rows.py::test_"


def _in(file: str, *tests: str):
    """A mutant of one file, with its tests."""
    return lambda kind, old, new, *others: Mutant(
        kind, f"csrc/cuda/{file}", old, new, tuple(f"{_rows}{t}" for t in others or tests), EMULATED
    )


rows = _in("rows/rows.cuh", "soft_gate[300-5-torch.float32]")
soft_gate = _in("soft_gate.cu", "soft_gate[300-5-torch.float32]")
topk_gate = _in("topk_gate.cu", "topk_gate[True-softmax-300-5-2]")
sort = _in("rows/sort_by_expert.cu", "order_of_assignments[1500-5]")
balance_loss = _in("balance_loss.cu", "balance_loss[400-5-switch-whole]")


def equal(file: str, old: str, new: str) -> Mutant:
    test = "tests/ops/test_edges.py::test_equal_gradients_of_gates_whose_sum_is_one_cancel_exactly[5-cuda]"
    return Mutant("cancellation", f"csrc/cuda/{file}", old, new, (test,), EMULATED)


def raced(file: str, kind: str, old: str, new: str) -> Mutant:
    """Threads of all warps come so far together that the numbers are right: ThreadSanitizer alone sees it."""
    return Mutant(kind, f"csrc/cuda/{file}", old, new, ("tests/emulation/test_sanitized.py::test_kernels_over_rows[thread]",), Suite())


def router(kind: str, old: str, new: str, test: str = "many_tiles[5-torch.float32]", file: str = "task_router.cu") -> Mutant:
    return Mutant(kind, f"csrc/cuda/{file}", old, new, (f"tests/emulation/test_router.py::test_{test}",), EMULATED)


router_epilogue = functools.partial(router, file="router_epilogue.cuh")


MUTANTS = [
    rows("tail", "live = t < rows;", "live = true;"),
    rows("reduction", "x += __shfl_xor_sync(~0u, x, by)", "x += __shfl_xor_sync(~0u, x, 1)"),
    rows("strides", "data[t * row + e * column]", "data[t * row + e]", "topk_of_strided_rows"),
    soft_gate("overflow", "c = fminf(p.largest(top), 0.0f);", "c = 0.0f;", "soft_gate_of_tiny_sigmoids"),
    soft_gate("epilogue", "/ (1.0f + expf(l))", "/ (1.0f + expf(-l))"),
    soft_gate("dtype", "from_float<T>(score(l)", "from_float<T>(2.0f * score(l)", "soft_gate[300-5-torch.bfloat16]"),
    equal("soft_gate.cu", "  common = p.least(common);", "  common = 0.0f;"),
    equal("topk_gate.cu", "renormalize ? p.least(common) : 0.0f", "0.0f"),
    topk_gate("tie order", "(other == best && there < where)", "(other == best && there > where)"),
    topk_gate("tie order", "(key == last && e > at)", "key == last"),
    topk_gate("order", "  x += Float(0);\n", "", "ranks_are_those_of_a_stable_sort[assignment-torch.float32]"),
    topk_gate("order", "x != x ? greatest : bits", "bits", "ranks_are_those_of_a_stable_sort[logits-torch.float32]"),
    topk_gate(
        "index",
        "return e >= 0 && e < experts ? static_cast<int>(e) : experts;",
        "return static_cast<int>(e < 0 ? 0 : e < experts ? e : experts);",
        "a_bad_index_reads_and_receives_nothing",
    ),
    topk_gate("tail", "if (p.lane == 0 && p.live) {", "if (p.lane == 0) {"),
    topk_gate(
        "sync", "  __syncwarp();\n  const auto chosen = [&](int i) { return p.live ?", "  const auto chosen = [&](int i) { return p.live ?"
    ),
    raced(
        "topk_gate.cu",
        "sync",
        "    weights[p.t * k + i] = e < experts ? weight(logits(p.t, e)) * scale : 0.0f;\n  }\n  __syncthreads();",
        "    weights[p.t * k + i] = e < experts ? weight(logits(p.t, e)) * scale : 0.0f;\n  }",
    ),
    topk_gate("epilogue", "if (all) d -= w * total;", "", "topk_gate[False-softmax-300-5-2]"),
    sort("sync", "    __syncwarp();\n    if (expert >= 0 && before == 0)", "    if (expert >= 0 && before == 0)"),
    sort("split sums", "earlier = b == blockIdx.x ? all : earlier;", "earlier = 0;"),
    sort("order", "same & ((1u << lane) - 1)", "same & ~((2u << lane) - 1)"),
    sort("index", "e >= 0 && e < s.experts ? e : s.experts", "e < s.experts ? e & 255 : s.experts"),
    sort("edge", "return *row >= 0 && *row < s.rows;", "return *row >= 0;", "order_of_groups[5]"),
    sort("carry", "base += __shfl_sync(~0u, sum, 31);", "base = __shfl_sync(~0u, sum, 31);", "order_of_assignments[700-256]"),
    balance_loss("mask", "return counts(t) ? scores(t, e) : 0.0f;", "return scores(t, e);"),
    balance_loss("sync", "  __syncthreads();\n  V sum = 0;", "  V sum = 0;"),
    balance_loss(
        "sync",
        "    __syncthreads();\n    if (static_cast<int>(threadIdx.x) < width && e < columns) {",
        "    if (static_cast<int>(threadIdx.x) < width && e < columns) {",
    ),
    balance_loss("epilogue", "mass[e] = factor * share;", "mass[e] = experts * share;"),
    balance_loss(
        "index", "if (e >= 0 && e < op.experts) atomicAdd(selected + e, 1)", "if (e < op.experts) atomicAdd(selected + (e & 1), 1)"
    ),
    balance_loss("reduction", "for (int by = width; by < 32; by *= 2)", "for (int by = width; by < 16; by *= 2)"),
    balance_loss(
        "order",
        "op.labels[first - 1] == label) continue;",
        "op.labels[first - 1] < label) continue;",
        "balance_loss[400-5-switch-segments]",
    ),
    balance_loss("split sums", "first += gridDim.x", "first += op.tokens", "each_block_serves_several_segments"),
    balance_loss("epilogue", "slopes[e] * factor * z * sum.softmax", "slopes[e] * factor * sum.softmax", "balance_loss[400-5-z-whole]"),
    router_epilogue(
        "sync", "    __syncthreads();\n    for (int at = static_cast<int>(threadIdx.x);", "    for (int at = static_cast<int>(threadIdx.x);"
    ),
    router_epilogue("edge", "const float w = n < p.width ? w2(e, n) : 0.0f;", "const float w = w2(0, n % p.width);"),
    router_epilogue("reduction", "for (int w = 0; w < Tile::warps_n; ++w) sum +=", "for (int w = 1; w < Tile::warps_n; ++w) sum +="),
    router_epilogue("epilogue", "live && c < left ? activate(activation, v[c])", "live && c < left ? activate(Activation::relu, v[c])"),
    router("group", "if (own != group) leave();", ""),
    router_epilogue("group", "group >= 0 && group < groups ? biases", "group < groups ? biases", "a_group_that_does_not_exist_has_no_bias"),
    router("split sums", "return parts;", "return parts - 1;", "sm90[150-5-torch.bfloat16]"),
    router_epilogue("edge", "else if (r < tile.end)\n", "else\n", "sm90[40-5-torch.bfloat16]"),
    router("split sums", "p < count; p += adding_warps", "p < 1; p += adding_warps"),
    router("epilogue", "sum + (b ? b[i % columns] : 0.0f)", "sum"),
]
