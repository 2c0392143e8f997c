"""What a small model from scratch starts with: coordinates that are alike where their numbers are."""

from __future__ import annotations

from typing import Any

import torch

from unimed.models.unimed.tokenization import COORDINATES, token_id


@torch.no_grad()
def smooth_coordinates(model: Any, tokenizer: Any, seed: int) -> None:
    """Neighbouring coordinates start alike (random waves of the number): what is learned for <41> helps <42>, and samples are few."""
    ids = [token_id(tokenizer, number) for number in COORDINATES]
    weight = model.get_input_embeddings().weight
    number = torch.linspace(0, 1, len(ids))
    frequency = torch.arange(8) * torch.pi
    waves = torch.cat([torch.cos(number[:, None] * frequency), torch.sin(number[:, None] * frequency[1:])], dim=1)
    rows = waves @ torch.randn(waves.shape[1], weight.shape[1], generator=torch.Generator().manual_seed(seed))
    weight[ids] = (rows / rows.std() * getattr(model.config.text_config, "initializer_range", 0.02)).to(weight)
