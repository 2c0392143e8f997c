"""The rule by which results are compared (a reference in fp64, a baseline in the tested dtype)."""

import torch
from torch import Tensor


def errors(value: Tensor, exact: Tensor) -> tuple[float, float]:
    """Largest and RMS error against the fp64 reference."""
    gap = (value.double() - exact).abs()
    return gap.max().item(), gap.square().mean().sqrt().item()


def assert_close(name: str, ours: Tensor, exact: Tensor, baseline: Tensor, dtype: torch.dtype | None = None, slack: float = 1) -> None:
    """err(ours) <= 2 * err(baseline) + 2 * eps * max|exact|, for the largest and for the RMS error.

    Args:
        ours: the result under test.
        exact: the naive formula in fp64, on the same (rounded) inputs.
        baseline: the naive formula in plain torch at the tested dtype.
        dtype: of the products behind ``ours``, where it is coarser than the dtype of ``ours`` (fp32 gradients of bf16 products).
        slack: a factor on what is allowed, for implementations that are not ours; for ours it needs its reason.
    """
    assert ours.shape == exact.shape, f"{name}: shape {tuple(ours.shape)}, must be {tuple(exact.shape)}"
    assert exact.dtype == torch.float64
    if not exact.numel():
        return
    assert ours.isfinite().all(), f"{name}: not finite"
    eps = torch.finfo(dtype or ours.dtype).eps
    scales = exact.abs().max().item(), exact.square().mean().sqrt().item()
    if scales[0] < 1e-12:
        # A gradient that is zero by definition (one expert, one chosen expert): the rule has no scale there, so unity is the scale.
        assert ours.abs().max() <= eps, f"{name}: {ours.abs().max():.3e}, must be zero"
        return
    for kind, got, allowed, scale in zip(("largest", "RMS"), errors(ours, exact), errors(baseline, exact), scales, strict=True):
        limit = slack * (2 * allowed + 2 * eps * scale)
        assert got <= limit, f"{name}: {kind} error {got:.3e} above {limit:.3e} (baseline {allowed:.3e}, reference {scale:.3e})"


def grads(output: Tensor, inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    """Gradients of <output, grad>; zeros where an input has no influence."""
    got = torch.autograd.grad(output, inputs, grad.to(output.dtype), allow_unused=True)
    return [torch.zeros_like(i) if g is None else g for g, i in zip(got, inputs, strict=True)]
