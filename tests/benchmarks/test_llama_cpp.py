"""The benchmark beside llama.cpp: the file that it writes, and what it takes from llama-bench."""

import json
import stat

import pytest
import torch

pytest.importorskip("transformers")

from benchmarks import experts_models, llama_cpp, record, report


@pytest.fixture
def bench(tmp_path):
    """A program that answers as llama-bench does: two runs of two seconds, with the arguments that it got."""
    program = tmp_path / "llama-bench"
    program.write_text("#!/bin/sh\necho '[{\"samples_ns\": [2000000000, 2000000000]}]'\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return program


@pytest.mark.parametrize(("tokens", "seconds"), [(1, 2 / llama_cpp.GENERATED), (64, 2)])
def test_both_sides_are_timed_for_the_same_work(bench, tmp_path, monkeypatch, tokens, seconds):
    monkeypatch.setattr(llama_cpp, "ROUNDS", 1)
    theirs = llama_cpp.command(bench, tmp_path / "x.gguf", tokens, 2)
    assert theirs[theirs.index("-p") + 1] == ("0" if tokens == 1 else "64")
    calls = []
    found = llama_cpp.measure(lambda: calls.append(1), theirs, tokens, seconds=0)
    assert len(calls) >= 2 * llama_cpp.ROUNDS
    assert found["sides"]["llama_cpp"]["calls"] == 2 * llama_cpp.ROUNDS
    assert found["sides"]["llama_cpp"]["tokens_per_second"] == pytest.approx(tokens / seconds)
    assert found["ratio"] > 1
    found |= {"weights": "int8", "theirs": "Q8_0", "layers": 4, "run": {"torch": "2.13", "date": "2026-11-30 10:00 UTC"}}
    record.merge(tmp_path / "x.json", {"cpu": "some CPU", "flags": []}, "int8", found | {"run": found["run"] | {"threads": 2}}, "llama_cpp")
    document = json.loads((tmp_path / "x.json").read_text())
    rate = f"{tokens / seconds:.3g}"
    assert f"| int8, Q8_0 | {tokens} |" in report.markdown([], [], [document])
    assert f" | {rate} | " in report.markdown([], [], [document])


def test_a_program_that_fails_ends_in_one_line(tmp_path):
    with pytest.raises(SystemExit, match=r"ended with 3: no such model$"):
        llama_cpp.measure(lambda: None, ["sh", "-c", "echo no such model >&2; exit 3"], 1, 0)


@pytest.mark.parametrize("kind", llama_cpp.WEIGHTS.values())
def test_the_file_has_the_weights(tmp_path, kind):
    gguf = pytest.importorskip("gguf")
    model = experts_models.build(layers=2, experts=4, hidden=128, of_expert=32)
    llama_cpp.write_gguf(model, kind, tmp_path / "x.gguf")
    reader = gguf.GGUFReader(tmp_path / "x.gguf")
    assert reader.get_field("qwen3moe.expert_count").contents() == 4
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert len(tensors) == 3 + 2 * 12
    down = tensors["blk.1.ffn_down_exps.weight"]
    assert (list(down.shape), down.tensor_type.name) == ([32, 128, 4], kind)
    values = torch.from_numpy(gguf.quants.dequantize(down.data, down.tensor_type))
    expected = model.model.layers[1].mlp.experts.down_proj.detach().float()
    torch.testing.assert_close(values, expected, rtol=0, atol=0 if kind == "BF16" else float(expected.abs().max()) / 127)
