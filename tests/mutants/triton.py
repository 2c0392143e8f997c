"""Planted bugs of the Triton kernels, caught in the interpreter under its strict layer."""

from tests.mutants import Mutant, Suite

INTERPRETED = Suite(environment={"TRITON_INTERPRET": "1"})
OPS = "cmoe_kernels/ops"


def _in(file: str, *tests: str):
    """A mutant of one file, with its tests."""
    return lambda kind, old, new, *others: Mutant(kind, f"{OPS}/{file}", old, new, others or tests, INTERPRETED)


_promises, _edges = "tests/ops/test_promises.py::test_", "tests/ops/test_edges.py::test_"
_gates, _groups, _tiles = (f"tests/triton/test_{name}.py::test_" for name in ("gates", "groups", "gemm"))


def _precision(form: str) -> str:
    return f"{_promises}precision[{form}-triton-torch.float32]"


def _many_tiles(form: str) -> str:
    return f"{_tiles}many_tiles[{form}-torch.float32]"


def _through_descriptors(form: str) -> str:
    return f"{_tiles}many_tiles_through_descriptors[{form}-torch.float32]"


def _far(what: str) -> str:
    return f"tests/triton/test_far.py::test_far_apart[{what}-sm_80]"


activation = _in("rows/activation.py")
soft_gate = _in("soft_gate/triton.py", f"{_gates}soft_gate[300-5]")
topk_gate = _in("topk_gate/triton.py", f"{_gates}topk_gate[True-softmax-300-5]")
balance_loss = _in("balance_loss/triton.py", f"{_gates}balance_loss[150-8-7-switch-whole]")
groups = _in("rows/sort.py", f"{_groups}selections_of_tokens[700-5]")
sums = _in("rows/reduce.py", _many_tiles("sparse"))
grouped = _in("grouped_linear/triton.py", _precision("grouped_linear-gather-scatter"))
router = _in("task_router/triton.py", _many_tiles("router"))
gemm = _in("gemm/grouped_gemm.py", _many_tiles("sparse-gated"))
backward = _in("gemm/dact_gemm.py", _many_tiles("sparse-gated"))
tiles = _in("gemm/tiles.py", _many_tiles("sparse"))
sum_of_experts = _in("gemm/grouped_gemm_sum.py", f"{_tiles}a_loop_is_split_among_programs_without_a_tile[torch.float32]")
weights = _in("gemm/wgrad.py", _many_tiles("sparse"))

