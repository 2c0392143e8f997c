"""The native library: what it links against, and its kernels against the reference.

The reference in fp64 is the truth; the reference at the tested dtype says how much error that dtype costs anyway.
"""

import platform
import re
import resource
import subprocess
import sys

import pytest
import torch

import cmoe_kernels as cmoe
from cmoe_kernels import backends
from cmoe_kernels.ops.balance_loss import reference as balance
from cmoe_kernels.ops.precision import FLOATS
from cmoe_kernels.ops.soft_gate import reference as soft
from cmoe_kernels.ops.topk_gate import reference as topk

pytestmark = pytest.mark.skipif(cmoe.native.library is None, reason=str(cmoe.native.error))
native = torch.ops.cmoe_native

SHAPES = [(0, 5), (1, 1), (9, 1), (7, 3), (33, 5), (5, 257), (2999, 5)]
SCORES = [("softmax", True), ("softmax", False), ("sigmoid", True), ("sigmoid", False)]
INF, NAN = float("inf"), float("nan")


def close(ours, baseline, exact):
    """The rule of comparison: at most twice the error that the dtype costs in plain torch, plus two roundings of the output.

    In fp64 the baseline is the truth itself, which says nothing about its own error, so that a fixed bound stands in for it.
    """
    assert ours.dtype == baseline.dtype
    assert ours.shape == exact.shape
    assert ours.is_contiguous()
    if not ours.numel():
        return
    eps = torch.finfo(ours.dtype).eps
    for norm in (lambda t: t.abs().max(), lambda t: t.square().mean().sqrt()):
        lost = norm(baseline.double() - exact) if ours.dtype != torch.float64 else 1e-14 * norm(exact)
        allowed = 2 * lost + 2 * eps * norm(exact)
        assert norm(ours.double() - exact) <= allowed


