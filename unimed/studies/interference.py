"""How the gradients of two tasks agree at shared parameters: in direction and in size.

Source: the tug-of-war of Uni-Med (NeurIPS 2024), section 3; its statistics in full are not public, these two are the usual ones.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

Grads = Tensor | Iterable[Tensor | None]


def _dots(a: Grads, b: Grads) -> tuple[float, float, float]:
    """<a, b>, <a, a>, <b, b>, summed in fp64 over the tensors; None is a gradient of zero."""
    pairs = [(a, b)] if isinstance(a, Tensor) and isinstance(b, Tensor) else list(zip(a, b, strict=True))
    ab = aa = bb = 0.0
    for one, other in pairs:
        if one is not None and other is not None and one.shape != other.shape:
            raise ValueError(f"gradients of shape {list(one.shape)} and {list(other.shape)}: expected the same parameters")
        x = None if one is None else one.detach().double().flatten()
        y = None if other is None else other.detach().double().flatten()
        ab += float(torch.dot(x, y)) if x is not None and y is not None else 0.0
        aa += float(torch.dot(x, x)) if x is not None else 0.0
        bb += float(torch.dot(y, y)) if y is not None else 0.0
    return ab, aa, bb


def direction(a: Grads, b: Grads) -> float:
    """Cosine of two gradients: 1 where they pull one way, -1 where one undoes the other. NaN where one is zero.

    a, b: tensors of one shape, or sequences of them, as `torch.autograd.grad` gives for the same parameters.

    Example::

        >>> direction(torch.tensor([1.0, 0.0]), torch.tensor([-2.0, 0.0]))
        -1.0
    """
    ab, aa, bb = _dots(a, b)
    return ab / math.sqrt(aa * bb) if aa and bb else math.nan


def magnitude(a: Grads, b: Grads) -> float:
    """2 |a| |b| / (|a|^2 + |b|^2): 1 where two gradients are of one size, near 0 where one outweighs the other. NaN where both are zero.

    Example::

        >>> round(magnitude(torch.tensor([3.0]), torch.tensor([1.0])), 6)
        0.6
    """
    _, aa, bb = _dots(a, b)
    return 2 * math.sqrt(aa * bb) / (aa + bb) if aa or bb else math.nan
