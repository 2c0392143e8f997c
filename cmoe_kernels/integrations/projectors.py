"""CMoE in the multimodal models of transformers: the trained projector becomes a mixture of experts.

    model = replace_projector(model, num_experts=4, tasks=["chart", "photo"])   # a CMoELlavaForConditionalGeneration
    model(**inputs, task=["chart", "photo"]).loss.backward()                    # one task per sample; its images follow it
    model.generate(**inputs, task="chart")

The projector sees image features only, deep inside the model. ``forward`` records the task of each sample and the image tokens in its text
(:class:`calls.Call`), and the connector looks them up. The record lives in a context variable, so threads do not meet, and a connector that
runs without one says that a task is missing instead of taking a stale one. Inside an activation checkpoint the task stays with the call
(``task_calls.py``): recomputation sees it again, whatever the context is by then.
"""

import copy
import functools
import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    conversion_mapping,
)
from transformers.initialization import guard_torch_init_functions

from cmoe_kernels.integrations import calls
from cmoe_kernels.integrations.adapters import FAMILIES, WITHOUT_PROJECTOR, Adapter
from cmoe_kernels.integrations.calls import Task
from cmoe_kernels.integrations.task_calls import route_of
from cmoe_kernels.integrations.upcycle import configure, read, upcycle
from cmoe_kernels.nn.config import CMoEConfig
from cmoe_kernels.nn.connector import CMoEConnector
from cmoe_kernels.nn.int8 import refuse_saving

INITS = ("upcycle", "random")


def replace_projector(
    model: PreTrainedModel,
    config: CMoEConfig | None = None,
    *,
    init: str = "upcycle",
    upcycle_noise: float = 0.0,
    **settings: Any,
) -> PreTrainedModel:
    """Put a connector mixture of experts in the place of a model's projector, in place.

    Args:
        model: a multimodal model of transformers whose type is in the adapter table (:func:`register_adapter` adds to it).
        config: settings of the connector, or None to give them by name: widths, kind, bias and activation of the experts then follow the
            trained projector, ``resample`` is "none" and the rest are the defaults of :class:`CMoEConfig`.
        init: "upcycle" copies the trained projector into every expert: the model's output is unchanged at first, because gates sum to one
            (co-upcycling, CuMo, arXiv 2405.05949); with ``renormalize=False`` they sum to less, which scales the output. "random"
            initialises every expert anew.
        upcycle_noise: adds N(0, (upcycle_noise * std(w))^2) to every weight of every expert. At 0 experts start equal: the router's
            gradient is zero in the first step (exactly by our kernels, within rounding by plain torch), and experts part because their
            gates differ. ``router="constant"`` has equal gates and therefore needs noise.
        settings: of :class:`CMoEConfig`: num_experts=4, tasks=["chart", "photo"], router="sparse", aux_losses={"switch": 0.01}, ...

    Returns:
        The same object. Its class is now the generated subclass of its family (``CMoELlavaForConditionalGeneration``; ``config.model_type``
        is "cmoe_llava"), whose forward and generate take ``task``. Save and load it as any model; ``import
        cmoe_kernels.integrations.transformers`` lets the Auto classes know it.

    Raises:
        TypeError, ValueError: a model that has no projector or no adapter, or settings that do not fit it; the message says which.
    """
    adapter = _adapter_of(model)
    if init not in INITS:
        raise ValueError(f"init is {init!r}, must be one of {', '.join(INITS)}")
    places = _places(model, adapter)
    trained = [read(model.get_submodule(path), adapter) for path in places]
    if any(layers.shape != trained[0].shape for layers in trained):
        raise ValueError(f"the projectors at {', '.join(places)} differ in width, must be alike to share one configuration")
    chosen = configure(trained[0], config, settings, init)
    if not upcycle_noise >= 0:
        raise ValueError(f"upcycle_noise is {upcycle_noise}, must be 0 or positive")
    if init == "upcycle":
        if chosen.router == "constant" and upcycle_noise == 0:
            raise ValueError(
                "upcycle_noise is 0, must be positive with router='constant': equal experts under equal gates get equal gradients and "
                "never part"
            )
    elif upcycle_noise:
        raise ValueError(f"upcycle_noise is {upcycle_noise}, must be 0 with init='random'")

    for path, layers in zip(places, trained, strict=True):
        weight = layers.first.weight
        projector = CMoEProjector(chosen, weight.device, weight.dtype)
        if init == "upcycle":
            upcycle(projector.connector, layers, upcycle_noise)
        _place(model, adapter, path, projector.train(model.training))
    classes = _classes[adapter.model_type]
    _share_config(model, classes.config, chosen)
    model.__class__ = classes.model
    _keep_whole(model)
    return model