def draw(shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def ks(experts):
    return sorted({1, min(2, experts), min(20, experts), experts})


# --- values -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_soft_gate(shape, dtype):
    logits = draw(shape, dtype=dtype) * 3
    close(native.soft_gate(logits), soft.soft_gate(logits), soft.soft_gate(logits.double()))
    dgates = draw(shape, dtype=soft.soft_gate(logits).dtype, seed=1)
    exact = soft.soft_gate_backward(dgates.double(), logits.double())
    close(native.soft_gate_backward(dgates, logits), soft.soft_gate_backward(dgates, logits), exact)


@pytest.mark.parametrize(("spread", "level"), [(1, -1000), (1, -100), (1, 100), (300, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_soft_gate_where_sigmoids_saturate(spread, level, dtype):
    logits = draw((33, 5), dtype) * spread + level
    close(native.soft_gate(logits), soft.soft_gate(logits), soft.soft_gate(logits.double()))
    dgates = draw((33, 5), dtype, seed=1)
    exact = soft.soft_gate_backward(dgates.double(), logits.double())
    close(native.soft_gate_backward(dgates, logits), soft.soft_gate_backward(dgates, logits), exact)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("score", "renormalize"), SCORES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_topk_gate(shape, score, renormalize, dtype):
    logits = draw(shape, dtype=dtype)
    for k in ks(shape[1]):
        settings = (score, renormalize, 2.5)
        weights, indices, counts = native.topk_gate(logits, k, *settings, None)
        baseline, *_ = topk.topk_gate(logits, k, *settings, None)
        exact, exact_indices, exact_counts = topk.topk_gate(logits.double(), k, *settings, None)
        close(weights, baseline, exact)
        assert_same((indices, counts), (exact_indices, exact_counts))
        dweights = draw((shape[0], k), weights.dtype, seed=1)
        exact = topk.topk_gate_backward(dweights.double(), logits.double(), indices, *settings)
        baseline = topk.topk_gate_backward(dweights, logits, indices, *settings)
        close(native.topk_gate_backward(dweights, logits, indices, *settings), baseline, exact)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("score", "renormalize"), SCORES)
def test_selection_ranks_in_its_own_dtype(score, renormalize, dtype):
    """A selection in fp64 tells apart what logits in bf16 could not; -inf excludes, and a row of nothing else chooses no expert."""
    logits, selection = draw((65, 7), torch.bfloat16), draw((65, 7), dtype, seed=2) * 1e-3 + 1
    selection[:, 3] = -INF
    selection[11] = -INF
    selection[12, 1:] = -INF
    for k in ks(7):
        settings = (score, renormalize, 1.0)
        weights, indices, counts = native.topk_gate(logits, k, *settings, selection)
        exact, *chosen = topk.topk_gate(logits.double(), k, *settings, selection)
        close(weights, topk.topk_gate(logits, k, *settings, selection)[0], exact)
        assert_same((indices, counts), chosen)
        assert (indices[11] == 7).all()
        assert (weights[indices == 7] == 0).all()
        dweights = draw((65, k), torch.float32, seed=3)
        dlogits = native.topk_gate_backward(dweights, logits, indices, *settings)
        baseline = topk.topk_gate_backward(dweights, logits, indices, *settings)
        close(dlogits, baseline, topk.topk_gate_backward(dweights.double(), logits.double(), indices, *settings))
        assert (dlogits[11] == 0).all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("score", "renormalize"), SCORES)
@pytest.mark.parametrize("experts", [1, 2, 5, 40])
def test_ties_infinities_and_nan(experts, score, renormalize, dtype):
    """Rows made of few values, so that nearly every row has ties; NaN ranks first and spreads as far as in the reference, no farther."""
    values = torch.tensor([NAN, INF, -INF, -INF, 0.0, -0.0, 1.0, 1.0], dtype=dtype)
    logits = values[torch.randint(len(values), (800, experts), generator=torch.Generator().manual_seed(0))]
    for k in ks(experts):
        assert_same(native.topk_gate(logits, k, score, renormalize, 1.0, None), topk.topk_gate(logits, k, score, renormalize, 1.0, None))
    assert_same([native.soft_gate(logits)], [soft.soft_gate(logits)])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    "segments",
    [
        None,
        torch.arange(6001) // 1500,
        torch.arange(6001).flip(0) // 7,
        torch.randint(-(2**62), 2**62, (9,), generator=torch.Generator().manual_seed(0))[torch.arange(6001) * 7919 % 9],
    ],
    ids=["whole", "longer than a piece", "many, in falling order", "scattered"],
)
@pytest.mark.parametrize("masked", [False, True])
def test_balance_loss(segments, masked, dtype):
    """Enough tokens for several pieces, for segments of several pieces, and for pieces of several runs."""
    logits, indices = draw((6001, 5), dtype), draw((6001, 6)).argsort(1)[:, :2]
    mask = draw((6001,)) > 1 if masked else None
    uneven = logits.sigmoid() * torch.arange(1, 6)  # near balance the loss is a difference of what is almost equal, in the reference too
    kinds = [("switch", logits.softmax(-1), indices), ("importance", uneven, None), ("z", logits, None)]
    kinds += [("softmax_switch", logits, indices), ("softmax_importance", logits * 3 + torch.arange(5), None)]
    for kind, scores, chosen in kinds:
        arguments = (chosen, mask, kind, segments, None, None)
        loss, dloss = native.balance_loss(scores, *arguments), torch.tensor(0.7, dtype=torch.float64)
        close(loss, balance.balance_loss(scores, *arguments), balance.balance_loss(scores.double(), *arguments))
        exact = balance.balance_loss_backward(dloss, scores.double(), *arguments)
        dloss = dloss.to(loss.dtype)
        dscores = native.balance_loss_backward(dloss, scores, *arguments)
        close(dscores, balance.balance_loss_backward(dloss, scores, *arguments), exact)
        if masked:
            assert not dscores[~mask].any()


def assert_same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        exactly = None if a.is_floating_point() else 0
        torch.testing.assert_close(a, b, equal_nan=True, rtol=exactly, atol=exactly)


# --- promises -----------------------------------------------------------------------------------------------------------


def everything(logits, dgates, dweights, indices):
    """Every kernel's outputs on these inputs."""
    return (
        native.soft_gate(logits),
        native.soft_gate_backward(dgates, logits),
        *native.topk_gate(logits, 2, "softmax", False, 1.5, None),
        native.topk_gate_backward(dweights, logits, indices, "softmax", False, 1.5),
        native.balance_loss(logits, indices, None, "switch", indices[:, 0], None, None),
        native.balance_loss_backward(dgates[0, 0], logits, indices, None, "switch", indices[:, 0], None, None),
        native.balance_loss(logits, indices, None, "softmax_switch", None, None, None),
        native.balance_loss_backward(dgates[0, 0], logits, indices, None, "softmax_switch", None, None, None),
        native.balance_loss(logits, None, dgates[:, 0] > 0, "z", None, None, None),
        native.balance_loss_backward(dgates[0, 0], logits, None, dgates[:, 0] > 0, "z", None, None, None),
    )


def inputs(tokens=3001, experts=5):
    """logits, dgates, dweights, indices"""
    grads = draw((tokens, experts), torch.float32, 1), draw((tokens, 2), torch.float32, 2)
    return draw((tokens, experts), torch.float32), *grads, draw((tokens, experts)).argsort(1)[:, :2]


def loss(scores, indices, mask=None, kind="switch", segments=None):
    return native.balance_loss(scores, indices, mask, kind, segments, None, None)


def assert_equal(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)
        assert a.is_contiguous()


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_same_bits_again_and_with_any_number_of_threads(threads):
    arguments = inputs()
    copies = [t.clone() for t in arguments]
    threads(1)
    once = everything(*arguments)
    assert_equal(everything(*arguments), once)
    for number in (2, 3):
        threads(number)
        assert_equal(everything(*arguments), once)
    assert all(torch.equal(a, b) for a, b in zip(arguments, copies, strict=True)), "an input was written to"


def test_any_strides():
    dense = inputs(tokens=31)
    columns_first = tuple(t.t().contiguous().t() for t in dense)
    every_second = tuple(torch.stack((t, torch.zeros_like(t)), -1).flatten(1)[:, ::2] for t in dense)
    assert_equal(everything(*columns_first), everything(*dense))
    assert_equal(everything(*every_second), everything(*dense))


def test_expanded_inputs():
    logits, _, _, indices = inputs(tokens=31)
    one_row, number = logits[:1].expand(31, 5), torch.tensor(0.7)
    expanded = (one_row, number.expand(31, 5), number.expand(31, 2), indices[:1].expand(31, 2))
    assert_equal(everything(*expanded), everything(*(t.contiguous() for t in expanded)))


def test_gradients_in_another_dtype():
    logits, dgates, dweights, indices = inputs(tokens=31)
    rounded = dgates.bfloat16(), dweights.bfloat16()
    wide = everything(logits, rounded[0].float(), rounded[1].float(), indices)
    assert_equal(everything(logits, *rounded, indices), wide)


@pytest.mark.skipif(platform.system() != "Linux", reason="reads the peak memory as Linux reports it")
def test_calls_leak_nothing():
    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    logits = draw((1, 5))
    for calls in (1000, 100_000):
        before = peak()
        for _ in range(calls):
            native.topk_gate(logits, 2, "softmax", True, 1.0, None)
    assert peak() - before < 2000, "KiB; one string of 32 bytes per call would be 3125"


# --- through the public operations --------------------------------------------------------------------------------------


def test_the_library_serves_by_default():
    for op in ("soft_gate", "topk_gate", "balance_loss"):
        assert backends.serving(op, "cpu") == ["cpu", "reference"]
        for name in (op, f"{op}_backward"):
            assert backends._kernels[name, "cpu"] is getattr(native, name).default


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype):
    logits, dgates, dweights, indices = inputs(tokens=4)
    logits, ops = logits.to(dtype), torch.ops.cmoe
    torch.library.opcheck(ops.soft_gate.default, (logits.clone().requires_grad_(), "cpu"))
    torch.library.opcheck(ops.topk_gate.default, (logits.clone().requires_grad_(), 2, "sigmoid", True, 1.0, None, "cpu"))
    torch.library.opcheck(ops.soft_gate_backward.default, (dgates, logits, "cpu"))
    torch.library.opcheck(ops.topk_gate_backward.default, (dweights, logits, indices, "sigmoid", True, 1.0, "cpu"))


