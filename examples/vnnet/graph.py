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

    ``hidden`` None: the convolutions give gates and candidate themselves (AGCRN). Otherwise each gives ``hidden`` features that diffuse
    over the graph, are dropped out and go through a Linear (DEGCN). Z gates the state in the candidate; the new state is R H + (1 - R)
    candidate.
    """

    def __init__(
        self, features: int, state: int, supports: int, embedding: int, dynamic: bool, hidden: int | None = None, dropout: float = 0.0
    ) -> None:
        super().__init__()
        wide = features + state
        self.gate = GraphConv(wide, hidden or 2 * state, supports, embedding, dynamic)
        self.update = GraphConv(wide, hidden or state, supports, embedding, dynamic)
        self.gate_diffusion = Diffusion() if hidden else None
        self.update_diffusion = Diffusion() if hidden else None
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


class DEGCN(nn.Module):
    """The repository's encoder: hours of station values to one state per layer and station, (B, T, N, C) -> (L, B, N, state).

    Month, day and hour are embedded into the static graph; its Chebyshev terms and one dynamic graph are the supports.
    """

    def __init__(
        self, variables: int, stations: int, state: int, hidden: int, embedding: int, order: int, layers: int, dropout: float
    ) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(stations, embedding) * 0.3)
        self.moment = Moment(embedding)
        self.state, self.order = state, order
        self.cells = nn.ModuleList(
            [GraphGRU(variables if i == 0 else state, state, order, embedding, True, hidden, dropout) for i in range(layers)]
        )

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        batch, hours, stations, _ = x.shape
        graph = adaptive_graph(self.embedding + self.moment(time)[:, :, None])
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


class Moment(nn.Module):
    """Month, day and hour (..., 3) to an embedding."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.tables = nn.ModuleList([nn.Embedding(count, width) for count in (12, 31, 24)])
        for table in self.tables:
            nn.init.normal_(table.weight, std=0.1)  # type: ignore[arg-type]

    def forward(self, time: Tensor) -> Tensor:
        month, day, hour = (table(time[..., i]) for i, table in enumerate(self.tables))
        return month + day + hour


class NGCN(nn.Module):
    """The paper's encoder as we make it: (B, T, N, C) -> (L, B, N, state).

    Three supports an hour: the station itself, a static graph that month, day and hour bend, and a dynamic graph made from the hour's
    values. All graphs, and the inputs' part of the GRU's gates, are computed for all hours at once; only the state's part is sequential.
    """

    def __init__(self, variables: int, stations: int, state: int, embedding: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(stations, embedding) * 0.3)
        self.moment = Moment(embedding)
        self.key, self.query = nn.Linear(variables, embedding), nn.Linear(variables, embedding)
        widths = [variables] + [state] * (layers - 1)
        self.inputs = nn.ModuleList([NodeLinear(embedding, 3 * width, 3 * state) for width in widths])
        self.gates = nn.ModuleList([NodeLinear(embedding, 3 * state, 2 * state) for _ in widths])
        self.updates = nn.ModuleList([NodeLinear(embedding, 3 * state, state) for _ in widths])
        self.state = state

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        batch, hours, stations, _ = x.shape
        static = adaptive_graph(self.embedding + self.moment(time)[:, :, None])
        dynamic = torch.softmax(F.relu(self.key(x) @ self.query(x).transpose(-1, -2)), dim=-1)
        graphs = torch.cat([static, dynamic], dim=-2)  # (B, T, 2 N, N)
        by_hour = graphs.unbind(1)
        last = []
        for layer in range(len(self.inputs)):
            (w, b), (wg, bg), (wu, bu) = (maps[layer].weights(self.embedding) for maps in (self.inputs, self.gates, self.updates))  # type: ignore[operator]
            gathered = self._gather(x.flatten(0, 1), graphs.flatten(0, 1))
            added = torch.baddbmm(b, gathered, w).unflatten(1, (batch, hours)).unbind(2)  # each (N, B, 3 state)
            state, outputs = x.new_zeros(stations, batch, self.state), []
            for hour in range(hours):
                to_gates, to_update = added[hour].split([2 * self.state, self.state], dim=-1)
                z, r = torch.sigmoid(torch.baddbmm(to_gates + bg, self._gather(state.transpose(0, 1), by_hour[hour]), wg)).chunk(2, dim=-1)
                candidate = torch.baddbmm(to_update + bu, self._gather((z * state).transpose(0, 1), by_hour[hour]), wu)
                state = torch.lerp(torch.tanh(candidate), state, r)
                outputs.append(state)
            last.append(state.transpose(0, 1))
            x = torch.stack(outputs, dim=1).permute(2, 1, 0, 3) if layer + 1 < len(self.inputs) else x
        return torch.stack(last)

    @staticmethod
    def _gather(x: Tensor, graphs: Tensor) -> Tensor:
        """(B, N, C) over both graphs (B, 2 N, N): itself, static, dynamic side by side, stations first (N, B, 3 C)."""
        static, dynamic = (graphs @ x).chunk(2, dim=1)
        return torch.cat([x, static, dynamic], dim=-1).transpose(0, 1)