def register_adapter(adapter: Adapter) -> None:
    """Add a model type to the table, or put another adapter in the place of one that is there.

    Generates its subclass and registers it with AutoConfig, AutoModelForImageTextToText and AutoModelForMultimodalLM. Call it before
    from_pretrained in each process.
    """
    base = getattr(transformers, adapter.model_class) if isinstance(adapter.model_class, str) else adapter.model_class
    classes = _generate_classes(adapter, base)
    _adapters[adapter.model_type], _classes[adapter.model_type] = adapter, classes
    for generated in (classes.config, classes.model):
        globals()[generated.__name__] = generated  # found by its name, as pickle needs
    name = classes.config.model_type
    AutoConfig.register(name, classes.config, exist_ok=True)
    for auto in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
        auto.register(classes.config, classes.model, exist_ok=True)
    # Keys are written and read as those of the family, also where its published checkpoints have older names than its modules.
    for ours, theirs in ((name, adapter.model_type), (classes.model.__name__, base.__name__)):
        if (mapping := conversion_mapping.get_checkpoint_conversion_mapping(theirs)) is not None:
            conversion_mapping.register_checkpoint_conversion_mapping(ours, mapping, overwrite=True)


def adapters() -> dict[str, Adapter]:
    """The adapter table: by model type, where the projector sits, its layers, and what stays around the experts."""
    return dict(_adapters)


def projectors(model: nn.Module) -> dict[str, "CMoEProjector"]:
    """The CMoE projectors of a model by their path: to train only them, to compile its ``connector``, for peft's ``modules_to_save``."""
    return {name: module for name, module in model.named_modules() if isinstance(module, CMoEProjector)}


@contextmanager
def use_task(task: Task | None = None, group_ids: Tensor | None = None) -> Iterator[None]:
    """Tasks for calls that cannot take ``task``: a pipeline, ``get_image_features``, a loop that is not yours.

    Args:
        task: as in forward: a name, one name per sample, or LongTensor [B]. Around ``get_image_features``, which sees no text, several
            tasks need one image per sample.
        group_ids: for such a call where image tokens are packed (Qwen-VL, Mistral 3): [T], the task of each token.
    """
    token = calls.ambient.set((task, group_ids))
    try:
        yield
    finally:
        calls.ambient.reset(token)


