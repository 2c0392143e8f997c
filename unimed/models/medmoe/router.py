"""The router of Med-MoE: trained on modality labels, the same in every layer, then frozen."""

import os
import pickle
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F

from unimed import io
from unimed.errors import UserError
from unimed.models.medmoe.layers import MoEFFN, Router
from unimed.models.medmoe.upcycling import moe_layers

Batches = Iterable[tuple[dict[str, Any], Tensor]]
Sample = tuple[Tensor, int]  # what each layer reads, [layers, tokens, D]; the label


class RouterAccuracy(NamedTuple):
    """Shares of right choices: of tokens in all layers, and of samples by the mean of their tokens' logits; ``majority`` is the share of
    samples with the most frequent label."""

    tokens: float
    samples: float
    majority: float


def train_router(
    model: nn.Module,
    batches: Batches,
    *,
    steps: int = 500,
    lr: float = 1e-3,
    batch_size: int = 1024,
    tokens_per_sample: int | None = 32,
    seed: int = 0,
) -> RouterAccuracy:
    """Train one router on what all upcycled layers read, each token with the label of its sample, and put it into every layer.

    loss = mean over layers and tokens of cross_entropy(router(x), label), x after the layer's norm   (Med-MoE, eq. 3)

    Args:
        model: upcycled with ``router="frozen"``. It runs once over the data as it is, without gradients. With scale="released" what later
            layers read shifts a little when the new router takes its place; :func:`router_accuracy` measures it there.
        batches: pairs of forward's arguments and labels [B] int64. Label i sends the sample's tokens to expert i. Tokens that
            ``attention_mask`` leaves out are not used.
        steps: of the optimiser.
        lr: of AdamW.
        batch_size: tokens in a step, drawn from all layers and samples.
        tokens_per_sample: drawn at random from each sample, the same in all layers, to bound memory; None for all.
        seed: of the router and all draws.

    Returns:
        The accuracy on the collected tokens.

    Raises:
        UserError: the model has no frozen routers, or there is no data, or a label is out of range.
    """
    layers = _frozen_layers(model)
    samples = _collect(model, batches, layers, tokens_per_sample, seed)
    _fit(layers, samples, steps, lr, batch_size, seed)
    return _judge(layers, samples)


def label_curve(
    model: nn.Module,
    batches: Batches,
    held_out: Batches,
    counts: Sequence[int],
    *,
    steps: int = 500,
    lr: float = 1e-3,
    batch_size: int = 1024,
    tokens_per_sample: int | None = 32,
    seed: int = 0,
) -> dict[int, RouterAccuracy]:
    """The accuracy on held-out samples by the number of labelled samples that the router was trained on, each time anew (Med-MoE, Fig. 6).

    Args:
        model: as of :func:`train_router`. Its layers keep the router of the largest count.
        batches: of training; a router of n labels is trained on the first n of them in a random order.
        held_out: of the measurement, whose tokens are drawn as those of training are.
        counts: numbers of labels.
        steps: and all others as of :func:`train_router`.
    """
    layers = _frozen_layers(model)
    samples = _collect(model, batches, layers, tokens_per_sample, seed)
    if not counts or any(type(count) is not int or not 1 <= count <= len(samples) for count in counts):
        raise UserError(f"counts is {list(counts)}, must be numbers in 1..{len(samples)} (the samples in batches)")
    measured = _collect(model, held_out, layers, tokens_per_sample, seed)
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed)).tolist()
    curve = {}
    for count in sorted(set(counts)):
        _fit(layers, [samples[place] for place in order[:count]], steps, lr, batch_size, seed)
        curve[count] = _judge(layers, measured)
    return curve


def plot_label_curve(curve: dict[int, RouterAccuracy], path: str | os.PathLike) -> None:
    """Write what :func:`label_curve` measured as a picture; its suffix says which kind (.svg, .png)."""
    label_curve_figure(curve).savefig(path)


