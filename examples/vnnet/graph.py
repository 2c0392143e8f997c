"""The numbers' side: graph convolutions over stations inside recurrent cells, as encoders and as the decoder.

Letters: B batch, N stations, S supports (matrices over stations), C features in, O features out, F factors, L layers.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def chebyshev(graph: Tensor, order: int) -> Tensor:
    """(..., order, N, N): identity, A, and 2 A T[k-1] - T[k-2]."""
    terms = [torch.eye(graph.shape[-1], dtype=graph.dtype, device=graph.device).expand_as(graph), graph]
    for _ in range(order - 2):
        terms.append(2 * graph @ terms[-1] - terms[-2])
    return torch.stack(terms[:order], dim=-3)


def adaptive_graph(embedding: Tensor) -> Tensor:
    """softmax(relu(E E^T)): rows say from which stations a station gathers."""
    return torch.softmax(F.relu(embedding @ embedding.transpose(-1, -2)), dim=-1)


class NodeLinear(nn.Module):
    """One linear map per station, spun from its embedding: W_n = sum_d E[n, d] pool[d]."""

    def __init__(self, embedding: int, features: int, out: int) -> None:
        super().__init__()
        self.pool = nn.Parameter(torch.empty(embedding, features, out))
        self.bias = nn.Parameter(torch.empty(embedding, out))
        nn.init.xavier_uniform_(self.pool)
        nn.init.xavier_uniform_(self.bias)

    def weights(self, embedding: Tensor) -> tuple[Tensor, Tensor]:
        """Spun once a forward pass, used at each hour."""
        return torch.einsum("nd,dco->nco", embedding, self.pool), (embedding @ self.bias)[:, None]


class GraphConv(nn.Module):
    """Features gathered over each support, then the stations' own maps: (B, N, C) -> (B, N, O).

    With ``dynamic``, one more support is made from the features themselves: softmax(relu(k(x) q(x)^T)).
    """

    def __init__(self, features: int, out: int, supports: int, embedding: int, dynamic: bool) -> None:
        super().__init__()
        self.maps = NodeLinear(embedding, (supports + dynamic) * features, out)
        self.key = nn.Linear(features, embedding) if dynamic else None
        self.query = nn.Linear(features, embedding) if dynamic else None

    def forward(self, x: Tensor, supports: Tensor, weights: tuple[Tensor, Tensor]) -> Tensor:
        batch, stations, features = x.shape
        gathered = (supports.flatten(-3, -2) @ x).view(batch, -1, stations, features)
        if self.key is not None and self.query is not None:
            graph = torch.softmax(F.relu(self.key(x) @ self.query(x).transpose(1, 2)), dim=-1)
            gathered = torch.cat([gathered, (graph @ x)[:, None]], dim=1)
        by_station = gathered.permute(2, 0, 1, 3).reshape(stations, batch, -1)
        w, b = weights
        return torch.baddbmm(b, by_station, w).transpose(0, 1)


class Diffusion(nn.Module):
    """Continuous graph diffusion dz/dt = alpha (A z - z) over t in 0..1, by Euler's method."""

    def __init__(self, step: float = 0.25) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.tensor(0.5))
        self.step, self.steps = step, round(1 / step)

    def forward(self, z: Tensor, graph: Tensor) -> Tensor:
        for _ in range(self.steps):
            z = torch.lerp(z, graph @ z, self.step * self.alpha)
        return z


class GraphGRU(nn.Module):
    """A GRU whose maps are graph convolutions.

    ``hidden`` None: the convolutions give gates and candidate themselves (N-GCN, AGCRN). Otherwise each gives ``hidden`` features that diffuse
    over the graph, are dropped out and go through a Linear (DEGCN). Z gates the state in the candidate; the state is R H + (1 - R) candidate.
    """

    def __init__(
        self, features: int, state: int, supports: int, embedding: int, dynamic: bool, hidden: int | None = None, dropout: float = 0.0
    ) -> None:
        super().__init__()
        wide = features + state
        self.gate = GraphConv(wide, hidden or 2 * state, supports, embedding, dynamic)
        self.update = GraphConv(wide, hidden or state, supports, embedding, dynamic)
        self.gate_diffusion, self.update_diffusion = (Diffusion(), Diffusion()) if hidden else (None, None)
        self.gate_out = nn.Linear(hidden, 2 * state) if hidden else nn.Identity()
        self.update_out = nn.Linear(hidden, state) if hidden else nn.Identity()
        self.dropout = nn.Dropout(dropout)

    def weights(self, embedding: Tensor) -> list[tuple[Tensor, Tensor]]:
        return [self.gate.maps.weights(embedding), self.update.maps.weights(embedding)]

    def forward(self, x: Tensor, state: Tensor, supports: Tensor, graph: Tensor, weights: list[tuple[Tensor, Tensor]]) -> Tensor:
        gates = self.gate(torch.cat([x, state], dim=-1), supports, weights[0])
        if self.gate_diffusion is not None:
            gates = self.dropout(self.gate_diffusion(gates, graph))
        z, r = torch.sigmoid(self.gate_out(gates)).chunk(2, dim=-1)
        candidate = self.update(torch.cat([x, z * state], dim=-1), supports, weights[1])
        if self.update_diffusion is not None:
            candidate = self.dropout(self.update_diffusion(candidate, graph))
        return torch.lerp(torch.tanh(self.update_out(candidate)), state, r)


