"""Upcycled decoders against formulas in plain torch, and their other forms. Tiny random models, no downloads."""

import copy
import pickle
import re
from pathlib import Path

import pytest
import torch
import transformers as tf
from torch.nn import functional as F

from unimed.models.medmoe import (
    count_parameters,
    forms,
    moe_layers,
    record_routing,
    routing_losses,
    upcycle,
)
from unimed.models.medmoe.layers import MoEFFN

torch.set_num_threads(1)
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = {
    "phi": (tf.PhiConfig, {}),
    "stablelm": (tf.StableLmConfig, {"use_qkv_bias": True}),
    "llama": (tf.LlamaConfig, {"mlp_bias": True}),
    "mistral": (tf.MistralConfig, {}),
    "qwen2": (tf.Qwen2Config, {}),
    "qwen3": (tf.Qwen3Config, {"head_dim": 8}),
    "gemma": (tf.GemmaConfig, {"head_dim": 8}),
    "phi3": (tf.Phi3Config, {}),
    "gpt_neox": (tf.GPTNeoXConfig, {}),
    "nemotron": (tf.NemotronConfig, {}),
}


def decoder(family="qwen2", **changes):
    torch.manual_seed(0)
    config, more = FAMILIES[family]
    sizes = {name: value for name, value in SIZES.items() if family != "gpt_neox" or name != "num_key_value_heads"}
    return tf.AutoModelForCausalLM.from_config(config(**{**sizes, **more, **changes})).eval()


def tokens(rows=2, length=9):
    return torch.randint(3, 64, (rows, length), generator=torch.Generator().manual_seed(1))


def stir(model):
    """Experts and routers that differ from each other."""
    torch.manual_seed(2)
    with torch.no_grad():
        for layer in moe_layers(model).values():
            for tensor in layer.state_dict().values():
                tensor.add_(torch.randn_like(tensor) * (0.3 if tensor.dim() > 1 else 0.1))
    return model