@pytest.mark.parametrize("experts", [1, 5])
def test_gradcheck(experts):
    logits = draw((4, experts)).requires_grad_()
    with cmoe.use_backend("cpu"):
        assert torch.autograd.gradcheck(cmoe.soft_gate, logits)
        for score, renormalize in SCORES:
            for k in ks(experts):
                assert torch.autograd.gradcheck(lambda x, k=k, s=score, r=renormalize: cmoe.topk_gate(x, k, s, r, 2.0).weights, logits)


@pytest.mark.each
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, i: native.soft_gate(x[0]), "logits must have the dimensions [T, E], got shape (5)"),
        (lambda x, i: native.soft_gate(x.long()), "logits must be float32, bfloat16, float16 or float64, got Long"),
        (lambda x, i: native.soft_gate_backward(x[:, :4], x), "dgates has shape (6, 4), must be (6, 5) like logits"),
        (lambda x, i: native.topk_gate(x, 0, "softmax", True, 1.0, None), "k is 0, must be in 1..5"),
        (lambda x, i: native.topk_gate(x, 6, "softmax", True, 1.0, None), "k is 6, must be in 1..5"),
        (lambda x, i: native.topk_gate(x, 1, "tanh", True, 1.0, None), "score is 'tanh', must be one of softmax, sigmoid"),
        (lambda x, i: native.topk_gate(x, 1, "softmax", True, 1.0, x[1:]), "selection has shape (5, 5), must be (6, 5) like logits"),
        (lambda x, i: native.topk_gate(x, 1, "softmax", True, 1.0, x.int()), "selection must be float32, bfloat16,"),
        (lambda x, i: native.topk_gate_backward(x[:, :2], x, i.int(), "softmax", True, 1.0), "indices must be int64, got Int"),
        (lambda x, i: native.topk_gate_backward(x[:, :1], x, i, "softmax", True, 1.0), "dweights has shape (6, 1), must be (6, 2)"),
        (lambda x, i: native.topk_gate_backward(x[1:, :2], x, i[1:], "softmax", True, 1.0), "indices has shape (5, 2), must be (6, 2)"),
        (lambda x, i: native.topk_gate_backward(x[:, :2], x, i + 4, "softmax", True, 1.0), "must be in 0..5 (5 is no expert)"),
        (lambda x, i: native.topk_gate_backward(x[:, :2], x, i - 9, "softmax", True, 1.0), "must be in 0..5 (5 is no expert)"),
        (lambda x, i: loss(x, i * 3), "indices holds 6, must be in -1..5 (5 experts; -1 and 5 mean no expert)"),
        (lambda x, i: loss(x, i - 9, mask=x[:, 0] > 9), "indices holds -7, must be in -1..5"),
        (lambda x, i: loss(x, i.int()), "indices must be Long, got Int"),
        (lambda x, i: loss(x, i[1:]), "indices has shape (5, 2), must be (6, 2)"),
        (lambda x, i: loss(x, None), "kind='switch' needs either indices or counts"),
        (lambda x, i: loss(x, i, kind="cv"), "kind is 'cv', must be one of switch, importance, z"),
        (lambda x, i: loss(x, i, mask=i[:, 0]), "mask must be Bool, got Long"),
        (lambda x, i: loss(x, i, segments=i), "segments has shape (6, 2), must be (6)"),
        (
            lambda x, i: native.balance_loss_backward(x, x, i, None, "switch", None, None, None),
            "dloss has shape (6, 5), must hold one number",
        ),
    ],
)
def test_errors_name_the_argument(call, message):
    logits, _, _, indices = inputs(tokens=6)
    indices[0, 0] = 2
    with pytest.raises(RuntimeError, match=re.escape(message)):
        call(logits, indices)


