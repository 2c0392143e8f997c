"""use_cmoe(weights="int8"): experts of transformers in int8; what they give, save and refuse."""

import copy

import pytest
import torch

pytest.importorskip("transformers")

from cmoe_kernels.integrations import experts
from cmoe_kernels.nn.int8 import Int8Linear
from tests.integrations import tiny
from tests.integrations.tiny import tiny_inputs, tiny_model

NAMES = ("MixtralExperts", "AriaExperts", "NemotronHExperts")  # gated, transposed, not gated


@pytest.fixture(scope="module")
def families():
    return {family.experts.__name__: family for family in tiny.families()}


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs)[0]


@pytest.mark.parametrize("name", NAMES)
def test_values_memory_and_state(name, families):
    """Logits near those of the parameters, a byte a weight, and a state dict that another model loads."""
    model = tiny_model(families[name]).eval()
    inputs = tiny_inputs(model)
    want = logits(model, inputs)
    made = copy.deepcopy(model)
    assert experts.use_cmoe(made, weights="int8") is made
    parts = {name: part for name, part in made.named_modules() if isinstance(part, Int8Linear)}
    assert parts
    got = logits(made, inputs)
    assert (got - want).norm() < 0.05 * want.norm()
    assert not torch.equal(got, want)
    state = made.state_dict()
    for part in parts:
        owner, own = part.rsplit(".", 1)
        w = getattr(model.get_submodule(owner), own)
        outputs = w.shape[2] if made.get_submodule(owner).is_transposed else w.shape[1]
        assert state[f"{part}.weight"].dtype == torch.int8
        assert state[f"{part}.weight"].shape[1] == outputs == state[f"{part}.scale"].shape[1]
    fresh = copy.deepcopy(model)
    for parameter in fresh.parameters():
        torch.nn.init.zeros_(parameter)
    experts.use_cmoe(fresh, weights="int8")
    fresh.load_state_dict(state)
    assert torch.equal(logits(fresh, inputs), got)


def test_refusals(families, tmp_path):
    model = tiny_model(families["MixtralExperts"])
    with pytest.raises(ValueError, match="weights is 'int4', must be 'int8' or None"):
        experts.use_cmoe(model, weights="int4")
    experts.use_cmoe(model, weights="int8")
    inputs = tiny_inputs(model)
    assert not model.training
    with pytest.raises(RuntimeError, match="int8 weights cannot be trained"):
        model.train()
    with pytest.raises(RuntimeError, match="requires a gradient, which int8 weights do not give"):
        model(**inputs)
    for part in (copy.deepcopy(model), model.model):
        with pytest.raises(RuntimeError, match=r"save_pretrained\(\) cannot write int8 weights: torch.save model.state_dict\(\)"):
            part.save_pretrained(tmp_path)
    assert not any(tmp_path.iterdir())
    with torch.no_grad():
        for other in ("eager", "grouped_mm"):
            model.set_experts_implementation(other)
            with pytest.raises(RuntimeError, match=f"experts_implementation is '{other}', must be 'cmoe': the experts' weights are int8"):
                model(**inputs)
        model.set_experts_implementation("cmoe")
        model(**inputs)
    with pytest.raises(ValueError, match="runs on its own loop, since its gate and up rows are interleaved"):
        experts.use_cmoe(tiny_model(families["GptOssExperts"]), weights="int8")
