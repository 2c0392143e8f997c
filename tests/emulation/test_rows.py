"""Gates, losses and the order of selections, emulated: more rows than a block, more experts than a warp, every order of threads.

The table of tests/ops has eleven tokens, which one block serves: what blocks and warps do beside each other is tested here.
"""

import ctypes

import pytest
import torch

import cmoe_kernels as cmoe
from benchmarks.compare import assert_close, grads
from cmoe_kernels.ops import groups
from cmoe_kernels.ops.sparse_experts.reference import _assignments
from cmoe_kernels.ops.topk_gate import reference as topk_reference
from tests.emulation import library
from tests.ops import naive
from tests.ops.cases import DTYPES

if not library.WANTED:
    pytest.skip("for the process of emulated kernels (CMOE_EMULATE_CUDA=1)", allow_module_level=True)

ORDERS = ("forward", "reverse", "shuffled")
native = torch.ops.cmoe_emulated if library.missing() is None else None


@pytest.fixture(autouse=True)
def _emulated():
    if reason := library.missing():
        pytest.skip(reason)
    with cmoe.use_backend("cuda"):
        yield


def in_every_order(call):
    """The call's results, the same bits for every order of threads and blocks."""
    results = []
    for order in ORDERS:
        with library.emulator(order):
            results.append([t.clone() for t in call()])
    for order, again in zip(ORDERS[1:], results[1:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(results[0], again, strict=True)), order
    return results[0]


def close_to_naive(op, source, arguments, upstream):
    """Value and gradient of ``source`` under the rule of benchmarks/compare.py, in every order of threads."""
    x = arguments[source].requires_grad_()
    double = {n: v.detach().double().requires_grad_(n == source) if n == source else v for n, v in arguments.items()}
    exact, baseline = getattr(naive, op)(**double), getattr(naive, op)(**arguments)
    upstream = upstream if exact.dim() else upstream.sum()

    def ours():
        y = getattr(cmoe, op)(**arguments)
        y = y[0] if isinstance(y, tuple) else y
        return [y.detach(), *grads(y, [x], upstream)]

    y, dx = in_every_order(ours)
    assert_close("y", y, exact.detach(), baseline.detach())
    assert_close(source, dx, grads(exact, [double[source]], upstream)[0], grads(baseline, [x], upstream)[0])


SHAPES = [(300, 5), (33, 1), (130, 8), (40, 64), (5, 257)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "experts"), SHAPES)
def test_soft_gate(tokens, experts, dtype):
    close_to_naive("soft_gate", "logits", {"logits": (3 * torch.randn(tokens, experts)).to(dtype)}, torch.randn(tokens, experts))


def test_soft_gate_of_tiny_sigmoids():
    close_to_naive("soft_gate", "logits", {"logits": torch.randn(40, 5) - 80}, torch.randn(40, 5))
    gates = cmoe.soft_gate(torch.full((3, 4), -1e30))
    assert torch.equal(gates, torch.full((3, 4), 0.25))


@pytest.mark.parametrize(("tokens", "experts", "k"), [(300, 5, 2), (33, 1, 1), (70, 8, 8), (20, 128, 8), (9, 256, 16), (3, 300, 2)])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("renormalize", [True, False])
def test_topk_gate(tokens, experts, k, score, renormalize):
    logits = torch.randn(tokens, experts)
    close_to_naive("topk_gate", "logits", {"logits": logits, "k": k, "score": score, "renormalize": renormalize}, torch.randn(tokens, k))
    logits = (2 * logits.detach()).round()  # ties in every row
    _, indices, counts = in_every_order(lambda: cmoe.topk_gate(logits, k, score, renormalize))
    _, expected, expected_counts = topk_reference.topk_gate(logits, k, score, renormalize, 1.0, None)
    assert torch.equal(indices, expected)
    assert torch.equal(counts, expected_counts)


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
@pytest.mark.parametrize("own", [False, True], ids=["selection", "logits"])
def test_ranks_are_those_of_a_stable_sort(dtype, own):
    """Signed zeros are equal, NaN of either sign comes first, -inf is no expert; fp64 selections keep what fp32 would lose."""
    if own and dtype == torch.float64:
        pytest.skip("logits in fp64 are not served")
    nan, inf = torch.nan, torch.inf
    special = torch.tensor([[0.0, -0.0, 0.0, -inf], [1.0, nan, inf, -nan], [-1.0, -1e-30, -2.0, 1e-30], [-inf, -inf, -inf, -3.0]])
    ranking = torch.cat([special.to(dtype), (torch.randn(8, 4, dtype=torch.float64) * 1e-9 + 1).to(dtype)])
    logits, selection = (ranking, None) if own else (torch.randn(12, 4), ranking)
    _, indices, counts = native.topk_gate(logits, 3, "softmax", True, 1.0, selection)
    _, expected, expected_counts = topk_reference.topk_gate(logits, 3, "softmax", True, 1.0, selection)
    assert torch.equal(indices, expected)
    assert torch.equal(counts, expected_counts)


def test_topk_of_strided_rows():
    logits, selection = torch.randn(5, 40).t(), torch.randn(40, 10)[:, ::2]
    ours = native.topk_gate(logits, 2, "softmax", False, 1.0, selection)
    for a, b in zip(ours, native.topk_gate(logits.contiguous(), 2, "softmax", False, 1.0, selection.contiguous()), strict=True):
        assert torch.equal(a, b)


