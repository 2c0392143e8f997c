"""The plugin for vLLM: what vLLM finds it by, and, where vLLM is installed, that it answers as our own model does."""

import importlib
import importlib.util
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
from model_samples import small

ROOT = Path(__file__).resolve().parents[2]


def test_the_plugin_names_the_model_once(monkeypatch):
    names = {}

    class Registry:
        @staticmethod
        def get_supported_archs():
            return set(names)

        @staticmethod
        def register_model(name, place):
            assert name not in names
            names[name] = place

    fake = ModuleType("vllm")
    fake.ModelRegistry = Registry
    monkeypatch.setitem(sys.modules, "vllm", fake)
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["vllm.general_plugins"]
    module, name = points["unimed"].split(":")
    for _ in range(2):  # vLLM calls it in each of its processes, and may do so again
        getattr(importlib.import_module(module), name)()
    assert names == {"UniMedForConditionalGeneration": "unimed.serve.vllm_model:UniMedForConditionalGeneration"}
    model, _ = small()
    assert type(model).__name__ in names  # as config.json of every saved model says
    assert (ROOT / "unimed" / "serve" / "vllm_model.py").is_file()


@pytest.mark.full
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_vllm_answers_as_the_model_does(tmp_path):
    script = Path(__file__).with_name("vllm_tokens.py")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, script, tmp_path], env=environment, capture_output=True, text=True, check=True)
    made = json.loads(done.stdout.splitlines()[-1])
    assert made["vllm"] == made["ours"]
    assert len(set(map(tuple, made["ours"]))) == 5
