"""The benchmark of micro-batches: its sides make the same gradients, and a wrong one gets no time."""

import pytest
import torch

from benchmarks import micro_batch
from benchmarks.shapes import SHAPES


@pytest.mark.parametrize("main_grad", [False, True])
def test_all_sides_make_the_same_gradients(main_grad):
    calls, grads = micro_batch.sides(SHAPES["tiny"], 7, torch.float32, main_grad)
    assert list(calls) == list(micro_batch.SIDES)
    micro_batch.check(*grads)
    before = grads[0][0].clone()
    calls["accumulate_grads"]()
    assert not torch.equal(grads[0][0], before)  # added to where it is
    with pytest.raises(ValueError, match="differ by"):
        micro_batch.check(*grads)
