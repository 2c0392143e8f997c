"""The benchmark of the meta expert: all forms are one computation, and a wrong one gets no time."""

import pytest
import torch

from benchmarks import meta_expert


@pytest.mark.parametrize("width", [(32, 48, False, "gelu_tanh", True), (32, 48, True, "silu", False)], ids=["plain", "gated"])
@pytest.mark.parametrize("tokens", [1, 7])
def test_all_forms_give_the_same(width, tokens):
    calls = meta_expert.sides(width, tokens, torch.float32, train=True, forms=meta_expert.FORMS)
    assert meta_expert.check(*calls) < 1e-5
    together, apart = calls[:2]
    parameters = 4 if width[-1] else 2
    assert len(together()) == 3 + parameters
    assert len(apart()) == 3 + 2 * parameters


def test_a_wrong_form_gets_no_time(monkeypatch):
    sides = meta_expert.sides((32, 48, False, "gelu", True), 5, torch.float32, train=False)
    monkeypatch.setattr(meta_expert, "activate", lambda name, u, gated: u)
    with pytest.raises(ValueError, match="the forms differ by"):
        meta_expert.check(*sides)
