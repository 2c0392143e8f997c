"""replace_projector on a random model of every family: unchanged at first, then trained, saved, loaded and asked."""

import copy
import pickle

import pytest
import torch

pytest.importorskip("transformers")

from transformers import AutoModelForImageTextToText, FuyuConfig, FuyuForCausalLM, LlamaConfig, LlamaForCausalLM

import cmoe_kernels.integrations.transformers as cmoe
from cmoe_kernels import CMoEConfig, backends
from tests import forked
from tests.integrations import tiny_models as tiny

TASKS = ("chart", "photo")
SETTINGS = {"num_experts": 3, "tasks": TASKS, "router_features": 8}

# Equal experts get equal gradients of their gates, bit for bit, from our kernels, which then cancel. Plain torch sums one expert's products
# in another order than the next's.
NATIVE = backends.choose("soft_experts", "cpu", torch.float32) != "reference"
NOTHING = 0.0 if NATIVE else 1e-6

every_family = pytest.mark.parametrize("family", tiny.FAMILIES)
# One family for each kind of adapter; the others under `make test-full`.
KINDS = ("llava_next", "gemma3", "qwen3_vl", "blip_2")
each_kind = pytest.mark.parametrize("family", [f if f in KINDS else pytest.param(f, marks=pytest.mark.full) for f in tiny.FAMILIES])


def swapped(family, seed=0, **settings):
    model, images = tiny.build(family, seed)
    torch.manual_seed(seed + 100)
    return cmoe.replace_projector(model, **{**SETTINGS, **settings}), images


def connectors_of(model):
    return {path: projector.connector for path, projector in cmoe.projectors(model).items()}


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def without_labels(batch):
    return {name: value for name, value in batch.items() if name != "labels"}


