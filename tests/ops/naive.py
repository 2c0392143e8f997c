"""The formulas as the release computes them: concatenate, run every expert in a loop, stack, multiply by the gates, sum.

The oracle of every op. Nothing here is clever, and autograd differentiates it.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

ACT = {
    "gelu": F.gelu,
    "gelu_tanh": lambda u: F.gelu(u, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
    "relu2": lambda u: F.relu(u) ** 2,
    None: lambda u: u,
}


def wide(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()


def soft_gate(logits):
    score = wide(logits).sigmoid()
    return score / score.sum(-1, keepdim=True)


def topk_gate(logits, k, score="softmax", renormalize=True, scale=1.0, selection=None):
    full = wide(logits).softmax(-1) if score == "softmax" else wide(logits).sigmoid()
    rank = (logits if selection is None else selection).tolist()
    chosen = torch.tensor([sorted(range(len(row)), key=lambda e: (-row[e], e))[:k] for row in rank]).reshape(-1, k)
    weights = full.gather(1, chosen)
    return scale * (weights / weights.sum(-1, keepdim=True) if renormalize else weights)


def task_router(x, task, w1, b1, w2=None, b2=None, group_ids=None, inputs="task_token", activation="gelu", recompute=False):
    dtype = (task if x is None else x).dtype
    task, w1, b1, w2, b2 = (None if t is None else t.to(dtype) for t in (task, w1, b1, w2, b2))
    if inputs == "task":
        rows = task
    elif inputs == "token":
        rows = x
    else:
        rows = torch.cat([task.expand(x.shape[0], -1) if group_ids is None else task[group_ids], x], -1)
    u = F.linear(rows, w1, b1)
    return wide(u if w2 is None else F.linear(ACT[activation](u), w2, b2))


def grouped_linear(x, w, b, offsets, gather_idx=None, k=1, scatter_idx=None, activation=None):
    w, b = w.to(x.dtype), None if b is None else b.to(x.dtype)
    y = [None] * (x.shape[0] * k)
    for i in range(x.shape[0] * k):
        token = x[(i if gather_idx is None else int(gather_idx[i])) // k]
        e = next((e for e in range(w.shape[0]) if offsets[e] <= i < offsets[e + 1]), None)
        row = x.new_zeros(w.shape[1]) if e is None else ACT[activation](F.linear(token, w[e], None if b is None else b[e]))
        y[i if scatter_idx is None else int(scatter_idx[i])] = row
    return torch.stack(y)


def expert_outputs(x, w1, b1, w2, b2, activation, gated=False):
    """[E, T, O]"""
    outputs = []
    for e in range(w1.shape[0]):
        y = F.linear(x, w1[e].to(x.dtype), None if b1 is None else b1[e].to(x.dtype))
        if w2 is not None:
            if gated:
                gate, up = y.chunk(2, -1)
                y = ACT[activation](gate) * up
            else:
                y = ACT[activation](y)
            y = F.linear(y, w2[e].to(x.dtype), None if b2 is None else b2[e].to(x.dtype))
        outputs.append(y)
    return torch.stack(outputs)


def soft_experts(x, gates, w1, b1, w2=None, b2=None, activation="gelu", group_ids=None, recompute=False):
    gates = gates.expand(x.shape[0], -1) if group_ids is None else gates[group_ids]
    stack = expert_outputs(x, w1, b1, w2, b2, activation)
    return (gates.T[:, :, None] * stack).sum(0).to(x.dtype)


def chosen(indices, experts):
    """One-hot rows [..., E]; -1 and E choose nothing."""
    return F.one_hot(indices.where(indices >= 0, experts), experts + 1)[..., :experts]


def sparse_experts(x, weights, indices, w1, b1, w2=None, b2=None, activation="gelu", gated=False, group_ids=None, recompute=False):
    experts = w1.shape[0]
    if weights is None:
        weights = wide(x.new_ones(())).expand(indices.shape)
    if group_ids is not None:
        indices, weights = indices[group_ids], weights[group_ids]
    indices, weights = indices.expand(x.shape[0], -1), weights.expand(x.shape[0], -1)
    gates = (chosen(indices, experts) * weights[:, :, None]).sum(1)
    stack = expert_outputs(x, w1, b1, w2, b2, activation, gated)
    return (gates.T[:, :, None] * stack).sum(0).to(x.dtype)


def balance_loss(scores, indices=None, mask=None, kind="switch", segments=None, counts=None, total=None, from_logits=False):
    scores, experts = wide(scores), scores.shape[1]
    if from_logits:
        scores = scores.softmax(-1)
    labels = torch.zeros(scores.shape[0], dtype=torch.int64) if segments is None else segments
    losses = []
    for label in labels.unique().tolist():
        rows = labels == label if mask is None else (labels == label) & mask
        if not rows.any():
            continue
        s = scores[rows]
        if kind == "switch":
            if counts is None:
                f = chosen(indices[rows], experts).to(s.dtype).mean((0, 1))
            else:
                f = counts.to(s.dtype) / (counts.sum() if total is None else total)
            losses.append(experts * (f * s.mean(0)).sum())
        elif kind == "importance":
            losses.append(experts * (s.sum(0) / s.sum()).square().sum() - 1)
        else:
            losses.append(s.logsumexp(-1).square().mean())
    return torch.stack(losses).mean() if losses else 0 * scores.sum()
