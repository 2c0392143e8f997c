"""Two tasks whose gradients are known."""

import math

import pytest
import torch

from unimed.studies.interference import direction, magnitude


def test_two_quadratics():
    """Losses |w - a|^2 / 2 and s |w - b|^2 / 2 at w = 0 have the gradients -a and -s b."""
    a, b, s = torch.tensor([3.0, 4.0]), torch.tensor([4.0, -3.0]), 2.0
    w = torch.zeros(2, requires_grad=True)
    one = torch.autograd.grad((w - a).square().sum() / 2, [w])
    other = torch.autograd.grad(s * (w - (a + b) / 2).square().sum() / 2, [w])
    assert direction(one, other) == pytest.approx(math.cos(math.pi / 4), rel=1e-6)
    size = s * 5 / math.sqrt(2)
    assert magnitude(one, other) == pytest.approx(2 * 5 * size / (25 + size**2), rel=1e-6)


def test_ends():
    a = torch.tensor([1.0, 2.0])
    assert direction(a, 3 * a) == pytest.approx(1)
    assert direction(a, -a) == pytest.approx(-1)
    assert direction(a, torch.tensor([2.0, -1.0])) == pytest.approx(0)
    assert magnitude(a, -a) == pytest.approx(1)
    assert magnitude(a, 0 * a) == 0
    assert math.isnan(direction(a, 0 * a))
    assert math.isnan(magnitude(0 * a, 0 * a))


def test_several_tensors_and_one_without_a_gradient():
    a, b = torch.tensor([[1.0], [2.0]]), torch.tensor([2.0])
    assert direction([a, b], [a, None]) == pytest.approx(math.sqrt(5) / 3)
    assert magnitude([a, b], [a, None]) == pytest.approx(2 * 3 * math.sqrt(5) / 14)
    with pytest.raises(ValueError, match="expected the same parameters"):
        direction([a], [b])
    with pytest.raises(ValueError, match="zip"):
        direction([a], [])
