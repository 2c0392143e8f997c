"""The memory of a training step, counted without allocating it.

The recipe's own model takes a step on fake tensors, which have shapes and no data, while every live storage is counted: parameters, what
autograd saves, gradients, the optimiser's state and what operations make in between. Memory inside kernels is not seen.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from cmoe_kernels import CMoEConfig, CMoEConnector
from cmoe_kernels.nn.connector import ConnectorOutput
from unimed.errors import UserError
from unimed.models.build import adapt, describe
from unimed.models.keys import nearest
from unimed.models.spec import DTYPES, from_scratch
from unimed.models.unimed.modeling import UniMedForConditionalGeneration
from unimed.tasks import RELEASED_TASKS, TASKS
from unimed.train import recipe as recipes
from unimed.train.recipe import Recipe

GB = 10**9
TOKENS = 256  # of text in a sample: 50 words each of question and answer, the frame, and room
DEVICES = {
    "a100-40g": 40, "a100-80g": 80, "h100-80g": 80, "h200-141g": 141, "b200-180g": 180, "mi300x": 192, "v100-32g": 32, "l4": 24,
    "l40s": 48, "a6000": 48, "rtx3090": 24, "rtx4090": 24, "rtx5090": 32,
}  # fmt: skip
# Left for the driver and for gaps between blocks: a rule of thumb, not measured.
USABLE, RESERVED = 0.95, 1 * GB


class Live(TorchDispatchMode):
    """Counts the bytes of storages that are alive, each once; `peak` is the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.add(one for one in tree_leaves(made) if isinstance(one, Tensor))
        return made

    def add(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key not in self._known:
                self._known[key] = weakref.ref(storage, partial(self._gone, key, size))
                self.now += size
        self.peak = max(self.peak, self.now)

    def _gone(self, key: int, size: int, _: Any) -> None:
        del self._known[key]
        self.now -= size


class PackedLinear(nn.Linear):
    """A Linear in 4 or 8 bits, as bitsandbytes keeps it: bytes and scales, and the weight only while a product needs it."""

    @classmethod
    def put(cls, linear: nn.Linear, kind: str) -> None:
        count = linear.weight.numel()
        # NF4: half a byte, a byte of scale for each 64, four for each 256 of those. int8: a byte, four for each row.
        size = count + 4 * linear.out_features if kind == "8bit" else count // 2 + count // 64 + count // 4096
        linear.weight = nn.Parameter(torch.empty(size, dtype=torch.uint8, device=linear.weight.device), requires_grad=False)
        linear.__class__ = cls

    def forward(self, x: Tensor) -> Tensor:
        half = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        y = _Unpacked.apply(x.to(half), self.weight, self.out_features)
        return y if self.bias is None else y + self.bias.to(half)


class _Unpacked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, out: int) -> Tensor:
        ctx.packed, ctx.shape = packed, (out, x.shape[-1])
        return F.linear(x, x.new_empty(ctx.shape))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return dy @ dy.new_empty(ctx.shape), None, None


