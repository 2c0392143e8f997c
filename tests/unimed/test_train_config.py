from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from unimed.errors import UserError
from unimed.train import recipe as recipes
from unimed.train.folder import Run
from unimed.train.schedule import rate


@pytest.mark.parametrize("name", ["tiny", "smollm2", "unimed-7b-release", "unimed-7b-paper", "medmoe-1", "medmoe-release-1"])
def test_recipes_load_and_survive_a_round_trip(name, tmp_path):
    recipe = recipes.load(name)
    copy = tmp_path / "recipe.yaml"
    copy.write_text(recipes.dump(recipe))
    assert recipes.load(copy) == recipe
    assert recipe.name == name


def test_overrides_win_over_the_file_and_the_file_over_defaults():
    overrides = ["train.max_steps=51", "sampler.ratios={vqa: 2}", "connector.aux_losses.switch=0.1", "optim.lr=3e-4", "name=mine"]
    recipe = recipes.load("tiny", overrides)
    assert (recipe.train.max_steps, recipe.optim.lr, recipe.name) == (51, 3e-4, "mine")
    assert recipe.sampler.ratios == {"vqa": 2.0}
    assert recipe.connector.aux_losses == {"switch": 0.1}
    assert recipe.train.batch_size == recipes.load("tiny").train.batch_size


@pytest.mark.each
@pytest.mark.parametrize("text", ["7_0", "2026_11_30", "007", "1e3", "0x10", "on", "null", "a #b", "${x}", "[a]", "{b: 1}", "x: y", " "])
def test_what_names_a_folder_is_taken_as_it_is_written(text):
    """YAML reads 7_0 as 70: the data of another folder was scored."""
    assert recipes.load("tiny", [f"data.sets.mine.root={text}"]).data.sets["mine"].root == text
    assert recipes.load("tiny", [f"data.sets.mine.root='{text}'"]).data.sets["mine"].root == text
    if text[0].isdigit():
        assert recipes.load("tiny", [f"name={text}"]).name == text


def test_a_run_that_goes_on_is_told_where_one_of_its_sets_lies(tmp_path):
    kept = recipes.load("tiny", ["data.sets.mine.root=a", "data.sets.mine.ratio=2", "data.sets.gap.root=b"])
    (tmp_path / "recipe.yaml").write_text(recipes.dump(kept))
    moved = Run(tmp_path).stored_recipe(["data.sets.mine.root=c"]).data
    assert {name: (one.root, one.ratio) for name, one in moved.sets.items()} == {"mine": ("c", 2.0), "gap": ("b", 1.0)}