class CMoEProjector(nn.Module):
    """A connector that is called as a projector is: features [..., D] in, embeddings [..., O] out; it looks the tasks up.

    ``connector`` is the :class:`CMoEConnector`, the part to compile: ``projector.connector.compile(fullgraph=True)``.
    """

    def __init__(self, config: CMoEConfig, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.connector = CMoEConnector(config, device, dtype)

    def forward(self, features: Tensor) -> Tensor:
        call, compiling = calls.current.get(), torch.compiler.is_compiling()
        look_up = calls.ambient.get if call is None else functools.partial(call.route, self, features)
        # Compiled code keeps what it recomputes by itself.
        task, group_ids = look_up() if compiling else route_of(self, look_up)
        out = self.connector(features.flatten(0, -3) if features.dim() > 3 else features, task, group_ids)
        if features.dim() > 3:
            out = out._replace(**{name: getattr(out, name).unflatten(0, features.shape[:-2]) for name in ("embeddings", "gates")})
        if call is not None and (compiling or call.graph_task == torch._C._current_graph_task_id()):
            call.outputs.append(out)
            if self.training and out.aux_losses and features.requires_grad and not torch.is_grad_enabled():
                warnings.warn(
                    "aux_losses get no gradient inside a checkpoint with use_reentrant=True; give use_reentrant=False", stacklevel=2
                )
        return out.embeddings


class CMoEModel:
    """What the generated classes add to their family's model; it stands before it among their bases.

    forward and generate take ``task``: the task of all samples (a name), of each sample (names), or LongTensor [B] of places in the
    connector's ``tasks``. Every image belongs to the sample whose text holds its tokens. forward's output gains

        lm_loss      the loss without the auxiliary one; ``loss`` is their sum
        aux_loss     the weighted fp32 sum over the connectors
        aux_losses   its unweighted parts by name
        gates        of each call of a connector, [..., E]

    which are None where no connector ran (text alone, or a step of generation behind the prompt).
    """

    adapter: Adapter
    config: Any
    generate_hands_on: bool  # whether generate gives what it does not know to forward

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        if config.cmoe is None:
            raise ValueError(f"config.cmoe is missing: {type(self).__name__} is made by replace_projector or loaded from what it saved")
        chosen = CMoEConfig.from_dict(config.cmoe)
        model = cast(PreTrainedModel, self)
        for path in _places(model, self.adapter):
            _place(model, self.adapter, path, CMoEProjector(chosen))
        _keep_whole(model)

    def initialize_weights(self) -> None:
        """What a checkpoint lacked of the connectors, then of the family's modules."""
        # The guard leaves what was loaded as it is.
        with torch.no_grad(), guard_torch_init_functions():
            for projector in projectors(cast(PreTrainedModel, self)).values():
                if not all(getattr(p, "_is_hf_initialized", False) for p in projector.parameters()):
                    projector.connector.reset_parameters()
        super().initialize_weights()  # type: ignore[misc]

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        if any(projector.connector.int8 for projector in projectors(cast(PreTrainedModel, self)).values()):
            refuse_saving()
        super().save_pretrained(*args, **kwargs)  # type: ignore[misc]

    def _forward(self, inputs: dict[str, Any], task: Task | None) -> Any:
        """The family's forward on ``inputs``, recorded."""
        return_dict = inputs.pop("return_dict", None)
        if (total := inputs.get("num_items_in_batch")) is not None:
            # A step without a learned token has the loss 0, not 0 / 0.
            inputs["num_items_in_batch"] = total.clamp(min=1) if isinstance(total, Tensor) else max(total, 1)
        call = calls.Call(self, inputs, calls.ambient.get()[0] if task is None else task)
        with calls.recorded(call):
            output = super().forward(**inputs, return_dict=True)  # type: ignore[misc]
        output = call.add_to(output)
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    def _generate(self, inputs: dict[str, Any], task: Task | None) -> Any:
        """The family's generate on ``inputs``: its images are encoded before the first forward, or within it."""
        texts = inputs if inputs.get("inputs") is None else {**inputs, "input_ids": inputs["inputs"]}
        call = calls.Call(self, texts, calls.ambient.get()[0] if task is None else task)
        if call.task is not None and self.generate_hands_on:
            inputs = {**inputs, "task": call.places()}
        with calls.recorded(call):
            return super().generate(**inputs)  # type: ignore[misc]


class AuxLossLogging:
    """For a Trainer: logs the auxiliary losses beside the loss, as means over the steps since the last log.

        class Trainer(AuxLossLogging, transformers.Trainer): ...

    Entries "aux_loss" (weighted, part of "loss") and "aux/<name>" (unweighted) of this process's batches. That the auxiliary loss is
    trained needs no such class: it is part of the model's loss.
    """

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any) -> Any:
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)  # type: ignore[misc]
        if model.training and (aux_loss := outputs.get("aux_loss")) is not None:
            sums = self.__dict__.setdefault("_aux_sums", {})
            for name, value in {"aux_loss": aux_loss, **{f"aux/{n}": v for n, v in outputs["aux_losses"].items()}}.items():
                entry = sums.setdefault(name, [torch.zeros((), device=value.device), 0])
                entry[0] += value.detach()
                entry[1] += 1
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            logs.update({name: float(total) / count for name, (total, count) in self.__dict__.pop("_aux_sums", {}).items()})
        super().log(logs, *args, **kwargs)  # type: ignore[misc]


# Reading and replacing the projector


