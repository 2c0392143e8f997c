"""experts_implementation="cmoe" against the loops of transformers: values, all gradients, layouts, what falls back and why."""

import copy
import importlib.util
import re
import warnings
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from torch import nn
from transformers.integrations import moe

import cmoe_kernels
from benchmarks.compare import assert_close
from cmoe_kernels import backends
from cmoe_kernels.integrations import experts
from tests.integrations import tiny
from tests.integrations.tiny import SIZES, tiny_inputs, tiny_model

DECORATED = re.compile(r"^@use_experts_implementation.*\nclass (\w+)\(", re.MULTILINE)
ROOT = Path(importlib.util.find_spec("transformers").submodule_search_locations[0]) / "models"
# By a search of the sources: what importing every family would cost at collection.
CLASSES = sorted(name for path in ROOT.glob("*/modeling_*.py") for name in DECORATED.findall(path.read_text(encoding="utf-8")))
# One per layout: gated, transposed, not gated; interleaved, a norm after each expert, a gate of its own.
SAMPLE = ("MixtralExperts", "AriaExperts", "NemotronHExperts", "GptOssExperts", "MuseSparkExperts", "DeepseekV4Experts")


@pytest.fixture(scope="module")
def families():
    return {family.experts.__name__: family for family in tiny.families()}


@pytest.fixture(autouse=True)
def _quiet():
    # Recurrent layers of some families have no deterministic kernels, and say so.
    torch.use_deterministic_algorithms(True, warn_only=True)
    experts._warn_once.cache_clear()
    transformers.logging.set_verbosity_error()


def full_unless_sampled(names, sample):
    return [name if name in sample else pytest.param(name, marks=pytest.mark.full) for name in names]


def run(model, implementation, inputs, grad=None):
    """First output and every gradient of <output, grad>, by one implementation of the experts."""
    model.set_experts_implementation(implementation)
    model.zero_grad()
    out = model(**inputs)[0]
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)) if grad is None else grad
    (out * grad.to(out.dtype)).sum().backward()
    return out.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def floats(inputs, dtype):
    return {name: v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v for name, v in inputs.items()}


def test_every_family_is_found(families):
    assert sorted(families) == CLASSES


@pytest.mark.parametrize("name", full_unless_sampled(CLASSES, SAMPLE))
def test_family(name, families, monkeypatch):
    """Logits and all gradients of a tiny random model."""
    calls = []
    monkeypatch.setattr(experts, "sparse_experts", lambda *a, **k: calls.append(1) or cmoe_kernels.sparse_experts(*a, **k))
    model = tiny_model(families[name])
    inputs = tiny_inputs(model)
    ours = copy.deepcopy(model)
    if families[name].reason is None:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            got, got_grads = run(ours, "cmoe", inputs)
    else:
        with pytest.warns(UserWarning, match=re.escape(families[name].reason)):
            got, got_grads = run(ours, "cmoe", inputs)
    assert bool(calls) == (families[name].reason is None)
    baseline, baseline_grads = run(model, "eager", inputs)
    assert got_grads.keys() == baseline_grads.keys()
    assert any("experts" in key for key in got_grads)
    if families[name].reason is not None:
        assert got.equal(baseline)
        assert all(grad.equal(baseline_grads[key]) for key, grad in got_grads.items())
        return
    exact, exact_grads = run(copy.deepcopy(model).double(), "eager", floats(inputs, torch.float64))
    # Errors that pass through every layer of a network: on a norm's eight weights, two orders of summation differ threefold by chance.
    assert_close("output", got, exact.double(), baseline, slack=2)
    for key, grad in got_grads.items():
        assert_close(key, grad, exact_grads[key].double(), baseline_grads[key], slack=2)


@pytest.mark.costly
@pytest.mark.parametrize("name", full_unless_sampled(CLASSES, SAMPLE[:1]))
def test_compiles_where_grouped_mm_does(name, families):
    model = tiny_model(families[name])
    if families[name].reason is not None:
        pytest.skip(f"eager: {families[name].reason}")
    inputs = tiny_inputs(model)
    try:
        run_compiled(model, "grouped_mm", inputs)
    except Exception as error:
        pytest.skip(f"grouped_mm does not compile either: {type(error).__name__}: {str(error).splitlines()[0]}")
    torch.compiler.reset()
    want, want_grads = run(model, "cmoe", inputs)
    got, got_grads = run_compiled(model, "cmoe", inputs)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    for key, grad in want_grads.items():
        torch.testing.assert_close(got_grads[key], grad, rtol=0, atol=2e-5 * grad.abs().max().item())


