"""The work of each benchmarked case: inputs and weights, our call, its peers, the formula in fp64, FLOPs and bytes."""

import copy
import functools
import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

import cmoe_kernels as cmoe
from benchmarks import peers
from benchmarks.shapes import Shape
from benchmarks.steps import Exact, Leaves, Skipped, Step, Work, parameters
from cmoe_kernels import backends, native

TASKS = cmoe.nn.config.TASKS


def on_backend(make: Callable[[], Step], backend: str) -> Callable[[], Step]:
    """A step of ours on one backend; backward follows the backend of forward."""

    def build() -> Step:
        with cmoe.use_backend(backend):
            step = make()
        forward = step.forward

        def chosen() -> Tensor:
            with cmoe.use_backend(backend):
                return forward()

        step.forward = chosen
        return step

    return build


def in_reference(make: Callable[[], Step], ops: Iterable[str], dtype: torch.dtype, device: str) -> Callable[[], Step]:
    """Our own step on the reference backend."""

    def build() -> Step:
        if all(backends.choose(op, device, dtype) == "reference" for op in ops):
            raise Skipped("ours is the reference backend here")
        return on_backend(make, "reference")()

    return build


def _work(
    ours: Callable[[], Step],
    others: dict[str, Callable[[], Step]],
    ops: tuple[str, ...],
    dtype: torch.dtype,
    reference: bool = True,
    **rest,
) -> Work:
    if reference:
        others = {**others, "reference": in_reference(ours, ops, dtype, torch.get_default_device().type)}
    return Work(ours=ours, peers=others, ops=ops, dtype=dtype, **rest)


def _step(formula: Callable[..., Callable[[], Tensor]], *arguments, dy: Tensor | None, exact: bool = False) -> Callable[[], Step]:
    """A step from a formula that takes its leaves last; without ``dy`` forward alone."""

    def build() -> Step:
        leaves = Exact() if exact else Leaves()
        forward = formula(*arguments, leaves)
        return Step(forward) if dy is None else Step(forward, leaves, dy.double() if exact else dy)

    return build


