"""Med-MoE's three stages at the smallest size: what trains by name, how one starts from the other, what is refused."""

import re
from pathlib import Path

import pytest
import torch

from tests.unimed.conftest import SMALL
from unimed import io
from unimed.errors import UserError
from unimed.models.load import load
from unimed.models.medmoe import moe_layers, record_routing
from unimed.train import recipe as recipes
from unimed.train import run as training
from unimed.train import stages
from unimed.train.folder import Run

FEW = [one for one in SMALL.split() if one.startswith(("train.", "optim.", "evaluate."))]
ROUTER = [f"router.{one}" for one in ("w1", "b1", "w2", "b2")]
PARTS = [one for one in SMALL.split() if one.startswith(("vision.", "connector.", "language."))]


def stage(number, root, runs, *more):
    parts = [*PARTS, "language.layers=2"] if number == 1 else [f"from={runs / f'medmoe-{number - 1}'}"]
    return recipes.load(f"medmoe-{number}", [f"data.root={root}", *FEW, *parts, f"name=medmoe-{number}", "train.max_steps=4", *more])


@pytest.fixture(scope="module")
def chain(sample_folder, tmp_path_factory):
    """runs/ with all three stages, four steps each. Read it, do not change it."""
    torch.set_num_threads(1)
    runs = tmp_path_factory.mktemp("chain") / "runs"
    for number in (1, 2, 3):
        more = ["medmoe.router_samples=48", "medmoe.router_steps=40"] if number == 2 else []
        training.train(stage(number, sample_folder, runs, *more), runs / f"medmoe-{number}")
    return runs


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_what_each_stage_trains_by_name(chain, sample_folder):
    for number in (1, 2, 3):
        recipe = recipes.load(chain / f"medmoe-{number}" / "recipe.yaml")
        model, _ = training.build(recipe, training.items(recipe, "train"))
        names = {name for name, _ in model.named_parameters()}
        of = {part: {name for name in names if name.startswith(f"{part}.")} for part in ("vision_tower", "connector", "language_model")}
        expected = {
            1: of["vision_tower"] | of["connector"],
            2: names,
            3: {f"language_model.model.layers.0.mlp.{one}" for one in ("w1", "w2")},
        }[number]
        assert trained(model) == expected
        frozen = recipe.model_copy(update={"vision": recipe.vision.model_copy(update={"freeze": True})})
        stages.set_trainable(model, frozen)
        assert trained(model) == expected - of["vision_tower"]


def test_the_router_trains_as_the_recipe_says(chain, monkeypatch):
    class Asked(Exception):
        pass

    def train_router(model, batches, **asked):
        raise Asked(asked)

    monkeypatch.setattr("unimed.models.medmoe.train_router", train_router)
    recipe = recipes.load(chain / "medmoe-2" / "recipe.yaml")
    with pytest.raises(Asked) as stopped:
        stages.train_domains(recipe, training.items(recipe, "train"), [], training.Run(chain / "medmoe-2"))
    assert stopped.value.args[0] == {"steps": 40, "lr": 5e-3, "seed": recipe.train.seed}


def test_a_learned_router_trains_and_a_dense_model_trains_its_ffns(chain, sample_folder):
    moe = "language_model.model.layers.0.mlp."
    saved, _ = load(chain / "medmoe-2" / "model")
    for more, expected in (
        (["medmoe.router=learned"], ["w1", "w2", *ROUTER]),
        (["medmoe.meta=false"], ["w1", "w2"]),
        (["medmoe.dense=true"], ["gate_proj.weight", "up_proj.weight", "down_proj.weight"]),
    ):
        recipe = stage(3, sample_folder, chain, *more)
        model, _ = training.build(recipe, training.items(recipe, "train"))
        assert trained(model) == {f"{moe}{one}" for one in expected}
        for layer in moe_layers(model).values():
            assert layer.w1.shape[0] == 3 + layer.settings.meta
    for name, tensor in saved.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name  # the dense one starts as stage 2 ended