class AGCRN(nn.Module):
    """The repository's decoder: hour after hour, from zeros, the value before gives the next."""

    def __init__(self, stations: int, state: int, embedding: int, layers: int, factors: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(stations, embedding) * 0.3)
        self.cells = nn.ModuleList([GraphGRU(1 if i == 0 else state, state, 2, embedding, False) for i in range(layers)])
        self.head = nn.Linear(state, factors)

    def forward(self, states: Tensor, horizon: int, truth: Tensor | None = None, use_truth: Tensor | None = None) -> Tensor:
        """(L, B F, N, state) -> (B F, horizon, N), normalised. ``truth`` (B F, horizon, N) is fed in place of the forecast where
        ``use_truth`` (horizon,) is True: scheduled sampling."""
        supports = chebyshev(adaptive_graph(self.embedding), 2)
        weights = [cell.weights(self.embedding) for cell in self.cells]  # type: ignore[operator]
        head, bias = _by_factor(self.head, states.shape[1])
        current, value, out = list(states), states.new_zeros(states.shape[1:3]), []
        for step in range(horizon):
            x = value[..., None]
            for i, cell in enumerate(self.cells):
                x = current[i] = cell(x, current[i], supports, supports[1], weights[i])
            value = (x * head[:, None]).sum(-1) + bias
            out.append(value)
            if truth is not None and use_truth is not None:
                value = torch.where(use_truth[step], truth[:, step], value)
        return torch.stack(out, dim=1)


class GCNDecoder(nn.Module):
    """The paper's GCN decoder as we make it: a graph GRU over [station, static graph] that starts from the last hour's value and forecasts
    the change from hour to hour, so that a level which training did not see is kept. It also reads the forecast hour's time of day and,
    with vision, the hour's view of the picture; both parts are computed for all hours at once."""

    def __init__(self, stations: int, state: int, embedding: int, layers: int, factors: int, context: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(stations, embedding) * 0.3)
        self.hour = nn.Embedding(24, 3 * state)
        nn.init.normal_(self.hour.weight, std=0.1)
        self.context = NodeLinear(embedding, context, 3 * state) if context else None
        fed = [1] + [state] * (layers - 1)
        self.gates = nn.ModuleList([NodeLinear(embedding, 2 * (state + width), 2 * state) for width in fed])
        self.updates = nn.ModuleList([NodeLinear(embedding, 2 * (state + width), state) for width in fed])
        self.head = nn.Linear(state, factors)
        self.state = state

    def forward(
        self,
        states: Tensor,
        go: Tensor,
        hours: Tensor,
        context: Tensor | None,
        truth: Tensor | None = None,
        use_truth: Tensor | None = None,
    ) -> Tensor:
        """(L, B F, N, state), first input (B F, N), hours of the day (B F, horizon), context (B F, horizon, N, C) -> (B F, horizon, N).
        ``truth`` and ``use_truth`` as in :class:`AGCRN`."""
        rows, horizon = hours.shape
        graph = adaptive_graph(self.embedding)
        weights = [[maps.weights(self.embedding) for maps in pair] for pair in zip(self.gates, self.updates, strict=True)]  # type: ignore[operator]
        added = self.hour(hours)[None]  # (1, B F, horizon, 3 state)
        if self.context is not None and context is not None:
            w, b = self.context.weights(self.embedding)
            added = added + torch.baddbmm(b, context.permute(2, 0, 1, 3).flatten(1, 2), w).unflatten(1, (rows, horizon))
        head, bias = _by_factor(self.head, rows)
        # Stations first: the graph is one matrix for all rows, the stations' maps one batched product.
        current = [state.transpose(0, 1) for state in states]
        value, out = go.t(), []
        for step in range(horizon):
            x = value[..., None]
            for i, ((wg, bg), (wu, bu)) in enumerate(weights):
                old = current[i]
                gates, update = torch.baddbmm(bg, self._gather(x, old, graph), wg), None
                if i == 0:
                    to_gates, update = added[:, :, step].split([2 * self.state, self.state], dim=-1)
                    gates = gates + to_gates
                z, r = torch.sigmoid(gates).chunk(2, dim=-1)
                candidate = torch.baddbmm(bu, self._gather(x, z * old, graph), wu)
                x = current[i] = torch.lerp(torch.tanh(candidate if update is None else candidate + update), old, r)
            value = value + (x * head).sum(-1) + bias.t()
            out.append(value)
            if truth is not None and use_truth is not None:
                value = torch.where(use_truth[step], truth[:, step].t(), value)
        return torch.stack(out, dim=0).permute(2, 0, 1)

    @staticmethod
    def _gather(x: Tensor, state: Tensor, graph: Tensor) -> Tensor:
        both = torch.cat([x, state], dim=-1)
        return torch.cat([both, (graph @ both.flatten(1)).view_as(both)], dim=-1)


def _by_factor(head: nn.Linear, rows: int) -> tuple[Tensor, Tensor]:
    """Rows come as (B F): each row's own head (B F, state) and bias (B F, 1)."""
    times = rows // head.out_features
    return head.weight.repeat(times, 1), head.bias.repeat(times)[:, None]