def _nbytes(*tensors: Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def _linear_weight(*shape: int, dtype: torch.dtype) -> Tensor:
    """Scaled as torch.nn.Linear initialises itself."""
    return torch.empty(shape, dtype=dtype).uniform_(-(shape[-1] ** -0.5), shape[-1] ** -0.5)


# --- the connector -----------------------------------------------------------------------------------------------------------
def soft_connector(shape: Shape, dtype: torch.dtype, recompute: bool = False) -> cmoe.CMoEConnector:
    """The connector of a shape, for image tokens as they are."""
    config = cmoe.CMoEConfig(
        in_features=shape.D,
        out_features=shape.O,
        hidden_features=shape.H,
        num_experts=shape.E,
        router_features=shape.R,
        task_features=shape.S,
        resample="none",
        recompute=recompute,
    )
    return cmoe.CMoEConnector(config, dtype=dtype)


def connector(shape: Shape, tokens: int, dtype: torch.dtype, train: bool, recompute: bool = False, prepacked: bool = False) -> Work:
    """The soft connector on frozen image tokens of one task."""
    if prepacked and torch.get_default_device().type != "cpu":
        raise Skipped("prepack() is for CPUs")
    connector = soft_connector(shape, dtype, recompute)
    torch.nn.init.normal_(connector.router.task_tokens)
    x = torch.randn(tokens, shape.D).to(dtype)
    dy = torch.randn(tokens, shape.O).to(dtype) if train else None
    if prepacked:
        connector.eval()
        connector.prepack()

    def forward() -> Tensor:
        return connector(x, task=TASKS[0]).embeddings

    def ours() -> Step:
        return Step(forward, parameters(connector), dy) if train else Step(forward)

    # The formula in fp64 reads the same x, rounded to the tested dtype.
    exact = _step(peers.released_loop, connector, x.double(), dy=dy, exact=True)
    loop = _step(peers.released_loop, connector, x, dy=dy)
    fused = _step(peers.fused_torch, connector, x, dy=dy)
    others = {"released loop": loop, "fused torch": fused}
    if not recompute and tokens <= 256:
        others |= {"compiled loop": peers.compiled(loop), "compiled fused": peers.compiled(fused)}
    weights = list(connector.parameters())
    forward_flops = 2 * tokens * (shape.R * (shape.D + shape.E) + shape.E * shape.H * (shape.D + shape.O)) + 2 * shape.R * shape.S
    # dW of every product and dX of those that do not read the frozen image tokens.
    backward_flops = forward_flops + 2 * tokens * (shape.R * shape.E + shape.E * shape.H * shape.O) + 2 * shape.R * shape.S
    y_bytes = tokens * shape.O * x.element_size()
    return _work(
        ours,
        others,
        ("task_router", "soft_gate", "soft_experts"),
        dtype,
        reference=tokens <= 64,  # minutes more at many tokens, where its ops have rows of their own
        exact=exact,
        baseline="released loop",
        flops=forward_flops + (backward_flops if train else 0),
        bytes=_nbytes(x, *weights) + y_bytes + (_nbytes(*weights) + y_bytes if train else 0),
        given=[x, *weights, *([] if dy is None else [dy])],
    )


# An int8 activation is half a percent of its row's largest value away from what it stands for; a bf16 one half that of itself.
INT8_SLACK = 8


def connector_int8(shape: Shape, tokens: int, dtype: torch.dtype) -> Work:
    """The soft connector with int8 weights, beside ours in bf16. Weights are numbers that both dtypes have: all sides compute one thing."""
    if torch.get_default_device().type != "cpu":
        raise Skipped("int8 weights are for CPUs")
    if dtype != torch.bfloat16:
        raise Skipped("int8 activations are within what rounding to bfloat16 allows, and no finer dtype's")
    connector = soft_connector(shape, dtype).eval()
    with torch.no_grad():
        for w in (connector.router.w1[:, shape.S :], connector.experts.w1, connector.experts.w2):
            _on_int8_grid_(w)
    x = torch.randn(tokens, shape.D).to(dtype)

    def ours(to: torch.dtype | None) -> Callable[[], Step]:
        def build() -> Step:
            made = copy.deepcopy(connector)
            made.requires_grad_(False)
            if to is not None:
                made.prepack(to)
            return Step(lambda: made(x, task=TASKS[0]).embeddings)

        return build

    loop, fused = (_step(peer, connector, x, dy=None) for peer in (peers.released_loop, peers.fused_torch))
    others = {"released loop": loop, "ours, bf16": ours(None), "ours, bf16, prepacked": ours(dtype), "fused torch, bf16": fused}
    others |= {f"fused torch, int8: {name}": peers.fused_int8(connector, x, linear) for name, linear in peers.INT8_LINEARS.items()}
    weights = shape.R * shape.D + shape.expert_weights
    products = native.int8_kernels()
    return _work(
        ours(torch.int8),
        others,
        ("int8_router", "soft_gate", "int8_experts"),
        dtype,
        reference=False,
        exact=_step(peers.released_loop, connector, x.double(), dy=None, exact=True),
        baseline="released loop",
        flops=2 * tokens * (weights + shape.R * shape.E) + 2 * shape.R * shape.S,
        bytes=weights + _nbytes(x) + tokens * shape.O * x.element_size(),
        given=[x],
        slack=INT8_SLACK if products and products.products else 1,
    )


def _on_int8_grid_(w: Tensor) -> None:
    """Integers up to 127 times a power of two, as large as torch.nn.Linear's weights; each row has 127, which sets its scale."""
    w.random_(-127, 128)
    w[..., 0] = 127
    w *= 2.0 ** -round(math.log2(127 * w.shape[-1] ** 0.5))


# --- one GEMM ----------------------------------------------------------------------------------------------------------------
def gemm(shape: Shape, tokens: int, dtype: torch.dtype, form: str) -> Work:
    """grouped_linear with one expert: the first layers of all experts as one product, [T, D] times [E * H, D]."""
    x = torch.randn(tokens, shape.D).to(dtype)
    w = _linear_weight(1, shape.E * shape.H, shape.D, dtype=dtype)
    dy = torch.randn(tokens, shape.E * shape.H).to(dtype)
    offsets = torch.tensor([0, tokens], dtype=torch.int32)
    a, b = {"forward": (x, w[0].T), "dx": (dy, w[0]), "dw": (dy.T, x)}[form]
    out = torch.empty(a.shape[0], b.shape[1], dtype=dtype)

    def ours() -> Tensor:
        if form == "forward":
            return cmoe.grouped_linear(x, w, None, offsets)
        needs = [form == "dx", form == "dw", False]
        backend = backends.choose("grouped_linear", x.device.type, dtype)
        none = x.new_empty(0)
        dx, dw, _ = backends.run("grouped_linear_backward", backend, x.device, dy, x, w, None, offsets, None, None, none, 1, None, needs)
        return dx if form == "dx" else dw[0]

    def exact() -> Tensor:
        left, right = a.double(), b
        return torch.cat([left @ part.double() for part in right.split(2048, 1)], 1)

    return _work(
        lambda: Step(ours),
        {"torch.mm": lambda: Step(lambda: torch.mm(a, b)), "torch.mm, kept buffer": lambda: Step(lambda: torch.mm(a, b, out=out))},
        ("grouped_linear",),
        dtype,
        exact=lambda: Step(exact),
        baseline="torch.mm",
        flops=2 * tokens * shape.D * shape.E * shape.H,
        bytes=_nbytes(x, w, dy),
        given=[x, w, dy],
    )


def grouped(shape: Shape, tokens: int, dtype: torch.dtype) -> Work:
    """The first layers of sparse experts on sorted rows, forward and both gradients."""
    width = (2 if shape.gated else 1) * shape.H
    rows = tokens * shape.K
    counts = torch.bincount(torch.randint(shape.E, (rows,)), minlength=shape.E)
    offsets = F.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
    x = torch.randn(rows, shape.D).to(dtype)
    w = _linear_weight(shape.E, width, shape.D, dtype=dtype)
    dy = torch.randn(rows, width).to(dtype)
    bounds = offsets.tolist()

    def whole(call: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], Step]:
        def build() -> Step:
            leaves = Leaves()
            xl, wl = leaves.vector("x", x), leaves.weight("w", w)
            return Step(lambda: call(xl, wl), leaves, dy)

        return build

    def loop(rows: Tensor, leaves: Leaves) -> Callable[[], Tensor]:
        xl, each = leaves.vector("x", rows), leaves.weights("w", w)
        return lambda: torch.cat([leaves.linear(xl[a:b], we) for a, b, we in zip(bounds, bounds[1:], each, strict=False)])

    def grouped_mm() -> Step:
        if not hasattr(F, "grouped_mm"):
            raise Skipped(f"torch {torch.__version__} has no torch.nn.functional.grouped_mm")
        return whole(lambda xl, wl: F.grouped_mm(xl, wl.transpose(1, 2), offs=offsets[1:]))()

    return _work(
        whole(lambda xl, wl: cmoe.grouped_linear(xl, wl, None, offsets)),
        {"torch loop": _step(loop, x, dy=dy), "torch grouped_mm": grouped_mm},
        ("grouped_linear",),
        dtype,
        exact=_step(loop, x.double(), dy=dy, exact=True),
        baseline="torch loop",
        flops=6 * rows * shape.D * width,
        bytes=2 * _nbytes(x, w, dy),
        given=[x, w, dy, offsets],
    )


