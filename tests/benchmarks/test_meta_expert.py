"""The benchmark of the meta expert: all forms are one computation, and a wrong one gets no time."""

import argparse

import pytest
import torch

from benchmarks import meta_expert


@pytest.mark.parametrize("width", [(32, 48, False, "gelu_tanh", True), (32, 48, True, "silu", False)], ids=["plain", "gated"])
@pytest.mark.parametrize("tokens", [1, 7])
def test_all_forms_give_the_same(width, tokens):
    calls = meta_expert.sides(width, tokens, torch.float32, train=True)
    assert meta_expert.check(*calls) < 1e-5
    ours, apart = calls[:2]
    parameters = 4 if width[-1] else 2
    assert len(ours()) == 3 + parameters
    assert len(apart()) == 3 + 2 * parameters
    assert meta_expert.check(*meta_expert.sides(width, tokens, torch.float32, train=False)) < 1e-5


def test_a_slow_form_is_left_out_of_larger_sizes(monkeypatch):
    monkeypatch.setitem(meta_expert.WIDTHS, "toy", (32, 48, False, "gelu", True))
    options = argparse.Namespace(forms=["loop", "beside"], seconds=0, once_above=9, longest=1e9, cpu_time=True)
    rows = list(meta_expert.rows("toy", "forward", "float32", [16, 32], options))
    assert [row[0] for row in rows] == ["16", "32"]
    assert all(float(cell) > 0 for row in rows for cell in (row[3], row[5]))
    options.longest = 0
    assert list(meta_expert.rows("toy", "forward", "float32", [16, 32], options))[1][2:] == ["–"] * 4


def test_a_wrong_form_gets_no_time(monkeypatch):
    sides = meta_expert.sides((32, 48, False, "gelu", True), 5, torch.float32, train=False)
    monkeypatch.setattr(meta_expert, "activate", lambda name, u, gated: u)
    with pytest.raises(ValueError, match="the forms differ by"):
        meta_expert.check(*sides)
