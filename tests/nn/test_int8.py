"""prepack(torch.int8): a connector with int8 weights, what it saves and loads, what it refuses, and how far it is from the parameters."""

import copy
import io
import pickle

import pytest
import torch

import cmoe_kernels as cmoe
from cmoe_kernels.nn.int8 import Int8Linear
from cmoe_kernels.ops import int8
from cmoe_kernels.ops.int8 import quantise
from tests.nn.forms import FORMS, SIZES

every_form = pytest.mark.parametrize("form", FORMS, ids=lambda f: "-".join(str(v) for v in f.values() if not isinstance(v, tuple)))


def connector(dtype: torch.dtype = torch.float32, **settings) -> cmoe.CMoEConnector:
    torch.manual_seed(0)
    return cmoe.CMoEConnector(cmoe.CMoEConfig(**{"tasks": ("a", "b", "c"), **SIZES, **settings})).to(dtype).eval()


def quantised(dtype: torch.dtype = torch.float32, **settings) -> cmoe.CMoEConnector:
    made = connector(dtype, **settings)
    made.prepack(torch.int8)
    return made


def features(dtype: torch.dtype = torch.float32, samples: int = 3) -> torch.Tensor:
    return torch.randn(samples, 48, 20, generator=torch.Generator().manual_seed(1)).to(dtype)


def dequantised(module: cmoe.CMoEConnector, plain: cmoe.CMoEConnector) -> cmoe.CMoEConnector:
    """The connector whose parameters are the numbers that int8 stands for."""
    twin = copy.deepcopy(plain)
    for name, part in module.named_modules():
        if isinstance(part, Int8Linear):
            parameter = twin.get_parameter(name)
            with torch.no_grad():
                parameter[..., parameter.shape[-1] - part.shape[-1] :] = part.weight().float() * part.scale[..., None]
    return twin


def test_weights_are_rounded_to_nearest_by_output():
    w = torch.tensor([[127.0, 0.5, 1.5, -126.6], [0, 0, 0, 0], [1e-3, -1e-3, 2.54e-1, 0]])
    q, scale = quantise.quantise_weight("w", w)
    assert q.tolist() == [[127, 0, 2, -127], [0, 0, 0, 0], [0, 0, 127, 0]]  # ties to even
    torch.testing.assert_close(scale, torch.tensor([1.0, 0.0, 0.002]))
    w = torch.randn(3, 40, 60)
    q, scale = quantise.quantise_weight("w", w)
    assert (q.float() * scale[..., None] - w).abs().max() <= scale.max() / 2 * 1.0001
    with pytest.raises(ValueError, match="w holds values that are not finite"):
        quantise.quantise_weight("w", torch.tensor([[1.0, torch.inf]]))


def test_rows_that_are_not_finite_stay_so():
    x = torch.randn(3, 10)
    x[1, 2], x[2, 3] = torch.nan, -torch.inf
    q, scale = quantise.quantise_rows(x)
    assert scale.isnan().tolist() == [False, True, True]
    assert not q[1:].any()