# --- parts of the connector --------------------------------------------------------------------------------------------------
def router(shape: Shape, tokens: int, dtype: torch.dtype) -> Work:
    """The router alone on frozen image tokens, forward and every gradient."""
    x, task = torch.randn(tokens, shape.D).to(dtype), torch.randn(1, shape.S).to(dtype)
    w1, b1 = _linear_weight(shape.R, shape.S + shape.D, dtype=dtype), _linear_weight(shape.R, dtype=dtype)
    w2, b2 = _linear_weight(shape.E, shape.R, dtype=dtype), _linear_weight(shape.E, dtype=dtype)
    dy = torch.randn(tokens, shape.E)

    def ours() -> Step:
        leaves = Leaves()
        arguments = [leaves.vector(n, t) for n, t in zip(("task", "w1", "b1", "w2", "b2"), (task, w1, b1, w2, b2), strict=True)]
        return Step(lambda: cmoe.task_router(x, *arguments), leaves, dy)

    flops = 2 * tokens * shape.R * (shape.D + shape.E) + 2 * shape.R * shape.S
    return _work(
        ours,
        {"concatenating torch": _step(peers.concatenating_router, x, task, w1, b1, w2, b2, dy=dy)},
        ("task_router",),
        dtype,
        exact=_step(peers.concatenating_router, x.double(), task, w1, b1, w2, b2, dy=dy, exact=True),
        baseline="concatenating torch",
        flops=2 * flops + 2 * tokens * shape.R * shape.E + 2 * shape.R * shape.S,
        bytes=_nbytes(x) + 2 * _nbytes(task, w1, b1, w2, b2, dy),
        given=[x, task, w1, b1, w2, b2, dy],
    )