class LoopConnector(nn.Module):
    """The connector without our kernels, as a plain loop over experts: the same parameters, the same values.

    `recompute`: in an activation checkpoint.
    """

    def __init__(self, connector: CMoEConnector, recompute: bool = False) -> None:
        super().__init__()
        self.config, self.recompute = connector.config, recompute
        self.router, self.experts = connector.router, connector.experts

    def forward(self, features: Tensor, task: Any = None) -> ConnectorOutput:
        c = self.config
        x, (batch, _) = CMoEConnector._resample(self, features)  # type: ignore[arg-type]
        x = x.unflatten(0, (batch, -1))
        places = torch.as_tensor([c.tasks.index(one) for one in task] if isinstance(task, list | tuple) else task, device=x.device)
        y, gates = checkpoint(self._run, x, places, use_reentrant=False) if self.recompute else self._run(x, places)
        return ConnectorOutput(y, gates, gates.new_zeros(()), {})

    def _run(self, x: Tensor, task: Tensor) -> tuple[Tensor, Tensor]:
        c = self.config
        experts: Any = self.experts
        gates = self._gates(x, task)
        total = None
        for e in range(c.num_experts):
            y = F.linear(x, experts.w1[e], None if experts.b1 is None else experts.b1[e])
            if c.expert == "mlp":
                y = F.linear(F.gelu(y), experts.w2[e], None if experts.b2 is None else experts.b2[e])
            y = y * gates[..., e : e + 1]
            total = y if total is None else total + y
        assert total is not None
        return total, gates

    def _gates(self, x: Tensor, task: Tensor) -> Tensor:
        c = self.config
        router: Any = self.router
        if c.router == "constant":
            return x.new_full((*x.shape[:2], c.num_experts), 1 / c.num_experts)
        if c.router == "hard":
            return F.one_hot(task, c.num_experts).to(x.dtype)[:, None].expand(-1, x.shape[1], -1)
        parts = [router.task_tokens[task][:, None].expand(-1, x.shape[1], -1).to(x.dtype)] if c.uses_task_tokens else []
        parts += [x] if c.router_inputs != "task" else []
        logits = F.linear(torch.cat(parts, dim=-1), router.w1, router.b1)
        if c.router_layers == 2:
            logits = F.linear(F.gelu(logits), router.w2, router.b2)
        if c.router == "soft":
            gates = logits.sigmoid()
            return gates / gates.sum(-1, keepdim=True)
        top, indices = logits.topk(c.top_k, dim=-1)
        return torch.full_like(logits, -torch.inf).scatter(-1, indices, top).softmax(-1)


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of a step. `activations`: what comes on top of the other three. `saved`: what autograd holds after forward.

    Gradients take the place of what autograd saved while backward runs, so `saved` may be above `activations`.
    """

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    saved: int

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.activations


def step_memory(recipe: Recipe, tokens: int = TOKENS, loop: bool = False) -> Memory:
    """The memory of one optimiser step of a recipe, after the first: its batch, with `tokens` tokens of text in each sample.

    `loop`: the connector as a plain loop (LoopConnector).
    """
    model = _model(recipe, loop)
    with FakeTensorMode(allow_non_fake_inputs=True):
        # Fake tensors of the CPU: any device has the same shapes, and no machine needs it.
        model.to_empty(device="cpu")
        model.train()
        (model.get_base_model() if recipe.lora else model).tie_weights()
        if recipe.train.gradient_checkpointing:
            model.activation_checkpointing_enable()
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, fused=True)
        for p in trained:
            p.grad = torch.empty_like(p)
        optimizer.step()
        optimizer.zero_grad()
        batch = _batch(recipe, model.config, tokens)
        live = Live()
        live.add([*model.parameters(), *model.buffers()])
        parameters = live.now
        live.add(value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor))
        state = live.now - parameters
        with live:
            # The Trainer's step: parts of a batch, each forward and backward, then the optimiser.
            for _ in range(recipe.train.accumulate):
                with _autocast(recipe):
                    loss = model(**batch, num_items_in_batch=torch.ones((), dtype=torch.long)).loss
                saved = live.now - parameters - state
                loss.backward()
                del loss
            if recipe.optim.clip:
                torch.nn.utils.clip_grad_norm_(trained, recipe.optim.clip)
            optimizer.step()
    gradients = sum(p.numel() * p.element_size() for p in trained)
    return Memory(parameters, gradients, state, live.peak - parameters - state - gradients, saved)


def _model(recipe: Recipe, loop: bool) -> Any:
    """The recipe's model on the meta device."""
    more = [task for task in recipe.data.tasks if task not in RELEASED_TASKS]
    config = describe(recipe, [task for task in (*RELEASED_TASKS, *more) if TASKS[task].needs_image])
    with torch.device("meta"):
        model: Any = UniMedForConditionalGeneration(config)
        if loop:
            model.connector = LoopConnector(model.connector, recipe.connector.recompute)
            model.connector.requires_grad_(not recipe.connector.freeze)
        model.apply_dtypes()
        model.set_trainable()
        if recipe.language.quantize:
            head = model.get_output_embeddings()
            for module in model.language_model.modules():
                if type(module) is nn.Linear and module is not head:
                    PackedLinear.put(module, recipe.language.quantize)
        return adapt(model, recipe, quantize=False)


def _autocast(recipe: Recipe) -> Any:
    halves = recipe.train.precision != "fp32"
    return torch.autocast("cpu", getattr(torch, DTYPES[recipe.train.precision])) if halves else nullcontext()