def _adapter_of(model: Any) -> Adapter:
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind is None:
        raise TypeError(f"model is a {type(model).__name__}, must be a multimodal model of transformers, loaded (from_pretrained)")
    if kind in WITHOUT_PROJECTOR:
        raise ValueError(f"model is of type {kind!r}, which has no projector to replace: {WITHOUT_PROJECTOR[kind]}")
    if isinstance(model, CMoEModel):
        raise ValueError(f"model is a {type(model).__name__}: its projector is a mixture of experts already")
    if kind not in _adapters:
        raise ValueError(f"model is of type {kind!r}, must be one of {', '.join(_adapters)}; register_adapter adds another")
    base = _classes[kind].base
    if type(model) is not base:
        raise TypeError(
            f"model is a {type(model).__name__}, must be a {base.__name__} itself"
            + ("; add LoRA afterwards" if hasattr(model, "peft_config") and not isinstance(model, PreTrainedModel) else "")
        )
    return _adapters[kind]


def _places(model: PreTrainedModel, adapter: Adapter) -> list[str]:
    """Paths of the projectors."""
    places = []
    for path in adapter.projectors:
        owner, _, last = path.rpartition(".")
        places += [f"{owner}.{name}" for name, _ in model.get_submodule(owner).named_children()] if last == "*" else [path]
    return places


def _place(model: PreTrainedModel, adapter: Adapter, path: str, projector: CMoEProjector) -> None:
    """The connector in the place of the linear layers; those that lie elsewhere pass their input on."""
    if adapter.rebuild is not None:
        model.set_submodule(path, adapter.rebuild(model.get_submodule(path)))
    if adapter.replaces:
        for name in adapter.layers:
            if not f"{name}.".startswith(f"{adapter.replaces}."):
                model.set_submodule(f"{path}.{name}", nn.Identity())
        path = f"{path}.{adapter.replaces}"
    model.set_submodule(path, projector)


def _keep_whole(model: PreTrainedModel) -> None:
    """Units of device maps and FSDP: the connector as well, and no class that it replaced."""
    present = {type(module).__name__ for module in model.modules()}
    model._no_split_modules = {CMoEProjector.__name__, *(name for name in model._no_split_modules or () if name in present)}


def _share_config(model: PreTrainedModel, config_class: type[PreTrainedConfig], chosen: CMoEConfig) -> None:
    """A configuration of the generated class for the model and its parts; the caller's object may serve other models and stays."""
    old: Any = model.config
    new: Any = copy.copy(old)
    new.__class__ = config_class
    new.cmoe = chosen.to_dict()
    for module in model.modules():
        if getattr(module, "config", None) is old:
            module.config = new


# Generated classes


class _Classes(NamedTuple):
    config: Any
    model: Any
    base: Any


def _generate_classes(adapter: Adapter, base: Any) -> _Classes:
    config = type(
        f"CMoE{base.config_class.__name__}",
        (base.config_class,),
        {"__module__": __name__, "__annotations__": {"cmoe": dict | None}, "cmoe": None, "model_type": f"cmoe_{adapter.model_type}"},
    )
    members = {
        "__module__": __name__,
        "__doc__": f"{base.__name__} with a mixture of experts for a projector, around which stays: {adapter.around}. See CMoEModel.",
        "adapter": adapter,
        "config_class": config,
        "forward": _taking_task(base.forward, CMoEModel._forward),
        "generate": _taking_task(base.generate, CMoEModel._generate),
        "generate_hands_on": base.generate is GenerationMixin.generate,
    }
    return _Classes(config, type(f"CMoE{base.__name__}", (CMoEModel, base), members), base)


def _taking_task(original: Any, run: Any) -> Any:
    """A method with the arguments of ``original`` and ``task``; Trainer and generate read them from the signature."""
    parameters = list(inspect.signature(original).parameters.values())
    names = [parameter.name for parameter in parameters[1:]]

    @functools.wraps(original)
    def method(self: Any, *args: Any, task: Task | None = None, **kwargs: Any) -> Any:
        return run(self, {**dict(zip(names, args, strict=False)), **kwargs}, task)

    new = inspect.Parameter("task", inspect.Parameter.KEYWORD_ONLY, default=None)
    where = next((i for i, p in enumerate(parameters) if p.kind == inspect.Parameter.VAR_KEYWORD), len(parameters))
    method.__signature__ = inspect.Signature([*parameters[:where], new, *parameters[where:]])  # type: ignore[attr-defined]
    return method


_adapters: dict[str, Adapter] = {}
_classes: dict[str, _Classes] = {}
for _family in FAMILIES:
    register_adapter(_family)
