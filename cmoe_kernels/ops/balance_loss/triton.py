"""balance_loss in Triton: sums over tokens in a fixed order, in two stages, and no word from the host.

Without segments. Stage 1: at most PROGRAMS programs each walk their share of the tokens with a tile [BLOCK_T, BLOCK_E] and keep, in
registers, the mass of each expert, the assignments of each expert (integers), the tokens that count and the sum of squared logsumexps;
each writes one row of partials. Stage 2: one program adds the rows and turns them into the loss, and into what the gradient needs: one
slope per expert, because d loss / d scores[t, e] is the same for every token that counts (for "z" a factor on logsumexp times softmax).
Backward repeats both stages, then writes the gradient in one pass. The number of programs follows from the shape, not from the device,
so the bits are the same on every model of GPU.

With segments, which are labels and not ranges, how many there are is known to the device alone. The labels are sorted there (stable);
program i serves the segment whose first sorted row is i and leaves at once where row i is not the first of its label. It walks on until
the label changes, so a segment is summed by one program in token order: right for CuMo's images of a few hundred tokens, slow for one
segment of a million. Per-segment losses lie at the position of the first row; a last program adds them and counts the segments that
hold a token. Memory: [T] for order, labels, losses; never [segments, E] or a one-hot of the assignments.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 2048
PROGRAMS = 256


@triton.jit
def _scores(scores, row, e, live, E, stride_t, stride_e):
    """Of the rows given, 0 where not live."""
    at = scores + row[:, None] * stride_t + e.to(tl.int64)[None, :] * stride_e
    return tl.load(at, live[:, None] & (e < E)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _tile(scores, indices, mask, row, live, e, E, K, stride_t, stride_e, stride_it, stride_ik, KIND: tl.constexpr, COUNT: tl.constexpr):
    """Of the rows given: scores (0 where not live), live as 0 or 1, the assignments of each expert, sum of squared logsumexps."""
    if mask is not None:
        live = live & (tl.load(mask + row, live, other=0) != 0)
    s = _scores(scores, row, e, live, E, stride_t, stride_e)
    count = tl.zeros_like(e)
    squares = 0.0
    if COUNT:
        for k in range(K):
            expert = tl.load(indices + row * stride_it + tl.cast(k, tl.int64) * stride_ik, live, other=-1)
            count += tl.sum((expert[:, None] == e[None, :]).to(tl.int32), 0)
    if KIND == "z":
        z, _ = _logsumexp(s, e, E)
        squares = tl.sum(tl.where(live, z * z, 0.0), 0)
    return s, live, count, squares


@triton.jit
def _logsumexp(s, e, E):
    """Of each row, and its softmax."""
    s = tl.where((e < E)[None, :], s, -float("inf"))
    top = tl.max(s, 1)
    base = tl.where(top == -float("inf"), 0.0, top)
    powers = tl.exp(s - base[:, None])
    total = tl.sum(powers, 1)
    return base + tl.log(total), tl.math.div_rn(powers, total[:, None])


@triton.jit
def _statistic(mass, selected, whole, tokens, squares, e, E, KIND: tl.constexpr):
    """Loss of one segment and the slope of each expert, from its sums; ``whole`` is what the assignments are a share of."""
    held = tl.maximum(tokens, 1.0)
    if KIND == "switch":
        share = selected / whole
        loss = E * tl.sum(share * mass, 0) / held
        slope = E * share / held
    elif KIND == "importance":
        total = tl.sum(mass, 0)
        divisor = tl.where(total == 0.0, 1.0, total)
        # E * sum p^2 - 1 in terms of d = p - 1/E: no difference of nearly equal numbers, and exactly zero at balance.
        deviation = tl.where(total == 0.0, 0.0, tl.where(e < E, (mass - total / E) / divisor, 0.0))
        square = tl.sum(deviation * deviation, 0)
        loss = E * square
        slope = 2.0 * E / divisor * (deviation - square)
    else:
        loss = squares / held
        slope = mass * 0.0 + 2.0 / held
    return loss, slope


@triton.jit
def balance_loss_sums_kernel(
    scores, indices, mask, masses, counts, tokens, squares, T, E, K, stride_t, stride_e, stride_it, stride_ik,
    KIND: tl.constexpr, COUNT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    e = tl.arange(0, BLOCK_E)
    mass = tl.zeros((BLOCK_E,), tl.float32)
    count = tl.zeros((BLOCK_E,), tl.int32)
    held = tl.zeros((BLOCK_T,), tl.int32)
    square = tl.zeros((1,), tl.float32)
    for block in range(program, tl.cdiv(T, BLOCK_T), tl.num_programs(0)):
        row = (block * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
        s, live, c, z = _tile(scores, indices, mask, row, row < T, e, E, K, stride_t, stride_e, stride_it, stride_ik, KIND, COUNT)
        mass += tl.sum(s, 0)
        count += c
        held += live.to(tl.int32)
        square += z
    tl.store(masses + program * E + e, mass, e < E)
    if COUNT:
        tl.store(counts + program * E + e, count, e < E)
    tl.store(tokens + program, tl.sum(held, 0))
    tl.store(squares + program + tl.arange(0, 1), square)


@triton.jit
def balance_loss_fwd_kernel(
    masses, counts, tokens, squares, given, total, loss, slopes, partials, E, K,
    KIND: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    e = tl.arange(0, BLOCK_E)
    p = tl.arange(0, BLOCK_P)
    mass = tl.zeros((BLOCK_E,), tl.float32)
    count = tl.zeros((BLOCK_E,), tl.int32)
    held = tl.zeros((BLOCK_P,), tl.int32)
    square = tl.zeros((BLOCK_P,), tl.float32)
    for start in range(0, partials, BLOCK_P):
        at = (start + p)[:, None] * E + e[None, :]
        inside = (start + p < partials)[:, None] & (e < E)[None, :]
        mass += tl.sum(tl.load(masses + at, inside, other=0.0), 0)
        if counts is not None:
            count += tl.sum(tl.load(counts + at, inside, other=0), 0)
        held += tl.load(tokens + start + p, start + p < partials, other=0)
        square += tl.load(squares + start + p, start + p < partials, other=0.0)
    n = tl.sum(held, 0).to(tl.float32)
    selected = count.to(tl.float32)
    whole = tl.maximum(n, 1.0) * K
    if given is not None:
        selected = tl.load(given + e, e < E, other=0).to(tl.float32)
        whole = tl.sum(selected, 0)
        if total is not None:
            whole = tl.load(total).to(tl.float32)
        whole = tl.maximum(whole, 1.0)
    value, slope = _statistic(mass, selected, whole, n, tl.sum(square, 0), e, E, KIND)
    if slopes is not None:
        tl.store(slopes + e, tl.where(n > 0.0, slope, 0.0), e < E)
    else:
        tl.store(loss, tl.where(n > 0.0, value, 0.0))


@triton.jit
def balance_loss_bwd_kernel(
    dloss, scores, mask, slopes, dscores, T, E, stride_t, stride_e, KIND: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.arange(0, BLOCK_E)
    slope = tl.load(slopes + e, e < E, other=0.0) * tl.load(dloss).to(tl.float32)
    _spread(scores, mask, dscores, slope, row, row < T, e, E, stride_t, stride_e, KIND, BLOCK_T)


@triton.jit
def _spread(scores, mask, dscores, slope, row, inside, e, E, stride_t, stride_e, KIND: tl.constexpr, BLOCK_T: tl.constexpr):
    """Write the gradient of the rows given: the slope of each expert, zero for a masked token."""
    live = inside
    if mask is not None:
        live = live & (tl.load(mask + row, inside, other=0) != 0)
    ds = tl.where(live[:, None], slope[None, :], 0.0)
    if KIND == "z":
        s = _scores(scores, row, e, live, E, stride_t, stride_e)
        z, softmax = _logsumexp(s, e, E)
        ds = ds * z[:, None] * softmax
    tl.store(dscores + row[:, None] * E + e[None, :], ds.to(dscores.dtype.element_ty), inside[:, None] & (e < E)[None, :])


@triton.jit
def balance_loss_segments_kernel(
    scores, indices, mask, order, labels, losses, filled, dloss, weight, dscores, T, E, K, stride_t, stride_e, stride_it, stride_ik,
    KIND: tl.constexpr, COUNT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + first)
    heads = first == 0
    if first > 0:
        heads = tl.load(labels + first - 1) != label
    e = tl.arange(0, BLOCK_E)
    loss = 0.0
    n = 0.0
    if heads:
        mass = tl.zeros((BLOCK_E,), tl.float32)
        count = tl.zeros((BLOCK_E,), tl.int32)
        held = tl.zeros((BLOCK_T,), tl.int32)
        square = tl.zeros((1,), tl.float32)
        at = first + tl.arange(0, BLOCK_T)
        mine = (at < T) & (tl.load(labels + at, at < T, other=0) == label)
        rows = tl.sum(mine.to(tl.int32), 0)
        while rows > 0:
            row = tl.load(order + at, mine, other=0)
            s, live, c, z = _tile(scores, indices, mask, row, mine, e, E, K, stride_t, stride_e, stride_it, stride_ik, KIND, COUNT)
            mass += tl.sum(s, 0)
            count += c
            held += live.to(tl.int32)
            square += z
            at += BLOCK_T
            mine = (at < T) & (tl.load(labels + at, at < T, other=0) == label)
            rows = tl.sum(mine.to(tl.int32), 0)
        n = tl.sum(held, 0).to(tl.float32)
        loss, slope = _statistic(mass, count.to(tl.float32), tl.maximum(n, 1.0) * K, n, tl.sum(square, 0), e, E, KIND)
        if dscores is not None:
            slope = tl.where(n > 0.0, slope, 0.0) * tl.load(weight) * tl.load(dloss).to(tl.float32)
            at = first + tl.arange(0, BLOCK_T)
            mine = (at < T) & (tl.load(labels + at, at < T, other=0) == label)
            rows = tl.sum(mine.to(tl.int32), 0)
            while rows > 0:
                row = tl.load(order + at, mine, other=0)
                _spread(scores, mask, dscores, slope, row, mine, e, E, stride_t, stride_e, KIND, BLOCK_T)
                at += BLOCK_T
                mine = (at < T) & (tl.load(labels + at, at < T, other=0) == label)
                rows = tl.sum(mine.to(tl.int32), 0)
    if losses is not None:
        tl.store(losses + first, tl.where(n > 0.0, loss, 0.0))
        tl.store(filled + first, tl.where(n > 0.0, 1, 0))


@triton.jit
def balance_loss_mean_kernel(losses, filled, loss, weight, T, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.float32)
    count = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, T, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(losses + at, at < T, other=0.0)
        count += tl.load(filled + at, at < T, other=0)
    w = 1.0 / tl.maximum(tl.sum(count, 0), 1).to(tl.float32)
    tl.store(weight, w)
    tl.store(loss, tl.sum(total, 0) * w)


def balance_loss(
    scores: Tensor,
    indices: Tensor | None,
    mask: Tensor | None,
    kind: str,
    segments: Tensor | None,
    counts: Tensor | None,
    total: Tensor | None,
) -> Tensor:
    if not scores.shape[0]:
        return scores.new_zeros((), dtype=torch.float32)
    if segments is not None:
        return _by_segment(scores, indices, mask, kind, segments)
    return _statistics(scores, indices, mask, kind, counts, total, slopes=None)


def balance_loss_backward(
    dloss: Tensor,
    scores: Tensor,
    indices: Tensor | None,
    mask: Tensor | None,
    kind: str,
    segments: Tensor | None,
    counts: Tensor | None,
    total: Tensor | None,
) -> Tensor:
    tokens, experts = scores.shape
    dscores = scores.new_empty(scores.shape)
    if not tokens:
        return dscores
    if segments is not None:
        _by_segment(scores, indices, mask, kind, segments, dloss, dscores)
        return dscores
    slopes = scores.new_empty(experts, dtype=torch.float32)
    _statistics(scores, indices, mask, kind, counts, total, slopes)
    block_t, settings = _tiles(experts)
    balance_loss_bwd_kernel[(triton.cdiv(tokens, block_t),)](
        dloss, scores, _contiguous(mask), slopes, dscores, tokens, experts, *scores.stride(), kind, **settings
    )
    return dscores


def _statistics(
    scores: Tensor,
    indices: Tensor | None,
    mask: Tensor | None,
    kind: str,
    counts: Tensor | None,
    total: Tensor | None,
    slopes: Tensor | None,
) -> Tensor:
    """The loss; or, into ``slopes``, what the gradient needs."""
    tokens, experts = scores.shape
    block_t, settings = _tiles(experts)
    partials = min(PROGRAMS, triton.cdiv(tokens, block_t))
    masses = scores.new_empty(partials, experts, dtype=torch.float32)
    selected = None if indices is None else scores.new_empty(partials, experts, dtype=torch.int32)
    held = scores.new_empty(partials, dtype=torch.int32)
    squares = scores.new_empty(partials, dtype=torch.float32)
    k, *strides = _assignments(indices)
    balance_loss_sums_kernel[(partials,)](
        scores, indices, _contiguous(mask), masses, selected, held, squares, tokens, experts, k, *scores.stride(), *strides,
        kind, indices is not None, **settings,
    )  # fmt: skip
    loss = scores.new_empty((), dtype=torch.float32)
    balance_loss_fwd_kernel[(1,)](
        masses, selected, held, squares, _contiguous(counts), total, loss, slopes, partials, experts, k,
        kind, max(1, 1024 // settings["BLOCK_E"]), settings["BLOCK_E"], num_warps=4,
    )  # fmt: skip
    return loss


def _by_segment(
    scores: Tensor,
    indices: Tensor | None,
    mask: Tensor | None,
    kind: str,
    segments: Tensor,
    dloss: Tensor | None = None,
    dscores: Tensor | None = None,
) -> Tensor:
    tokens, experts = scores.shape
    _, settings = _tiles(experts)
    labels, order = segments.sort(stable=True)
    losses = scores.new_empty(tokens, dtype=torch.float32)
    filled = scores.new_empty(tokens, dtype=torch.int32)
    loss, weight = (scores.new_empty((), dtype=torch.float32) for _ in range(2))
    k, *strides = _assignments(indices)
    inputs = (scores, indices, _contiguous(mask), order, labels)
    shape = (tokens, experts, k, *scores.stride(), *strides, kind, indices is not None)
    balance_loss_segments_kernel[(tokens,)](*inputs, losses, filled, None, None, None, *shape, **settings)
    balance_loss_mean_kernel[(1,)](losses, filled, loss, weight, tokens, 1024, num_warps=4)
    if dscores is not None:
        balance_loss_segments_kernel[(tokens,)](*inputs, None, None, dloss, weight, dscores, *shape, **settings)
    return loss


def _assignments(indices: Tensor | None) -> tuple[int, ...]:
    return (1, 0, 0) if indices is None else (indices.shape[1], *indices.stride())


def _contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def _tiles(experts: int) -> tuple[int, dict[str, int]]:
    block_e = triton.next_power_of_2(experts)
    block_t = min(128, max(1, TILE // block_e))
    return block_t, {"BLOCK_T": block_t, "BLOCK_E": block_e, "num_warps": 4 if block_e <= TILE else 8}
