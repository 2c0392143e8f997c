"""The same layer computed in other ways, for comparison: a loop over experts, an einsum dispatch with capacity, and the dense FFN.

Each takes a layer, its input [T, D], and the weights and indices [T, K] that its router chose. Weights are those of scale="released".
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from unimed.models.medmoe.layers import MoEFFN, dense

CAPACITY = 4.0  # Med-MoE's factor, in training and evaluation


def _expert(layer: MoEFFN, place: int, x: Tensor) -> Tensor:
    w1, b1, w2, b2 = (None if p is None else p[place] for p in (layer.w1, layer.b1, layer.w2, layer.b2))
    return dense(x, w1, b1, w2, b2, layer.activation, layer.gated)


def loop(layer: MoEFFN, x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
    """Choice by choice, expert by expert, each on the rows that chose it."""
    meta = int(layer.settings.meta)
    y = _expert(layer, 0, x) if meta else torch.zeros_like(x)
    for k in range(indices.shape[1]):
        for e in range(layer.settings.num_experts):
            rows = (indices[:, k] == e).nonzero().squeeze(1)
            if len(rows):
                y = y.index_add(0, rows, weights[rows, k, None].to(x.dtype) * _expert(layer, e + meta, x[rows]))
    return y


def einsum(layer: MoEFFN, x: Tensor, weights: Tensor, indices: Tensor, capacity: float = CAPACITY) -> Tensor:
    """As DeepSpeed dispatches: products with [T, E, C] masks, C places an expert. A token without a place is dropped."""
    experts, meta = layer.settings.num_experts, int(layer.settings.meta)
    tokens, k = indices.shape
    places = min(tokens, max(int(capacity * tokens * k / experts + 0.999999), 1))
    combine, used = x.new_zeros(tokens, experts, places), torch.zeros(experts, dtype=torch.long, device=x.device)
    for one in range(k):
        mask = F.one_hot(indices[:, one], experts)
        place = mask.cumsum(0) - 1 + used  # of each token in each expert's queue
        used = used + mask.sum(0)
        kept = mask * (place < places)
        where = F.one_hot((place * kept).sum(1).clamp(max=places - 1), places) * kept.sum(1, keepdim=True)
        combine = combine + weights[:, one, None, None].to(x.dtype) * kept[:, :, None] * where[:, None, :]
    queues = torch.einsum("tec,td->ecd", (combine != 0).to(x.dtype), x)
    outputs = torch.stack([_expert(layer, e + meta, queues[e]) for e in range(experts)])
    y = torch.einsum("tec,ecd->td", combine, outputs)
    return y + _expert(layer, 0, x) if meta else y


def dense_ffn(layer: MoEFFN, x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
    """One FFN for every token: what the layer was before it was upcycled."""
    return _expert(layer, 0, x)


def bytes_kept(call: Callable[[], Tensor], given: Sequence[Tensor]) -> int:
    """Bytes that the forward of ``call`` keeps for the backward: each storage once, without those of ``given``."""
    known = {t.untyped_storage().data_ptr() for t in given}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if (storage := t.untyped_storage()).data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = call()  # lives until here, so no storage is freed and its address given to another
    total = sum(kept.values())
    del y
    return total