def expert(layer, place, x):
    """One expert by plain torch."""
    w1, b1, w2, b2 = (None if p is None else p[place].double() for p in (layer.w1, layer.b1, layer.w2, layer.b2))
    u = F.linear(x.double(), w1, b1)
    acts = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda t: F.gelu(t, approximate="tanh"), "relu2": lambda t: F.relu(t) ** 2}
    acts["quick_gelu"] = lambda t: t * torch.sigmoid(1.702 * t)
    act = acts[layer.activation]
    h = act(u[..., : u.shape[-1] // 2]) * u[..., u.shape[-1] // 2 :] if layer.gated else act(u)
    return F.linear(h, w2, b2)


def expected(layer, x):
    """sum_i G_i E_i(x) + meta(x), token by token, expert by expert."""
    s = layer.settings
    logits = F.linear(x.double(), layer.router.w1.double(), None if layer.router.b1 is None else layer.router.b1.double())
    p, chosen = logits.softmax(-1).topk(s.top_k, -1)
    if s.top_k > 1:
        p = p / p.sum(-1, keepdim=True)
    rows = []
    for row, weights, places in zip(x, p, chosen, strict=True):
        y = sum(w * expert(layer, int(e) + s.meta, row) for w, e in zip(weights, places, strict=True))
        total = weights.sum() + s.meta
        y = y + expert(layer, 0, row) if s.meta else y
        rows.append(y / total if s.scale == "preserve" else y)
    return torch.stack(rows)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_is_its_formula_in_every_family(family):
    model = stir(upcycle(decoder(family), "all"))
    for layer in moe_layers(model).values():
        x = torch.randn(11, 32)
        torch.testing.assert_close(layer(x).double(), expected(layer, x), rtol=1e-5, atol=1e-5)
    assert torch.isfinite(model(tokens()).logits).all()


@pytest.mark.parametrize("meta", [True, False])
@pytest.mark.parametrize("scale", ["released", "preserve"])
@pytest.mark.parametrize("top_k", [1, 2])
def test_a_layer_is_its_formula_in_every_setting(top_k, scale, meta):
    layer = next(iter(moe_layers(stir(upcycle(decoder(), top_k=top_k, scale=scale, meta=meta))).values()))
    x = torch.randn(13, 32)
    torch.testing.assert_close(layer(x).double(), expected(layer, x), rtol=1e-5, atol=1e-5)
    with torch.no_grad():  # one token: other kernels
        torch.testing.assert_close(layer(x[:1]).double(), expected(layer, x[:1]), rtol=1e-5, atol=1e-5)


def test_the_winner_keeps_its_probability():
    """Check 8 of the facts: y = p E(x) + meta(x) to 1e-6, in fp64."""
    layer = next(iter(moe_layers(stir(upcycle(decoder()).double())).values()))
    x = torch.randn(5, 32, dtype=torch.float64)
    p, e = layer.router(x).double().softmax(-1).max(-1)
    y = torch.stack([p[t] * expert(layer, int(e[t]) + 1, x[t]) + expert(layer, 0, x[t]) for t in range(5)])
    torch.testing.assert_close(layer(x), y, rtol=1e-6, atol=1e-6)
    assert (p < 0.999).all()


@pytest.mark.parametrize("top_k", [1, 2])
def test_start_of_the_released_scale(top_k):
    model = decoder()
    ffn = copy.deepcopy(model.model.layers[0].mlp)
    layer = upcycle(model, top_k=top_k).model.layers[0].mlp
    x = torch.randn(7, 32)
    p = layer.router(x).softmax(-1).max(-1, keepdim=True).values if top_k == 1 else 1
    torch.testing.assert_close(layer(x), (1 + p) * ffn(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("top_k", [1, 2])
def test_start_of_the_preserving_scale(family, top_k):
    model = decoder(family)
    before = model(tokens()).logits
    after = upcycle(model, "all", top_k=top_k, scale="preserve")(tokens()).logits
    torch.testing.assert_close(after, before, rtol=1e-5, atol=2e-6)


def test_no_expert_stays_none():
    """A router that excludes everything (logits of -inf) leaves the meta expert alone."""
    layer = next(iter(moe_layers(stir(upcycle(decoder()))).values()))
    layer.router.b1.fill_(-torch.inf)
    x = torch.randn(3, 32)
    torch.testing.assert_close(layer(x).double(), expert(layer, 0, x), rtol=1e-5, atol=1e-5)


def test_released_second_choice_is_drawn_by_gumbel_noise():
    layer = next(iter(moe_layers(upcycle(decoder(), num_experts=3, top_k=2, released=True)).values()))
    logits = torch.tensor([[2.0, 1.0, 0.0]]).log_softmax(-1).expand(20000, 3)
    torch.manual_seed(0)
    weights, indices = layer._choose(logits)
    assert (indices[:, 0] == 0).all()
    p = logits[0].exp()
    # Gumbel-max: the second is drawn by the softmax over the rest. Five standard deviations.
    share = float((indices[:, 1] == 1).float().mean())
    wanted = float(p[1] / (p[1] + p[2]))
    assert abs(share - wanted) < 5 * (wanted * (1 - wanted) / 20000) ** 0.5
    chosen = p[indices]
    torch.testing.assert_close(weights, chosen / chosen.sum(-1, keepdim=True))
    plain = next(iter(moe_layers(upcycle(decoder(), num_experts=3, top_k=2)).values()))
    assert (plain._choose(logits)[1][:, 1] == 1).all()


def test_which_layers():
    assert list(moe_layers(upcycle(decoder()))) == ["model.layers.0.mlp", "model.layers.2.mlp"]
    assert len(moe_layers(upcycle(decoder(), "all"))) == 4
    model = upcycle(decoder(), [3, 1])
    assert model.config.medmoe["layers"] == [1, 3]
    assert list(moe_layers(model)) == ["model.layers.1.mlp", "model.layers.3.mlp"]


def test_gradients_reach_experts_and_never_a_frozen_router():
    model = stir(upcycle(decoder(), router_bias=True)).train()
    model(tokens(4, 16), labels=tokens(4, 16)).loss.backward()
    assert not any("router" in name for name, _ in model.named_parameters())
    for layer in moe_layers(model).values():
        used = layer.router(torch.randn(1, 32)).requires_grad
        assert not used
        assert layer.w1.grad.flatten(1).abs().sum(1)[0] > 0
        assert layer.w2.grad.abs().sum() > 0
    learned = stir(upcycle(decoder(), router="learned")).train()
    learned(tokens(4, 16), labels=tokens(4, 16)).loss.backward()
    assert all(layer.router.w1.grad.abs().sum() > 0 for layer in moe_layers(learned).values())


def test_gradients_are_those_of_plain_torch():
    layer = next(iter(moe_layers(stir(upcycle(decoder(), router="learned", scale="preserve", top_k=2).double())).values()))
    x = torch.randn(6, 32, dtype=torch.float64, requires_grad=True)
    leaves = [x, *layer.parameters()]
    dy = torch.randn(6, 32, dtype=torch.float64)
    # The router computes in fp32.
    for ours, plain in zip(torch.autograd.grad(layer(x), leaves, dy), torch.autograd.grad(expected(layer, x), leaves, dy), strict=True):
        torch.testing.assert_close(ours, plain.to(ours.dtype), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["phi", "gemma"])
def test_saved_and_loaded_by_auto_classes(family, tmp_path):
    model = stir(upcycle(decoder(family), router_layers=2, router_features=5))
    model.save_pretrained(tmp_path)
    assert tf.AutoConfig.from_pretrained(tmp_path).model_type == f"medmoe_{family}"
    loaded, info = tf.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is type(model)
    assert isinstance(loaded, type(decoder(family)))
    assert not any(info.values())
    assert not any("router" in name for name, _ in loaded.named_parameters())
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)
    half = tf.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    layer = next(iter(moe_layers(half).values()))
    assert (layer.w1.dtype, layer.router.w1.dtype) == (torch.bfloat16, torch.float32)
    error = (half(tokens()).logits.float() - model(tokens()).logits).abs().max() / model(tokens()).logits.abs().max()
    assert error < 0.05
    assert torch.equal(pickle.loads(pickle.dumps(model))(tokens()).logits, model(tokens()).logits)


def test_a_checkpoint_that_lacks_a_layer_is_initialised(tmp_path):
    model = upcycle(decoder(), router="learned")
    state = {name: value for name, value in model.state_dict().items() if "layers.2.mlp" not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    loaded, info = tf.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert any("layers.2.mlp.router.w1" in key for key in info["missing_keys"])
    layer = moe_layers(loaded)["model.layers.2.mlp"]
    assert all(torch.isfinite(p).all() and p.abs().max() < 1 for p in layer.parameters())
    assert torch.equal(moe_layers(loaded)["model.layers.0.mlp"].w1, model.model.layers[0].mlp.w1)
    assert layer.w1.std() > 0.01
    assert layer.router.w1.std() > 0.01


def test_the_configuration_given_stays_as_it_is():
    config = tf.Qwen2Config(**SIZES)
    first, second = tf.Qwen2ForCausalLM(config), tf.Qwen2ForCausalLM(config)
    upcycle(first)
    assert second.config is config
    assert config.model_type == "qwen2"
    assert first.model.config is first.config


@pytest.mark.parametrize("top_k", [1, 2])
def test_generation_with_a_cache_equals_without(top_k):
    model = stir(upcycle(decoder(), top_k=top_k))
    ids, given = tokens(), {"attention_mask": torch.ones(2, 9, dtype=torch.int64), "max_new_tokens": 6, "do_sample": False}
    cached = model.generate(ids, **given)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **given))
    one = model.generate(ids[:1], **{**given, "attention_mask": given["attention_mask"][:1]})
    assert torch.equal(one[0], cached[0][: one.shape[1]])


def test_compiles_without_a_graph_break():
    model = stir(upcycle(decoder(num_hidden_layers=1)))
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(tokens(), use_cache=False).logits, model(tokens()).logits, rtol=1e-5, atol=1e-5)
    layer = model.model.layers[0].mlp
    x = torch.randn(2, 3, 32)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x), rtol=1e-5, atol=1e-5)


