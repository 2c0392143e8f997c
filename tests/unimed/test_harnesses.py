"""Our models under lmms-eval and VLMEvalKit. Where a harness is not installed, its interface is the one written down here."""

import importlib
import importlib.util
import sys
from dataclasses import dataclass
from importlib.metadata import entry_points
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

import unimed
from unimed.errors import UserError


class Lmms:
    """lmms_eval.api.model.lmms 0.7.3, as far as its evaluator uses a simple model."""

    is_simple = True

    def __init__(self):
        self._rank, self._world_size, self.task_dict = 0, 1, {}
        self.cache_hook = Hook()

    @property
    def rank(self):
        return self._rank


class Hook:
    def __init__(self):
        self.kept = []

    def add_partial(self, name, request, result):
        self.kept.append((name, request, result))


@dataclass(frozen=True)
class ModelManifest:
    model_id: str
    simple_class_path: str


class BaseModel:
    """vlmeval.vlm.base.BaseModel, as far as its inference uses a model."""

    INTERLEAVE = False

    def generate(self, message, dataset=None):
        return self.generate_inner(message, dataset)


INTERFACES = {
    "lmms_eval.api.model": {"lmms": Lmms},
    "lmms_eval.models.registry_v2": {"ModelManifest": ModelManifest},
    "vlmeval.vlm.base": {"BaseModel": BaseModel},
    "vlmeval.config": {"supported_VLM": {}},
}


@pytest.fixture
def harness(monkeypatch):
    """A module of `unimed.harnesses` on the harness that is installed, or on its interface."""

    def load(name):
        if importlib.util.find_spec({"lmms_eval": "lmms_eval", "vlmevalkit": "vlmeval"}[name]) is None:
            for path, names in INTERFACES.items():
                parts = path.split(".")
                for end in range(1, len(parts) + 1):
                    package = ".".join(parts[:end])
                    if package not in sys.modules:
                        monkeypatch.setitem(sys.modules, package, ModuleType(package))
                for key, value in names.items():
                    setattr(sys.modules[path], key, value)
        monkeypatch.delitem(sys.modules, f"unimed.harnesses.{name}", raising=False)
        return importlib.import_module(f"unimed.harnesses.{name}")

    yield load
    for name in ("lmms_eval", "vlmevalkit"):
        sys.modules.pop(f"unimed.harnesses.{name}", None)


@dataclass
class Instance:
    args: tuple


PICTURES = [Image.fromarray(np.full((40, 50, 3), shade, np.uint8)) for shade in (30, 120, 220)]


def test_lmms_eval_gets_the_answers_of_the_session(harness, small_run):
    module = harness("lmms_eval")
    model = module.UniMed.create_from_arg_string(f"pretrained={small_run}") if hasattr(module.UniMed, "create_from_arg_string") else None
    model = model or module.UniMed(pretrained=str(small_run), batch_size="2")
    model.cache_hook = Hook()
    model.task_dict = {"toy": {"test": [{"pictures": [one]} for one in PICTURES] + [{"pictures": []}]}}
    prompts = ["<image>\nWhich modality is it?", "Is the liver there?", "[caption] ", "Is aspirin a drug?"]
    options = {"max_new_tokens": 8, "until": ["\n\n"]}
    asked = [Instance((text, options, lambda one: one["pictures"], number, "toy", "test")) for number, text in enumerate(prompts)]
    session = unimed.load(small_run)
    wanted = [
        session.answer(PICTURES[0], "Which modality is it?", max_new_tokens=8),
        session.answer(PICTURES[1], "Is the liver there?", max_new_tokens=8),
        session.answer(PICTURES[2], "", "caption", max_new_tokens=8),
        session.answer(None, "Is aspirin a drug?", "qa", max_new_tokens=8),
    ]
    assert model.generate_until(asked) == [one.text for one in wanted]
    assert [name for name, _, _ in model.cache_hook.kept] == ["generate_until"] * 4
    for refused in (model.loglikelihood, model.generate_until_multi_round):
        with pytest.raises(NotImplementedError, match="unimed answers"):
            refused(asked)
    with pytest.raises(UserError, match="batch_size=auto: expected a positive number"):
        module.UniMed(pretrained=str(small_run), batch_size="auto")


def test_lmms_eval_finds_the_model_by_name(harness):
    module = harness("lmms_eval")
    made = module.manifest()
    assert made.model_id == "unimed"
    path, _, name = made.simple_class_path.rpartition(".")
    assert getattr(importlib.import_module(path), name) is module.UniMed
    (entry,) = entry_points(group="lmms_eval.models", name="unimed")
    assert entry.value == "unimed.harnesses.lmms_eval:manifest"


def test_vlmevalkit_gets_the_answers_of_the_session(harness, small_run, tmp_path):
    module = harness("vlmevalkit")
    module.register("unimed-small", str(small_run))
    model = sys.modules["vlmeval.config"].supported_VLM["unimed-small"]()
    PICTURES[1].save(tmp_path / "one.png")
    message = [
        {"type": "image", "value": str(tmp_path / "one.png")},
        {"type": "text", "value": "Which modality"},
        {"type": "text", "value": "is it?"},
    ]
    assert model.generate(message, "toy") == unimed.load(small_run).answer(PICTURES[1], "Which modality\nis it?").text


def test_prompts_of_a_harness(caplog):
    from unimed.harnesses.common import request, until

    assert (request("a <image> b", [1], "vqa").question, request("a", [1], "vqa").task) == ("a   b", "vqa")
    assert (request("[cls] which?", [1], "vqa").task, request("[cls] which?", [1], "vqa").question) == ("cls", "which?")
    assert request("[note] which?", [1], "vqa").question == "[note] which?"
    assert request("why?", [], "vqa").task == "qa"
    assert request("why?", [1, 2], "vqa").image == 1
    assert "2 pictures in one question: the first one is shown" in caplog.text
    assert until("yes\nno. Q:", ["\n", "Q:", ""]) == "yes"
    assert until("yes\nno", None) == "yes\nno"
    assert until("yes Q: no", "Q:") == "yes "