@every_family
def test_upcycled_starts_equal_and_then_trains(family):
    model, images = tiny.build(family)
    batch = tiny.batch(model, images, labels=True)
    expected = model(**batch)
    expected.loss.backward()
    unreached = {name for name, grad in gradients(model).items() if grad is None}
    model.zero_grad()
    moved = model(**{**batch, "pixel_values": -batch["pixel_values"]}).logits
    assert (moved - expected.logits).abs().max() > 0.05, "the images matter to the logits"

    assert cmoe.replace_projector(model, **SETTINGS) is model
    connectors = connectors_of(model)
    assert connectors
    out = model(**batch, task=list(TASKS))
    torch.testing.assert_close(out.logits, expected.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(out.loss, expected.loss, rtol=0, atol=1e-5)
    assert len(out.gates) == len(connectors)

    out.loss.backward()
    for path, connector in connectors.items():
        scale = max(p.grad.abs().max() for p in connector.experts.parameters())
        for name, p in connector.named_parameters():
            if name.startswith("router."):
                # Equal experts, so no gate is better than another.
                assert p.grad.abs().max() <= NOTHING * scale, f"{path}.{name}"
            else:
                assert p.grad.any(), f"{path}.{name}"
    inside = tuple(connectors)
    assert {n for n, grad in gradients(model).items() if grad is None and not n.startswith(inside)} <= unreached

    torch.optim.SGD(model.parameters(), lr=0.5).step()
    model.zero_grad()
    model(**batch, task=list(TASKS)).loss.backward()
    for path, connector in connectors.items():
        scale = max(p.grad.abs().max() for p in connector.experts.parameters())
        for name, p in connector.named_parameters():
            assert p.grad.abs().max() > 1e-5 * scale, f"{path}.{name} after one step"


@pytest.mark.skipif(not NATIVE, reason="plain torch rounds equal experts differently")
@pytest.mark.parametrize("inputs", ["task_token", "token", "task"])
@pytest.mark.parametrize("family", ["llava", "paligemma"])
@pytest.mark.parametrize(
    ("router", "dtype"),
    # fp32 of sparse experts is left out: a product of at most four rows sums in another order than one of more.
    [("soft", torch.float32), ("soft", torch.bfloat16), ("soft", torch.float64), ("sparse", torch.bfloat16), ("sparse", torch.float64)],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_equal_experts_teach_their_router_exactly_nothing(family, router, dtype, inputs):
    model, images = tiny.build(family)
    cmoe.replace_projector(model.to(dtype), **SETTINGS, router=router, router_inputs=inputs)
    batch = tiny.batch(model, images, labels=True)
    batch["pixel_values"] = batch["pixel_values"].to(dtype)
    model(**batch, task=list(TASKS)).loss.backward()
    for connector in connectors_of(model).values():
        assert all(p.grad.any() for p in connector.experts.parameters())
        assert not any(p.grad.any() for p in connector.router.parameters())


@every_family
def test_images_follow_the_task_of_their_sample(family):
    """A batch that mixes tasks and numbers of images gives what its samples give alone; so does a swapped task nothing of the kind."""
    model, images = swapped(family, init="random")
    batch = tiny.batch(model, images, per_sample=(2, 1))
    with torch.no_grad():
        together = model(**batch, task=list(TASKS))
        exchanged = model(**batch, task=list(TASKS)[::-1])
        for task in TASKS:
            of_all = model(**batch, task=task)
            row = TASKS.index(task)
            torch.testing.assert_close(together.logits[row], of_all.logits[row], rtol=0, atol=1e-5)
            last = batch["attention_mask"][row].bool()
            assert (exchanged.logits[row, last] - of_all.logits[row, last]).abs().max() > 1e-4
        numbers = torch.tensor([TASKS.index(task) for task in TASKS])
        torch.testing.assert_close(model(**batch, task=numbers).logits, together.logits, rtol=0, atol=0)
        embeds = model.get_input_embeddings()(batch["input_ids"])
        if family not in ("blip_2",) and not family.startswith("qwen"):
            by_embedding = model(**{**batch, "input_ids": None}, inputs_embeds=embeds, task=list(TASKS))
            torch.testing.assert_close(by_embedding.logits, together.logits, rtol=0, atol=1e-5)


@every_family
def test_batch_equals_single(family):
    model, images = swapped(family, init="random")
    with torch.no_grad():
        batch = tiny.batch(model, images, per_sample=(1, 1))
        together = model(**batch, task=list(TASKS)).logits
        for row, task in enumerate(TASKS):
            alone = tiny.single(model, images, batch, row)
            found = model(**alone, task=task).logits[0]
            torch.testing.assert_close(together[row, -len(found) :], found, rtol=0, atol=1e-5)


@each_kind
def test_generate(family):
    """Cached equals uncached, two beams run, a mixed batch answers as its tasks do alone, and an upcycled model as the model it was."""
    model, images = tiny.build(family)
    batch = tiny.batch(model, images)
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    before = model.generate(**batch, **settings)
    cmoe.replace_projector(model, **SETTINGS)
    assert torch.equal(model.generate(**batch, **settings, task=list(TASKS)), before)
    with torch.no_grad():
        for connector in connectors_of(model).values():
            connector.reset_parameters()
            connector.router.task_tokens.normal_(std=3)
    cached = model.generate(**batch, **settings, task=list(TASKS))
    assert torch.equal(model.generate(**batch, **settings, task=list(TASKS), use_cache=False), cached)
    for row, task in enumerate(TASKS):
        assert torch.equal(model.generate(**batch, **settings, task=task)[row], cached[row])
    beams = model.generate(**batch, **settings, task=list(TASKS), num_beams=2)
    for row, task in enumerate(TASKS):
        assert torch.equal(model.generate(**batch, **settings, task=task, num_beams=2)[row], beams[row])


LOAD = """
import sys, torch
import cmoe_kernels.integrations.transformers
from transformers import AutoModelForImageTextToText
torch.set_num_threads(1)
for folder in sys.argv[1:]:
    model = AutoModelForImageTextToText.from_pretrained(folder)
    batch, task, expected = torch.load(f"{folder}/expected.pt")
    with torch.no_grad():
        assert torch.equal(model(**batch, task=task).logits, expected), folder
    print(type(model).__name__)
"""


@pytest.mark.costly
def test_round_trip_in_a_fresh_process(tmp_path):
    folders, names = [], []
    for family in tiny.FAMILIES:
        model, images = swapped(family, init="random", router="sparse", aux_losses={"switch": 0.1})
        batch = tiny.batch(model, images)
        with torch.no_grad():
            expected = model(**batch, task=list(TASKS)).logits
        model.save_pretrained(tmp_path / family)
        torch.save((batch, list(TASKS), expected), tmp_path / family / "expected.pt")
        folders.append(str(tmp_path / family))
        names.append(type(model).__name__)
    done = forked.run(LOAD, *map(str, folders), modules=("torch", "transformers.modeling_utils"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == names


def test_copies_and_pickles():
    """Of a swapped model, and of what it returns."""
    model, images = swapped("llava", router="sparse", aux_losses={"switch": 0.1})
    batch = tiny.batch(model, images)
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    with torch.no_grad():
        out = model(**batch, task="photo")
        for twin in twins:
            assert type(twin) is type(model)
            assert torch.equal(twin(**batch, task="photo").logits, out.logits)
    for twin in (copy.deepcopy(out), pickle.loads(pickle.dumps(out))):
        assert type(twin) is type(out)
        assert twin.keys() == out.keys()
        assert torch.equal(twin.logits, out.logits)
        assert torch.equal(twin.aux_losses["switch"], out.aux_losses["switch"])


@each_kind
def test_a_loaded_model_is_swapped_saved_and_loaded(family, tmp_path):
    """Published checkpoints keep names of keys that transformers translates; a swapped model keeps them as well, and its dtype."""
    model, images = tiny.build(family)
    batch = tiny.batch(model, images)
    model.save_pretrained(tmp_path / "published")
    loaded = type(model).from_pretrained(tmp_path / "published")
    cmoe.replace_projector(loaded, **SETTINGS, upcycle_noise=0.1)
    loaded.save_pretrained(tmp_path / "swapped")
    again, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "swapped", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert type(again) is type(loaded)
    with torch.no_grad():
        torch.testing.assert_close(again(**batch, task="photo").logits, loaded(**batch, task="photo").logits, rtol=0, atol=0)
    half = AutoModelForImageTextToText.from_pretrained(tmp_path / "swapped", dtype=torch.bfloat16)
    assert {p.dtype for c in cmoe.projectors(half).values() for p in c.parameters()} == {torch.bfloat16}
    batch["pixel_values"] = batch["pixel_values"].bfloat16()
    with torch.no_grad():
        assert half(**batch, task="photo").logits.isfinite().all()


@pytest.mark.parametrize("lacking", ["connector", "key", "other sizes"])
@pytest.mark.parametrize("family", ["llava", "blip_2"])
def test_what_a_checkpoint_lacks_is_initialised(family, lacking, tmp_path):
    model, images = tiny.build(family)
    model.save_pretrained(tmp_path)
    config = swapped(family)[0].config
    saved, _ = swapped(family, init="random", num_experts=4 if lacking == "other sizes" else 3)
    state = {} if lacking == "connector" else saved.state_dict()
    if lacking != "connector":
        gone = next(key for key in state if key.endswith("experts.w1"))
        saved.save_pretrained(tmp_path, state_dict={key: value for key, value in state.items() if key != gone or lacking == "other sizes"})
    loaded = type(saved).from_pretrained(tmp_path, config=config, ignore_mismatched_sizes=True)
    for path, connector in connectors_of(loaded).items():
        experts, router = connector.experts, connector.router
        for weight in filter(torch.is_tensor, (experts.w1, experts.w2, router.w1, router.w2)):
            spread = weight.shape[-1] ** -0.5
            assert 0.5 * spread < weight.max() <= spread
            assert -spread <= weight.min() < -0.5 * spread
        for name, p in connector.named_parameters():
            kept = state.get(f"{path}.connector.{name}")
            if lacking == "key" and kept is not None and name != "experts.w1":
                assert torch.equal(p, kept), name
    with torch.no_grad():
        assert loaded(**tiny.batch(loaded, images), task="photo").logits.isfinite().all()


def test_int8_connectors_are_not_saved(tmp_path):
    model, _ = swapped("llava")
    for connector in connectors_of(model).values():
        connector.prepack(torch.int8)
    with pytest.raises(RuntimeError, match=r"save_pretrained\(\) cannot write int8 weights"):
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize("family", ["llava", "paligemma"])
def test_a_loss_of_samples_with_a_task_each(family):
    model, images = swapped(family, init="random", router="sparse", aux_losses={"sample_switch": 0.1})
    batch = tiny.batch(model, images)
    with torch.no_grad():
        by_name, by_sample = (model(**batch, task=task) for task in ("photo", ["photo"] * 2))
        mixed = model(**batch, task=list(TASKS))
    torch.testing.assert_close(by_sample.aux_loss, by_name.aux_loss)
    assert mixed.aux_loss > 0
    assert mixed.gates[0].shape == by_name.gates[0].shape


def test_the_callers_configuration_stays():
    model, _ = tiny.build("llava")
    config = model.config
    cmoe.replace_projector(model, **SETTINGS)
    assert config.model_type == "llava"
    assert not hasattr(config, "cmoe")
    assert model.config.model_type == model.model.config.model_type == "cmoe_llava"
    assert CMoEConfig.from_dict(model.config.cmoe).tasks == TASKS


@pytest.mark.parametrize("router", ["soft", "sparse", "hard", "constant"])
@pytest.mark.parametrize("inputs", ["task_token", "token", "task"])
@pytest.mark.parametrize("family", ["llava_next", pytest.param("qwen3_vl", marks=pytest.mark.full)])
def test_every_router(family, router, inputs):
    noise = 0.5 if router == "constant" else 0.0
    model, images = tiny.build(family)
    batch = tiny.batch(model, images, labels=True)
    expected = model(**batch).logits
    aux = {"importance": 0.3, **({"z": 0.2} if router in ("soft", "sparse") else {})}
    cmoe.replace_projector(model, **SETTINGS, router=router, router_inputs=inputs, aux_losses=aux, upcycle_noise=noise)
    needs_task = router == "hard" or (router in ("soft", "sparse") and inputs != "token")
    if needs_task:
        with pytest.raises(ValueError, match="task is missing"):
            model(**batch)
        out = model(**batch, task=list(TASKS))
    else:
        out = model(**batch)
    if not noise:
        torch.testing.assert_close(out.logits, expected, rtol=0, atol=1e-5)
    assert set(out.aux_losses) == set(aux)
    torch.testing.assert_close(out.loss, out.lm_loss + sum(aux[name] * value for name, value in out.aux_losses.items()))
    out.loss.backward()


def test_noise_sets_the_experts_apart():
    model, images = swapped("llava", upcycle_noise=0.1, router="constant")
    (connector,) = connectors_of(model).values()
    trained, _ = tiny.build("llava")
    weight = trained.model.multi_modal_projector.linear_1.weight
    spread = (connector.experts.w1 - weight).std() / weight.std()
    assert 0.05 < spread < 0.2
    batch = tiny.batch(model, images, labels=True)
    model(**batch).loss.backward()
    assert not torch.equal(connector.experts.w2.grad[0], connector.experts.w2.grad[1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"router": "constant"}, "upcycle_noise is 0"),
        ({"init": "copy"}, "init is 'copy'"),
        ({"num_experts": 0}, "num_experts is 0, must be a positive integer"),
        ({"experts": 3}, r"unknown settings \['experts'\]; known are .*num_experts"),
        ({"tasks": "chart"}, "tasks is 'chart', must be a sequence of names"),
        ({"tasks": ["chart", "chart"]}, "must be different names"),
        ({"upcycle_noise": -1.0}, "upcycle_noise is -1.0, must be 0 or positive"),
        ({"init": "random", "upcycle_noise": 0.1}, "must be 0 with init='random'"),
        ({"expert": "linear"}, "expert is 'linear', must be 'mlp'"),
        ({"hidden_features": 7}, "hidden_features is 7, must be 32"),
        ({"activation": "relu"}, "activation is 'relu', must be 'gelu'"),
        ({"expert_bias": False}, "expert_bias is False, must be True"),
        ({"resample": "projection"}, "resample is 'projection', must be 'none'"),
        ({"in_features": 5}, "in_features is 5, must be 16"),
        ({"config": CMoEConfig(in_features=16, out_features=32, resample="none")}, "one or the other"),
    ],
)
def test_settings_that_do_not_fit(settings, message):
    model, _ = tiny.build("llava")
    with pytest.raises((TypeError, ValueError), match=message):
        cmoe.replace_projector(model, **{"num_experts": 2, **settings})
    assert type(model).__name__ == "LlavaForConditionalGeneration"


def test_a_whole_configuration():
    model, images = tiny.build("llava")
    config = CMoEConfig(
        in_features=16, out_features=32, hidden_features=8, num_experts=2, resample="none", router_inputs="token", activation="silu"
    )
    cmoe.replace_projector(model, config, init="random")
    assert model(**tiny.batch(model, images)).logits.isfinite().all()
    assert CMoEConfig.from_dict(model.config.cmoe) == config


def test_models_that_have_no_projector():
    fuyu = FuyuForCausalLM(FuyuConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=64))
    with pytest.raises(ValueError, match="'fuyu', which has no projector to replace: it feeds pixel patches"):
        cmoe.replace_projector(fuyu)
    llama = LlamaForCausalLM(LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=64))
    with pytest.raises(ValueError, match=r"'llama', must be one of llava, .*register_adapter"):
        cmoe.replace_projector(llama)
    with pytest.raises(TypeError, match="model is a str, must be a multimodal model of transformers"):
        cmoe.replace_projector("llava-hf/llava-1.5-7b-hf")
    model, _ = tiny.build("llava")
    with pytest.raises(TypeError, match="config is a dict, must be a CMoEConfig"):
        cmoe.replace_projector(model, {"num_experts": 2})
    with pytest.raises(TypeError, match="model is a LlavaModel, must be a LlavaForConditionalGeneration itself"):
        cmoe.replace_projector(model.model, **SETTINGS)
    model, _ = swapped("llava")
    with pytest.raises(ValueError, match="a mixture of experts already"):
        cmoe.replace_projector(model, **SETTINGS)


