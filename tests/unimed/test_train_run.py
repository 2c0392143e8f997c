import importlib.util
import itertools
import json
import shutil

import pytest
import torch
from model_samples import picture, small
from PIL import Image
from safetensors.torch import load_file
from transformers import TrainerCallback

from unimed import io
from unimed.errors import UserError
from unimed.evaluate.run import evaluate_run
from unimed.inference.session import load
from unimed.models.merge import merge_folder
from unimed.needs import missing_weights
from unimed.tasks import RELEASED_TASKS, TASKS
from unimed.train import recipe as recipes
from unimed.train.folder import Run
from unimed.train.run import build, items, train
from unimed.train.trainer import UniMedTrainer, arguments


class Killed(Exception):
    pass


class KillAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Killed


@pytest.fixture(scope="module")
def recipe(small_overrides):
    return recipes.load("tiny", small_overrides)


@pytest.fixture(scope="module")
def whole(small_run):
    return small_run


def log_of(run):
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in entry.items() if "second" not in key} for entry in entries if "loss" in entry]


def test_a_run_leaves_its_model_logs_and_settings(whole, recipe):
    log = log_of(whole)
    assert [entry["step"] for entry in log] == [2, 4, 6, 8, 10, 12]
    seen = {key for entry in log for key in entry}
    assert {"loss", "learning_rate", "grad_norm"} | {f"loss/{task}" for task in RELEASED_TASKS} <= seen
    assert recipes.load(whole / "recipe.yaml") == recipe
    assert [path.name for path in Run(whole).checkpoints()] == ["checkpoint-8", "checkpoint-12"]
    assert not list(whole.rglob("training_args.bin"))
    record = json.loads((whole / "run.json").read_text())
    assert record["steps"] == 12
    assert record["trained_parameters"] == record["parameters"] > 0
    model = load(whole).model
    stored = load_file(whole / "checkpoint-12" / "model.safetensors")
    assert stored
    assert all(torch.equal(model.state_dict()[name], value) for name, value in stored.items())


def test_a_run_shorter_than_the_steps_between_two_logs_logs_its_end(recipe, tmp_path):
    settings = recipe.train.model_copy(update={"max_steps": 2, "log_every": 4})
    train(recipe.model_copy(update={"train": settings}), tmp_path / "short")
    assert [entry["step"] for entry in log_of(tmp_path / "short")] == [2]
    assert [entry["step"] for entry in json.loads((tmp_path / "short" / "router.json").read_text())] == [2]


def test_the_loss_of_the_log_is_the_mean_of_its_tasks_weighted_by_tokens(whole):
    for entry in log_of(whole):
        tasks = [value for key, value in entry.items() if key.startswith("loss/")]
        assert min(tasks) <= entry["loss"] * 1.2
        assert max(tasks) >= entry["loss"] * 0.8


def test_gates_are_logged_by_task_and_sum_to_one(whole):
    history = json.loads((whole / "router.json").read_text())
    assert [entry["step"] for entry in history] == [2, 4, 6, 8, 10, 12]
    assert {task for entry in history for task in entry["tasks"]} == {"vqa", "refer", "identify", "caption", "cls"}
    for entry in history:
        for task in entry["tasks"].values():
            assert sum(task["gates"]) == pytest.approx(1, abs=1e-5)
            assert sum(task["load"]) == pytest.approx(1, abs=1e-5)
            assert 0 < task["entropy"] <= 1 + 1e-6
    assert json.loads((whole / "checkpoint-12" / "router.json").read_text()) == history