def soft_experts(shape: Shape, tokens: int, dtype: torch.dtype) -> Work:
    """The experts alone on frozen image tokens, forward and every gradient."""
    x = torch.randn(tokens, shape.D).to(dtype)
    w1, b1 = _linear_weight(shape.E, shape.H, shape.D, dtype=dtype), _linear_weight(shape.E, shape.H, dtype=dtype)
    w2, b2 = _linear_weight(shape.E, shape.O, shape.H, dtype=dtype), _linear_weight(shape.E, shape.O, dtype=dtype)
    gates = cmoe.soft_gate(torch.randn(tokens, shape.E))
    dy = torch.randn(tokens, shape.O).to(dtype)

    def ours() -> Step:
        leaves = Leaves()
        arguments = [leaves.vector(n, t) for n, t in zip(("gates", "w1", "b1", "w2", "b2"), (gates, w1, b1, w2, b2), strict=True)]
        return Step(lambda: cmoe.soft_experts(x, *arguments), leaves, dy)

    return _work(
        ours,
        {
            "stacking torch": _step(peers.stacked_experts, x, gates, w1, b1, w2, b2, dy=dy),
            "fused torch": _step(peers.fused_experts, x, gates, w1, b1, w2, b2, dy=dy),
        },
        ("soft_experts",),
        dtype,
        exact=_step(peers.stacked_experts, x.double(), gates, w1, b1, w2, b2, dy=dy, exact=True),
        baseline="stacking torch",
        flops=2 * tokens * shape.E * shape.H * (2 * shape.D + 3 * shape.O),
        bytes=_nbytes(x) + 2 * _nbytes(gates, w1, b1, w2, b2, dy),
        given=[x, gates, w1, b1, w2, b2, dy],
    )