def test_gradient_checkpoints_give_the_same_gradients_and_record_once():
    grads = []
    for checkpointing in (False, True):
        model = stir(upcycle(decoder(), router="learned", top_k=2)).train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        with record_routing(model) as records:
            loss = model(tokens(), labels=tokens(), use_cache=False).loss
            (loss + routing_losses(records).weighted(1.0, 1.0)).backward()
        assert len(records) == 2
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-5, atol=1e-7)


def test_a_checkpoint_whose_logits_have_no_gradient_is_warned_about():
    model = upcycle(decoder(), router="learned").train()
    model.activation_checkpointing_enable({"use_reentrant": True})
    with record_routing(model), pytest.warns(UserWarning, match="recorded logits have no gradient"):
        model(tokens(), use_cache=False)


def test_autocast_keeps_the_router_in_fp32():
    model = stir(upcycle(decoder()))
    layer = next(iter(moe_layers(model).values()))
    x = torch.randn(9, 32)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
        with torch.no_grad():
            assert layer(x[:1]).dtype == torch.bfloat16
        logits = layer.router(x)
    exact = F.linear(x.double(), layer.router.w1.double(), layer.router.b1.double())
    torch.testing.assert_close(logits.double(), exact, rtol=1e-5, atol=1e-5)


def test_lora_beside_the_experts_and_on_them(tmp_path):
    peft = pytest.importorskip("peft")
    model = stir(upcycle(decoder()))
    model.save_pretrained(tmp_path / "base")
    targets = {"target_modules": ["q_proj", "v_proj"], "target_parameters": ["mlp.w1", "mlp.w2"]}
    lora = peft.get_peft_model(model, peft.LoraConfig(r=2, **targets))
    with torch.no_grad():
        for name, p in lora.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.1)
    lora(tokens(), labels=tokens()).loss.backward()
    got = {name for name, p in lora.named_parameters() if p.grad is not None and p.grad.any()}
    assert got == {name for name, p in lora.named_parameters() if "lora_" in name}
    assert len(got) == 2 * 4 * 2 + 2 * 2 * 2
    lora.eval().save_pretrained(tmp_path / "adapter")
    base = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    again = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    torch.testing.assert_close(again(tokens()).logits, lora(tokens()).logits)
    torch.testing.assert_close(lora.merge_and_unload()(tokens()).logits, again(tokens()).logits, rtol=1e-4, atol=1e-5)