def label_curve_figure(curve: dict[int, RouterAccuracy]) -> Any:
    """The picture of :func:`plot_label_curve` as a figure of matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axes = figure.subplots()
    counts = list(curve)
    for name in ("tokens", "samples"):
        axes.plot(counts, [100 * getattr(curve[count], name) for count in counts], marker="o", label=name)
    axes.axhline(100 * curve[counts[0]].majority, linestyle="--", color="grey", label="majority")
    axes.set(xscale="log", xlabel="labelled samples", ylabel="held-out accuracy, %")
    axes.set_xticks(counts, [f"{count:,}" for count in counts])
    axes.minorticks_off()
    axes.legend()
    return figure


def router_accuracy(model: nn.Module, batches: Batches) -> RouterAccuracy:
    """How often the routers choose the expert that a sample's label names, on all tokens; arguments as of :func:`train_router`."""
    layers = _frozen_layers(model)
    return _judge(layers, _samples(model, batches, layers))


def save_router(model: nn.Module, path: str | os.PathLike) -> None:
    """Write the router of the upcycled layers as safetensors: ``weight`` [E, D] and ``bias``, or those of two layers as ``0.`` and ``2.``.

    Raises:
        UserError: the layers have different routers.
    """
    layers = _frozen_layers(model)
    state = layers[0].router.state_dict()
    for layer in layers[1:]:
        if any(not torch.equal(tensor, state[name]) for name, tensor in layer.router.state_dict().items()):
            raise UserError("the layers' routers differ, so one file cannot hold them; train_router and load_router make them one")
    names = {"w1": "0.weight", "b1": "0.bias", "w2": "2.weight", "b2": "2.bias"}
    if "w2" not in state:
        names = {"w1": "weight", "b1": "bias"}
    target = Path(path)
    try:
        with io.beside(target) as partial:
            safetensors.torch.save_file({names[name]: tensor.contiguous() for name, tensor in state.items()}, partial)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be written: {str(error).splitlines()[0]}") from error


def load_router(model: nn.Module, path: str | os.PathLike) -> None:
    """Put a router file into every upcycled layer.

    The file is safetensors, or what torch.save wrote of plain tensors, as the release's are; nothing in it is executed. Its keys end in
    "weight" and "bias"; prefixes do not matter.

    Raises:
        UserError: another container, or a router of another width, number of experts or number of layers.
    """
    layers = _frozen_layers(model)
    found = _read(Path(path))
    parts: dict[str, list[Tensor]] = {"weight": [], "bias": []}
    for key in sorted(found):
        kind = key.rpartition(".")[2]
        if kind not in parts:
            raise UserError(f"{path}: the key {key!r} must end in weight or bias")
        parts[kind].append(found[key])
    state = {f"{letter}{i}": tensor for letter, kind in (("w", "weight"), ("b", "bias")) for i, tensor in enumerate(parts[kind], 1)}
    wanted = layers[0].router.state_dict()
    if _shapes(state) != _shapes(wanted):
        raise UserError(f"{path}: the router has {_shapes(state) or 'nothing'}, must have {_shapes(wanted)} for this model")
    _install(layers, state)


def _frozen_layers(model: nn.Module) -> list[MoEFFN]:
    layers = list(moe_layers(model).values())
    if not layers:
        raise UserError(f"{type(model).__name__} has no upcycled layers; call upcycle first")
    frozen = [layer for layer in layers if layer.settings.router == "frozen"]
    if not frozen:
        raise UserError("the routers are learned with the model, must be those of upcycle(..., router='frozen')")
    if len({_shapes(layer.router.state_dict()) for layer in frozen}) > 1:
        raise UserError("the frozen routers differ in size, must be alike to be one")
    return frozen


def _shapes(state: dict[str, Tensor]) -> str:
    return ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in sorted(state.items()))