@pytest.mark.each
@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.max_stepz=50", ["train.max_stepz", "50", "train.max_steps"]),
        ("max_steps=50", ["max_steps", "train.max_steps"]),
        ("train.max_steps=many", ["train.max_steps", "many", "a whole number", "default: 500"]),
        ("train.max_steps=2.5", ["train.max_steps", "2.5"]),
        ("train.max_steps=0", ["train.max_steps=0", "1 or more"]),
        ("train=5", ["train", "section", "train.max_steps"]),
        ("train.max_steps", ["key=value"]),
        ("connector.router=smooth", ["connector.router", "smooth", "soft"]),
        ("sampler.ratios.vqqa=1", ["vqqa", "vqa"]),
        ("sampler.ratios.vqa=-1", ["vqa", "zero or more"]),
        ("sampler.ratios={}", ["at least one"]),
        ("optim.lr=.nan", ["optim.lr"]),
        ("vision.image_size=97", ["vision.image_size=97", "multiple of 12"]),
        ("data.tasks=[vqa,speech]", ["speech", "vqa, refer"]),
        ("evaluate.splits=[../train]", ["../train", "slab"]),
        ("train.save_every=15", ["train.save_every", "multiple of 20"]),
        ("optim.betas=[0.9]", ["optim.betas"]),
        ("train.seed={a: 1", ["not readable"]),
        ("train.seed.deep=1", ["train.seed={'deep': 1}", "a whole number"]),
        ("train.seed=-1", ["train.seed=-1", "zero or more"]),
        ("train.seed=4294967296", ["train.seed=4294967296", "at most 4294967295"]),
        ("language.kind=llama2", ["language.kind='llama2'", "language.from"]),
        ("lora.enabled=true", ["lora.enabled=True", "language.lora"]),
        ("language.archive=somewhere", ["language.archive='somewhere'", "language.from='llama'"]),
        ("language.heads=3", ["language.width=128", "multiple of 3"]),
        ("language.dtype=fp16", ["language.dtype='fp16'", "fp32 or bf16"]),
        ("language.lora.rank=4", ["language.lora.rank", "language.lora"]),
        ("language.lora.r=0", ["language.lora.r=0", "1 or more"]),
        ("vision.lora.r=4", ["vision.lora", "language.freeze=true"]),
        ("connector.lora.r=4", ["connector.lora", "nearest"]),
        ("vision.source=clip", ["vision.source", "nearest"]),
        ("train.report_to=mlflow", ["mlflow", "'tensorboard', 'wandb' or 'trackio'"]),
        ("train.max_steps=true", ["train.max_steps=True", "a whole number"]),
        ("data.cache_images=9", ["data.cache_images=9", "data.cache_mb"]),
        ("data.cache_mb=-1", ["data.cache_mb=-1", "zero or more"]),
        ("data.workers=-1", ["data.workers=-1", "zero or more"]),
        ("augment.zoom=1.5", ["augment.zoom=1.5", "below 1"]),
    ],
)
def test_a_wrong_override_is_one_line_that_names_it(override, words):
    with pytest.raises(UserError) as caught:
        recipes.load("tiny", [override])
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train:\n  max_stepz: 3\n", ["train.max_stepz", "nearest", "train.max_steps"]),
        ("train: 7\n", ["train=7", "section"]),
        ("- a\n- b\n", ["mapping"]),
        ("train: [unclosed\n", ["not readable as YAML"]),
        ("optim:\n  lr: fast\n", ["optim.lr", "fast"]),
    ],
)
def test_a_wrong_file_is_one_line_that_names_file_and_key(text, words, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        recipes.load(path)
    assert all(word in str(caught.value) for word in [*words, "mine.yaml"]), str(caught.value)


def test_a_setting_that_the_language_model_does_not_read_is_refused():
    for setting in ("width=256", "layers=2", "heads=8", "mlp_width=64", "vocab_size=2048"):
        with pytest.raises(UserError, match=rf"language.{setting}: language.from='smollm2' does not read it; leave it out"):
            recipes.load("smollm2", [f"language.{setting}"])


def test_another_language_model_does_not_take_the_sizes_of_the_recipe_s_own():
    language = recipes.load("tiny", ["language.from=Qwen/Qwen2-0.5B", "language.lora.r=4"]).language
    assert (language.source, language.layers, language.lora.r) == ("Qwen/Qwen2-0.5B", 4, 4)
    assert recipes.load("tiny", ["language.from=qwen2"]).language.layers == 3
    language = recipes.load("smollm2", ["language.from=./folder"]).language
    assert (language.archive, language.lora.r) == ("", 8)
    with pytest.raises(UserError, match=r"language.width=64: language.from='./folder' does not read it"):
        recipes.load("tiny", ["language.from=./folder", "language.width=64"])


def test_a_recipe_of_an_earlier_version_is_read(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("language: {kind: smollm2, width: 128, archive: there}\nlora: {enabled: true, r: 4, alpha: 16, dropout: 0.05}\n")
    language = recipes.load(path).language
    assert (language.source, language.archive, language.lora.r) == ("smollm2", "there", 4)
    path.write_text("language: {kind: tiny, width: 64}\nlora: {enabled: false, r: 4}\n")
    language = recipes.load(path).language
    assert (language.source, language.width, language.lora) == ("llama", 64, None)


def test_a_file_with_a_key_of_an_earlier_version_loads_with_a_warning(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("data:\n  cache_images: 100\ntrain:\n  seed: 7\n")
    with pytest.warns(UserWarning, match=r"data.cache_images is no longer read; use data.cache_mb"):
        assert recipes.load(path).train.seed == 7


def test_harmless_keys_are_marked_at_the_field():
    harmless = [key for key in recipes.dotted_keys() if recipes.harmless(key)]
    assert {"train.threads", "evaluate.limit", "data.cache_mb", "data.root", "name"} <= set(harmless)
    assert not {"train.seed", "train.max_steps", "optim.lr", "data.tasks", "train.batch_size", "train.accumulate"} & set(harmless)


def test_an_unknown_recipe_names_the_ones_there_are():
    with pytest.raises(UserError, match="smollm2, tiny, unimed-7b-paper, unimed-7b-release"):
        recipes.load("medium")


@given(st.text(max_size=12), st.text(max_size=12))
def test_any_override_is_taken_or_refused_by_a_user_error(key, value):
    try:
        recipes.load("tiny", [f"{key}={value}"])
        message = ""
    except UserError as error:
        message = str(error)
    assert "\n" not in message


def test_keys_are_as_they_are_written_in_a_recipe():
    listed = recipes.dotted_keys()
    assert {"train.max_steps", "name", "language.from", "language.lora", "data.sets"} <= set(listed)
    written = OmegaConf.create(recipes.dump(recipes.load("tiny")))
    assert all(OmegaConf.select(written, key, default="absent") != "absent" for key in listed)


def test_the_released_recipe_has_the_released_numbers():
    recipe = recipes.load("unimed-7b-release")
    assert sum(recipe.sampler.ratios.values()) == 50
    optim, total = recipe.optim, recipe.train.max_steps
    for step, expected in {0: 1e-6, 4999: 9.998e-6, 5000: 9.758e-6, 25_000: 5.05e-6, 49_999: 1e-7}.items():
        assert rate(step, total, optim) == pytest.approx(expected, rel=2e-4)


def test_the_continuous_schedule_has_no_jump_and_ends_at_the_least_rate():
    optim = recipes.load("unimed-7b-release", ["optim.schedule=continuous"]).optim
    rates = [rate(step, 50_000, optim) for step in range(50_000)]
    assert rates[0] == optim.warmup_lr
    assert rates[5000] == optim.lr == max(rates)
    assert rates[-1] == pytest.approx(optim.min_lr)
    assert max(abs(b - a) for a, b in pairwise(rates)) < 1.01 * (optim.lr - optim.warmup_lr) / 5000
