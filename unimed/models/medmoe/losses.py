"""CuMo (arXiv 2405.05949): experts in the connector and in CLIP, and their balance and z losses.

loss = ce + balance * L_b + z * L_z, the last two for the connector and for CLIP, there as means over the layers
L_b: E * sum_e p_e f_e of each image, then the mean over images; p the mean probability, f the share of first choices (1 when even)
L_z: the mean over tokens of logsumexp(logits)^2
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cmoe_kernels import balance_loss
from cmoe_kernels.integrations.transformers import adapters, replace_projector
from unimed.errors import UserError
from unimed.models.medmoe.layers import Routing, read_ffn
from unimed.models.medmoe.upcycling import find_ffns, moe_layers, upcycle

BALANCE, Z = 0.1, 0.01  # CuMo's coefficients


@contextmanager
def record_routing(model: nn.Module) -> Iterator[list[Routing]]:
    """A list that fills with the routing of each call of each upcycled layer, in their order.

    Activation checkpoints record the first run only; give them ``use_reentrant=False``, or the logits have no gradient. One recording of
    a model at a time.
    """
    layers = moe_layers(model).values()
    if not layers:
        raise UserError(f"{type(model).__name__} has no upcycled layers to record")
    records: list[Routing] = []
    for layer in layers:
        layer.records = records
    try:
        yield records
    finally:
        for layer in layers:
            layer.records = None


class RoutingLosses(NamedTuple):
    """The unweighted means over calls, fp32 scalars."""

    balance: Tensor
    z: Tensor

    def weighted(self, balance: float = BALANCE, z: float = Z) -> Tensor:
        """Their sum with coefficients, by default CuMo's."""
        return balance * self.balance + z * self.z


def routing_losses(records: Sequence[Routing], mask: Tensor | None = None) -> RoutingLosses:
    """CuMo's losses of what :func:`record_routing` recorded.

    Args:
        records: logits [B, N, E] and indices [B, N, K] of each call; a sample (an image) is one of B.
        mask: [B, N] bool, True for the tokens that count.
    """
    if not records:
        raise UserError("records is empty: run the model inside record_routing")
    balance, z = [], []
    for logits, indices in records:
        if logits.dim() != 3:
            raise UserError(f"logits have the shape {tuple(logits.shape)}, must be [samples, tokens, experts]")
        samples, tokens, experts = logits.shape
        segments = torch.arange(samples, device=logits.device).repeat_interleave(tokens)
        flat, keep = logits.reshape(-1, experts), None if mask is None else mask.reshape(-1)
        balance.append(balance_loss(flat, indices[..., 0].reshape(-1, 1), keep, segments=segments, from_logits=True))
        z.append(balance_loss(flat, mask=keep, kind="z"))
    return RoutingLosses(torch.stack(balance).mean(), torch.stack(z).mean())


def co_upcycle(
    model: PreTrainedModel,
    num_experts: int = 4,
    top_k: int = 2,
    *,
    vision: str = "model.vision_tower",
    balance: float = BALANCE,
    z: float = Z,
) -> PreTrainedModel:
    """Turn a multimodal model's projector and every FFN of its vision tower into mixtures of experts, in place.

    Experts are copies of what was trained, and weights sum to one, so the model's outputs are unchanged at first. Routers are one linear
    layer without bias. The connector's losses are part of the model's ``loss``; the tower's are added with :func:`record_routing`.

    Args:
        model: a multimodal model that ``replace_projector`` knows (LLaVA and others); its vision tower is one that :func:`upcycle` knows.
        num_experts: E of both.
        top_k: experts per token, chosen by the softmax over all experts; their weights are divided by their sum.
        vision: path of the vision tower.
        balance: coefficient of the connector's balance loss.
        z: coefficient of its z loss.

    Returns:
        The same object, with the class that replace_projector generates.
    """
    if top_k < 2:
        raise UserError(f"top_k is {top_k}, must be at least 2 (one weight divided by itself is 1, and teaches the router nothing)")
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in adapters():
        raise UserError(f"model is a {type(model).__name__}, must be a multimodal model of type {', '.join(adapters())}")
    for path, ffn in find_ffns(model, vision)[1].items():
        read_ffn(ffn, path)  # before anything changes
    try:
        replace_projector(
            model,
            num_experts=num_experts,
            router="sparse",
            router_inputs="token",
            router_layers=1,
            router_bias=False,
            top_k=top_k,
            tasks=(),
            aux_losses={"sample_switch": balance, "z": z},
        )
    except (TypeError, ValueError) as error:
        raise UserError(str(error)) from error
    return upcycle(model, "all", num_experts, top_k, meta=False, router_bias=False, part=vision)
