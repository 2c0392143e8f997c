"""Reading and writing the released checkpoint layout, beyond the golden cases."""

import logging

import pytest
import torch

import cmoe_kernels as cmoe
from cmoe_kernels.nn.convert import from_unimed, to_unimed

TASKS = ("vqa", "refer", "identify", "caption", "cls")


def released(experts=5, width=8, hidden=6, out=7, router=True, expert="mlp", bias=True):
    """A checkpoint as the release writes it: each expert under two names, LoRA and the frozen norm beside it."""
    state = {f"task_tokens.{task}": torch.randn(1, 1, width) for task in TASKS}
    for e in range(experts):
        layers = [("0", hidden if expert == "mlp" else out, width)] + ([("2", out, hidden)] if expert == "mlp" else [])
        for layer, rows, columns in layers:
            for kind, shape in (("weight", (rows, columns)), ("bias", (rows,))):
                if kind == "weight" or bias:
                    state[f"moe_layers.{e}.{layer}.{kind}"] = torch.randn(shape)
                    state[f"llm_proj.{e}.{layer}.{kind}"] = state[f"moe_layers.{e}.{layer}.{kind}"]
    if router:
        state |= {"router.fc1.weight": torch.randn(20, 2 * width), "router.fc1.bias": torch.randn(20)}
        state |= {"router.fc2.weight": torch.randn(experts, 20), "router.fc2.bias": torch.randn(experts)}
    lora = "llm_model.base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
    return state | {"ln_vision.weight": torch.ones(2), lora: torch.randn(8, 4)}


@pytest.mark.parametrize("expert", ["mlp", "linear"])
@pytest.mark.parametrize("bias", [True, False])
def test_round_trip(expert, bias):
    state = released(expert=expert, bias=bias)
    config, ours = from_unimed(state)
    assert (config.in_features, config.features, config.out_features, config.num_experts) == (2, 8, 7, 5)
    assert (config.expert, config.expert_bias, config.router, config.router_inputs, config.router_hidden) == (
        expert,
        bias,
        "soft",
        "task_token",
        20,
    )
    connector = cmoe.CMoEConnector(config)
    connector.load_state_dict(ours)
    back = to_unimed(connector.state_dict(), config)
    assert set(back) == {key for key in state if not key.startswith(("llm_proj", "llm_model", "ln_vision"))}
    assert all(torch.equal(back[key], state[key]) for key in back)


def test_what_shapes_cannot_tell_is_given_by_name():
    config, ours = from_unimed(released(), router="sparse", top_k=1, renormalize=False)
    assert (config.router, config.top_k, config.renormalize) == ("sparse", 1, False)
    connector = cmoe.CMoEConnector(config)
    connector.load_state_dict(ours)
    assert connector(torch.randn(1, 4, 2), "vqa").gates.sum() < 1
    assert from_unimed(released())[0].renormalize


def test_either_name_of_the_experts_will_do_and_a_whole_checkpoint_too():
    state = released()
    expected = from_unimed(state)
    for kept in ("moe_layers", "llm_proj"):
        dropped = "llm_proj" if kept == "moe_layers" else "moe_layers"
        config, ours = from_unimed({"model": {k: v for k, v in state.items() if not k.startswith(dropped)}, "epoch": 0})
        assert config == expected[0]
        assert all(torch.equal(ours[k], expected[1][k]) for k in expected[1])


def test_what_is_not_used_is_listed(caplog):
    with caplog.at_level(logging.WARNING):
        config, ours = from_unimed(released(), router="constant")
    assert set(ours) == {"experts.w1", "experts.b1", "experts.w2", "experts.b2"}
    for key in ("ln_vision.weight", "lora_A", "router.fc1.weight", "task_tokens.vqa"):
        assert key in caplog.text
    cmoe.CMoEConnector(config).load_state_dict(ours)


def without(*keys):
    return {k: v for k, v in released().items() if k not in keys}


def without_layer(layer, kind):
    return {k: v for k, v in released().items() if not k.endswith(f".{layer}.{kind}")}


@pytest.mark.parametrize(
    ("state", "settings", "error", "message"),
    [
        (lambda: released() | {"moe_layers.0.1.weight": torch.ones(1)}, {}, ValueError, "unknown keys: moe_layers.0.1.weight"),
        (
            lambda: released() | {"llm_proj.3.0.bias": torch.ones(6)},
            {},
            ValueError,
            "expert 3 differs between its two names moe_layers.3 and llm_proj.3",
        ),
        (lambda: without("llm_proj.4.2.bias"), {}, ValueError, "expert 4 differs between its two names"),
        (
            lambda: without(*(f"{m}.2.{k}" for m in ("moe_layers", "llm_proj") for k in ("0.weight", "0.bias", "2.weight", "2.bias"))),
            {},
            ValueError,
            "experts are numbered .0, 1, 3, 4., must be 0..3",
        ),
        (lambda: without("moe_layers.1.2.bias", "llm_proj.1.2.bias"), {}, ValueError, "expert 1 has .* must be the same layers"),
        *(
            (lambda layer=layer, kind=kind: without_layer(layer, kind), {}, ValueError, rf"moe_layers.<e>.{layer}.{kind} is missing")
            for layer, kind in (("0", "bias"), ("2", "bias"), ("2", "weight"))
        ),
        (lambda: without("router.fc1.bias"), {}, ValueError, "router.fc1.bias is missing"),
        (lambda: without("router.fc2.bias"), {}, ValueError, "router.fc2.bias is missing"),
        (lambda: without("router.fc2.weight"), {}, ValueError, "router.fc1.weight and router.fc2.weight must be there with router='soft'"),
        (lambda: without("task_tokens.cls"), {"tasks": TASKS}, ValueError, "task_tokens.cls is missing"),
        (lambda: released() | {"task_tokens.seg": torch.ones(1, 1, 8)}, {}, ValueError, r"give tasks=\(...\) in their order"),
        (
            lambda: released() | {"task_tokens.vqa": torch.ones(1, 10, 8)},
            {},
            ValueError,
            r"task_tokens.vqa has shape \(1, 10, 8\), must be \[1, 1, S\]",
        ),
        (released, {"router_inputs": "token"}, ValueError, "router.fc1.weight reads 16 features, but router_inputs='token' gives 8"),
        (released, {"resample_rate": 3}, ValueError, "experts read 8 features, which is no multiple of resample_rate=3"),
        (released, {"num_experts": 5}, TypeError, "'num_experts'. cannot be given: read from the shapes"),
        (lambda: {"ln_vision.weight": torch.ones(2)}, {}, ValueError, "no experts"),
    ],
)
def test_wrong_checkpoints(state, settings, error, message):
    with pytest.raises(error, match=message):
        from_unimed(state(), **settings)


def test_to_unimed_refuses_what_it_does_not_know():
    config, ours = from_unimed(released())
    with pytest.raises(ValueError, match=r"'experts\.w3' is no key of a CMoEConnector"):
        to_unimed(ours | {"experts.w3": torch.ones(1)}, config)
    single = cmoe.CMoEConfig(in_features=2, out_features=2, router_layers=1)
    with pytest.raises(ValueError, match="router_layers is 1, must be 2"):
        to_unimed({}, single)
