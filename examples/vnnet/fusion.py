"""Where pictures meet numbers: the projection of picture tokens (plain, or a CMoE connector with factors as tasks), LGVNFM and DQAM.

P is the tokens of a picture, V their width, S the width of a station's state, F factors, E experts.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cmoe_kernels import CMoEConfig, CMoEConnector


class PlainProjection(nn.Module):
    """One projection for all factors."""

    def __init__(self, features: int, out: int, hidden: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(features, hidden), nn.GELU(), nn.Linear(hidden, out))

    def forward(self, tokens: Tensor, factors: int) -> tuple[Tensor, Tensor | None, Tensor]:
        y = self.layers(tokens)
        return y[:, None].expand(-1, factors, -1, -1), None, tokens.new_zeros(())


class ExpertProjection(nn.Module):
    """A CMoE connector between vision and numbers: the factor is the task, so that each factor mixes the experts in its own way."""

    def __init__(self, features: int, out: int, hidden: int, factors: tuple[str, ...], experts: int, balance: float) -> None:
        super().__init__()
        self.connector = CMoEConnector(
            CMoEConfig(
                in_features=features,
                out_features=out,
                hidden_features=hidden,
                num_experts=experts,
                router_features=2 * features,
                tasks=factors,
                resample="none",
                aux_losses={"importance": balance},
            )
        )

    def forward(self, tokens: Tensor, factors: int) -> tuple[Tensor, Tensor | None, Tensor]:
        batch, places, width = tokens.shape
        repeated = tokens[:, None].expand(batch, factors, places, width).reshape(batch * factors, places, width)
        out = self.connector(repeated, task=torch.arange(factors, device=tokens.device).repeat(batch))
        shape = (batch, factors)
        return out.embeddings.unflatten(0, shape), out.gates.unflatten(0, shape), out.aux_loss


def token_grid(height: int, width: int, device: torch.device) -> Tensor:
    """(P, 2): centres of the tokens, x to the east and y to the south, in -1..1."""
    y, x = ((torch.arange(n, device=device) + 0.5) / n * 2 - 1 for n in (height, width))
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).reshape(-1, 2)


class LGVNFM(nn.Module):
    """The repository's fusion: in each layer the token nearest to a station joins its state; then states attend to all tokens."""

    def __init__(self, state: int, layers: int, heads: int) -> None:
        super().__init__()
        self.local = nn.ModuleList([nn.Linear(2 * state, state) for _ in range(layers)])
        self.query, self.key, self.value, self.out = (nn.Linear(state, state) for _ in range(4))
        self.heads = heads

    def forward(self, states: Tensor, values: Tensor, grid: tuple[int, int], positions: Tensor) -> tuple[Tensor, None, Tensor]:
        """States (L, B, N, S) and values (B, F, P, S) -> states (L, B F, N, S), no context, attention (B F, heads, L N, P)."""
        layers, batch, stations, width = states.shape
        factors = values.shape[1]
        values = values.flatten(0, 1)
        states = states[:, :, None].expand(-1, -1, factors, -1, -1).reshape(layers, batch * factors, stations, width)
        height, across = grid
        column = ((positions[:, 0] + 1) / 2 * across).long().clamp(0, across - 1)
        row = ((positions[:, 1] + 1) / 2 * height).long().clamp(0, height - 1)
        nearest = values[:, row * across + column]
        states = torch.stack([s + F.relu(layer(torch.cat([nearest, s], dim=-1))) for layer, s in zip(self.local, states, strict=True)])
        queries = states.transpose(0, 1).flatten(1, 2)  # (B F, L N, S)
        q, k, v = (_heads(m(t), self.heads) for m, t in ((self.query, queries), (self.key, values), (self.value, values)))
        attention = torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, dim=-1)
        seen = self.out((attention @ v).transpose(1, 2).flatten(2))
        states = states + seen.unflatten(1, (layers, stations)).transpose(0, 1)
        return states, None, attention


