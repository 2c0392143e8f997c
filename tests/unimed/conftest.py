import os
import shutil

import pytest
import torch

from tests.builds import alone_in

SMALL = """
vision.image_size=32 vision.patch_size=8 vision.width=16 vision.layers=1 vision.heads=2 connector.hidden_features=16
language.width=32 language.layers=1 language.heads=2 language.mlp_width=32 language.vocab_size=400
train.max_steps=12 train.batch_size=4 train.log_every=2 train.save_every=4 train.threads=1 optim.warmup_steps=2
evaluate.limit=4 evaluate.max_new_tokens=12 name=small
"""


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory):
    """UNIMED_CACHE of all tests, also of the processes that they start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UNIMED_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def sample_folder(tmp_path_factory):
    """The built-in sample, built once for all tests that read it, in whatever worker of xdist."""
    from unimed.sample.build import build_sample

    shared = tmp_path_factory.getbasetemp()
    shared = (shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared) / "data"
    with alone_in(shared):
        build_sample(shared / "sample")  # does nothing where it is there
    return shared / "sample"


@pytest.fixture(scope="session")
def small_overrides(sample_folder):
    """Overrides that make the tiny recipe train in seconds."""
    return [f"data.root={sample_folder}", *SMALL.split()]


@pytest.fixture(scope="session")
def small_run(small_overrides, tmp_path_factory):
    """A finished run: runs/small under a folder of its own. Read it, do not change it."""
    from unimed.train import recipe as recipes
    from unimed.train.run import train

    torch.set_num_threads(1)
    return train(recipes.load("tiny", small_overrides), tmp_path_factory.mktemp("work") / "runs" / "small")


@pytest.fixture(scope="session")
def evaluated_run(small_run):
    from unimed.evaluate.run import evaluate_run
    from unimed.tasks import overlap

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(overlap, "has_coco", lambda: False)
        evaluate_run(small_run, untrained=True)
    return small_run


@pytest.fixture(scope="session")
def test_only_run(small_run, sample_folder, tmp_path_factory):
    """The small run, evaluated on another data set, which has a test split only, after its own is gone: run, data set, metrics."""
    from unimed.evaluate.run import evaluate_run
    from unimed.records import jsonl

    folder = tmp_path_factory.mktemp("elsewhere")
    run, root = folder / "runs" / "small", folder / "hospital"
    shutil.copytree(small_run, run, ignore=shutil.ignore_patterns("checkpoint-*"))
    recipe = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(recipe.replace(str(sample_folder), str(folder / "gone")))
    named = {"dataset": "hospital", "source": "", "modality": ""}
    held_out = [record for _, record in jsonl.read_records(sample_folder, split="test")]
    asked = [record for record in held_out if {"qa", "box"} & {one.kind for one in record.annotations}]
    jsonl.write(root, jsonl.DatasetInfo(name="hospital"), [record.model_copy(update=named) for record in asked])
    shutil.copytree(sample_folder / "images", root / "images")
    return run, root, evaluate_run(run, [f"data.root={root}", "evaluate.splits=[test]", "evaluate.limit=3"], untrained=True)


@pytest.fixture
def without_java(monkeypatch):
    """Report metrics from Python alone: starting a Java machine for every score takes longer than all else."""
    from unimed.tasks import overlap

    monkeypatch.setattr(overlap, "has_coco", lambda: False)


@pytest.fixture
def settings(tmp_path, monkeypatch):
    """Of `unimed serve`, whose workers load no model: tests/unimed/fake_worker.py."""
    import fake_worker

    from unimed.serve import worker
    from unimed.serve.settings import Settings

    monkeypatch.setattr(worker, "main", fake_worker.main)
    return lambda **changes: Settings(**{"model": tmp_path, **changes})


@pytest.fixture(scope="module")
def session(small_run):
    import unimed

    return unimed.load(small_run)


@pytest.fixture(scope="module")
def slab(small_run):
    """Five of its held-out questions."""
    from unimed.evaluate import evaluate
    from unimed.train import recipe as recipes
    from unimed.train.run import items

    return evaluate.spread(items(recipes.load(small_run / "recipe.yaml"), "slab"), 5)


@pytest.fixture(scope="module")
def picture(sample_folder):
    return sample_folder / "images" / "ct_axial_014.jpg"
