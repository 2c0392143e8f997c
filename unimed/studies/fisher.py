"""The empirical Fisher information of training: its spectrum at chosen modules, over the steps of a run.

For the gradients g_1 .. g_n [p] of n samples' losses, F = 1/n sum_i g_i g_i^T [p, p]. Its nonzero eigenvalues are those of the Gram matrix
G G^T / n [n, n] (G holds a gradient a row), which is small. Two numbers describe them (our definitions; the paper gives none):

    entropy         -sum_i q_i log q_i / log min(n, p), with q_i = l_i / sum l: 0 where one direction holds all, 1 where all are alike
    dominant_ratio  l_1 / sum l: the share of the largest

Example::

    probe = FisherProbe(samples, collate, modules=("connector",), every=200, out="fisher.jsonl")
    trainer.add_callback(probe)

Source: the question is IMAX's (lower entropy and a higher ratio with image-centric data); measure and validation are ours.
"""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from unimed.errors import UserError
from unimed.train.probe import undisturbed

EXACT = 2048  # the largest Gram matrix whose eigenvalues are computed one and all
STEPS, PROBES = 96, 16  # of Lanczos: its steps, and the random vectors whose mean estimates the entropy


class Spectrum(NamedTuple):
    eigenvalues: Tensor  # largest first, fp64; of more than EXACT only the largest that converged
    entropy: float
    dominant_ratio: float


def spectrum(grads: Tensor, exact: int = EXACT, seed: int = 0) -> Spectrum:
    """Eigenvalues, entropy and dominant ratio of the empirical Fisher information of gradients [n, p].

    Up to ``exact`` samples or parameters, whichever are fewer, from the Gram matrix in fp64. Beyond, by Lanczos: the largest eigenvalues
    with a residual below 1e-6 of the first; the entropy by stochastic Lanczos quadrature,
    within 0.01 on the matrices of the tests. Gradients
    that are all zero have entropy 0 and ratio 0. Raises ValueError for another shape, no sample, or a value that is not finite.
    """
    if grads.ndim != 2 or 0 in grads.shape:
        raise ValueError(f"grads has shape {list(grads.shape)}: expected [n, p], a gradient a row")
    if not bool(torch.isfinite(grads).all()):
        raise ValueError("grads holds a value that is not finite")
    n, p = grads.shape
    if min(n, p) <= exact:
        rows = grads.double()
        return of_gram(rows @ rows.T / n if n <= p else rows.T @ rows / n, min(n, p))
    return _by_lanczos(grads, seed)


def of_gram(gram: Tensor, rank: int) -> Spectrum:
    """The spectrum of a symmetric, positive semidefinite matrix of at most this rank."""
    values = torch.linalg.eigvalsh(gram.double()).flip(0).clamp(min=0)[:rank]
    total = float(values.sum())
    if total == 0:
        return Spectrum(values, 0.0, 0.0)
    shares = values / total
    entropy = float(-torch.special.xlogy(shares, shares).sum()) / math.log(rank) if rank > 1 else 0.0
    return Spectrum(values, max(entropy, 0.0), float(shares[0]))


def _by_lanczos(grads: Tensor, seed: int) -> Spectrum:
    n, p = grads.shape
    side, trace = min(n, p), float(grads.double().square().sum()) / n
    if trace == 0:
        return Spectrum(torch.zeros(1, dtype=torch.float64), 0.0, 0.0)

    def times(vector: Tensor) -> Tensor:
        inner, outer = (grads.T, grads) if n <= p else (grads, grads.T)
        return (outer @ (inner @ vector.to(grads.dtype))).double() / n

    generator = torch.Generator().manual_seed(seed)
    best, residuals, entropies, sizes = None, None, 0.0, 0.0
    for _ in range(PROBES):
        start = torch.randn(side, generator=generator, dtype=torch.float64).to(grads.device)
        values, vectors, last = _lanczos(times, start)
        # Gauss quadrature of sum f(l) with f(l) = -(l / trace) log(l / trace): the squares of the first row are its weights.
        shares = values.clamp(min=0) / trace
        weights = vectors[0].square()
        entropies -= float((weights * torch.special.xlogy(shares, shares)).sum())
        sizes += float((weights * shares).sum())  # of 1 / side: the ratio of both sums has less noise than the former by itself
        if best is None or values[-1] > best[-1]:
            best, residuals = values, (last * vectors[-1]).abs()
    assert best is not None
    assert residuals is not None
    kept = best[residuals < 1e-6 * best[-1]].flip(0)
    return Spectrum(kept, min(max(entropies / sizes / math.log(side), 0.0), 1.0), float(best[-1]) / trace)