class Encoder(nn.Module):
    """Hours of station values to one state per layer and station: (B, T, N, C) -> (L, B, N, state).

    ``diffuse`` True is the repository's DEGCN: Chebyshev terms of the time-aware static graph, one dynamic graph, diffusion. False is the
    paper's N-GCN as we make it: identity, static and dynamic graph, no diffusion. Month, day and hour are embedded into the static graph.
    """

    def __init__(
        self, variables: int, stations: int, state: int, hidden: int, embedding: int, order: int, layers: int, dropout: float, diffuse: bool
    ) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(stations, embedding) * 0.3)
        self.times = nn.ModuleList([nn.Embedding(count, embedding) for count in (12, 31, 24)])
        for table in self.times:
            nn.init.normal_(table.weight, std=0.1)  # type: ignore[arg-type]
        self.state, self.order = state, order if diffuse else 2
        self.cells = nn.ModuleList(
            [
                GraphGRU(variables if i == 0 else state, state, self.order, embedding, True, hidden if diffuse else None, dropout)
                for i in range(layers)
            ]
        )

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        batch, hours, stations, _ = x.shape
        moment = sum(table(time[..., i]) for i, table in enumerate(self.times))
        graph = adaptive_graph(self.embedding + moment[:, :, None])
        supports = chebyshev(graph, self.order)
        graph_by_hour, supports_by_hour, inputs = graph.unbind(1), supports.unbind(1), x.unbind(1)
        last = []
        for cell in self.cells:
            weights = cell.weights(self.embedding)  # type: ignore[operator]
            state = x.new_zeros(batch, stations, self.state)
            outputs = []
            for hour in range(hours):
                state = cell(inputs[hour], state, supports_by_hour[hour], graph_by_hour[hour], weights)
                outputs.append(state)
            inputs = tuple(outputs)
            last.append(state)
        return torch.stack(last)


class Decoder(nn.Module):
    """AGCRN, hour after hour: the value before, the hour's time and the hour's view of the pictures give the next value.

    ``context`` 0 and ``times`` False is the repository's decoder.
    """

    def __init__(self, stations: int, state: int, embedding: int, layers: int, factors: int, context: int, times: bool) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(stations, embedding) * 0.3)
        self.hour = nn.Embedding(24, embedding) if times else None
        width = 1 + context + (embedding if times else 0)
        self.cells = nn.ModuleList([GraphGRU(width if i == 0 else state, state, 2, embedding, False) for i in range(layers)])
        self.head = nn.Linear(state, factors)
        self.factors, self.context = factors, context

    def forward(
        self, states: Tensor, go: Tensor, hours: Tensor, context: Tensor | None, truth: Tensor | None = None, use_truth: Tensor | None = None
    ) -> Tensor:
        """(L, B F, N, state) and the first input (B F, N) -> (B F, horizon, N), normalised.

        Args:
            hours: (B F, horizon), the hour of the day of each forecast.
            context: (B F, horizon, N, context) or None.
            truth: (B F, horizon, N), fed in place of the forecast where ``use_truth`` (horizon,) is True: scheduled sampling.
        """
        batch, stations, _ = states[0].shape
        supports = chebyshev(adaptive_graph(self.embedding), 2)
        weights = [cell.weights(self.embedding) for cell in self.cells]  # type: ignore[operator]
        clock = None if self.hour is None else self.hour(hours)
        factor = torch.arange(self.factors, device=states.device).repeat(batch // self.factors)
        head, bias = self.head.weight[factor], self.head.bias[factor, None]
        current, value, out = list(states), go, []
        for step in range(hours.shape[1]):
            parts = [value[..., None]]
            if self.context:
                parts.append(context[:, step] if context is not None else value.new_zeros(batch, stations, self.context))
            if clock is not None:
                parts.append(clock[:, step, None].expand(-1, stations, -1))
            x = torch.cat(parts, dim=-1)
            for i, cell in enumerate(self.cells):
                x = current[i] = cell(x, current[i], supports, supports[1], weights[i])
            value = torch.baddbmm(bias[:, None], x, head[:, :, None]).squeeze(-1)
            out.append(value)
            if truth is not None and use_truth is not None:
                value = torch.where(use_truth[step], truth[:, step], value)
        return torch.stack(out, dim=1)
