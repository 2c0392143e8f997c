"""The benchmark of transformers models: it times what it has checked, and a wrong result gets no time."""

import pytest
import torch

pytest.importorskip("transformers")

from benchmarks import experts_models, report
from cmoe_kernels.integrations import experts


@pytest.fixture
def model():
    return experts_models.build(layers=2, experts=16, hidden=256, of_expert=32)


EAGER = [name for name in report.MODEL_PEERS if name != report.COMPILED]


@pytest.mark.parametrize("peers", [EAGER, pytest.param([report.COMPILED], marks=pytest.mark.full)], ids=["eager", "compiled"])
@pytest.mark.parametrize("step", list(experts_models.LAYERS))
@pytest.mark.parametrize("tokens", [1, 5])
def test_measures_every_peer(model, tokens, step, peers):
    result = experts_models.measure(model, tokens, step, seconds=0, peers=peers)
    assert set(result["peers"]) == set(peers)
    assert result["ours"]["calls"] >= 3
    assert (result["layers"], result["dtype"]) == (2, "bfloat16")
    assert all(peer["ratio"] > 0 for peer in result["peers"].values())


def test_a_peer_that_would_copy_too_much_is_skipped(model, monkeypatch):
    monkeypatch.setattr(experts_models, "MOST_COPIED", 0)
    monkeypatch.setattr(experts_models, "MOST_WRITTEN", 0)
    assert set(experts_models.measure(model, 5, "forward", 0, EAGER)["skipped"]) == {"batched_mm"}
    assert set(experts_models.measure(model, 5, "train", 0, EAGER)["skipped"]) == {"batched_mm", "eager"}


def test_a_model_that_does_not_compile_is_skipped(model, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("no compiler\nat all")

    monkeypatch.setattr(torch, "compile", lambda _: refuse)
    assert experts_models.measure(model, 5, "forward", 0)["skipped"] == {report.COMPILED: "RuntimeError: no compiler"}


def test_a_wrong_result_gets_no_time(model, monkeypatch):
    monkeypatch.setattr(experts, "sparse_experts", lambda x, *a, **k: torch.zeros_like(x))
    with pytest.raises(ValueError, match="cmoe differs from grouped_mm"):
        experts_models.measure(model, 5, "forward", seconds=0)