def test_a_bad_index_reads_and_receives_nothing():
    logits, dweights = torch.randn(2, 3), torch.randn(2, 2)
    indices = torch.tensor([[1 << 40, 0], [-1, 2]])
    clean = torch.tensor([[3, 0], [3, 2]])
    for score, renormalize in (("softmax", True), ("softmax", False), ("sigmoid", True)):
        ours = native.topk_gate_backward(dweights, logits, indices, score, renormalize, 1.0)
        torch.testing.assert_close(ours, topk_reference.topk_gate_backward(dweights, logits, clean, score, renormalize, 1.0))
    scores = torch.rand(2, 3)
    losses = [native.balance_loss(scores, i, None, "switch", None, None, None) for i in (indices, clean)]
    assert torch.equal(*losses)


@pytest.mark.parametrize("segmented", [False, True], ids=["whole", "segments"])
@pytest.mark.parametrize("kind", ["switch", "importance", "z"])
@pytest.mark.parametrize(("tokens", "experts"), [(400, 5), (17000, 1), (150, 40), (131, 300)])
def test_balance_loss(tokens, experts, kind, segmented):
    """More tokens than a block sums, more blocks than the least; segments longer than a block's rows, and labels beyond int32."""
    if tokens > 1000 and (segmented or kind == "z"):
        pytest.skip("minutes in the emulator, and the same paths as with fewer tokens")
    arguments = {
        "scores": torch.rand(tokens, experts),
        "indices": torch.randint(-1, experts + 1, (tokens, 2)) if kind == "switch" else None,
        "mask": torch.rand(tokens) < 0.7,
        "kind": kind,
        "segments": torch.randint(-2, 3, (tokens,)) * (1 << 35) if segmented else None,
    }
    close_to_naive("balance_loss", "scores", arguments, torch.tensor(0.75))


def test_each_block_serves_several_segments():
    """More labels than there are blocks for them."""
    tokens = 1100
    arguments = {"scores": torch.randn(tokens, 3), "kind": "z", "segments": torch.randperm(tokens) // 2}
    close_to_naive("balance_loss", "scores", arguments, torch.tensor(1.0))


# --- the order of selections --------------------------------------------------------------------------------------------------
def sort_by_expert(indices, experts, tokens, group_ids=None, weights=None):
    def pointer(t):
        return None if t is None else ctypes.c_void_p(t.data_ptr())

    function = library.library().sort_by_expert
    function.restype = ctypes.c_int64
    rows, k = indices.shape
    sizes = torch.tensor([rows, *indices.stride(), tokens, k, experts, *((0, 0) if weights is None else weights.stride())])
    inputs = [pointer(t) for t in (indices, group_ids, weights, sizes)]
    gather_idx, offsets = torch.full((tokens * k,), -7), torch.full((experts + 1,), -7, dtype=torch.int32)
    row_weights = None if weights is None else torch.full((tokens * k,), torch.nan)
    scratch = torch.full((max(1, function(*inputs, None, None, None, None)),), -7, dtype=torch.int32)
    function(*inputs, *(pointer(t) for t in (gather_idx, offsets, row_weights, scratch)))
    return [gather_idx, offsets] + ([] if row_weights is None else [row_weights])


def check_sort(indices, experts, tokens, group_ids=None, weights=None):
    gather_idx, offsets, *row_weights = in_every_order(lambda: sort_by_expert(indices, experts, tokens, group_ids, weights))
    order, ends = groups.sort_by_expert(_assignments(indices, group_ids, tokens, experts), experts)
    assert torch.equal(gather_idx, order)
    assert torch.equal(offsets, ends)
    if weights is not None:
        assert torch.equal(row_weights[0], groups.per_row(weights, group_ids, tokens, order))


@pytest.mark.parametrize("experts", [1, 3, 5, 63, 256])
@pytest.mark.parametrize("tokens", [1, 11, 700, 1500])
def test_order_of_selections(experts, tokens):
    check_sort(torch.randint(-1, experts + 2, (tokens, 3)), experts, tokens, weights=torch.rand(tokens, 3))


def test_order_of_many_selections():
    """More than the blocks at their least."""
    check_sort(torch.randint(0, 6, (33000, 16)), 5, 33000)


@pytest.mark.parametrize("tokens", [1, 2100])
def test_order_of_one_row_for_all(tokens):
    check_sort(torch.tensor([[4, 0, 5]]), 5, tokens, weights=torch.rand(1, 3))


@pytest.mark.parametrize("experts", [5, 100])
def test_order_of_groups(experts):
    check_sort(torch.randint(-1, experts + 1, (4, 2)), experts, 2500, torch.randint(-1, 5, (2500,)), torch.rand(4, 2))


@pytest.mark.parametrize("expert", [0, 2, 3])
def test_all_to_one(expert):
    check_sort(torch.full((1030, 1), expert), 3, 1030)


def test_order_of_strided_and_of_no_selections():
    check_sort(torch.randint(0, 6, (2, 300)).t(), 5, 300, weights=torch.rand(2, 300).t())
    check_sort(torch.empty(0, 2, dtype=torch.int64), 5, 0)