class DQAM(nn.Module):
    """The paper's double query attention, as we make it. Both queries read the same tokens:

    1. the stations' states, whose answer is added to the state;
    2. learned cross-modal queries, one per hour of the forecast, whose answers the decoder reads hour by hour.

    A head looks around a point that moves away from the station with the hour, in a direction it reads from the station's state: a
    Gaussian in the logits, beside the match of query and key. Where to look is shared by the factors; each has its own projection of it.
    """

    def __init__(self, tokens: int, state: int, heads: int, horizon: int, layers: int) -> None:
        super().__init__()
        self.ask = nn.Parameter(torch.randn(horizon, state) * 0.1)
        self.query, self.out, self.context_out = (nn.Linear(state, state) for _ in range(3))
        self.key = nn.Linear(tokens, state)
        self.value = nn.Linear(state, state)
        self.drift = nn.Sequential(nn.Linear(state, state), nn.Tanh(), nn.Linear(state, 2 * heads))
        self.layer = nn.Parameter(torch.full((layers,), 0.5))
        self.spread = nn.Parameter(torch.full((heads,), -1.5))
        # Heads begin by looking in different directions, a quarter of the picture away at the last hour.
        angle = torch.arange(heads) / heads * 2 * torch.pi
        with torch.no_grad():
            self.drift[-1].bias.copy_(0.5 * torch.stack([angle.cos(), angle.sin()], dim=-1).flatten())  # type: ignore[operator]
        self.heads, self.horizon = heads, horizon

    def forward(
        self, states: Tensor, tokens: Tensor, values: Tensor, grid: tuple[int, int], positions: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """States (L, B, N, S), tokens (B, P, V), values (B, F, P, S) -> states (L, B F, N, S), context (B F, horizon, N, S), attention
        (B, heads, (1 + horizon) N, P): the state's own look first."""
        _, batch, stations, _ = states.shape
        factors = values.shape[1]
        top = states[-1]
        asks = torch.cat([top[:, None], top[:, None] + self.ask[:, None]], dim=1)  # (B, 1 + horizon, N, S)
        q = _heads(self.query(asks).flatten(1, 2), self.heads)
        k = _heads(self.key(tokens), self.heads)
        ahead = torch.arange(self.horizon + 1, device=states.device) / self.horizon
        drift = self.drift(top).unflatten(-1, (self.heads, 2)).permute(0, 2, 1, 3)  # (B, heads, N, 2)
        centre = positions + ahead[:, None, None] * drift[:, :, None]  # (B, heads, 1 + horizon, N, 2)
        centre = centre.flatten(2, 3)
        spot = token_grid(*grid, tokens.device)
        # -|spot - centre|^2 / (2 spread^2) without its part that is the same for all tokens, inside one product.
        sharp = torch.exp(-2 * self.spread)[:, None, None]
        where = torch.cat([centre * sharp, -0.5 * sharp.expand(batch, -1, centre.shape[2], 1)], dim=-1)
        q = torch.cat([q * q.shape[-1] ** -0.5, where], dim=-1)
        spot = torch.cat([spot, spot.square().sum(-1, keepdim=True)], dim=-1)
        k = torch.cat([k, spot.expand(batch, self.heads, -1, -1)], dim=-1)
        attention = torch.softmax(q @ k.transpose(-1, -2), dim=-1)
        v = self.value(values).unflatten(-1, (self.heads, -1)).permute(0, 3, 2, 1, 4).flatten(3)  # (B, heads, P, F S / heads)
        seen = (attention @ v).unflatten(-1, (factors, -1)).permute(0, 3, 2, 1, 4).flatten(3)  # (B, F, (1 + horizon) N, S)
        seen = seen.unflatten(2, (1 + self.horizon, stations)).flatten(0, 1)
        shared = states[:, :, None].expand(-1, -1, factors, -1, -1).flatten(1, 2)
        return shared + self.layer[:, None, None, None] * self.out(seen[:, 0]), self.context_out(seen[:, 1:]), attention


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)
