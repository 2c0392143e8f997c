"""The pictures' side: MLVFEM of the repository, V-LSTM of the paper. Both turn (B, C, T, H, W) into one map (B, O, h, w)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def middle_width(features: int, out: int, space: int, time: int) -> int:
    """Width between the two halves of a factorised convolution, so that it has as many weights as the whole one."""
    return space * space * time * features * out // (space * space * features + time * out)


class Factorised(nn.Module):
    """A 3-D convolution as one over space, then one over time: no biases, BatchNorm and ReLU between."""

    def __init__(self, features: int, out: int, kernel: tuple[int, int], stride: tuple[int, int], middle: int | None = None) -> None:
        super().__init__()
        (time, space), (over_time, over_space) = kernel, stride
        middle = middle or middle_width(features, out, space, time)
        self.space = nn.Conv3d(features, middle, (1, space, space), (1, over_space, over_space), (0, space // 2, space // 2), bias=False)
        self.space_norm = nn.BatchNorm3d(middle)
        self.time = nn.Conv3d(middle, out, (time, 1, 1), (over_time, 1, 1), (time // 2, 0, 0), bias=False)
        self.time_norm = nn.BatchNorm3d(out)

    def forward(self, x: Tensor) -> Tensor:
        return self.time_norm(self.time(F.relu(self.space_norm(self.space(x)))))


class Residual(nn.Module):
    def __init__(self, features: int, out: int, stride: tuple[int, int]) -> None:
        super().__init__()
        self.first, self.first_norm = Factorised(features, out, (3, 3), stride), nn.BatchNorm3d(out)
        self.second, self.second_norm = Factorised(out, out, (3, 3), (1, 1)), nn.BatchNorm3d(out)
        same = features == out and stride == (1, 1)
        self.shortcut = nn.Identity() if same else nn.Sequential(Factorised(features, out, (1, 1), stride), nn.BatchNorm3d(out))

    def forward(self, x: Tensor) -> Tensor:
        y = self.second_norm(self.second(F.relu(self.first_norm(self.first(x)))))
        return F.relu(y + self.shortcut(x))


class MLVFEM(nn.Module):
    """The repository's picture encoder: a factorised stem and three residual stages of two blocks, then the mean over time.

    (B, 6, 12, 160, 160) -> (B, 32, 40, 40) with 244,078 parameters at the default sizes. ``strides`` are those of the three stages, each
    over time and over space; a stage of stride 1 keeps the grid.
    """

    def __init__(
        self,
        channels: int = 6,
        widths: tuple[int, int, int] = (16, 32, 32),
        stem: int = 45,
        strides: tuple[tuple[int, int], ...] = ((1, 1), (2, 2), (2, 2)),
    ) -> None:
        super().__init__()
        self.stem = Factorised(channels, widths[0], (3, 3), (1, 1), stem)
        blocks, before = [], widths[0]
        for width, stride in zip(widths, strides, strict=True):
            blocks += [Residual(before, width, stride), Residual(width, width, (1, 1))]
            before = width
        self.blocks = nn.Sequential(*blocks)
        self.out_features = before

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(F.relu(self.stem(x))).mean(dim=2)


class MultiScaleGate(nn.Module):
    """Multi-scale joint channel-spatial module: what is seen at three scales, gated by channel and by place. The inside is ours."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scales = nn.ModuleList([nn.Conv2d(width, width, k, padding=k // 2, groups=width, bias=False) for k in (3, 5, 7)])
        self.mix = nn.Conv2d(width, width, 1)
        self.channel = nn.Sequential(nn.Linear(width, max(width // 2, 4)), nn.ReLU(), nn.Linear(max(width // 2, 4), width))
        self.place = nn.Conv2d(2, 1, 5, padding=2)

    def forward(self, x: Tensor) -> Tensor:
        y = F.gelu(self.mix(sum(scale(x) for scale in self.scales)))
        by_channel = self.channel(y.mean(dim=(2, 3)))[:, :, None, None]
        by_place = self.place(torch.stack([y.mean(dim=1), y.amax(dim=1)], dim=1))
        return x + y * torch.sigmoid(by_channel + by_place)


class VLSTM(nn.Module):
    """The paper's picture encoder: convolutions shrink each frame, the multi-scale module gates it, a convolutional LSTM reads the frames.

    (B, C, T, H, W) -> (B, width, H / stride, W / stride). ``stride`` is 1, 2 or 4.
    """

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        halvings = stride.bit_length() - 1
        # Pictures lie in 0..1 and are mostly background: centred and scaled, their cells stand out from the first step.
        layers: list[nn.Module] = [nn.BatchNorm2d(channels)]
        for i in range(max(halvings, 1)):
            layers += [nn.Conv2d(channels if i == 0 else width, width, 3, 2 if halvings else 1, 1), nn.GELU()]
        self.shrink = nn.Sequential(*layers)
        self.gate = MultiScaleGate(width)
        self.cell = nn.Conv2d(2 * width, 4 * width, 3, padding=1)
        self.out_features = width
        with torch.no_grad():
            self.cell.bias[width : 2 * width] = 1.0  # type: ignore[index]  # remember at first

    def forward(self, x: Tensor) -> Tensor:
        batch, _, hours = x.shape[:3]
        frames = self.gate(self.shrink(x.transpose(1, 2).flatten(0, 1)))
        frames = frames.unflatten(0, (batch, hours))
        state = memory = torch.zeros_like(frames[:, 0])
        for hour in range(hours):
            write, keep, show, new = self.cell(torch.cat([frames[:, hour], state], dim=1)).chunk(4, dim=1)
            memory = torch.sigmoid(keep) * memory + torch.sigmoid(write) * torch.tanh(new)
            state = torch.sigmoid(show) * torch.tanh(memory)
        # What was seen last is handed on beside what the LSTM remembers of it.
        return state + frames[:, -1]