def test_wrong_tasks():
    model, images = swapped("llava")
    batch = tiny.batch(model, images)
    with pytest.raises(ValueError, match="task is 'map', must be one of chart, photo"):
        model(**batch, task="map")
    with pytest.raises(ValueError, match="task is 'map', must be one of chart, photo"):
        model(**batch, task=["map", "photo"])
    with pytest.raises(ValueError, match=r"task has 3 entries, must have 2 \(samples in the batch\)"):
        model(**batch, task=["chart"] * 3)
    with pytest.raises(TypeError, match="task is 1, must be a name, a name per sample or LongTensor"):
        model(**batch, task=1)
    with pytest.raises(TypeError, match=r"task must be torch.int64, got torch.float32"):
        model(**batch, task=torch.tensor([0.0, 1.0]))
    with pytest.raises(ValueError, match=r"task holds 7, must be in 0..1 \(chart, photo\)"):
        model(**batch, task=torch.tensor([0, 7]))
    with pytest.raises(ValueError, match="input_ids hold 12 image tokens, the images become 8"):
        model(**{**batch, "pixel_values": batch["pixel_values"][:2]}, task=list(TASKS))
    assert model(input_ids=batch["input_ids"].clamp(max=20)).aux_loss is None, "no image, no task"


def test_a_task_for_calls_that_cannot_take_one():
    model, images = swapped("qwen2_vl", init="random")
    batch = tiny.batch(model, images)
    with torch.no_grad():
        expected = model(**batch, task=list(TASKS)).logits
        with cmoe.use_task(list(TASKS)):
            torch.testing.assert_close(model(**batch).logits, expected, rtol=0, atol=0)
        with pytest.raises(ValueError, match="task is missing"):
            model(**batch)
        pixels = (batch["pixel_values"], batch["image_grid_thw"])
        group_ids = torch.tensor([0] * 4 + [1] * 5)
        with cmoe.use_task(group_ids=group_ids):
            features = torch.cat(model.model.get_image_features(*pixels).pooler_output)
        for place, task in enumerate(TASKS):
            with cmoe.use_task(task):
                alone = torch.cat(model.model.get_image_features(*pixels).pooler_output)
            mine = group_ids == place
            torch.testing.assert_close(features[mine], alone[mine], rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_5_vl", "qwen3_vl"])
def test_videos_follow_the_task_of_their_sample(family):
    model, images = swapped(family, init="random")
    batch = tiny.videos(model, images)
    with torch.no_grad():
        together = model(**batch, task=list(TASKS)).logits
        for row, task in enumerate(TASKS):
            alone = model(**batch, task=task).logits
            torch.testing.assert_close(together[row], alone[row], rtol=0, atol=1e-5)
            assert (together[1 - row] - alone[1 - row]).abs().max() > 1e-4


def test_images_without_a_text():
    """BLIP-2 describes an image that comes with no words."""
    model, images = swapped("blip_2", init="random")
    pixels = images(model, [1, 1]).arguments["pixel_values"]
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    together = model.generate(pixels, task=list(TASKS), **settings)
    for row, task in enumerate(TASKS):
        assert torch.equal(model.generate(pixels[row : row + 1], task=task, **settings)[0], together[row])


def test_users_register_their_own():
    from tests.integrations.tiny_models import own_model

    model, batch = own_model()
    expected = model(**batch).logits
    adapter = cmoe.Adapter(
        model_type="own",
        model_class=type(model),
        projector="bridge",
        layers=("0", "1", "2"),
        replaces="",
        around="nothing",
    )
    cmoe.register_adapter(adapter)
    assert cmoe.adapters()["own"] is adapter
    cmoe.replace_projector(model, **SETTINGS)
    torch.testing.assert_close(model(**batch, task=list(TASKS)).logits, expected, rtol=0, atol=1e-5)
    assert type(model).__name__ == "CMoEOwnForConditionalGeneration"