def run_compiled(model, implementation, inputs):
    model.set_experts_implementation(implementation)
    model.zero_grad()
    out = torch.compile(model, backend="aot_eager", fullgraph=True)(**inputs)[0]
    (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    return out.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


# --- one experts module, each layout ------------------------------------------------------------------------------------------


def experts_module(gated=True, transposed=False, bias=False, act="silu", experts=5, width=12, hidden=7):
    """Experts as a model outside transformers would write them, with its decorator."""

    class Experts(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.num_experts = experts
            up = "gate_up_proj" if gated else "up_proj"
            rows = 2 * hidden if gated else hidden
            shapes = {up: (rows, width), "down_proj": (width, hidden)}
            for name, (out, size) in shapes.items():
                shape = (experts, size, out) if transposed else (experts, out, size)
                setattr(self, name, nn.Parameter(torch.randn(shape) * size**-0.5))
                if bias:
                    setattr(self, f"{name}_bias", nn.Parameter(torch.randn(experts, out)))
            self.act_fn = transformers.activations.ACT2FN[act]

        def forward(self, hidden_states, top_k_index, top_k_weights):
            y = torch.zeros_like(hidden_states)
            up = "gate_up_proj" if gated else "up_proj"
            turn = (lambda w: w) if transposed else (lambda w: w.T)
            for t, (row, chosen) in enumerate(zip(hidden_states, top_k_index, strict=True)):
                for k, e in enumerate(chosen.tolist()):
                    if e >= self.num_experts:
                        continue
                    h = row @ turn(getattr(self, up)[e]) + (getattr(self, f"{up}_bias")[e] if bias else 0)
                    h = self._apply_gate(h) if gated else self.act_fn(h)
                    out = h @ turn(self.down_proj[e]) + (self.down_proj_bias[e] if bias else 0)
                    y[t] = y[t] + top_k_weights[t, k] * out
            return y

    decorated = moe.use_experts_implementation(is_transposed=transposed, has_bias=bias, has_gate=gated)(Experts)
    config = transformers.PreTrainedConfig()
    config._experts_implementation = "cmoe"
    return decorated(config).double()


def call(module, implementation, x, indices, weights):
    module.config._experts_implementation = implementation
    y = module(x, indices, weights)
    return y, torch.autograd.grad(y.square().sum(), [x, weights, *module.parameters()])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_layouts(gated, transposed, bias):
    module = experts_module(gated, transposed, bias)
    x = torch.randn(11, 12, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(11, 3, dtype=torch.float64, requires_grad=True)
    indices = torch.rand(11, 5).argsort(-1)[:, :3]
    y, grads = call(module, "cmoe", x, indices, weights)
    want, want_grads = call(module, "eager", x, indices, weights)
    torch.testing.assert_close(y, want)
    for grad, expected in zip(grads, want_grads, strict=True):
        torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("act", ["silu", "swish", "relu", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_accurate", "relu2"])
def test_activations(act):
    module = experts_module(gated=False, act=act)
    x, weights = torch.randn(6, 12, dtype=torch.float64, requires_grad=True), torch.rand(6, 1, dtype=torch.float64, requires_grad=True)
    indices = torch.randint(0, 5, (6, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y, _ = call(module, "cmoe", x, indices, weights)
    # gelu_fast rounds sqrt(2 / pi) to ten digits.
    torch.testing.assert_close(y, call(module, "eager", x, indices, weights)[0], rtol=1e-7, atol=1e-9)


def test_unknown_activation_falls_back_with_one_warning():
    module = experts_module(gated=False, act="quick_gelu")
    x, weights, indices = torch.randn(4, 12, dtype=torch.float64), torch.rand(4, 2, dtype=torch.float64), torch.randint(0, 5, (4, 2))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        module(x, indices, weights)
        module(x, indices, weights)
    assert len(caught) == 1
    assert "QuickGELUActivation is none of gelu, " in str(caught[0].message)


@pytest.mark.parametrize("sentinel", [5, 8, -1])
def test_sentinels_add_nothing_and_get_no_gradient(sentinel):
    """Expert parallelism gives the experts of other ranks the index E; others give numbers above; serving stacks pad with -1."""
    module = experts_module()
    module._is_expert_parallel = True
    x = torch.randn(9, 12, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(9, 2, dtype=torch.float64, requires_grad=True)
    indices = torch.rand(9, 5).argsort(-1)[:, :2]
    gone = torch.rand(9, 2) < 0.4
    gone[0] = True
    y, (dx, dweights, *_) = call(module, "cmoe", x, indices.masked_fill(gone, sentinel), weights)
    want, (want_dx, _, *_) = call(module, "eager", x, indices.masked_fill(gone, 5), weights)
    torch.testing.assert_close(y, want)
    torch.testing.assert_close(dx, want_dx)
    assert not dweights[gone].any()
    assert dweights[~gone].all()
    assert not y[0].any()


@pytest.mark.parametrize("transposed", [False, True])
def test_weights_are_never_copied(transposed, monkeypatch):
    """The kernels see the parameters' own memory."""
    seen = []
    backend = backends.choose("sparse_experts", "cpu", torch.float64)
    for name in ("sparse_experts", "sparse_experts_backward"):
        kernel = backends._kernels[name, backend]
        first = 3 if name == "sparse_experts" else 4
        spy = lambda *a, kernel=kernel, first=first: seen.append([a[first], a[first + 2]]) or kernel(*a)  # noqa: E731
        monkeypatch.setitem(backends._kernels, (name, backend), spy)
    module = experts_module(transposed=transposed)
    x = torch.randn(4, 12, dtype=torch.float64, requires_grad=True)
    call(module, "cmoe", x, torch.randint(0, 5, (4, 2)), torch.rand(4, 2, dtype=torch.float64, requires_grad=True))
    assert len(seen) == 2
    for w1, w2 in seen:
        assert [w1.data_ptr(), w2.data_ptr()] == [module.gate_up_proj.data_ptr(), module.down_proj.data_ptr()]
        assert w1.is_contiguous() is not transposed


# --- a whole model ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def mixtral():
    return transformers.MixtralForCausalLM(mixtral_config()).eval()


def mixtral_config(**extra):
    sizes = {name: SIZES[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")}
    return transformers.MixtralConfig(**sizes, num_key_value_heads=2, num_local_experts=5, max_position_embeddings=64, **extra)


def test_from_pretrained(mixtral, tmp_path):
    mixtral.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="cmoe")
    assert loaded.config._experts_implementation == "cmoe"
    inputs = tiny_inputs(mixtral)
    torch.testing.assert_close(loaded(**inputs).logits, mixtral(**inputs).logits)


def test_generate(mixtral):
    prompt = torch.randint(3, 60, (2, 5))
    want = mixtral.generate(prompt, max_new_tokens=6, do_sample=False)
    mixtral.set_experts_implementation("cmoe")
    assert mixtral.generate(prompt, max_new_tokens=6, do_sample=False).equal(want)


def test_bfloat16(mixtral):
    exact, exact_grads = run(copy.deepcopy(mixtral).bfloat16().double(), "eager", inputs := tiny_inputs(mixtral))
    half = mixtral.bfloat16()
    baseline, baseline_grads = run(half, "eager", inputs)
    got, got_grads = run(half, "cmoe", inputs)
    assert_close("logits", got, exact.double(), baseline)
    for key in (key for key in got_grads if "experts" in key):
        assert_close(key, got_grads[key], exact_grads[key].double(), baseline_grads[key])


def test_autocast(mixtral):
    inputs = tiny_inputs(mixtral)
    mixtral.set_experts_implementation("cmoe")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = mixtral(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    assert mixtral.model.layers[0].mlp.experts.down_proj.grad.dtype == torch.float32
    torch.testing.assert_close(loss, mixtral(**inputs, labels=inputs["input_ids"]).loss, rtol=2e-2, atol=0)


def test_gradient_checkpointing(mixtral):
    mixtral.set_experts_implementation("cmoe")
    inputs = {**tiny_inputs(mixtral), "use_cache": False}
    results = []
    for checkpointed in (False, True):
        if checkpointed:
            mixtral.train().gradient_checkpointing_enable()
        mixtral.zero_grad()
        mixtral(**inputs, labels=inputs["input_ids"]).loss.backward()
        results.append({name: p.grad.clone() for name, p in mixtral.named_parameters()})
    for name, grad in results[0].items():
        assert results[1][name].equal(grad), name


def test_a_dense_model_is_refused():
    dense = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    )
    with pytest.raises(ValueError, match="LlamaForCausalLM has no experts"):
        experts.use_cmoe(dense)


def test_the_table_of_the_docs_is_up_to_date():
    """docs/kernels/experts_table.md is what `python -m docs.experts` writes with the installed transformers."""
    from docs.experts import table

    path = Path(__file__).parents[2] / "docs" / "kernels" / "experts_table.md"
    assert path.read_text() == table(), "run `python -m docs.experts`"
