"""VN-Net whole: encoder of numbers, encoder of pictures, fusion, decoder; NNet is the same without pictures.

Two versions exist and are not mixed:

- ``paper`` (arXiv 2404.16037): N-GCN, V-LSTM with a multi-scale joint channel-spatial module, double query attention, a GCN decoder. The
  abstract fixes these parts by name; their insides are ours.
- ``repository``: DEGCN, MLVFEM, LGVNFM, AGCRN with the shapes of the released code.

Ours in both: several factors in one model. The factor is a task of the CMoE connector between pictures and numbers, and its decoder
states and head are its own; everything else is shared.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from examples.vnnet.files import UserError
from examples.vnnet.fusion import DQAM, LGVNFM, ExpertProjection, PlainProjection
from examples.vnnet.graph import AGCRN, DEGCN, NGCN, GCNDecoder
from examples.vnnet.vision import MLVFEM, VLSTM

__all__ = ["MLVFEM", "VLSTM", "Forecast", "NNet", "Settings", "VNNet", "build"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Sizes; the defaults are the released ones. ``small`` gives those of the demo."""

    stations: int
    factors: tuple[str, ...] = ("temperature", "humidity", "visibility", "wind")
    version: str = "paper"  # or "repository"
    vision: bool = True
    fusion: str = "cmoe"  # or "plain"
    experts: int = 4
    balance: float = 0.01
    variables: int = 23
    history: int = 12
    horizon: int = 12
    frames: int = 12
    channels: int = 6
    state: int = 32
    hidden: int = 64
    embedding: int = 8
    chebyshev: int = 6
    layers: int = 2
    heads: int = 4
    dropout: float = 0.1
    vision_width: int = 32
    vision_stride: int = 4

    def __post_init__(self) -> None:
        object.__setattr__(self, "factors", tuple(self.factors))
        for name, choices in (("version", ("paper", "repository")), ("fusion", ("cmoe", "plain")), ("vision_stride", (1, 2, 4))):
            if getattr(self, name) not in choices:
                raise UserError(f"{name} is {getattr(self, name)!r}, must be one of {', '.join(map(str, choices))}")
        if self.state % self.heads:
            raise UserError(f"state is {self.state}, must be a multiple of heads ({self.heads})")

    def state_dict(self) -> dict[str, Any]:
        return {**asdict(self), "factors": list(self.factors)}

    @classmethod
    def small(cls, **changes: Any) -> "Settings":
        sizes = {
            "frames": 3,
            "channels": 2,
            "state": 16,
            "hidden": 16,
            "embedding": 4,
            "chebyshev": 3,
            "layers": 1,
            "heads": 4,
            "dropout": 0.0,
        }
        return cls(**{**sizes, "vision_width": 24, "vision_stride": 4, **changes})


class Forecast(NamedTuple):
    """``values`` (B, horizon, N, F), normalised; ``gates`` (B, F, P, E) of a CMoE fusion; ``attention`` over the P tokens; ``aux_loss``."""

    values: Tensor
    gates: Tensor | None
    attention: Tensor | None
    grid: tuple[int, int] | None
    aux_loss: Tensor