MUTANTS = [
    activation("epilogue", "0.134145 * u * u", "0.044715 * u * u", _precision("soft_experts-mlp-recompute")),
    activation("epilogue", "return s * (1.0 + u * (1.0 - s))", "return s * (1.0 + u * s)", _precision("soft_experts-mlp-groups")),
    activation("epilogue", "* u * tl.exp(-0.5 * u * u)", "* u * tl.exp(-u * u)", _precision("soft_experts-mlp")),
    activation("edge", "tl.where(u <= 0.0, 0.0, 1.0)", "tl.where(u < 0.0, 0.0, 1.0)", f"{_edges}relu_has_no_gradient_at_zero[triton]"),
    soft_gate("tail", "tl.store(gates + t * E + e, g, live)", "tl.store(gates + t * E + e, g, t < T)"),
    soft_gate("epilogue", "* tl.sigmoid(-l)", "* tl.sigmoid(l)"),
    soft_gate("overflow", "scores - tl.max(scores, 1)[:, None]", "scores", f"{_edges}soft_gate_where_every_sigmoid_underflows[triton]"),
    soft_gate(
        "strides",
        "dgates + t * stride_dt + e * stride_de",
        "dgates + t * E + e",
        f"{_promises}expanded_gradient[soft_gate-logits-triton]",
    ),
    topk_gate("tie order", "tl.min(tl.where(key == best, e, BLOCK_E), 1)", "tl.max(tl.where(key == best, e, -1), 1)"),
    topk_gate("tail", "(taken & some & (t < T))", "(taken & some)"),
    topk_gate("epilogue", "scaled -= tl.sum(scaled * w, 1)[:, None]", "scaled -= tl.sum(scaled, 1)[:, None]"),
    topk_gate("order", "bits = (v + 0.0)", "bits = v", f"{_gates}ranks_are_those_of_a_stable_sort"),
    topk_gate(
        "order", "return tl.where(v != v, ~tl.full((), LOWEST, INTEGER), key)", "return key", f"{_gates}ranks_are_those_of_a_stable_sort"
    ),
    topk_gate(
        "dtype",
        "logits if selection is None else selection\n",
        "logits if selection is None else selection.float()\n",
        f"{_gates}ranks_are_those_of_a_stable_sort[torch.float64]",
    ),
    topk_gate("index", "chosen = (index >= 0) & (index < E)", "chosen = index < E", f"{_gates}a_bad_index_reads_and_receives_nothing"),
    topk_gate(
        "empty row",
        'div_rn(powers, tl.where(top == -float("inf"), 1.0, total))',
        "div_rn(powers, total)",
        f"{_edges}topk_ties_exclusion_and_saturation",
    ),
    balance_loss("mask", "live = live & (tl.load(mask + row, live, other=0) != 0)", "live = live & (row >= 0)"),
    balance_loss("split sums", "range(program, tl.cdiv(T, BLOCK_T), tl.num_programs(0))", "range(program, tl.num_programs(0))"),
    balance_loss(
        "split sums",
        "for start in range(0, partials, BLOCK_P):",
        "for start in range(0, 1):",
        f"{_gates}balance_loss[40-64-40-importance-whole]",
    ),
    balance_loss("epilogue", "slope = E * share / held", "slope = E * share"),
    balance_loss(
        "order",
        "heads = tl.load(labels + first - 1) != label",
        "heads = tl.load(labels + first - 1) == label",
        f"{_gates}balance_loss[90-5-7-switch-segments]",
    ),
    balance_loss(
        "empty group",
        "tl.store(filled + first, tl.where(n > 0.0, 1, 0))",
        "tl.store(filled + first, 1)",
        f"{_edges}a_segment_without_a_token_does_not_count[triton]",
    ),
    groups("index", "tl.where((expert >= 0) & (expert < E), expert, E)", "tl.where(expert < E, expert, E)"),
    groups("order", "rank = tl.cumsum(mine.to(tl.int32), 0) - 1", "rank = tl.cumsum(mine.to(tl.int32), 0)"),
    groups("race", "place[None, :] + tl.cumsum(count, 0) - count", "place[None, :] + count * 0", f"{_groups}one_row_for_all"),
    groups("split sums", "place += tl.sum(count, 0)", "place += 0", f"{_groups}more_blocks_than_one_program_scans_at_a_time"),
    groups("tail", "tl.store(gather_idx + place, i, i < N)", "tl.store(gather_idx + place, i)"),
    sums("index", "rows + (t * k + i)[:, None] * width", "rows + (t * k)[:, None] * width"),
    sums("index", "(i >= tl.load(offsets + j + 1))", "(i > tl.load(offsets + j + 1))"),
    sums("empty group", "live = live & (e < experts)", "live = live & (e <= experts)"),
    sums("split sums", "for tile in range(tiles):", "for tile in range(1):"),
    sums("tail", "for start in range(0, tokens, BT):", "for start in range(0, tokens // BT * BT, BT):", _many_tiles("router")),
    sums("epilogue", "multiply_add(share, activate(value, ACT)", "multiply_add(share, value", _many_tiles("router")),
    grouped("index", "source, served = source_rows(scatter, r, live, rows, 1)", "source, served = source_rows(None, r, live, rows, 1)"),
    grouped("epilogue", "d.to(tl.float32) * derivative(pre, ACT)", "d.to(tl.float32)"),
    grouped(
        "strides",
        "dy + source[:, None] * sd_r + n.to(tl.int64)[None, :] * sd_n",
        "dy + source[:, None] * width + n[None, :]",
        f"{_promises}expanded_gradient[grouped_linear-gather-scatter-triton]",
    ),
    grouped("order", ".clamp(0, rows).cummax(0).values", ".clamp(0, rows)", f"{_tiles}wrong_indices_are_no_rows"),
    router("tail", "(e < experts)[None, :] & columns[:, None]", "(e < experts)[None, :]"),
    router("index", "known = (group >= 0) & (group < groups)", "known = group < groups"),
    router("epilogue", "(dh * derivative(pre, ACT))", "dh"),
    gemm("epilogue", "acc += s[:, None] * bias if WEIGH_BIAS else bias", "acc += bias"),
    gemm("epilogue", "tl.store(us + width, up,", "tl.store(us + width, acc,"),
    gemm("empty group", "value = tl.where(served[:, None], acc, 0.0)", "value = acc", f"{_tiles}wrong_indices_are_no_rows"),
    backward("epilogue", "tl.sum(acc * act * up, 1)", "tl.sum(acc * act, 1)"),
    backward("epilogue", "acc *= derivative(pre, ACT)", "acc *= act"),
    backward("index", "(source if ACT is None else far_r)", "far_r", _many_tiles("sparse-linear")),
    gemm("int32 wrap", "wide_e, wide_n = expert.to(tl.int64), n.to(tl.int64)", "wide_e, wide_n = expert, n", _far("soft_experts-b1-0")),
    gemm("int32 wrap", "k = tl.arange(0, BK).to(tl.int64)", "k = tl.arange(0, BK)", _far("soft_experts-w1-2")),
    router("int32 wrap", "k = tl.arange(0, BK).to(tl.int64)", "k = tl.arange(0, BK)", _far("task_router-w1-1")),
    sum_of_experts("int32 wrap", "k = tl.arange(0, BK).to(tl.int64)", "k = tl.arange(0, BK)", _far("soft_experts-w2-2")),
    sums("int32 wrap", "tl.cast(BN, tl.int64) * sb_n", "BN * sb_n", _far("soft_experts-b2-1")),
    balance_loss("int32 wrap", "e.to(tl.int64)[None, :] * stride_e", "e[None, :] * stride_e", _far("balance_loss-scores-1")),
    tiles("order", "first + tile % width % size", "first + tile % width % GROUP"),
    tiles("empty group", "highs = tl.where(e == experts, rows, highs)", "highs = tl.where(e == experts, lows, highs)"),
    tiles("index", "live = live & (source >= 0) & (source < rows)", "live = live & (source < rows)", f"{_tiles}wrong_indices_are_no_rows"),
    tiles(
        "transposed strides",
        "return tl.reshape(t.load([expert, start, row]), [BK, BN])",
        "return tl.reshape(t.load([expert, row, start]), [BK, BN])",
        _through_descriptors("grouped"),
    ),
    sum_of_experts("split sums", "tl.minimum((part + 1) * share, experts * steps)", "(part + 1) * share"),
    sum_of_experts("split sums", "for part in range(splits):", "for part in range(1):"),
    sum_of_experts("epilogue", "acc += tl.load(gates + r * sg_r + far * sg_e, mask=live, other=0.0)[:, None] * bias", "acc += bias"),
    weights(
        "tail", "value = tl.where(live[:, None], value, 0.0).to(value.dtype)", "value = value + 0", _through_descriptors("grouped-plain")
    ),
    weights("race", "if tile_n == 0:", "if tile_n >= 0:"),
    weights("index", "end = tl.minimum(tl.load(offsets + expert + 1), rows)", "end = rows"),
]
