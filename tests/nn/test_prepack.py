"""prepack(): the same values from copies in the kernels' order, and copies that never outlive the weights they were made of."""

import copy

import pytest
import torch

import cmoe_kernels as cmoe
from benchmarks.compare import assert_close
from cmoe_kernels import backends
from tests.nn.forms import FORMS, SIZES

pytestmark = pytest.mark.skipif(backends.choose("soft_experts", "cpu") != "cpu", reason="the native library is not in use")


def connector(dtype: torch.dtype = torch.float32, **settings) -> cmoe.CMoEConnector:
    torch.manual_seed(0)
    return cmoe.CMoEConnector(cmoe.CMoEConfig(**SIZES, **settings)).to(dtype).eval()


def features(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(3, 48, 20, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("form", FORMS, ids=lambda f: "-".join(str(v) for v in f.values() if not isinstance(v, tuple)))
@pytest.mark.parametrize("task", ["b", ["a", "c", "a"]], ids=["one_task", "tasks"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_values(form, task, dtype):
    plain = connector(dtype, **form)
    packed = copy.deepcopy(plain)
    assert packed.prepack() > 0
    with torch.no_grad():
        want, got = plain(features(dtype), task), packed(features(dtype), task)
    # The same products in the same order, but for the bias of a task, which is not summed anew.
    for name in ("embeddings", "gates"):
        w, g = getattr(want, name), getattr(got, name)
        assert_close(name, g, w.double(), w)


def test_packed_experts_take_minus_one_for_no_expert():
    experts = connector(tasks=("a",)).experts
    x, weights = torch.randn(9, 80), torch.rand(9, 2)
    indices = torch.randint(0, 4, (9, 2))
    with torch.no_grad():
        expected = experts(x, weights=weights, indices=indices)
        experts.packed = experts.pack(None)
        torch.testing.assert_close(experts(x, weights=weights, indices=indices.masked_fill(indices == 3, -1)), expected)
        with pytest.raises(RuntimeError, match=r"indices holds -2, must be in -1..3 \(3 experts; -1 and 3 mean no expert\)"):
            experts(x, weights=weights, indices=indices * 0 - 2)


def test_the_copies_are_what_runs_and_their_bytes_are_told():
    c = connector(torch.bfloat16, tasks=("a", "b"))
    nbytes = c.prepack()
    weights = c.experts.w1.numel() + c.experts.w2.numel() + c.router.w1[:, c.config.task_width :].numel()
    assert 2 * weights <= nbytes < 16 * weights
    with torch.no_grad():
        before = c(features(torch.bfloat16), "a").embeddings
        c.experts.packed.w1.zero_()
        assert not torch.equal(c(features(torch.bfloat16), "a").embeddings, before)


def test_gradients_and_other_dtypes_use_the_parameters():
    c = connector(tasks=("a", "b"))
    c.prepack()
    c(features(), "a").embeddings.sum().backward()
    assert all(p.grad is not None for p in c.parameters())
    c.experts.packed.w1.zero_()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert c(features(), "a").embeddings.abs().sum() > 0
    with torch.no_grad(), cmoe.use_backend("reference"):
        assert c(features(), "a").embeddings.abs().sum() > 0


@pytest.mark.parametrize(
    "undo",
    [
        lambda c: c.train(),
        lambda c: c.load_state_dict(c.state_dict()),
        lambda c: c.double(),
        lambda c: c.to("cpu"),
        lambda c: c.unpack(),
        lambda c: torch.nn.Sequential(c).load_state_dict({f"0.{k}": v for k, v in c.state_dict().items()}),
        lambda c: torch.nn.Sequential(c).train(),
    ],
    ids=["train", "load_state_dict", "dtype", "device", "unpack", "load_state_dict of a parent", "train of a parent"],
)
def test_undone(undo):
    c = connector(tasks=("a", "b"))
    c.prepack()
    undo(c)
    assert c.router.packed is None
    assert c.experts.packed is None


def test_weights_changed_since():
    c = connector(tasks=("a", "b"))
    c.prepack()
    with torch.no_grad():
        c.experts.w2.add_(1)
        with pytest.raises(RuntimeError, match=r"w2 has changed since prepack\(\)"):
            c(features(), "a")
        c.prepack()
        c(features(), "a")
        c.router.w1 = torch.nn.Parameter(c.router.w1.clone())
        with pytest.raises(RuntimeError, match=r"w1 has changed since prepack\(\)"):
            c(features(), "a")


def test_around_a_peft_merge():
    peft = pytest.importorskip("peft")
    plain = connector(tasks=("a", "b"))
    wrapped = peft.get_peft_model(
        copy.deepcopy(plain), peft.LoraConfig(r=2, target_modules=[], target_parameters=["experts.w1", "experts.w2"])
    )
    with torch.no_grad():
        for name, p in wrapped.named_parameters():
            if "lora_" in name:
                p.normal_(std=0.3)
    wrapped.eval()
    with torch.no_grad():
        want = wrapped(features(), "a").embeddings
        merged = wrapped.merge_and_unload()
        assert not torch.allclose(want, plain(features(), "a").embeddings)
        merged.prepack()
        torch.testing.assert_close(merged(features(), "a").embeddings, want, rtol=1e-4, atol=1e-4)


def test_compile():
    c = connector(tasks=("a", "b"))
    c.prepack()
    with torch.no_grad():
        compiled = torch.compile(c, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(features(), "a").embeddings, c(features(), "a").embeddings)


@pytest.mark.parametrize(
    ("parameters", "dtype", "error", "message"),
    [
        (torch.float64, torch.float32, ValueError, r"dtype is torch.float32 and .* is torch.float64"),
        (torch.float32, torch.float64, ValueError, r"dtype is torch.float64 and .* is torch.float32"),
        (torch.float32, torch.int32, TypeError, "dtype is torch.int32, must be torch.float32, bfloat16, float16, float64 or int8"),
    ],
)
@pytest.mark.parametrize("inputs", ["task_token", "task"])
def test_dtypes_that_do_not_go_together(parameters, dtype, error, message, inputs):
    c = connector(parameters, tasks=("a", "b"), router_inputs=inputs)
    with pytest.raises(error, match=message):
        c.prepack(dtype)
    with torch.no_grad():
        assert c(features(parameters), "a").embeddings.isfinite().all()
    w, like = torch.randn(3, 5, 4, dtype=parameters), torch.empty(0, dtype=dtype)
    with pytest.raises(RuntimeError, match=r"must be float64 where products are|must be float32, bfloat16"):
        torch.ops.cmoe_native.prepack(w, like)
    with pytest.raises(RuntimeError, match=r"must be float64 where products are|must be float32, bfloat16"):
        torch.ops.cmoe_native.packed_router_bias(torch.zeros(2, 4, dtype=dtype), w[0], None)


def test_without_the_native_kernels():
    with cmoe.use_backend("reference"), pytest.raises(RuntimeError, match="needs the native CPU kernels"):
        connector(tasks=("a", "b")).prepack()
    with pytest.raises(RuntimeError, match="the parameters are on meta"):
        cmoe.CMoEConnector(cmoe.CMoEConfig(**SIZES), device="meta").prepack()


@pytest.mark.parametrize(
    ("dtype", "backend", "grad", "reason"),
    [
        (None, "auto", True, "gradients are enabled"),
        (torch.bfloat16, "auto", False, "products would be in torch.float32, the copies are torch.bfloat16"),
        (None, "reference", False, "the backend is reference"),
    ],
    ids=["grad", "dtype", "backend"],
)
def test_a_log_line_says_why_copies_are_not_used(caplog, dtype, backend, grad, reason):
    c = connector(tasks=("a",))
    c.prepack(dtype)
    with caplog.at_level("INFO", logger="cmoe_kernels"), torch.set_grad_enabled(grad), cmoe.use_backend(backend):
        c(features(), "a")
    assert [reason in r.getMessage() for r in caplog.records] == [True, True]  # router and experts


def test_packing_is_done_by_operators():
    """With schemas, fakes and no autograd, as every other op."""
    w, task = torch.randn(3, 50, 20), torch.randn(2, 8)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.cmoe.prepack.default, (w, w.new_empty(0, dtype=torch.bfloat16)), test_utils=checks)
    torch.library.opcheck(torch.ops.cmoe.packed_router_bias.default, (task, torch.randn(30, 8), torch.randn(30)), test_utils=checks)