class VNNet(nn.Module):
    """Forecasts of each factor at each station.

    Args:
        settings: sizes and version.
        positions: (N, 2) of the stations in the picture, x east and y south in -1..1.
        places: which of the 23 variables each factor is.
    """

    def __init__(self, settings: Settings, positions: Tensor, places: list[int]) -> None:
        super().__init__()
        s = self.settings = settings
        paper = s.version == "paper"
        self.register_buffer("positions", positions.detach().clone().float())
        self.places = places
        self.encoder: nn.Module
        self.decoder: nn.Module
        if paper:
            self.encoder = NGCN(s.variables, s.stations, s.state, s.embedding, s.layers)
            self.decoder = GCNDecoder(s.stations, s.state, s.embedding, s.layers, len(s.factors), s.state if s.vision else 0)
        else:
            self.encoder = DEGCN(s.variables, s.stations, s.state, s.hidden, s.embedding, s.chebyshev, s.layers, s.dropout)
            self.decoder = AGCRN(s.stations, s.state, s.embedding, s.layers, len(s.factors))
        several = len(s.factors) > 1
        self.factor = nn.Parameter(torch.randn(len(s.factors), s.state) * 0.1) if several else None
        self.vision: nn.Module | None = None
        self.fusion: nn.Module | None = None
        self.projection: nn.Module | None = None
        if s.vision:
            if paper:
                self.vision = VLSTM(s.channels, s.vision_width, s.vision_stride)
                self.fusion = DQAM(s.vision_width, s.state, s.heads, s.horizon, s.layers)
            else:
                strides = {1: (1, 1), 2: (2, 1), 4: (2, 2)}[s.vision_stride]
                stages = ((1, 1), (2, strides[0]), (2, strides[1]))
                half = s.vision_width // 2
                self.vision = MLVFEM(s.channels, (half, s.vision_width, s.vision_width), 45 * half // 16, stages)
                self.fusion = LGVNFM(s.state, s.layers, s.heads)
            if s.fusion == "cmoe":
                self.projection = ExpertProjection(s.vision_width, s.state, s.state, s.factors, s.experts, s.balance)
            elif paper or s.vision_width != s.state:
                self.projection = PlainProjection(s.vision_width, s.state, s.state)

    def forward(
        self, x: Tensor, time: Tensor, pictures: Tensor | None = None, truth: Tensor | None = None, use_truth: Tensor | None = None
    ) -> Forecast:
        """x (B, history, N, 23), time (B, history + horizon, 3), pictures (B, C, frames, H, W); truth (B, horizon, N, F) for scheduled
        sampling; all normalised."""
        s = self.settings
        batch, history, _, _ = x.shape
        count = len(s.factors)
        states = self.encoder(x, time[:, :history])
        context = gates = attention = grid = None
        aux_loss = x.new_zeros(())
        if self.vision is not None and self.fusion is not None:
            if pictures is None:
                raise UserError("this model reads pictures, and the data has none; train with vision off")
            seen = self.vision(pictures)
            grid = (seen.shape[2], seen.shape[3])
            tokens = seen.flatten(2).transpose(1, 2)
            if self.projection is None:
                values = tokens[:, None].expand(-1, count, -1, -1)
            else:
                values, gates, aux_loss = self.projection(tokens, count)
            if isinstance(self.fusion, DQAM):
                states, context, attention = self.fusion(states, tokens, values, grid, self.positions)
            else:
                states, context, attention = self.fusion(states, values, grid, self.positions)
        else:
            states = states[:, :, None].expand(-1, -1, count, -1, -1).flatten(1, 2)
        if self.factor is not None:
            states = states + self.factor[:, None].repeat(batch, 1, 1)
        fed = None if truth is None else truth.permute(0, 3, 1, 2).flatten(0, 1)
        if isinstance(self.decoder, AGCRN):
            values = self.decoder(states, s.horizon, fed, use_truth)
        else:
            last = x[:, -1, :, self.places].permute(0, 2, 1).flatten(0, 1)  # (B F, N)
            hours = time[:, history:, 2].repeat_interleave(count, dim=0)
            values = self.decoder(states, last, hours, context, fed, use_truth)
        return Forecast(values.unflatten(0, (batch, count)).permute(0, 2, 3, 1), gates, attention, grid, aux_loss)


class NNet(VNNet):
    """VN-Net without pictures."""

    def __init__(self, settings: Settings, positions: Tensor, places: list[int]) -> None:
        super().__init__(replace(settings, vision=False), positions, places)


def build(settings: Settings, positions: Tensor, places: list[int]) -> VNNet:
    return VNNet(settings, positions, places) if settings.vision else NNet(settings, positions, places)
