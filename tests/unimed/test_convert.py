"""Checkpoints with the full layout of keys, made here at a reduced width, against the formulas of the projects they come from."""

import importlib.util
import json
import math
import pickle

import pytest
import torch
from model_samples import TEXTS, batch, small
from torch.nn import functional as F
from transformers import AutoTokenizer, LlamaForCausalLM
from typer.testing import CliRunner

from unimed.cli import app as cli
from unimed.errors import UserError
from unimed.models.build import describe
from unimed.models.convert import eva, export, llama, release
from unimed.models.convert.checkpoint import Row
from unimed.models.load import load
from unimed.models.unimed import UniMedForConditionalGeneration
from unimed.models.unimed.modeling import EvaVisionModel
from unimed.models.unimed.tokenization import train_tokenizer
from unimed.train import recipe as recipes

C, HEADS, DEPTH, MLP, PATCH, SIDE = 176, 2, 2, 192, 8, 32  # of the tower
WIDTH, LAYERS, TASKS = 48, 2, ("vqa", "refer", "identify", "caption", "cls")


def draw(seed):
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape, std=0.1: torch.randn(*shape, generator=generator) * std


def eva_file(seed=0, depth=DEPTH, width=C, mlp=MLP, patch=PATCH, side=SIDE):
    """The keys of eva_vit_g.pth."""
    new = draw(seed)
    state = {"cls_token": new(1, 1, width), "pos_embed": new(1, 1 + (side // patch) ** 2, width)}
    state |= {"patch_embed.proj.weight": new(width, 3, patch, patch), "patch_embed.proj.bias": new(width)}
    for n in range(depth):
        block = {"attn.q_bias": (width,), "attn.v_bias": (width,), "attn.qkv.weight": (3 * width, width)}
        block |= {"attn.proj.weight": (width, width), "attn.proj.bias": (width,)}
        block |= {"mlp.fc1.weight": (mlp, width), "mlp.fc1.bias": (mlp,), "mlp.fc2.weight": (width, mlp), "mlp.fc2.bias": (width,)}
        block |= {f"norm{i}.{kind}": (width,) for i in (1, 2) for kind in ("weight", "bias")}
        state |= {f"blocks.{n}.{key}": new(*shape) for key, shape in block.items()}
    return state


def eva_features(state, pixels):
    """Uni-Med's side of it: BEiT-like blocks with biases for queries and values, then a LayerNorm with torch's eps."""
    x = F.conv2d(pixels, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=PATCH).flatten(2).transpose(1, 2)
    x = torch.cat([state["cls_token"].expand(len(x), -1, -1), x], dim=1) + state["pos_embed"]
    for n in range(DEPTH):
        p = {key.removeprefix(f"blocks.{n}."): value for key, value in state.items() if key.startswith(f"blocks.{n}.")}
        h = F.layer_norm(x, (C,), p["norm1.weight"], p["norm1.bias"], 1e-6)
        bias = torch.cat([p["attn.q_bias"], torch.zeros(C), p["attn.v_bias"]])
        q, k, v = F.linear(h, p["attn.qkv.weight"], bias).unflatten(-1, (3, HEADS, C // HEADS)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-1, -2) / math.sqrt(C // HEADS)).softmax(-1)
        x = x + F.linear((weights @ v).transpose(1, 2).flatten(2), p["attn.proj.weight"], p["attn.proj.bias"])
        h = F.layer_norm(x, (C,), p["norm2.weight"], p["norm2.bias"], 1e-6)
        h = F.gelu(F.linear(h, p["mlp.fc1.weight"], p["mlp.fc1.bias"]))
        x = x + F.linear(h, p["mlp.fc2.weight"], p["mlp.fc2.bias"])
    return F.layer_norm(x, (C,))


def meta_file(heads=4, kv=2, vocab=400, mlp=64, seed=3):
    new = draw(seed)
    state = {"tok_embeddings.weight": new(vocab, WIDTH, std=0.02), "norm.weight": 1 + new(WIDTH), "output.weight": new(vocab, WIDTH)}
    for n in range(LAYERS):
        small = kv * WIDTH // heads
        layer = {
            "attention.wq": (WIDTH, WIDTH),
            "attention.wk": (small, WIDTH),
            "attention.wv": (small, WIDTH),
            "attention.wo": (WIDTH, WIDTH),
        }
        layer |= {"feed_forward.w1": (mlp, WIDTH), "feed_forward.w2": (WIDTH, mlp), "feed_forward.w3": (mlp, WIDTH)}
        state |= {f"layers.{n}.{key}.weight": new(*shape, std=0.2) for key, shape in layer.items()}
        state |= {f"layers.{n}.{key}.weight": 1 + new(WIDTH) for key in ("attention_norm", "ffn_norm")}
    return state


def meta_logits(state, ids, heads=4, kv=2, eps=1e-5):
    """Meta's forward pass: rotations of neighbouring pairs as complex numbers."""

    def rms(x, weight):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight

    head, length = WIDTH // heads, ids.shape[1]
    angles = torch.outer(torch.arange(length).float(), 1.0 / 10000.0 ** (torch.arange(0, head, 2).float() / head))
    turn = torch.polar(torch.ones_like(angles), angles)[None, :, None]
    x = F.embedding(ids, state["tok_embeddings.weight"])
    for n in range(LAYERS):
        p = {
            key.removeprefix(f"layers.{n}.").removesuffix(".weight"): value
            for key, value in state.items()
            if key.startswith(f"layers.{n}.")
        }
        h = rms(x, p["attention_norm"])
        q, k, v = (F.linear(h, p[f"attention.w{name}"]).unflatten(-1, (-1, head)) for name in "qkv")
        q, k = (torch.view_as_real(torch.view_as_complex(one.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(-2) for one in (q, k))
        k, v = (one.repeat_interleave(heads // kv, dim=2) for one in (k, v))
        q, k, v = (one.transpose(1, 2) for one in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + F.linear(mixed, p["attention.wo"])
        h = rms(x, p["ffn_norm"])
        x = x + F.linear(F.silu(F.linear(h, p["feed_forward.w1"])) * F.linear(h, p["feed_forward.w3"]), p["feed_forward.w2"])
    return F.linear(rms(x, state["norm.weight"]), state["output.weight"])


def meta_folder(folder, state, shards=2):
    """As Meta publishes it, in as many files as it was trained on."""
    folder.mkdir()
    for i in range(shards):
        part = {}
        for key, value in state.items():
            name = key.removesuffix(".weight")
            axis = llama.META[name.partition(".")[2].partition(".")[2] if name.startswith("layers.") else name][1]
            part[key] = value if axis is None else value.chunk(shards, dim=axis)[i].clone()
        torch.save({**part, "rope.freqs": torch.zeros(6)}, folder / f"consolidated.{i:02}.pth")
    about = {"dim": WIDTH, "n_layers": LAYERS, "n_heads": 4, "n_kv_heads": 2, "norm_eps": 1e-5, "vocab_size": -1, "multiple_of": 256}
    (folder / "params.json").write_text(json.dumps(about))
    train_tokenizer(TEXTS, 400).save_pretrained(folder)
    return folder


def release_file(seed=7, r=4, mlp=64, hidden=WIDTH, experts=5):
    """What the release's trainer writes: experts under both names, router, task tokens, LoRA, and the rotary buffers."""
    new, d = draw(seed), 4 * C
    state = {f"task_tokens.{task}": new(1, 1, 24) for task in TASKS}
    for e in range(experts):
        part = {"0.weight": new(hidden, d), "0.bias": new(hidden), "2.weight": new(WIDTH, hidden), "2.bias": new(WIDTH)}
        state |= {f"{name}.{e}.{key}": value for name in ("moe_layers", "llm_proj") for key, value in part.items()}
    i = d + 24
    state |= {
        "router.fc1.weight": new(4 * i, i),
        "router.fc1.bias": new(4 * i),
        "router.fc2.weight": new(experts, 4 * i),
        "router.fc2.bias": new(experts),
    }
    sizes = {f"self_attn.{name}_proj": (WIDTH, WIDTH) for name in "qo"} | {f"self_attn.{name}_proj": (WIDTH, WIDTH // 2) for name in "kv"}
    sizes |= {"mlp.gate_proj": (WIDTH, mlp), "mlp.up_proj": (WIDTH, mlp), "mlp.down_proj": (mlp, WIDTH)}
    start = "llm_model.base_model.model.model.layers"
    for n in range(LAYERS):
        state[f"{start}.{n}.self_attn.rotary_emb.inv_freq"] = 1.0 / (10000.0 ** (torch.arange(0, 12, 2).float() / 12))
        for name, (inner, outer) in sizes.items():
            state[f"{start}.{n}.{name}.lora_A.default.weight"] = new(r, inner)
            state[f"{start}.{n}.{name}.lora_B.default.weight"] = new(outer, r)
    return {"model": state, "optimizer": {"state": {}}, "config": {"run": {"seed": 42}}, "scaler": {"scale": 65536.0}, "epoch": 0}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Both halves of a base, converted; and the files they were."""
    folder = tmp_path_factory.mktemp("base")
    tower, language = eva_file(), meta_file()
    torch.save(tower, folder / "eva_vit_g.pth")
    eva.convert(folder / "eva_vit_g.pth", folder / "checkpoints" / "eva-vit-g", SIDE)
    llama.convert(meta_folder(folder / "meta", language), folder / "checkpoints" / "llama-2-7b-chat")
    return folder, tower, language


def refused(message, call, *arguments):
    with pytest.raises(UserError, match=message) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)


def test_the_tower_gives_the_features_of_the_release(parts):
    folder, state, _ = parts
    tower = EvaVisionModel.from_pretrained(folder / "checkpoints" / "eva-vit-g").eval()
    pixels = draw(1)(2, 3, SIDE, SIDE, std=1.0)
    with torch.no_grad():
        got = tower(pixels).last_hidden_state
    assert torch.allclose(got, eva_features(state, pixels), atol=2e-5)
    back = eva.tower_file(tower.state_dict())
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)


def test_the_tower_is_strict_and_lists_what_it_leaves_out(tmp_path):
    state = eva_file()
    more = {"norm.weight": torch.zeros(C), "head.weight": torch.zeros(3, C), "blocks.39.norm1.weight": torch.zeros(C)}
    _, _, rows = eva.tower_state("f", state | more, SIDE)
    assert Row("blocks.N.attn.q_bias", "encoder.layers.N.self_attn.qkv.bias", DEPTH) in rows
    assert {row.theirs for row in rows if row.ours.startswith("not used")} == {"norm.weight", "head.weight", "blocks.N.norm1.weight"}
    less = {key: value for key, value in state.items() if "blocks.1.mlp" not in key} | {"blocks.1.mlp.fc1.weights": torch.zeros(1)}
    refused(
        r"missing: blocks.1.mlp.fc1.bias, .*; extra: blocks.1.mlp.fc1.weights \(nearest: blocks.1.mlp.fc1.weight\)",
        eva.tower_state,
        "f",
        less,
        SIDE,
    )
    refused(
        r"wrong shape: cls_token is \[1, 176\] and must be \[1, 1, 176\]",
        eva.tower_state,
        "f",
        state | {"cls_token": torch.zeros(1, C)},
        SIDE,
    )
    refused("no EVA tower", eva.tower_state, "f", {"a": torch.zeros(1)}, SIDE)
    torch.save(less, tmp_path / "f.pth")
    refused("missing", eva.convert, tmp_path / "f.pth", tmp_path / "out", SIDE)
    assert [path.name for path in tmp_path.iterdir()] == ["f.pth"]


def test_positions_are_interpolated_as_the_release_does():
    config, state, _ = eva.tower_state("f", eva_file(), 48)
    assert (config.image_size, state["embeddings.position_embedding"].shape) == (48, (1, 37, C))
    pixels = draw(2)(1, 3, 48, 48, std=1.0)
    made, whole = EvaVisionModel(config).eval(), EvaVisionModel(eva.tower_state("f", eva_file(), SIDE)[0]).eval()
    made.load_state_dict(state)
    whole.load_state_dict(eva.tower_state("f", eva_file(), SIDE)[1])
    with torch.no_grad():
        want = whole(pixels, interpolate_pos_encoding=True).last_hidden_state
        assert torch.allclose(made(pixels).last_hidden_state, want, atol=1e-5)


def test_the_full_size_tower_has_the_file_s_keys_and_shapes():
    with torch.device("meta"):
        tower = EvaVisionModel(describe(recipes.load("unimed-7b-release")).vision_config)
    # One stored element stands for each tensor: shapes count, and key biases are looked at.
    state = {key: torch.zeros(1).expand(value.shape) for key, value in tower.state_dict().items()}
    file = eva.tower_file(state)
    assert sum(value.numel() for value in file.values()) == 985_894_528
    assert file["blocks.38.attn.q_bias"].shape == (1408,)
    assert file.keys() == eva_file(depth=39, width=1, mlp=1).keys()
    config, made, _ = eva.tower_state("f", file)
    assert {key: value.shape for key, value in made.items()} == {key: value.shape for key, value in state.items()}
    assert config.num_attention_heads == 16


def test_llama_of_meta_gives_its_logits(parts):
    folder, _, state = parts
    model = LlamaForCausalLM.from_pretrained(folder / "checkpoints" / "llama-2-7b-chat").eval()
    ids = torch.arange(14).reshape(2, 7) * 5
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, meta_logits(state, ids), atol=2e-5)
    q = "self_attn.q_proj.weight"
    assert torch.equal(llama.pairs(model.state_dict()[f"model.layers.1.{q}"], 4), state["layers.1.attention.wq.weight"])
    assert len(AutoTokenizer.from_pretrained(folder / "checkpoints" / "llama-2-7b-chat")) == 400


def test_llama_of_transformers_with_bin_files(parts, tmp_path):
    folder = parts[0] / "checkpoints" / "llama-2-7b-chat"
    model = LlamaForCausalLM.from_pretrained(folder)
    state = model.state_dict() | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(6)}
    old = tmp_path / "old"
    model.config.save_pretrained(old)
    AutoTokenizer.from_pretrained(folder).save_pretrained(old)
    torch.save(state, old / "pytorch_model.bin")
    rows = llama.convert(old, tmp_path / "new")
    assert Row("model.layers.N.self_attn.rotary_emb.inv_freq", "not used: computed", 1) in rows
    again = LlamaForCausalLM.from_pretrained(tmp_path / "new").state_dict()
    assert all(torch.equal(value, again[key]) for key, value in model.state_dict().items())
    torch.save({key: value for key, value in state.items() if "down_proj" not in key}, old / "pytorch_model.bin")
    refused("missing: model.layers.0.mlp.down_proj.weight", llama.convert, old, tmp_path / "other")
    (old / "pytorch_model.bin").write_bytes(pickle.dumps(print))
    refused("not a checkpoint of plain tensors", llama.convert, old, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_llama_of_meta_is_strict(tmp_path):
    state = meta_file()
    refused("no such folder", llama.convert, tmp_path / "none", tmp_path / "out")
    folder = meta_folder(tmp_path / "a", state)
    (folder / "consolidated.01.pth").unlink()
    refused("1 files hold 24 of 48 columns of tok_embeddings.weight: one is missing", llama.convert, folder, tmp_path / "out")
    (folder / "params.json").write_text('{"dim": 48}')
    refused("do not describe a Llama", llama.convert, folder, tmp_path / "out")
    (folder / "consolidated.00.pth").unlink()
    refused("consolidated.00.pth is not", llama.convert, folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(importlib.util.find_spec("sentencepiece") is not None, reason="sentencepiece is installed")
def test_a_tokenizer_that_cannot_be_read_here_names_the_packages(tmp_path):
    folder = meta_folder(tmp_path / "a", meta_file())
    (folder / "tokenizer.json").unlink()
    refused("no tokenizer.model and no tokenizer.json", llama.convert, folder, tmp_path / "out")
    (folder / "tokenizer.model").touch()
    refused("pip install sentencepiece protobuf", llama.convert, folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def wanted(base, content):
    """The logits of the release's formulas: features, soft experts, then Llama with LoRA worked in."""
    _, tower, language = base
    state = content["model"]
    merged = dict(language)
    for key, a in state.items():
        if ".lora_A." not in key:
            continue
        name = key.split("base_model.model.", 1)[1].removesuffix(".lora_A.default.weight")
        update = 2 * 2 * state[key.replace("lora_A", "lora_B")] @ a  # alpha 16 of r 4
        theirs = llama.their_key(name + ".weight")
        heads = {"q_proj": 4, "k_proj": 2}.get(name.rpartition(".")[2])
        merged[theirs] = merged[theirs] + (llama.pairs(update, heads) if heads else update)

    def connect(pixels, task):
        x = eva_features(tower, pixels)[:, 1:].reshape(len(pixels), -1, 4 * C)
        mix = torch.cat([state[f"task_tokens.{task}"].expand(*x.shape[:2], -1), x], dim=-1)
        gates = F.linear(
            F.gelu(F.linear(mix, state["router.fc1.weight"], state["router.fc1.bias"])),
            state["router.fc2.weight"],
            state["router.fc2.bias"],
        )
        gates = gates.sigmoid() / gates.sigmoid().sum(-1, keepdim=True)
        experts = []
        for e in range(5):
            h = F.gelu(F.linear(x, state[f"moe_layers.{e}.0.weight"], state[f"moe_layers.{e}.0.bias"]))
            experts.append(F.linear(h, state[f"moe_layers.{e}.2.weight"], state[f"moe_layers.{e}.2.bias"]))
        return sum(gates[..., e : e + 1] * one for e, one in enumerate(experts))

    return merged, connect


def test_a_released_checkpoint_gives_the_answers_of_the_release_and_goes_back_bit_for_bit(parts, tmp_path):
    content = release_file()
    torch.save(content, tmp_path / "checkpoint_0.pth")
    out = tmp_path / "uni-med"
    result = CliRunner().invoke(
        cli.app,
        ["convert", "release", f"{tmp_path / 'checkpoint_0.pth'}", "--base", f"{parts[0] / 'checkpoints'}", "--out", f"{out}"],
        env={"COLUMNS": "200"},
    )
    assert result.exit_code == 0, result.output
    shown = " ".join(result.output.split())
    assert "moe_layers.N.0.weight connector.experts.w1 5" in shown
    assert "llm_proj.N.0.weight connector.experts.w1 5" in shown
    assert f"{len(content['model'])} entries" in shown
    model, processor = load(out)
    model.eval()
    rows = batch(processor)
    with torch.no_grad():
        got = model(**rows)
        merged, connect = wanted(parts, content)
        images = [connect(rows["pixel_values"][i : i + 1], TASKS[task])[0] for i, task in enumerate(rows["task_ids"].tolist())]
        connected = (
            model.get_base_model().connector(model.get_base_model().encode_images(rows["pixel_values"]), task=rows["task_ids"]).embeddings
        )
    assert torch.allclose(connected, torch.stack(images), atol=1e-4)
    text = rows["attention_mask"][1].bool()  # the row without an image
    ids = rows["input_ids"][1][text][None]
    assert torch.allclose(got.logits[1][text], meta_logits(merged, ids)[0], atol=1e-3)

    export.convert(out, tmp_path / "back.pth")
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert back["model"].keys() == content["model"].keys()
    assert all(torch.equal(back["model"][key], value) for key, value in content["model"].items())
    assert back["config"]["model"]["router_type"] == "soft"
    release.convert(tmp_path / "back.pth", out / "base", tmp_path / "again")  # on a saved base, which is not copied
    assert not (tmp_path / "again" / "base").exists()
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "again")[0].eval()(**rows).logits, got.logits)


def test_settings_that_shapes_cannot_show(parts, tmp_path):
    content = release_file()
    model = {"arch": "uni_med", "has_moe": True, "projector_type": "moe_mlp", "num_experts": 5, "router_type": "hard", "num_task_tokens": 1}
    model |= {"task_token_c": 24, "chat_template": True, "lora_alpha": 8, "llm_model_name": "llama2", "lora_target_modules": ["all"]}
    torch.save({**content, "config": {"model": model}}, tmp_path / "c.pth")
    found = release.read(tmp_path / "c.pth")
    assert (found.connector_config.router, found.alpha) == ("hard", 8)
    assert Row("router.fc1.weight", "not used: router hard reads none", 1) in found.rows
    assert sum(row.tensors for row in found.rows if row.ours.startswith("not used")) == 4 + 5
    found = release.read(tmp_path / "c.pth", {"model": {**model, "router_type": "sparse", "sparse_topk": 3}})
    assert (found.connector_config.router, found.connector_config.top_k) == ("sparse", 3)
    some = {key: value for key, value in content["model"].items() if ".lora_" not in key or "v_proj" in key or "q_proj" in key}
    some["ln_vision.weight"], some["ln_vision.bias"] = torch.full((C,), 2.0), torch.ones(C)
    torch.save({"model": some}, tmp_path / "some.pth")
    release.convert(tmp_path / "some.pth", parts[0] / "checkpoints", tmp_path / "some")
    adapted = load(tmp_path / "some")[0]
    assert {name.split(".")[-4] for name, _ in adapted.named_parameters() if ".lora_A." in name} == {"q_proj", "v_proj"}
    assert adapted.get_base_model().vision_tower.post_layernorm.weight.unique().tolist() == [2.0]
    plain = {key.replace("llm_proj.0", "llm_proj"): value for key, value in content["model"].items() if key.startswith("llm_proj.0.")}
    torch.save({"model": plain}, tmp_path / "plain.pth")
    release.convert(tmp_path / "plain.pth", parts[0] / "checkpoints", tmp_path / "plain")
    whole = load(tmp_path / "plain")[0]
    assert type(whole) is UniMedForConditionalGeneration
    assert torch.equal(whole.connector.experts.w1[0], plain["llm_proj.0.weight"])
    export.convert(tmp_path / "plain", tmp_path / "plain-back.pth")
    back = torch.load(tmp_path / "plain-back.pth", weights_only=True)["model"]
    assert back.keys() == plain.keys()
    assert all(torch.equal(back[key], value) for key, value in plain.items())


class Surprise:
    def __reduce__(self):
        return (open, ("surprise", "w"))


def test_wrong_checkpoints_are_one_line_and_leave_nothing(parts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state, base, file, out = release_file()["model"], parts[0] / "checkpoints", tmp_path / "c.pth", tmp_path / "out"

    def wrong(message, value):
        torch.save(value, file)
        refused(message, release.convert, file, base, out)

    lora = "llm_model.base_model.model.model.layers.0.mlp.up_proj.lora_A.default.weight"
    wrong("'model' entry maps names to tensors", {"state": {}})
    wrong("not a checkpoint of plain tensors", {"model": state, "config": Surprise()})
    wrong("unknown key moe_layer.0.0.weight; nearest: moe_layers.N.0.weight", {"model": {**state, "moe_layer.0.0.weight": torch.zeros(1)}})
    wrong("unknown key something", {"model": {**state, "something": torch.zeros(1)}})
    wrong(
        "unknown key llm_model.base_model.model.lm_head", {"model": {**state, "llm_model.base_model.model.lm_head.weight": torch.zeros(1)}}
    )
    wrong(f"missing: {lora}", {"model": {key: value for key, value in state.items() if key != lora}})
    wrong(
        r"wrong shape: .*up_proj.lora_A.default.weight is \[4, 47\] and must be \[4, 48\]", {"model": {**state, lora: torch.zeros(4, 47)}}
    )
    wrong("differs between its two names", {"model": {**state, "llm_proj.3.2.bias": torch.zeros(WIDTH)}})
    wrong("must have one", {"model": {**state, lora: torch.zeros(8, 48)}})
    rotary = "llm_model.base_model.model.model.layers.0.self_attn.rotary_emb.inv_freq"
    wrong("inv_freq does not fit", {"model": {**state, rotary: torch.zeros(6)}})
    refused("not a checkpoint of plain tensors", release.convert, tmp_path / "absent.pth", base, out)
    torch.save({"model": state}, file)
    refused(r"folders with a config.json there: none", release.convert, file, tmp_path, out)
    out.mkdir()
    refused("exists; choose another name", release.convert, file, base, out)
    assert not (tmp_path / "surprise").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.pth", "out"]


def test_what_the_released_layout_cannot_hold_is_not_exported(tmp_path):
    small(vision={"freeze": True})[0].save_pretrained(tmp_path / "a")
    refused("was trained, and the released layout has no place for it", export.convert, tmp_path / "a", tmp_path / "x.pth")
    small(language={"from": "qwen2"})[0].save_pretrained(tmp_path / "b")
    refused("this model is of blip_2_vision_model and qwen2", export.convert, tmp_path / "b", tmp_path / "x.pth")
    refused("no trained model there", export.convert, tmp_path, tmp_path / "x.pth")
    assert not (tmp_path / "x.pth").exists()