# --- what the library is made of ----------------------------------------------------------------------------------------


@pytest.mark.skipif(platform.system() != "Linux", reason="reads ELF symbols")
def test_symbols():
    elffile = pytest.importorskip("elftools.elf.elffile")
    with open(str(cmoe.native.library), "rb") as file:
        symbols = [s for s in elffile.ELFFile(file).get_section_by_name(".dynsym").iter_symbols() if s.name]
    undefined = {s.name for s in symbols if s["st_shndx"] == "SHN_UNDEF"}
    assert {s.name for s in symbols} - undefined == {"PyInit__C"}
    # C names of the stable ABI, and nothing of torch's C++ classes, which change from release to release.
    assert [name for name in undefined if re.match(r"_Z.*(3c10|2at|5torch)", name)] == []
    assert [name for name in undefined if "torch" in name and not re.match(r"(aoti_)?torch_", name)] == []
    assert {name for name in undefined if re.match("_?Py", name)} == {"PyModule_Create2", "PyUnicode_FromString", "Py_BuildValue"}


def test_limited_api():
    pytest.importorskip("abi3audit")
    command = [sys.executable, "-m", "abi3audit", "--strict", "--assume-minimum-abi3", "3.10", str(cmoe.native.library)]
    audit = subprocess.run(command, capture_output=True, text=True)
    assert audit.returncode == 0, audit.stdout + audit.stderr


def test_python_can_import_the_library():
    import cmoe_kernels._C  # noqa: F401