@pytest.mark.parametrize("layout", [(16, 4, 4), (32, 4, 64), (1, 7, 7)])
def test_the_order_of_kernels_and_back(layout):
    q = torch.randint(-127, 128, (3, 37, 70), dtype=torch.int8)
    panels = quantise.pack(q, quantise.Layout(*layout))
    assert panels.shape[3:] == layout[:2]
    assert panels.shape[2] * layout[1] % layout[2] == 0
    assert torch.equal(quantise.unpack(panels, 37, 70), q)
    lanes, step, _ = layout
    assert panels[2, 20 // lanes, 65 // step, 20 % lanes, 65 % step] == q[2, 20, 65]


@every_form
@pytest.mark.parametrize("task", ["b", ["a", "c", "a"]], ids=["one_task", "tasks"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activations", ["as_here", "int8"])
def test_values(form, task, dtype, activations, monkeypatch):
    """Those of a connector whose parameters are the int8 numbers, within what int8 activations cost, here and where they are used."""
    plain, made = connector(torch.float32, **form), quantised(torch.float32, **form)
    exact = activations == "as_here" and int8.float_rows(cmoe.backends.choose("int8_experts", "cpu")) == int8.MANY
    if activations == "int8":  # by the twin
        monkeypatch.setattr(int8, "float_rows", lambda backend: 0)
    with torch.no_grad(), cmoe.use_backend("auto" if activations == "as_here" else "reference"):
        want, got = dequantised(made, plain)(features(dtype).float(), task), made(features(dtype), task)
    assert got.embeddings.dtype == dtype
    share = {torch.float32: 1e-6, torch.bfloat16: 0.01, torch.float16: 0.002}[dtype] if exact else 0.03
    for w, g in ((want.embeddings, got.embeddings.float()), (want.gates, got.gates)):
        if form["router"] != "sparse" or exact:
            assert (g - w).norm() <= max(share, 1e-6) * w.norm()


@every_form
def test_the_twin_agrees(form, monkeypatch):
    """Of whatever serves here and plain PyTorch: the same roundings."""
    made, rows = quantised(**form), int8.float_rows(cmoe.backends.choose("int8_experts", "cpu"))
    monkeypatch.setattr(int8, "float_rows", lambda backend: rows)
    for samples in (1, 3):
        with torch.no_grad():
            got = made(features(samples=samples), "b")
            with cmoe.use_backend("reference"):
                want = made(features(samples=samples), "b")
        torch.testing.assert_close(got.embeddings, want.embeddings, rtol=1e-4, atol=2e-5)
        torch.testing.assert_close(got.gates, want.gates, rtol=1e-4, atol=1e-6)


# Relative error of the output, largest difference of a gate, share of tokens whose best two experts stay.
@pytest.mark.parametrize("activations", ["floats", "int8"])
def test_error_against_the_parameters(activations, monkeypatch):
    """The stated bounds (docs/kernels/int8.md), on a connector of random weights in the release's proportions."""
    torch.manual_seed(0)
    config = cmoe.CMoEConfig(in_features=88, out_features=256, hidden_features=256, num_experts=5, router_features=2816)
    plain = cmoe.CMoEConnector(config).eval()
    torch.nn.init.normal_(plain.router.w2, std=0.2)  # gates that differ
    made, x = copy.deepcopy(plain), torch.randn(8, 256, 88)
    made.prepack(torch.int8)
    monkeypatch.setattr(int8, "float_rows", lambda backend: int8.MANY if activations == "floats" else 0)
    with torch.no_grad(), cmoe.use_backend("reference"):
        want, got = plain(x, "vqa"), made(x, "vqa")
    error = (got.embeddings - want.embeddings).norm() / want.embeddings.norm()
    gates = (got.gates - want.gates).abs().max()
    best = [t.gates.topk(2).indices.sort().values for t in (want, got)]
    agree = (best[0] == best[1]).all(-1).float().mean()
    bound = {"floats": (0.01, 0.01, 0.99), "int8": (0.02, 0.02, 0.98)}[activations]
    assert want.gates.std() > 0.05
    assert error < bound[0]
    assert gates < bound[1]
    assert agree > bound[2]


def test_memory_is_half_of_bf16():
    config = cmoe.CMoEConfig(in_features=64, out_features=256, hidden_features=256, num_experts=5, resample="none", task_features=256)
    made = cmoe.CMoEConnector(config, dtype=torch.bfloat16)
    image = made.experts.w1.numel() + made.experts.w2.numel() + made.router.w1.shape[0] * 64
    nbytes = made.prepack(torch.int8)
    held = sum(t.nbytes for t in (*made.parameters(), *made.buffers()))
    assert image <= nbytes <= held < 1.2 * image
    assert made.prepack(torch.int8) == nbytes


@every_form
def test_saved_and_loaded(form):
    """[out, in] int8 with scales whatever reads them; a new connector becomes int8 by loading."""
    made = quantised(torch.bfloat16, **form)
    state = made.state_dict()
    assert state["experts.w1.weight"].dtype == torch.int8
    assert list(state["experts.w1.weight"].shape) == [3, 70 if form["expert"] == "mlp" else 50, 80]
    assert state["experts.w1.scale"].dtype == torch.float32
    assert not any("panels" in key for key in state)
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    fresh = connector(torch.bfloat16, **form)
    with torch.no_grad():
        for p in fresh.parameters():
            p.zero_()
    fresh.load_state_dict(torch.load(file, weights_only=True))
    again = fresh.state_dict()
    assert all(torch.equal(value, again[key]) for key, value in state.items())
    x = features(torch.bfloat16)
    assert not any(p.requires_grad for p in fresh.parameters())
    expected = made(x, "b").embeddings
    assert torch.equal(fresh(x, "b").embeddings, expected)
    with torch.no_grad():
        made.load_state_dict(state)
        assert torch.equal(made(x, "b").embeddings, expected)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "half", "double", "cpu", "eval"])
def test_copies_and_casts_leave_int8_as_it_is(how):
    made = quantised()
    with torch.no_grad():
        expected = made(features(), "b").embeddings
        copies = {"deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m))}
        twin = copies[how](made) if how in copies else getattr(copy.deepcopy(made), how)()
        assert twin.experts.w1.scale.dtype == torch.float32
        tolerance = 2e-3 if how == "half" else 1e-6  # the router's second layer is not int8
        torch.testing.assert_close(twin(features(), "b").embeddings, expected, rtol=tolerance, atol=tolerance)


def test_built_without_memory_and_loaded():
    made = quantised()
    with torch.device("meta"):
        fresh = cmoe.CMoEConnector(made.config)
    fresh.load_state_dict(made.state_dict(), assign=True)
    fresh.eval()
    with torch.no_grad():
        assert torch.equal(fresh(features(), "b").embeddings, made(features(), "b").embeddings)


def one_line(error) -> bool:
    return "\n" not in str(error.value)


def test_training_is_refused_in_one_line():
    made = quantised()
    for start in (made.train, torch.nn.Sequential(made).train):
        with pytest.raises(RuntimeError, match="int8 weights cannot be trained: load the floating-point weights") as error:
            start()
        assert one_line(error)
        assert not made.training
        assert not made.experts.training
    made.eval()
    with pytest.raises(RuntimeError, match=r"x requires a gradient, which int8 weights do not give: call under torch.no_grad\(\)") as error:
        made(features().requires_grad_(), "a")
    assert one_line(error)
    assert not made(features(), "a").embeddings.requires_grad
    with torch.no_grad():
        made(features().requires_grad_(), "a")


def test_what_else_is_refused():
    made, state = quantised(), connector().state_dict()
    with pytest.raises(RuntimeError, match="the connector's weights are int8: load the floating-point weights into a new connector"):
        made.prepack(torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"w1 is floating-point and the module's weights are int8: load it into a new module") as error:
        made.load_state_dict(state)
    assert one_line(error)
    with pytest.raises(RuntimeError, match="int8 weights cannot be initialised anew"):
        made.reset_parameters()
    with torch.no_grad(), pytest.raises(TypeError, match=r"x is torch.float64; int8 weights take float32, bfloat16 or float16"):
        made(features().double(), "a")
    saved = made.state_dict()
    wrong = {**saved, "experts.w1.weight": saved["experts.w1.weight"][:, 1:]}
    with pytest.raises(RuntimeError, match=r"experts.w1.weight is torch.int8 \(3, 69, 80\), must be torch.int8 \(3, 70, 80\)"):
        connector().load_state_dict(wrong)
    with pytest.raises(RuntimeError, match=r"Missing key.*experts.w2.scale"):
        connector().load_state_dict({k: v for k, v in saved.items() if k != "experts.w2.scale"})
    with torch.no_grad(), pytest.raises((RuntimeError, ValueError), match=r"indices holds 7, must be in -1..3"):
        made.experts(torch.randn(2, 80), indices=torch.full((2, 1), 7))


@pytest.mark.parametrize("name", ["experts.w2", "router.w1"])
def test_weights_that_are_not_finite_leave_the_connector_as_it_was(name):
    made = connector().train()
    with torch.no_grad():
        made.get_parameter(name)[1, -1] = torch.nan
    with pytest.raises(ValueError, match=f"{name} holds values that are not finite; int8 weights need finite ones"):
        made.prepack(torch.int8)
    assert not any(isinstance(part, Int8Linear) for part in made.modules())
    assert made.training
    assert all(p.requires_grad for p in made.parameters())


@pytest.mark.parametrize("inputs", ["task_token", "token", "task"])
@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_single_layer_router_takes_image_tokens_of_every_dtype(parameters, inputs):
    made = quantised(parameters, router_layers=1, router_inputs=inputs)
    loaded = connector(parameters, router_layers=1, router_inputs=inputs)
    loaded.load_state_dict(made.state_dict())
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for task in ("b", ["a", "c", "a"]):
            out = made(features(dtype), task)
            assert out.embeddings.dtype == dtype
            assert torch.equal(loaded(features(dtype), task).embeddings, out.embeddings)


def test_autocast_sets_the_dtype():
    made = quantised()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert made(features(), "a").embeddings.dtype == torch.bfloat16


def test_compile():
    made = quantised()
    with torch.no_grad():
        compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(features(), "a").embeddings, made(features(), "a").embeddings)


def test_opcheck():
    made, x = quantised(), torch.randn(9, 80)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    first, last, router = made.experts.w1, made.experts.w2, made.router.w1
    for backend in cmoe.backends.serving("int8_experts", "cpu"):
        rest = first.panels, first.scale, first.bias, last.panels, last.scale, last.bias, None, "gelu", False, int8.MANY, backend
        torch.library.opcheck(torch.ops.cmoe.int8_experts.default, (x, torch.rand(9, 3), None, *rest), test_utils=checks)
        torch.library.opcheck(
            torch.ops.cmoe.int8_experts.default, (x, torch.rand(9, 2), torch.randint(0, 3, (9, 2)), *rest), test_utils=checks
        )
        arguments = x, router.panels, router.scale[None], router.bias, made.router.w2, made.router.b2, torch.arange(9) % 3, "gelu", 0
        if int8.float_rows(backend) == int8.MANY and backend == "cpu":
            arguments = (*arguments[:-1], int8.MANY)
        torch.library.opcheck(torch.ops.cmoe.int8_router.default, (*arguments, backend), test_utils=checks)
