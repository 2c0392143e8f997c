"""The plugin for vLLM: what vLLM finds it by, and, where vLLM is installed, that it answers as our own model does."""

import importlib
import os
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
from model_samples import lively, picture, small

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = [
    "[INST] <Img><ImageHere></Img> [refer] give me the location of liver [/INST]",
    "[INST] <Img><ImageHere></Img> [vqa] which modality? [/INST]",
    "[INST] <Img><ImageHere></Img> [refer] liver [/INST]",  # as the chat template words the message below
]
MESSAGE = {"role": "user", "content": [{"type": "image_pil", "image_pil": picture(2)}, {"type": "text", "text": "[refer] liver"}]}


def entry():
    """What the entry point of pyproject.toml names."""
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["vllm.general_plugins"]
    module, name = points["unimed"].split(":")
    return getattr(importlib.import_module(module), name)


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
    for _ in range(2):  # vLLM calls it in each of its processes, and may do so again
        entry()()
    assert names == {"UniMedForConditionalGeneration": "unimed.serve.vllm_model:UniMedForConditionalGeneration"}
    model, _ = small()
    assert type(model).__name__ in names  # as config.json of every saved model says
    assert (ROOT / "unimed" / "serve" / "vllm_model.py").is_file()


@pytest.mark.full
def test_vllm_answers_as_the_model_does(tmp_path, monkeypatch):
    pytest.importorskip("vllm", reason="vLLM is not installed")
    for name, value in {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}.items():
        monkeypatch.setitem(os.environ, name, value)
    model, processor = small(language={"width": 64, "heads": 2})  # heads of 32: the narrowest that vLLM has on a CPU
    lively(model).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    pictures = [picture(1), picture(1), picture(2)]
    wanted = []
    for prompt, image in zip(PROMPTS, pictures, strict=True):
        inputs = processor(text=[prompt], images=[image])
        made = model.generate(**inputs, max_new_tokens=12, do_sample=False)
        wanted.append(made[0, inputs["input_ids"].shape[1] :].tolist())
    assert len(set(map(tuple, wanted))) == 3
    entry()()
    from vllm import LLM, SamplingParams

    engine = LLM(str(tmp_path), dtype="float32", enforce_eager=True, max_model_len=256, max_num_seqs=4)
    asked = [
        {"prompt": prompt.replace("<ImageHere>", "<image>"), "multi_modal_data": {"image": image}}
        for prompt, image in zip(PROMPTS, pictures, strict=True)
    ]
    greedy = SamplingParams(temperature=0, max_tokens=12)
    assert [list(one.outputs[0].token_ids) for one in engine.generate(asked, greedy)] == wanted
    (one,) = engine.chat([MESSAGE], greedy)
    assert list(one.outputs[0].token_ids) == wanted[2]