def _lanczos(times: Callable[[Tensor], Tensor], start: Tensor) -> tuple[Tensor, Tensor, float]:
    """Ritz values (rising), eigenvectors of the tridiagonal matrix, and the last coupling; every new vector is orthogonalised twice."""
    basis, diagonal, beside = [start / start.norm()], [], []
    for _ in range(min(STEPS, len(start))):
        vector = times(basis[-1])
        diagonal.append(float(vector @ basis[-1]))
        known = torch.stack(basis)
        for _ in range(2):
            vector = vector - known.T @ (known @ vector)
        beside.append(float(vector.norm()))
        if beside[-1] <= 1e-12 * max(map(abs, diagonal)):
            break
        basis.append(vector / beside[-1])
    couplings = torch.tensor(beside[:-1], dtype=torch.float64)
    small = torch.diag(torch.tensor(diagonal, dtype=torch.float64)) + torch.diag(couplings, 1) + torch.diag(couplings, -1)
    values, vectors = torch.linalg.eigh(small)
    return values, vectors, beside[-1]


def gram_of_samples(
    loss: Callable[[int], Tensor], count: int, parameters: Sequence[nn.Parameter], memory: int = 2**30
) -> tuple[Tensor, int]:
    """The Gram matrix G G^T [count, count] of the gradients of ``loss(i)``, and the number of backward passes that it took.

    At most ``memory`` bytes of gradients are kept at one time: where all of them need more, it is summed over slices of the parameters, and
    every slice takes all the backward passes again. Beside them stands one sample's gradient.
    """
    size = sum(p.numel() for p in parameters)
    wide = max(memory // (4 * count), 1)
    gram, passes = torch.zeros(count, count, dtype=torch.float64), 0
    for start in range(0, size, wide):
        kept = torch.empty(count, min(wide, size - start))
        for i in range(count):
            found = torch.autograd.grad(loss(i), list(parameters), allow_unused=True)
            passes += 1
            _copy(found, parameters, start, kept[i])
        for part in kept.split(2**16, dim=1):  # fp64 in parts, so that no whole copy is made
            gram += part.double() @ part.double().T
    return gram, passes


def _copy(grads: Sequence[Tensor | None], parameters: Sequence[Tensor], start: int, out: Tensor) -> None:
    """The elements from ``start`` on of all gradients in a row, as many as ``out`` has."""
    end, at = start + out.numel(), 0
    for grad, parameter in zip(grads, parameters, strict=True):
        low, high = max(start, at), min(end, at + parameter.numel())
        if low < high:
            part = out[low - start : high - start]
            part.zero_() if grad is None else part.copy_(grad.reshape(-1)[low - at : high - at])
        at += parameter.numel()


class FisherProbe(TrainerCallback):
    """Writes the spectrum at chosen modules over the steps of a run, one JSON line a step.

    samples: the fixed samples, at most ``count`` of them are used. collate: a list with one sample to the model's inputs, labels among
    them. modules: parts of the names of the parameters; only those that are trained count. every: steps between two points, 0 for eight
    points a run. memory: bytes of gradients that are kept at one time. seconds: what the probe took so far; the report of a run shows it
    beside the training time.

    Raises UserError where a name in ``modules`` fits no trained parameter.
    """

    def __init__(
        self,
        samples: Sequence[Any],
        collate: Callable[[list[Any]], Mapping[str, Any]],
        modules: Sequence[str] = ("connector",),
        every: int = 0,
        count: int = 32,
        memory: int = 2**30,
        out: str | Path | None = None,
    ) -> None:
        if not samples:
            raise UserError("the Fisher probe has no samples")
        self.samples, self.collate, self.modules = list(samples[:count]), collate, tuple(modules)
        self.every, self.memory, self.out = every, memory, None if out is None else Path(out)
        self.points: list[dict[str, Any]] = []
        self.seconds = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **_: Any) -> None:
        every = self.every or max(state.max_steps // 8, 1)
        if model is not None and state.is_world_process_zero and state.global_step % every == 0:
            self.measure(model, state.global_step)

    def measure(self, model: nn.Module, step: int = 0) -> list[dict[str, Any]]:
        """The points of this step, one a module name; also written and kept in ``points``."""
        start = time.perf_counter()
        model = getattr(model, "module", model)  # DistributedDataParallel's: gradients are not reduced over processes here
        device = next(model.parameters()).device

        def loss(i: int) -> Tensor:
            inputs = {
                name: value.to(device) if isinstance(value, Tensor) else value for name, value in self.collate([self.samples[i]]).items()
            }
            return model(**inputs).loss

        found = []
        with undisturbed(model), torch.enable_grad():
            for name in self.modules:
                chosen = [p for path, p in model.named_parameters() if name in path and p.requires_grad]
                if not chosen:
                    raise UserError(f"the Fisher probe finds no trained parameter with {name!r} in its name")
                gram, passes = gram_of_samples(loss, len(self.samples), chosen, self.memory)
                size = sum(p.numel() for p in chosen)
                spectral = of_gram(gram / len(self.samples), min(len(self.samples), size))
                found.append(
                    {
                        "step": step, "module": name, "samples": len(self.samples), "parameters": size, "passes": passes,
                        "entropy": spectral.entropy, "dominant_ratio": spectral.dominant_ratio, "trace": float(spectral.eigenvalues.sum()),
                        "eigenvalues": spectral.eigenvalues.tolist(),
                    }
                )  # fmt: skip
        self.seconds += time.perf_counter() - start
        self.points += found
        if self.out:
            with self.out.open("a") as file:
                file.writelines(json.dumps(point) + "\n" for point in found)
        return found