PHI_2 = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 51200}
STABLELM_2 = {
    **{"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 24, "num_attention_heads": 32, "num_key_value_heads": 32},
    **{"vocab_size": 100352, "use_qkv_bias": True},
}


@pytest.mark.parametrize(
    ("config", "copies", "with_meta", "activated"),
    [(tf.PhiConfig(**PHI_2), 5.297, 6.136, 3.619), (tf.StableLmConfig(**STABLELM_2), 2.890, 3.305, 2.060)],
    ids=["phi-2", "stablelm-2"],
)
def test_parameter_totals(config, copies, with_meta, activated):
    """The paper's 5.3 B and 2.9 B are four FFN copies in all; with the meta expert there are five."""
    with torch.device("meta"):
        four = upcycle(tf.AutoModelForCausalLM.from_config(config), meta=False)
        five = upcycle(tf.AutoModelForCausalLM.from_config(config))
    billions = [n / 1e9 for n in (count_parameters(four).total, *count_parameters(five))]
    # 3.30556 and 2.05985: the facts cut the former after three digits.
    assert billions == pytest.approx([copies, with_meta, activated], abs=6e-4)


# Multimodal models


# The router


# Wrong input


def test_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[2] / "docs" / "unimed" / "medmoe.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)
    assert blocks
    space: dict = {}
    for block in blocks:
        exec(block, space)
    assert isinstance(next(iter(moe_layers(space["model"]).values())), MoEFFN)


@pytest.mark.parametrize("family", ["phi", "qwen2"])
@pytest.mark.parametrize("meta", [True, False])
@pytest.mark.parametrize("top_k", [1, 2])
def test_other_forms_of_a_layer(family, meta, top_k):
    layer = next(iter(moe_layers(stir(upcycle(decoder(family), meta=meta, top_k=top_k))).values()))
    x = torch.randn(13, 32, generator=torch.Generator().manual_seed(3))
    chosen = layer._choose(layer.router(x))
    for form in (forms.loop, forms.einsum):
        torch.testing.assert_close(form(layer, x, *chosen), layer(x), rtol=1e-4, atol=1e-5)
    if meta:
        torch.testing.assert_close(forms.dense_ffn(layer, x, *chosen).double(), expert(layer, 0, x), rtol=1e-4, atol=1e-5)


def test_einsum_drops_what_has_no_place():
    layer = next(iter(moe_layers(stir(upcycle(decoder(), num_experts=2))).values()))
    x, weights = torch.randn(4, 32), torch.ones(4, 1)
    indices = torch.tensor([[0], [0], [0], [1]])  # two places each: the third token of expert 0 has none
    y = forms.einsum(layer, x, weights, indices, capacity=1.0)
    whole = forms.loop(layer, x, weights, indices)
    torch.testing.assert_close(y[[0, 1, 3]], whole[[0, 1, 3]], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(y[2].double(), expert(layer, 0, x[2]), rtol=1e-4, atol=1e-5)