@pytest.mark.parametrize("killed_at", [5, 9])
def test_a_killed_and_resumed_run_is_the_same_run(whole, recipe, tmp_path, killed_at):
    run = tmp_path / "killed"
    with pytest.raises(Killed):
        train(recipe, run, callbacks=[KillAt(killed_at)])
    assert not (run / "model").exists()
    train(recipe, run, resume=True)
    assert log_of(run) == log_of(whole)
    assert json.loads((run / "router.json").read_text()) == json.loads((whole / "router.json").read_text())
    ours, theirs = load_file(run / "model" / "model.safetensors"), load_file(whole / "model" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_homogeneous_batches_resume_too_and_accumulation_sees_the_same_samples(small_overrides, tmp_path):
    recipe = recipes.load("tiny", [*small_overrides, "sampler.mode=homogeneous", "train.accumulate=2", "train.max_steps=8"])
    with pytest.raises(Killed):
        train(recipe, tmp_path / "killed", callbacks=[KillAt(6)])
    train(recipe, tmp_path / "killed", resume=True)
    train(recipe, tmp_path / "whole")
    assert log_of(tmp_path / "killed") == log_of(tmp_path / "whole")


def test_a_run_killed_while_it_writes_a_checkpoint_resumes_from_the_one_before(whole, recipe, tmp_path, monkeypatch):
    run, written = tmp_path / "killed", []

    def dying(self, output_dir):
        written.append(output_dir)
        if len(written) == 2:
            raise Killed

    monkeypatch.setattr(UniMedTrainer, "_save_rng_state", dying)
    with pytest.raises(Killed):
        train(recipe, run)
    monkeypatch.undo()
    assert [path.name for path in Run(run).checkpoints()] == ["checkpoint-4"]
    train(recipe, run, resume=True)
    assert log_of(run) == log_of(whole)


def test_a_corrupt_checkpoint_is_named(whole, recipe, tmp_path):
    for name, damage, words in (
        ("model.safetensors", lambda path: path.write_bytes(path.read_bytes()[:-10]), "bytes"),
        ("optimizer.pt", lambda path: path.unlink(), "missing"),
        ("model.safetensors", lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\x55"), "sha256"),
        ("manifest.json", lambda path: path.write_text("{"), "not valid JSON"),
        ("manifest.json", lambda path: path.unlink(), "manifest.json"),
    ):
        run = tmp_path / "run"
        shutil.copytree(whole, run)
        damage(run / "checkpoint-12" / name)
        with pytest.raises(UserError, match=words) as caught:
            train(recipe, run, resume=True)
        assert "checkpoint-12" in str(caught.value)
        shutil.rmtree(run)


def test_a_run_is_not_overwritten_or_resumed_by_mistake(whole, recipe, small_overrides, tmp_path):
    with pytest.raises(UserError, match="--resume"):
        train(recipe, whole)
    with pytest.raises(UserError, match="nothing to resume"):
        train(recipe, tmp_path / "new", resume=True)
    other = recipes.load("tiny", [*small_overrides, "optim.lr=0.5"])
    with pytest.raises(UserError, match=r"optim.lr=0.5.*0.001"):
        train(other, whole, resume=True)
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "letter.txt").write_text("dear")
    with pytest.raises(UserError, match="not a run"):
        train(recipe, tmp_path / "precious", overwrite=True)
    assert (tmp_path / "precious" / "letter.txt").read_text() == "dear"


def test_a_run_that_cannot_start_leaves_the_one_it_would_replace(whole, recipe, small_overrides, tmp_path, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    before = {path.relative_to(run) for path in run.rglob("*")}
    wrong = recipes.load("tiny", [*small_overrides, "language.vocab_size=200"])
    for error in (UserError, KeyboardInterrupt):
        with pytest.raises(error):
            train(wrong, run, overwrite=True)
        assert {path.relative_to(run) for path in run.rglob("*")} == before
        assert [path.name for path in tmp_path.iterdir()] == ["run"]
        monkeypatch.setattr("unimed.train.run.build", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))


def test_a_run_resumes_by_what_changes_its_mathematics(whole, recipe, small_overrides, sample_folder, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    shutil.copytree(sample_folder, tmp_path / "moved")
    harmless = ["train.threads=2", "evaluate.limit=3", "data.cache_mb=5", "train.keep=9", f"data.root={tmp_path}/moved", "name=other"]
    train(recipes.load("tiny", [*small_overrides, *harmless]), run, resume=True)
    assert recipes.load(run / "recipe.yaml").train.keep == 9
    torch.set_num_threads(1)
    record = json.loads((run / "start.json").read_text())
    assert record["command"] == "train"
    assert record["processes"] == 1
    assert record["examples"] == len(items(recipe, "train"))
    for change, words in (
        ({"processes": 2}, r"with 1 process and train.accumulate=1: .* 2 processes and .*--nproc-per-node 2"),
        ({"examples_sha256": "0"}, "items changed"),
    ):
        (run / "start.json").write_text(json.dumps({**record, **change}))
        with pytest.raises(UserError, match=words):
            train(recipe, run, resume=True)
    (run / "start.json").write_text(json.dumps({**record, "processes": 2}))  # a step has the same two batches
    train(recipes.load("tiny", [*small_overrides, "train.accumulate=2"]), run, resume=True)
    (run / "recipe.yaml").write_text((whole / "recipe.yaml").read_text())
    (run / "start.json").unlink()  # a run of an earlier version
    train(recipe, run, resume=True)


def test_the_log_is_added_to_and_starts_again_from_the_checkpoint(whole, recipe, tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(io, "write_text", lambda path, text, write=io.write_text: written.append(path.name) or write(path, text))
    run = tmp_path / "run"
    with pytest.raises(Killed):
        train(recipe, run, callbacks=[KillAt(7)])
    assert "metrics.jsonl" not in written
    assert [entry["step"] for entry in log_of(run)] == [2, 4, 6]
    train(recipe, run, resume=True)
    assert written.count("metrics.jsonl") == 1
    assert log_of(run) == log_of(whole)


def test_missing_data_and_recipes_that_cannot_run_say_so(recipe, sample_folder, tmp_path):
    with pytest.raises(UserError, match="unimed sample build"):
        items(recipes.load("tiny", [f"data.root={tmp_path}/nothing"]), "train")
    hub = recipes.load("unimed-7b-release", ["language.from=meta-llama/Llama-2-7b-chat-hf", "vision.from=eva"])
    assert missing_weights(hub) == ""
    with pytest.raises(
        UserError, match=r"cannot run here: vision.from=checkpoints/eva-vit-g is missing \(unimed convert eva .*language.from"
    ):
        train(recipes.load("unimed-7b-release", [f"data.root={sample_folder}"]), tmp_path / "released")


def test_accumulated_batches_weigh_by_tokens_and_images(small_overrides, tmp_path):
    """Eight answers of 2 to 30 tokens, as one batch, in 2, 4 or 8, or in two unequal ones, are the same step."""
    recipe = recipes.load("tiny", [*small_overrides, "connector.router=sparse", "connector.aux_losses={z: 0.5}", "train.accumulate=2"])
    model, processor = build(recipe, items(recipe, "train"))
    trainer = UniMedTrainer(recipe, model, processor, None, tmp_path)
    prompt, digits = "[INST] <Img><ImageHere></Img> [vqa] which one? [/INST]", "987654321098765"
    answers = [" ".join(digits[:length]) for length in (1, 15, 3, 15, 1, 15, 15, 8)]
    sizes = [len(processor.tokenizer(" " + text, add_special_tokens=False).input_ids) + 1 for text in answers]
    assert min(sizes) <= 3
    assert max(sizes) >= 30
    images = [Image.new("RGB", (32, 32), (30 * i, 99, 10)) for i in range(8)]

    def rows(part):
        batch = processor(text=[prompt] * len(answers[part]), images=images[part], answers=answers[part], task="vqa")
        return {**batch, "sample_tasks": torch.zeros(len(answers[part]), dtype=torch.long)}

    def gradient(*cuts):
        model.zero_grad()
        parts = [rows(slice(*ends)) for ends in itertools.pairwise((0, *cuts, 8))]
        batches, tokens = trainer.get_batch_samples(iter(parts), len(parts), torch.device("cpu"))
        trainer.current_gradient_accumulation_steps = len(batches)
        loss = sum(trainer.training_step(model, part, tokens) for part in batches)
        return loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    whole_loss, whole = gradient()
    for cuts in ((4,), (2, 4, 6), range(1, 8), (1,)):
        parts_loss, parts = gradient(*cuts)
        assert parts_loss == pytest.approx(float(whole_loss), rel=1e-6)
        assert whole.keys() == parts.keys()
        for name in whole:
            torch.testing.assert_close(parts[name], whole[name], rtol=1e-4, atol=1e-6, msg=name)


def test_telemetry_names_tasks_by_the_model_s_own_list(small_overrides, tmp_path):
    recipe = recipes.load("tiny", small_overrides)
    model, processor = small(tasks=[task for task in RELEASED_TASKS if TASKS[task].needs_image][::-1])
    trainer = UniMedTrainer(recipe, model.train(), processor, None, tmp_path)
    rows = processor(text="[INST] <Img><ImageHere></Img> [vqa] which modality? [/INST]", images=picture(1), answers="CT")
    trainer.compute_loss(model, {**rows, "sample_tasks": torch.tensor([list(TASKS).index("vqa")])})
    trainer.log({"loss": 1.0})
    logged = trainer.state.log_history[-1]
    assert {"loss/vqa", "router_entropy/vqa"} <= logged.keys()
    assert not any(task in key for key in logged for task in ("cls", "caption", "refer"))


def processor_rows(processor):
    return processor(text="[INST] <Img><ImageHere></Img> [vqa] which modality? [/INST]", images=picture(1))


def test_lora_trains_resumes_and_evaluates(small_overrides, tmp_path, without_java):
    settings = ["language.lora.r=4", "evaluate.limit=1", "evaluate.splits=[slab]", "train.max_steps=8"]
    recipe = recipes.load("tiny", [*small_overrides, *settings])
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(recipe, whole)
    with pytest.raises(Killed):
        train(recipe, killed, callbacks=[KillAt(6)])
    train(recipe, killed, resume=True)
    assert log_of(killed) == log_of(whole)
    ours, theirs = (load_file(run / "model" / "adapter_model.safetensors") for run in (killed, whole))
    assert all(any(part in name for name in ours) for part in (".lora_A", "connector", "vision_tower"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert any(value.any() for name, value in ours.items() if ".lora_B" in name)
    moved = tmp_path / "elsewhere" / "run"
    shutil.copytree(killed, moved)
    shutil.rmtree(killed)
    for folder in (moved, moved / "checkpoint-8"):
        model = load(folder).model
        saved = {name.replace(".modules_to_save.default", "").replace(".default", ""): value for name, value in model.state_dict().items()}
        assert all(torch.equal(saved[name], value) for name, value in ours.items())
    assert not (moved / "model" / "base").exists()
    assert (moved / "base" / "model.safetensors").is_file()  # once for the model and every checkpoint
    merge_folder(moved / "model", tmp_path / "merged")
    plain, adapted = load(tmp_path / "merged"), load(moved)
    picture_of = processor_rows(plain.processor)
    torch.testing.assert_close(plain.model(**picture_of).logits, adapted.model(**picture_of).logits, rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match="exists; choose a new folder"):
        merge_folder(moved / "model", tmp_path / "merged")
    with pytest.raises(UserError, match=r"no adapter_model.safetensors there, so there is no LoRA to merge"):
        merge_folder(tmp_path / "merged", tmp_path / "again")
    result = evaluate_run(moved)
    assert result["splits"]["slab"]["rows"]["trained"].keys() == set(RELEASED_TASKS)


def test_weight_decay_goes_where_the_release_puts_it(recipe, tmp_path):
    train_items = items(recipe, "train")
    model, processor = build(recipe, train_items)
    trainer = UniMedTrainer(recipe, model, processor, None, tmp_path)
    decayed = set(trainer.get_decay_parameter_names(model))
    for name, parameter in model.named_parameters():
        plain = parameter.ndim >= 2 and "bias" not in name and "norm" not in name
        assert (name in decayed) == plain, name
    assert any("task" in name for name in decayed)
    groups = trainer.create_optimizer().param_groups
    assert sorted(group["weight_decay"] for group in groups) == [0.0, recipe.optim.weight_decay]
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_the_same_seed_builds_the_same_model_and_another_seed_another(recipe, small_overrides):
    train_items = items(recipe, "train")
    first, second = build(recipe, train_items)[0].state_dict(), build(recipe, train_items)[0].state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = build(recipes.load("tiny", [*small_overrides, "train.seed=1"]), train_items)[0].state_dict()
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize(
    ("overrides", "logged"),
    [
        (["connector.router=sparse", "connector.aux_losses={switch: 0.1, z: 0.01}"], {"aux/switch", "aux/z"}),
        (["connector.router=hard", "train.gradient_checkpointing=true"], set()),
        (["connector.router=constant", "train.precision=bf16"], set()),
        (["connector.router_inputs=task", "connector.resample=avgpool", "optim.schedule=released"], {"router_entropy/vqa"}),
        (["data.tasks=[qa]", "vision.freeze=true"], {"loss/qa"}),
        (["language.from=qwen2", "vision.from=siglip", "connector.freeze=true"], {"router_entropy/vqa"}),
    ],
)
def test_other_settings_of_a_recipe_train_and_log(small_overrides, tmp_path, overrides, logged):
    recipe = recipes.load("tiny", [*small_overrides, *overrides, "train.max_steps=4", "sampler.ratios={vqa: 4, refer: 1, qa: 1}"])
    log = log_of(train(recipe, tmp_path / "run"))
    assert [entry["step"] for entry in log] == [2, 4]
    assert all(torch.isfinite(torch.tensor(entry["loss"])) for entry in log)
    assert logged <= {key for entry in log for key in entry}


def test_an_auxiliary_loss_adds_to_the_loss_by_its_weight(small_overrides, tmp_path):
    same = [*small_overrides, "connector.router=sparse", "train.max_steps=2", "sampler.ratios={vqa: 1}", "optim.lr=0", "optim.warmup_lr=0"]
    plain = log_of(train(recipes.load("tiny", [*same, "connector.aux_losses={z: 0}"]), tmp_path / "plain"))[0]
    weighted = log_of(train(recipes.load("tiny", [*same, "connector.aux_losses={z: 100}"]), tmp_path / "weighted"))[0]
    assert plain["aux/z"] == weighted["aux/z"] > 0
    assert weighted["loss"] - plain["loss"] == pytest.approx(100 * weighted["aux/z"], rel=1e-3)


class Tracker(TrainerCallback):
    """In the place of the callback that transformers has for a tracker."""

    def __init__(self):
        self.logging_dir, self.seen = None, []
        Tracker.last = self

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append(dict(logs))


def test_a_tracker_gets_what_the_log_gets(small_overrides, tmp_path, monkeypatch):
    from transformers.integrations import integration_utils

    recipe = recipes.load("tiny", [*small_overrides, "train.report_to=trackio", "train.max_steps=2"])
    if importlib.util.find_spec("trackio") is None:
        with pytest.raises(UserError, match=r"train.report_to='trackio': the package trackio is not installed; get it with: pip install"):
            train(recipe, tmp_path / "run")
        assert not (tmp_path / "run").exists()
    monkeypatch.setattr("unimed.train.run._require_installed", lambda trackers: None)
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "trackio", Tracker)
    settings = arguments(recipe, tmp_path)
    assert (settings.project, settings.run_name) == ("unimed", "small")
    log = log_of(train(recipe, tmp_path / "run"))
    assert [{key: value for key, value in seen.items() if "second" not in key} for seen in Tracker.last.seen if "loss" in seen] == [
        {key: value for key, value in entry.items() if key != "step"} for entry in log
    ]


def test_tensorboard_files_lie_in_the_run(small_overrides, tmp_path):
    pytest.importorskip("tensorboard")
    recipe = recipes.load("tiny", [*small_overrides, "train.report_to=tensorboard", "train.max_steps=2"])
    train(recipe, tmp_path / "run")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert {"train/loss", "train/loss/vqa"} <= set(events.Tags()["scalars"])


def test_a_process_takes_one_gpu(recipe, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        for name, value in {"is_available": True, "device_count": 4, "set_device": None}.items():
            patch.setattr(torch.cuda, name, lambda *device, value=value: value)
        assert arguments(recipe, tmp_path).n_gpu == 1
    arguments(recipe, tmp_path)  # and accelerate is back on the CPU


def test_half_precision_without_a_gpu_is_refused(small_overrides, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(UserError, match=r"fp16.*GPU"):
        train(recipes.load("tiny", [*small_overrides, "train.precision=fp16"]), tmp_path / "run")