def connector_memory(recipe: Recipe, loop: bool, recompute: bool) -> int:
    """Bytes that autograd holds after the connector's forward pass of a batch, beside its parameters and its output."""
    changed = recipe.model_copy(update={"connector": recipe.connector.model_copy(update={"recompute": recompute})})
    config = describe(changed, [task for task in RELEASED_TASKS if TASKS[task].needs_image])
    c = CMoEConfig.from_dict(config.connector)
    with torch.device("meta"):
        connector: Any = CMoEConnector(c, dtype=getattr(torch, DTYPES[recipe.connector.dtype]))
    connector = LoopConnector(connector, recompute) if loop else connector
    with FakeTensorMode(allow_non_fake_inputs=True):
        connector.to_empty(device="cpu")
        dtype = next(connector.parameters()).dtype
        patches = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
        features = torch.zeros(recipe.train.batch_size, patches, c.in_features, dtype=dtype)
        tasks = torch.zeros(recipe.train.batch_size, dtype=torch.long)
        live = Live()
        live.add([*connector.parameters(), features, tasks])
        before = live.now
        with live, _autocast(recipe):
            embeddings = connector(features, task=tasks).embeddings
        return live.now - before - embeddings.untyped_storage().nbytes()


def _batch(recipe: Recipe, config: Any, tokens: int) -> dict[str, Any]:
    """A batch in which every sample has an image: half of the text is the answer."""
    size, side, images = recipe.train.batch_size, config.vision_config.image_size, config.num_image_tokens
    length = images + tokens
    if length > config.text_config.max_position_embeddings:
        raise UserError(
            f"--tokens {tokens}: with {images} image tokens, more than the {config.text_config.max_position_embeddings} positions"
        )
    ids = torch.zeros(size, length, dtype=torch.long)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": torch.zeros_like(ids),
        "pixel_values": torch.zeros(size, 3, side, side),
        "task_ids": torch.zeros(size, dtype=torch.long),
    }


# What the command says


@dataclass(frozen=True)
class Change:
    """Something that makes a recipe smaller: the overrides that do it, and its total then."""

    overrides: tuple[str, ...]
    total: int
    fits: bool


def device_bytes(name: str) -> int:
    """The memory of a device by its name; "cpu" is this machine."""
    if name == "cpu":
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if name not in DEVICES:
        near = nearest(name, list(DEVICES))
        raise UserError(f"--device {name}: unknown{f', nearest: {near}' if near else ''}; known are cpu, {', '.join(DEVICES)}")
    return DEVICES[name] * GB


def fits(total: int, device: str) -> bool:
    usable = device_bytes(device)
    return total <= (usable if device == "cpu" else USABLE * usable - RESERVED)


def smaller(recipe: Recipe) -> Iterator[tuple[str, ...]]:
    """Overrides that need less memory, each on top of those before, the harmless first."""
    train, language = recipe.train, recipe.language
    half = "bf16" if train.precision == "fp32" else train.precision  # autocast makes copies of weights in any other dtype
    so_far: list[str] = []
    steps = [
        ["train.gradient_checkpointing=true"] if not train.gradient_checkpointing else [],
        ["connector.recompute=true"] if not recipe.connector.recompute else [],
        [f"train.batch_size=1 train.accumulate={train.batch_size * train.accumulate}"] if train.batch_size > 1 else [],
        [f"language.dtype={half}"] if language.dtype == "fp32" and (language.lora or language.freeze) else [],
        ["language.quantize=4bit"] if language.quantize is None and language.lora and not from_scratch(language.source) else [],
    ]
    for one in steps:
        if one:
            so_far += one[0].split()
            yield tuple(so_far)


def report(source: str, overrides: list[str], device: str, tokens: int = TOKENS) -> dict[str, Any]:
    """Everything that `unimed estimate` says, as JSON has it."""
    device_bytes(device)
    recipe = recipes.load(source, overrides)
    memory = step_memory(recipe, tokens)
    connector = {
        f"{name}{'_recompute' * recompute}": connector_memory(recipe, loop, recompute)
        for name, loop in (("kernels", False), ("loop", True))
        for recompute in (False, True)
    }
    own = connector["kernels_recompute" if recipe.connector.recompute else "kernels"]
    changes = []
    if not fits(memory.total, device):
        for more in smaller(recipe):
            total = step_memory(recipes.load(source, [*overrides, *more]), tokens).total
            changes.append(Change(more, total, fits(total, device)))
            if changes[-1].fits:
                break
    return {
        "recipe": recipe.name,
        "batch": recipe.train.batch_size,
        "tokens": tokens,
        **{name: getattr(memory, name) for name in ("parameters", "gradients", "optimizer", "activations", "total")},
        "saved_for_backward": memory.saved,
        "connector": connector,
        "activations_without_kernels": memory.activations - own + connector["loop"],
        "device": device,
        "device_bytes": device_bytes(device),
        "fits": fits(memory.total, device),
        "changes": [asdict(change) for change in changes],
    }