# --- sparse experts ----------------------------------------------------------------------------------------------------------
def sparse(shape: Shape, tokens: int, dtype: torch.dtype, train: bool) -> Work:
    """The experts of a sparse layer, the selection given; training also makes the gradients of x and of the selection's weights."""
    weights, indices, _ = cmoe.topk_gate(torch.randn(tokens, shape.E), shape.K)
    first = (2 if shape.gated else 1) * shape.H
    s = peers.Sparse(
        x=torch.randn(tokens, shape.D).to(dtype),
        weights=weights,
        indices=indices,
        w1=_linear_weight(shape.E, first, shape.D, dtype=dtype),
        b1=None if shape.gated else _linear_weight(shape.E, first, dtype=dtype),
        w2=_linear_weight(shape.E, shape.O, shape.H, dtype=dtype),
        b2=None if shape.gated else _linear_weight(shape.E, shape.O, dtype=dtype),
        gated=shape.gated,
    )
    dy = torch.randn(tokens, shape.O).to(dtype) if train else None

    def ours(p: peers.Sparse, leaves: Leaves | None) -> Callable[[], Tensor]:
        p = p.whole(leaves)
        arguments = (p.x, p.weights, p.indices, p.w1, p.b1, p.w2, p.b2, p.activation, p.gated)
        return lambda: cmoe.sparse_experts(*arguments)

    def whole(formula: Callable[..., Callable[[], Tensor]], **settings) -> Callable[[], Step]:
        """Over leaves in one piece; none where there is no backward."""

        def build() -> Step:
            leaves = Leaves() if train else None
            return Step(formula(s, leaves, **settings), leaves, dy)

        return build

    def vllm(packing: bool) -> Step:
        if train:
            raise Skipped("vLLM's operators have no backward")
        return Step(peers.vllm_experts(s, packing))

    others: dict[str, Callable[[], Step]] = {"torch loop": _step(peers.expert_loop, s, dy=dy)}
    others["torch grouped_mm"] = whole(peers.torch_grouped_mm)
    for name in ("eager", "batched_mm", "grouped_mm"):
        others[f"transformers {name}"] = whole(peers.transformers_experts, implementation=name)
    for name, formula in peers.GPU_PEERS.items():
        others[name] = whole(formula)
    others["vllm"] = functools.partial(vllm, packing=False)
    others["vllm, packing inside"] = functools.partial(vllm, packing=True)
    # Experts without rows are not read forward; their zero gradients are written.
    used = indices.unique().numel() / shape.E
    matrices, biases, size = shape.expert_weights, shape.expert_biases, s.x.element_size()
    rows = _nbytes(s.x) + tokens * shape.O * size
    flops = 2 * tokens * shape.K * matrices / shape.E
    exact_s = peers.Sparse(**{**vars(s), "x": s.x.double(), "weights": s.weights.double()})
    return _work(
        whole(ours),
        others,
        ("sparse_experts",),
        dtype,
        exact=_step(peers.expert_loop, exact_s, dy=dy, exact=True),
        baseline="torch loop",
        flops=(3 if train else 1) * flops,
        bytes=used * (matrices + biases) * size + rows + ((matrices + biases) * size + rows if train else 0),
        given=[t for t in (*vars(s).values(), dy) if isinstance(t, Tensor)],
    )


# --- gates and losses --------------------------------------------------------------------------------------------------------
def gates(shape: Shape, tokens: int, dtype: torch.dtype, kind: str) -> Work:
    """Forward and backward from logits."""
    logits = torch.randn(tokens, shape.E).to(dtype)
    k = shape.K

    def torch_soft(scores: Tensor) -> Tensor:
        scores = scores.sigmoid()
        return scores / scores.sum(-1, keepdim=True)

    def torch_topk(scores: Tensor) -> Tensor:
        chosen = scores.softmax(-1).topk(k).values
        return chosen / chosen.sum(-1, keepdim=True)

    def torch_loss(scores: Tensor) -> Tensor:
        probabilities = scores.softmax(-1)
        share = F.one_hot(probabilities.topk(k).indices, shape.E).to(scores.dtype).mean((0, 1))
        return shape.E * (share * probabilities.mean(0)).sum()

    def our_loss(scores: Tensor) -> Tensor:
        return cmoe.balance_loss(scores, cmoe.topk_gate(scores, k).indices, from_logits=True)

    ours, theirs, ops = {
        "soft": (cmoe.soft_gate, torch_soft, ("soft_gate",)),
        "topk": (lambda scores: cmoe.topk_gate(scores, k).weights, torch_topk, ("topk_gate",)),
        "loss": (our_loss, torch_loss, ("topk_gate", "balance_loss")),
    }[kind]
    dy = {"soft": torch.randn(tokens, shape.E), "topk": torch.randn(tokens, k), "loss": torch.ones(())}[kind]

    def step(call: Callable[[Tensor], Tensor], exact: bool = False) -> Callable[[], Step]:
        def build() -> Step:
            leaves = Leaves()
            leaf = leaves.vector("logits", logits.double() if exact else logits)
            return Step(lambda: call(leaf), leaves, dy)

        return build

    def transformers() -> Step:
        leaves = Leaves()
        return Step(peers.transformers_loss(leaves.vector("logits", logits), shape.E, k), leaves, dy)

    others = {"torch": step(theirs), **({"transformers": transformers} if kind == "loss" else {})}
    return _work(
        step(ours),
        others,
        ops,
        dtype,
        exact=step(theirs, exact=True),
        baseline="torch",
        flops=0,
        bytes=2 * _nbytes(logits, dy),
        given=[logits, dy],
    )
