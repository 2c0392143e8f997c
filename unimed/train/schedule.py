"""Learning rate by optimiser step: linear warm-up, then a cosine.

`released` evaluates the cosine at the absolute step over the whole length, so the rate drops at the end of the
warm-up (9.998e-6 at step 4,999, 9.758e-6 at 5,000 with the released numbers). `continuous` starts the cosine where
the warm-up ends. Both reach `min_lr` at the last step.
"""

from __future__ import annotations

import math

from unimed.train.recipe import Optim


def rate(step: int, total: int, optim: Optim) -> float:
    """Learning rate of `step` (0 is the first) in a run of `total` steps."""
    warmup = optim.warmup_steps
    if step < warmup:
        return optim.warmup_lr + (optim.lr - optim.warmup_lr) * step / warmup
    # The released cosine reaches 1 at `total`, one step after the last; ours reaches it on the last step.
    share = step / total if optim.schedule == "released" else (step - warmup) / max(total - 1 - warmup, 1)
    return optim.min_lr + (optim.lr - optim.min_lr) * 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))