def test_only_the_experts_change_in_stage_3(chain):
    before, after = (load(chain / name / "model")[0].state_dict() for name in ("medmoe-2", "medmoe-3"))
    moe = "language_model.model.layers.0.mlp."
    assert {name for name in after if name not in before} == {f"{moe}{one}" for one in ("w1", "w2", *ROUTER)}
    for name in before.keys() & after.keys():
        assert torch.equal(before[name], after[name]), name
    dense = before[f"{moe}down_proj.weight"]
    moved = (after[f"{moe}w2"] - dense).abs().amax((1, 2))
    assert after[f"{moe}w2"].shape[0] == 4  # the meta expert and three domains
    assert (moved > 0).all()


def test_the_router_of_stage_2_is_that_of_stage_3(chain):
    model, _ = load(chain / "medmoe-3" / "model")
    import safetensors.torch

    saved = safetensors.torch.load_file(chain / "medmoe-2" / "domains" / "router.safetensors")
    for layer in moe_layers(model).values():
        assert torch.equal(layer.router.w1, saved["0.weight"])
        assert torch.equal(layer.router.b2, saved["2.bias"])
        assert not layer.router.w1.requires_grad
    record = io.read_json(chain / "medmoe-2" / "domains" / "domains.json")
    assert record["experts"] == ["organ crops", "CT body", "MR body"]
    assert sum(record["labelled"].values()) == 48
    assert 0 < record["training"]["tokens"] <= 1
    assert list(record["labels"]) == ["10", "30", "48"]
    assert all(0 <= value <= 1 for one in record["labels"].values() for value in one.values())