def _collect(model: nn.Module, batches: Batches, layers: Sequence[MoEFFN], tokens_per_sample: int | None, seed: int) -> list[Sample]:
    """Some tokens of each sample."""
    draw = torch.Generator().manual_seed(seed)
    samples: list[Sample] = []
    for x, label in _samples(model, batches, layers):
        if tokens_per_sample is not None:
            x = x[:, torch.randperm(x.shape[1], generator=draw)[:tokens_per_sample].to(x.device)]
        samples.append((x, label))
    if not samples:
        raise UserError("batches holds no sample, must hold at least one")
    return samples


def _fit(layers: Sequence[MoEFFN], samples: Sequence[Sample], steps: int, lr: float, batch_size: int, seed: int) -> None:
    """A new router, trained on the samples, in every layer."""
    x = torch.cat([tokens.flatten(0, 1) for tokens, _ in samples])
    y = torch.cat([torch.full((tokens.shape[0] * tokens.shape[1],), label) for tokens, label in samples]).to(x.device)
    draw = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        router = Router(layers[0].settings, x.shape[1])
    weights: dict[str, Tensor] = {name: nn.Parameter(tensor.to(x.device)) for name, tensor in router.state_dict().items()}
    optimizer = torch.optim.AdamW(weights.values(), lr=lr, weight_decay=0.0)
    for _ in range(steps):
        rows = torch.randint(len(x), (batch_size,), generator=draw).to(x.device)
        with torch.enable_grad():
            loss = F.cross_entropy(torch.func.functional_call(router, weights, (x[rows],)), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    _install(layers, {name: tensor.detach() for name, tensor in weights.items()})


def _install(layers: Sequence[MoEFFN], state: dict[str, Tensor]) -> None:
    for layer in layers:
        layer.router.load_state_dict(state)


@torch.no_grad()
def _judge(layers: Sequence[MoEFFN], samples: Iterable[Sample]) -> RouterAccuracy:
    right, count, hits, labels = 0, 0, 0, []
    for x, label in samples:
        logits = torch.stack([layer.router(tokens) for layer, tokens in zip(layers, x, strict=True)])
        right += int((logits.argmax(-1) == label).sum())
        count += logits.shape[0] * logits.shape[1]
        hits += int(logits.mean((0, 1)).argmax()) == label
        labels.append(label)
    if not labels:
        raise UserError("batches holds no sample, must hold at least one")
    return RouterAccuracy(right / count, hits / len(labels), max(map(labels.count, set(labels))) / len(labels))


@torch.no_grad()
def _samples(model: nn.Module, batches: Batches, layers: Sequence[MoEFFN]) -> Iterator[Sample]:
    """What the layers read, sample by sample."""
    experts = layers[0].settings.num_experts
    read: list[Tensor] = []
    hooks = [layer.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0])) for layer in layers]
    training = model.training
    model.eval()
    try:
        for inputs, labels in batches:
            if labels.dtype != torch.int64 or labels.dim() != 1 or not bool(((labels >= 0) & (labels < experts)).all()):
                raise UserError(f"labels are {labels.tolist()}, must be int64 in 0..{experts - 1} (the experts), one for each sample")
            read.clear()
            model(**inputs)
            x = torch.stack(read, 1)  # [B, layers, N, D]
            if len(x) != len(labels):
                raise UserError(f"labels has {len(labels)} entries, must have {len(x)} (samples in the batch)")
            mask = inputs.get("attention_mask")
            for i, label in enumerate(labels.tolist()):
                yield x[i] if mask is None else x[i][:, mask[i].bool()], label
    finally:
        for hook in hooks:
            hook.remove()
        model.train(training)


def _read(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            found: Any = safetensors.torch.load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"{path}: not a file of plain tensors: {str(error).splitlines()[0]}") from error
    if not isinstance(found, dict) or not all(isinstance(key, str) and _plain(value) for key, value in found.items()):
        raise UserError(f"{path}: it must map names to dense floating-point tensors")
    return found


def _plain(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout is torch.strided and value.is_floating_point()
