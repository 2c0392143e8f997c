"""A call of a model whose projector is a mixture of experts: whose tasks, which text, and what the connectors gave.

The projector sees image features only, deep inside the model; the call is recorded where ``forward`` or ``generate`` starts, in a context
variable, so that threads do not meet.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from cmoe_kernels.integrations.task_calls import Route
from cmoe_kernels.nn.connector import ConnectorOutput
from cmoe_kernels.ops.arguments import require_index, require_range

Task = str | Sequence[str] | Tensor


class Call:
    """One forward (or generate): whose tasks, which text, and what the connectors gave."""

    def __init__(self, model: Any, inputs: dict[str, Any], task: Task | None) -> None:
        self.model, self.inputs, self.task = model, inputs, task
        self.outputs: list[ConnectorOutput] = []
        self.seen: dict[nn.Module, int] = {}
        # A call that began in a backward pass is recomputed there; recomputed projectors of other calls are no part of it.
        self.graph_task = torch._C._current_graph_task_id()

    def route(self, projector: Any, features: Tensor) -> Route:
        """One task for all rows of features, or the task of each."""
        turn = self.seen[projector] = self.seen.get(projector, -1) + 1
        if self.task is None or not projector.connector.config.needs_task:
            return None, None
        if isinstance(self.task, str):
            return self.task, None
        places, rows = self.places().to(features.device), features.shape[:-1].numel()
        kinds = [kind for kind, name in PIXELS.items() if self.inputs.get(name) is not None] or ["image"]
        kind = kinds[min(turn, len(kinds) - 1)]
        tokens = self._image_tokens(kind)
        if tokens is None:
            return None, places.repeat_interleave(rows // len(places))
        of_token = places.repeat_interleave(tokens.to(features.device))
        images = None
        if self.model.adapter.images is not None:
            images = self.model.adapter.images(self.model, self.inputs, kind, features, len(of_token))
        expected = rows if images is None else sum(images.tokens)
        if expected != len(of_token):
            raise ValueError(f"input_ids hold {len(of_token)} {kind} tokens, the {kind}s become {expected}: tasks cannot be told apart")
        if images is None:
            return None, of_token
        first = torch.tensor([0, *images.tokens[:-1]], device=features.device).cumsum(0)
        return None, of_token[first].repeat_interleave(torch.tensor(images.rows, device=features.device))

    def places(self) -> Tensor:
        """LongTensor [B], the place of each sample's task in ``tasks``."""
        tasks = self.model.config.cmoe["tasks"]
        # BLIP-2 may lack a text; every sample has one image then.
        samples = next(x for name in ("input_ids", "inputs_embeds", "pixel_values") if (x := self.inputs.get(name)) is not None)
        given = [self.task] * len(samples) if isinstance(self.task, str) else self.task
        if isinstance(given, Tensor):
            require_index("task", given, "B", samples)
            require_range("task", given, len(tasks), ", ".join(tasks))
        elif not isinstance(given, Sequence):
            raise TypeError(f"task is {given!r}, must be a name, a name per sample or LongTensor [B]")
        else:
            unknown = [name for name in given if name not in tasks]
            if unknown:
                raise ValueError(f"task is {unknown[0]!r}, must be one of {', '.join(tasks)}")
            given = torch.tensor([tasks.index(name) for name in given], device=samples.device)
        if given.shape != (len(samples),):
            raise ValueError(f"task has {len(given)} entries, must have {len(samples)} (samples in the batch)")
        return given

    def _image_tokens(self, kind: str) -> Tensor | None:
        """How many tokens of a kind each sample's text holds."""
        ids, embeds, token = self.inputs.get("input_ids"), self.inputs.get("inputs_embeds"), getattr(self.model.config, f"{kind}_token_id")
        if ids is not None:
            return (ids == token).sum(-1)
        if embeds is None:
            return None
        return (embeds == self.model.get_input_embeddings()(torch.tensor(token, device=embeds.device))).all(-1).sum(-1)

    def add_to(self, output: Any) -> Any:
        """The family's output with what the connectors gave."""
        added: dict[str, Any] = {"lm_loss": output.get("loss")}
        if self.outputs:
            parts = [out.aux_losses for out in self.outputs]
            aux_loss = torch.stack([out.aux_loss for out in self.outputs]).sum()
            added["aux_loss"] = aux_loss
            added["aux_losses"] = {name: torch.stack([part[name] for part in parts]).sum() for name in parts[0]}
            added["gates"] = tuple(out.gates for out in self.outputs)
            if output.get("loss") is not None:
                added["loss"] = output["loss"] + self._share() * aux_loss
        return _output(type(output), {**output, **added})

    def _share(self) -> Tensor | float:
        """This batch's part of an optimiser step, by learned tokens, as the language model's loss has it."""
        total = self.inputs.get("num_items_in_batch")
        return 1.0 if total is None else (self.inputs["labels"][:, 1:] != -100).sum() / total


PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}  # in the order in which models encode them

current: ContextVar[Call | None] = ContextVar("current", default=None)
ambient: ContextVar[Route] = ContextVar("ambient", default=(None, None))


@contextmanager
def recorded(call: Call) -> Iterator[None]:
    token = current.set(call)
    try:
        yield
    finally:
        current.reset(token)


@functools.cache
def _output_class(base: type[ModelOutput]) -> type[ModelOutput]:
    fields = dict.fromkeys(("lm_loss", "aux_loss", "aux_losses", "gates"), None)
    annotations = dict.fromkeys(fields, Any)
    members = {"__module__": __name__, "__annotations__": annotations, "__reduce__": lambda self: (_output, (base, dict(self))), **fields}
    return dataclasses.dataclass(type(f"CMoE{base.__name__}", (base,), members))


def _output(base: type[ModelOutput], values: dict[str, Any]) -> ModelOutput:
    return _output_class(base)(**values)