def test_stage_3_goes_on_after_it_was_interrupted(chain, sample_folder, tmp_path):
    recipe = stage(3, sample_folder, chain, "train.save_every=2")

    class Stop(Exception):
        pass

    from transformers import TrainerCallback

    class StopAt(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                raise Stop

    with pytest.raises(Stop):
        training.train(recipe, tmp_path / "again", callbacks=[StopAt()])
    training.train(recipe, tmp_path / "again", resume=True)
    whole, again = (load(path / "model")[0].state_dict() for path in (chain / "medmoe-3", tmp_path / "again"))
    for name, tensor in whole.items():
        assert torch.equal(tensor, again[name]), name


def test_domains_of_items(sample_folder):
    recipe = recipes.load("medmoe-1", [f"data.root={sample_folder}"])
    names = list(recipe.medmoe.domains)
    for item in training.items(recipe, "slab"):
        wanted = None if item.image is None else "organ crops" if item.task == "cls" else {"ct": "CT body", "mr": "MR body"}[item.subject]
        place = stages.domain(recipe.medmoe, item)
        assert (None if place is None else names[place]) == wanted


@pytest.mark.parametrize(
    ("number", "override", "message"),
    [
        (2, "from=runs/nowhere", "from='runs/nowhere': no run is there .no recipe.yaml.; train that stage first"),
        (2, "from={runs}/medmoe-2", "from='.*medmoe-2': a run of stage 2, must be of stage 1"),
        (3, "from={runs}/medmoe-1", "from='.*medmoe-1': a run of stage 1, must be of stage 2"),
        (2, "language.width=64", "language.width=64: the run in from='.*medmoe-1' has 32, and its model is the start; leave it out"),
        (3, "medmoe.router_layers=1", "medmoe.router_layers=1: the router in from='.*medmoe-2' was trained with 2; keep that"),
        (3, "medmoe.top_k=4", "medmoe.top_k=4: must be at most 3"),
        (1, "from={runs}/medmoe-1", "only medmoe.stage 2 and 3 start from a run"),
        (
            2,
            "medmoe.domains={brain: [mri/*], crops: [sample/*/cls]}",
            "medmoe.domains: no image of 'brain' among [0-9]+ labelled training items",
        ),
        (1, "language.freeze=true", "medmoe.stage: says what trains; leave out lora, language.freeze and connector.freeze"),
    ],
)
def test_what_is_refused_in_one_line(chain, sample_folder, tmp_path, number, override, message):
    with pytest.raises(UserError) as error:
        training.train(stage(number, sample_folder, chain, override.replace("{runs}", str(chain))), tmp_path / "run")
    assert re.search(message, str(error.value))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_run_of_another_kind_or_unfinished_is_no_start(small_run, chain, sample_folder, tmp_path):
    recipe = stage(2, sample_folder, chain)
    with pytest.raises(UserError, match="no run of Med-MoE's stages, must be of stage 1"):
        stages.require(recipe.model_copy(update={"source": str(small_run)}))
    with pytest.raises(UserError, match=r"from='': medmoe.stage=2 starts from a run of stage 1; give from=runs/NAME"):
        recipes.Recipe(medmoe={"stage": 2, "domains": {"all": ["*"]}})
    Run(tmp_path / "half").create(recipes.load(chain / "medmoe-1" / "recipe.yaml"), {})
    with pytest.raises(UserError, match="the run is not finished; go on with: unimed train medmoe-1 --name half --resume"):
        stages.require(recipe.model_copy(update={"source": str(tmp_path / "half")}))


def test_the_release_settings_are_chained(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number in (1, 2, 3):
        name = f"medmoe-release-{number}"
        recipe = recipes.load(name)
        assert recipe.medmoe.stage == number
        assert (recipe.language.source, recipe.connector.hidden_features) == ("microsoft/phi-2", 2560)
        assert recipe.medmoe.upcycling["num_experts"] == 4
        folder = Path("runs") / name
        folder.mkdir(parents=True)
        (folder / "recipe.yaml").write_text(recipes.dump(recipe))
        assert recipes.load(folder / "recipe.yaml") == recipe


def test_experts_of_a_run(chain):
    from unimed.evaluate.experts import DENSE, EINSUM, LOOP, OURS, measure

    found = measure(chain / "medmoe-3", limit=24, repeats=1)
    assert found == io.read_json(chain / "medmoe-3" / "experts.json")
    assert found["domains"] == ["organ crops", "CT body", "MR body"]
    assert set(found["labels"]) == {"10", "30", "48"}
    assert found["layers"] == ["language_model.model.layers.0.mlp"]
    assert set(found["splits"]) == {"slab", "subject"}
    for part in found["splits"].values():
        assert part["images"] == 24
        shares = [sum(row) for by_layer in part["use"].values() for row in by_layer]
        assert all(share == pytest.approx(1) or share == 0 for share in shares)  # the held-out subject has no MR
        assert all(0 <= value <= 1 for value in part["accuracy"].values())
    # Tokens before the image have not read it: counted by hand.
    model, processor = load(chain / "medmoe-3" / "model")
    recipe = recipes.load(chain / "medmoe-3" / "recipe.yaml")
    some = stages.labelled(recipe.medmoe, training.items(recipe, "slab"), 24, recipe.train.seed)
    right = []
    with torch.no_grad(), record_routing(model) as records:
        for inputs, labels in stages.batches(model.eval(), processor, some):
            model(**inputs)
            for row, label in enumerate(labels.tolist()):
                start = inputs["input_ids"][row].tolist().index(processor.image_token_id)
                end = int(inputs["attention_mask"][row].sum())
                right += [one == label for one in records[-1].indices[row, start:end, 0].tolist()]
    assert found["splits"]["slab"]["accuracy"]["tokens from the image on"] == pytest.approx(sum(right) / len(right))
    assert found["splits"]["subject"]["use"]["MR body"] == [[0, 0, 0]]
    cost = found["cost"]["forms"]
    assert set(cost) == {OURS, LOOP, EINSUM, DENSE}
    assert cost[EINSUM]["bytes_kept"] > cost[OURS]["bytes_kept"] > 0
    with pytest.raises(UserError, match="not a run of stage 3"):
        measure(chain / "medmoe-2")


@pytest.mark.full
def test_the_demo_of_medmoe(sample_folder, tmp_path, monkeypatch, without_java):
    from typer.testing import CliRunner

    from unimed.cli.app import app

    monkeypatch.chdir(tmp_path)
    few = [f"data.root={sample_folder}", *PARTS, "language.layers=2", *FEW, "train.max_steps=4", "medmoe.router_samples=48"]
    done = CliRunner().invoke(app, ["demo", "--model", "medmoe", *few])
    assert done.exit_code == 0, done.output
    assert "stage 3 of 3" in done.output
    html = (tmp_path / "runs" / "demo-medmoe" / "report.html").read_text()
    assert "Every token also has the meta expert" in html
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["demo-medmoe", "demo-medmoe-1", "demo-medmoe-2"]
