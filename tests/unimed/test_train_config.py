from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from unimed.errors import UserError
from unimed.train import config
from unimed.train.schedule import rate


@pytest.mark.parametrize("name", ["tiny", "smollm2", "released"])
def test_recipes_load_and_survive_a_round_trip(name, tmp_path):
    recipe = config.load(name)
    copy = tmp_path / "recipe.yaml"
    copy.write_text(config.dump(recipe))
    assert config.load(copy) == recipe
    assert recipe.name == name


def test_overrides_win_over_the_file_and_the_file_over_defaults():
    overrides = ["train.max_steps=51", "sampler.ratios={vqa: 2}", "connector.aux_losses.switch=0.1", "optim.lr=3e-4", "name=mine"]
    recipe = config.load("tiny", overrides)
    assert (recipe.train.max_steps, recipe.optim.lr, recipe.name) == (51, 3e-4, "mine")
    assert recipe.sampler.ratios == {"vqa": 2.0}
    assert recipe.connector.aux_losses == {"switch": 0.1}
    assert recipe.train.batch_size == config.load("tiny").train.batch_size


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.max_stepz=50", ["train.max_stepz", "50", "train.max_steps"]),
        ("max_steps=50", ["max_steps", "train.max_steps"]),
        ("train.max_steps=many", ["train.max_steps", "many", "Integer"]),
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
        ("train.seed.deep=1", ["train.seed.deep"]),
        ("train.seed=-1", ["train.seed=-1", "from 0 to 4294967295"]),
        ("train.seed=4294967296", ["train.seed=4294967296", "from 0 to 4294967295"]),
        ("language.kind=llama2", ["language.kind='llama2'", "tiny, smollm2"]),
        ("language.kind=llama3", ["language.kind", "llama3"]),
        ("language.kind=smollm2", ["language.layers=3", "smollm2", "language.archive"]),
        ("language.archive=somewhere", ["language.archive='somewhere'", "language.kind='tiny'", "language.width"]),
        ("data.cache_images=9", ["data.cache_images=9", "data.cache_mb"]),
        ("data.cache_mb=-1", ["data.cache_mb=-1", "zero or more"]),
        ("data.workers=-1", ["data.workers=-1", "zero or more"]),
        ("augment.zoom=1.5", ["augment.zoom=1.5", "below 1"]),
    ],
)
def test_a_wrong_override_is_one_line_that_names_it(override, words):
    with pytest.raises(UserError) as caught:
        config.load("tiny", [override])
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
        config.load(path)
    assert all(word in str(caught.value) for word in [*words, "mine.yaml"]), str(caught.value)


def test_a_setting_that_the_language_model_does_not_read_is_refused():
    for setting in ("width=256", "layers=2", "heads=8", "mlp_width=64", "vocab_size=2048"):
        with pytest.raises(UserError, match=rf"language.{setting}: language.kind='smollm2' does not read it, only language.archive"):
            config.load("smollm2", [f"language.{setting}"])
    with pytest.raises(UserError, match=r"language.kind='llama2': cannot be trained yet; supported are tiny, smollm2"):
        config.load("released", ["cannot_run=''"])


def test_a_file_with_a_key_of_an_earlier_version_loads_with_a_warning(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("data:\n  cache_images: 100\ntrain:\n  seed: 7\n")
    with pytest.warns(UserWarning, match=r"data.cache_images is no longer read; use data.cache_mb"):
        assert config.load(path).train.seed == 7


def test_harmless_keys_are_keys():
    harmless = [key for key in config.dotted_keys() if config.harmless(key)]
    assert sum(len(names.split()) for names in config.HARMLESS.values()) == len(harmless)
    assert {"train.threads", "evaluate.limit", "data.cache_mb", "data.root", "name"} <= set(harmless)
    assert not {"train.seed", "train.max_steps", "optim.lr", "data.tasks", "train.batch_size", "train.accumulate"} & set(harmless)


def test_an_unknown_recipe_names_the_ones_there_are():
    with pytest.raises(UserError, match="released, smollm2, tiny"):
        config.load("medium")


@given(st.text(max_size=12), st.text(max_size=12))
def test_any_override_is_taken_or_refused_by_a_user_error(key, value):
    try:
        config.load("tiny", [f"{key}={value}"])
        message = ""
    except UserError as error:
        message = str(error)
    assert "\n" not in message


def test_every_key_has_its_default_where_keys_says():
    structured = OmegaConf.structured(config.Recipe)
    listed = config.dotted_keys()
    assert "train.max_steps" in listed
    assert "name" in listed
    assert all(OmegaConf.select(structured, key, default="absent") != "absent" for key in listed)


def test_the_released_recipe_has_the_released_numbers():
    recipe = config.load("released")
    assert sum(recipe.sampler.ratios.values()) == 50
    assert recipe.cannot_run
    optim, total = recipe.optim, recipe.train.max_steps
    for step, expected in {0: 1e-6, 4999: 9.998e-6, 5000: 9.758e-6, 25_000: 5.05e-6, 49_999: 1e-7}.items():
        assert rate(step, total, optim) == pytest.approx(expected, rel=2e-4)


def test_the_continuous_schedule_has_no_jump_and_ends_at_the_least_rate():
    optim = config.load("released", ["optim.schedule=continuous"]).optim
    rates = [rate(step, 50_000, optim) for step in range(50_000)]
    assert rates[0] == optim.warmup_lr
    assert rates[5000] == optim.lr == max(rates)
    assert rates[-1] == pytest.approx(optim.min_lr)
    assert max(abs(b - a) for a, b in pairwise(rates)) < 1.01 * (optim.lr - optim.warmup_lr) / 5000
