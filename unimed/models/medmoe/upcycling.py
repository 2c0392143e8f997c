"""Any transformers model with known FFNs, upcycled: some of its FFNs become mixtures of copies of themselves.

    model = upcycle(AutoModelForCausalLM.from_pretrained("microsoft/phi-2"))       # a MedMoEPhiForCausalLM
    model.save_pretrained("phi-2-moe"); AutoModelForCausalLM.from_pretrained("phi-2-moe")

The model's class becomes a generated subclass of its own, whose configuration has a ``model_type`` of its own ("medmoe_phi") and the field
``medmoe`` with the settings. Importing this package registers both with the Auto classes.
"""

import copy
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import transformers
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel, conversion_mapping, initialization
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from unimed.errors import UserError
from unimed.models.medmoe.config import MoESettings
from unimed.models.medmoe.layers import MoEFFN, read_ffn

BLOCKS = ("mlp", "feed_forward", "ffn")
# Registered on import; other classes by register(). Language models also as the part of a multimodal model.
REGISTERED = (
    *(f"{name}{kind}" for name in ("Phi", "StableLm", "Llama", "Mistral", "Qwen2", "Qwen3", "Gemma") for kind in ("Model", "ForCausalLM")),
    "CLIPVisionModel",
)


def upcycle(
    model: PreTrainedModel,
    layers: str | Sequence[int] = "every_other",
    num_experts: int = 4,
    top_k: int = 1,
    meta: bool = True,
    *,
    scale: str = "released",
    released: bool = False,
    router: str | None = None,
    router_layers: int = 1,
    router_features: int | None = None,
    router_bias: bool = True,
    part: str = "",
) -> PreTrainedModel:
    """Turn FFNs of a transformer into mixtures of experts that start as copies of them, in place.

    y = sum_i G_i E_i(x) + meta(x), with G over the top_k of the router's softmax over all experts. top_k=1 keeps the raw probability of the
    winner; a larger top_k divides by the sum over the chosen.

    Args:
        model: of transformers; its layers' FFNs are gated (gate, up, down) or plain (two linear layers).
        layers: "every_other" (0, 2, 4, ..., as Med-MoE), "all", or places of layers.
        num_experts: E, without the meta expert.
        top_k: experts per token, beside the meta expert.
        meta: an expert that is always on with weight 1.
        scale: "released": the formula above, which at first gives (1 + p) FFN(x) with top_k=1 and 2 FFN(x) with top_k=2. "preserve" (ours):
            all weights are divided by their sum, the meta expert's 1 included, so that the model's outputs are unchanged at first.
        released: with top_k=2, choose the second expert by logits with Gumbel noise, in training and evaluation, as the release does.
        router: "frozen" (its weights are buffers, which :func:`train_router` fills) or "learned"; default "frozen" with ``meta``,
            else "learned".
        router_layers: 1 (a linear layer) or 2 (with GELU between).
        router_features: hidden width of a router of two layers; default its input's.
        router_bias: biases in the router.
        part: path of the part to upcycle in a multimodal model ("model.language_model", "model.vision_tower"); "" for the model itself.

    Returns:
        The same object. Experts train, whatever the FFN did. Routers start random and compute in fp32.

    Raises:
        UserError: an FFN of another layout, settings that do not fit, a model that is upcycled already.
    """
    target, blocks = find_ffns(model, part)
    settings = MoESettings(
        layers=_places(layers, len(blocks)),
        num_experts=num_experts,
        top_k=top_k,
        meta=meta,
        scale=scale,
        released=released,
        router=router or ("frozen" if meta else "learned"),
        router_layers=router_layers,
        router_features=router_features,
        router_bias=router_bias,
    )
    holder = _holder(model, target)
    classes = register(type(target))
    _place(target, settings)
    old: Any = target.config
    # The caller's configuration may serve other models and stays as it is.
    new = copy.copy(old)
    new.__class__, new.medmoe = classes.config, settings.to_dict()
    for module in target.modules():
        if getattr(module, "config", None) is old:
            module.config = new
    if holder is not None:
        setattr(model.config, holder, new)
    target.__class__ = classes.model
    _CAN_RECORD_REGISTRY[target] = target._can_record_outputs  # of the class: set when a model is made, and read by output_hidden_states
    return model


def register(model_class: type[PreTrainedModel]) -> "Classes":
    """Let the Auto classes load what :func:`upcycle` makes of a model class; call it before from_pretrained, in each process.

    The classes of Phi-2, StableLM-2, Llama, Mistral, Qwen2, Qwen3, Gemma and CLIP's vision tower are registered on import.
    """
    if model_class in _classes:
        return _classes[model_class]
    base: Any = model_class
    configs = {classes.base.config_class: classes.config for classes in _classes.values()}
    config = configs.get(base.config_class) or _config_class(base.config_class)
    members = {"__module__": __name__, "__doc__": base.__doc__, "config_class": config}
    model: Any = type(f"MedMoE{base.__name__}", (MedMoEModel, base), members)
    _classes[model_class] = Classes(config, model, base)
    for generated in (config, model):
        globals()[generated.__name__] = generated  # found by its name, as pickle needs
    AutoConfig.register(config.model_type, config, exist_ok=True)
    for auto in (AutoModel, AutoModelForCausalLM):
        if base.config_class in auto._model_mapping and auto._model_mapping[base.config_class] is base:
            auto.register(config, model, exist_ok=True)
    # Keys are written and read as those of the family, also where its published checkpoints have other names than its modules.
    for ours, theirs in ((config.model_type, base.config_class.model_type), (model.__name__, base.__name__)):
        if (mapping := conversion_mapping.get_checkpoint_conversion_mapping(theirs)) is not None:
            conversion_mapping.register_checkpoint_conversion_mapping(ours, mapping, overwrite=True)
    return _classes[model_class]


class MedMoEModel:
    """What the generated classes add to their family's model; it stands before it among their bases."""

    config: Any

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        if config.medmoe is None:
            raise UserError(f"config.medmoe is missing: {type(self).__name__} is made by upcycle or loaded from what it saved")
        _place(cast(PreTrainedModel, self), MoESettings.from_dict(config.medmoe))

    def _initialize_weights(self, module: nn.Module, *args: Any, **kwargs: Any) -> None:
        super()._initialize_weights(module, *args, **kwargs)  # type: ignore[misc]
        if module is not self:
            return
        # The model itself comes last. What a checkpoint lacks is left: tensors that were read are marked, and these functions pass them by.
        std = getattr(self.config, "initializer_range", 0.02)
        for layer in moe_layers(module).values():
            layer.router.reset_parameters()
            for name, parameter in layer.named_parameters(recurse=False):
                initialization.normal_(parameter, std=std if name.startswith("w") else 0.0)


def moe_layers(model: nn.Module) -> dict[str, MoEFFN]:
    """The upcycled layers by path, in the order of the model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MoEFFN)}


class Parameters(NamedTuple):
    """How many parameters there are, and how many serve one token."""

    total: int
    activated: int


def count_parameters(model: nn.Module) -> Parameters:
    """Total and activated parameters; shared ones count once."""
    frozen = [layer.router.buffers() for layer in moe_layers(model).values()]
    total = sum(p.numel() for p in itertools.chain(model.parameters(), *frozen))
    resting = 0
    for layer in moe_layers(model).values():
        of_expert = sum(p[0].numel() for p in layer.parameters(recurse=False))
        resting += (layer.settings.num_experts - layer.settings.top_k) * of_expert
    return Parameters(total, total - resting)


# Finding and replacing FFNs


def find_ffns(model: Any, part: str) -> tuple[PreTrainedModel, dict[str, nn.Module]]:
    """The model that is ``part``, and the FFN of each of its layers by path."""
    target = _target(model, part)
    return target, _blocks(target)


def ffns_at(model: Any, part: str, layers: str | Sequence[int]) -> dict[str, nn.Module]:
    """The FFNs that :func:`upcycle` would replace, by path in the part."""
    _, blocks = find_ffns(model, part)
    return {path: module for place, (path, module) in enumerate(blocks.items()) if place in _places(layers, len(blocks))}


def _target(model: Any, part: str) -> PreTrainedModel:
    if not isinstance(model, PreTrainedModel):
        hint = "; add LoRA afterwards" if hasattr(model, "peft_config") else ""
        raise UserError(f"model is a {type(model).__name__}, must be a model of transformers{hint}")
    parts: dict[str, Any] = {name: module for name, module in model.named_modules() if isinstance(module, PreTrainedModel)}
    if part not in parts:
        raise UserError(f"part is {part!r}, must be one of {', '.join(filter(None, parts)) or 'none (it has no parts)'}")
    if moe_layers(parts[part]):
        raise UserError(f"{part or type(model).__name__} is upcycled already")
    return parts[part]


def _blocks(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The FFN of each layer of the model's one stack, by its path."""
    stacks: dict[str, dict[str, nn.Module]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module):
            blocks = [next(((key, getattr(layer, key)) for key in BLOCKS if hasattr(layer, key)), None) for layer in module]
            if all(block is not None for block in blocks):
                stacks[name] = {f"{name}.{i}.{block[0]}": block[1] for i, block in enumerate(blocks) if block}
    if len(stacks) != 1:
        found = f"stacks of layers at {', '.join(stacks)}; name one of its models by part" if stacks else "no stack of layers"
        raise UserError(f"{type(model).__name__} has {found} (each layer must have its FFN as {', '.join(BLOCKS)})")
    return next(iter(stacks.values()))


def _places(layers: Any, count: int) -> tuple[int, ...]:
    if layers == "every_other":
        return tuple(range(0, count, 2))
    if layers == "all":
        return tuple(range(count))
    places = list(layers) if isinstance(layers, Sequence) and not isinstance(layers, str) else []
    if not places or any(type(place) is not int or not 0 <= place < count for place in places) or len(set(places)) < len(places):
        raise UserError(f"layers is {layers!r}, must be 'every_other', 'all' or different numbers in 0..{count - 1}")
    return tuple(sorted(places))


def _place(model: PreTrainedModel, settings: MoESettings) -> None:
    blocks = list(_blocks(model).items())
    _places(settings.layers, len(blocks))
    # All are read before one is replaced: a bad layer leaves the model as it was.
    for place in settings.layers:
        read_ffn(blocks[place][1], blocks[place][0])
    for place in settings.layers:
        path, module = blocks[place]
        layer = MoEFFN(settings, read_ffn(module, path)).train(module.training)
        model.set_submodule(path, layer)
        blocks[place] = path, layer  # frees the FFN: memory grows by the copies of one layer at a time


def _holder(model: PreTrainedModel, target: PreTrainedModel) -> str | None:
    """The field of a multimodal model's configuration that holds its part's."""
    if target is model:
        return None
    fields = [key for key in getattr(model.config, "sub_configs", {}) if getattr(model.config, key, None) is target.config]
    if not fields:
        raise UserError(f"{type(model.config).__name__} does not hold the configuration of {type(target).__name__}")
    return fields[0]


# Generated classes


class Classes(NamedTuple):
    """The generated classes of a model class."""

    config: Any
    model: Any
    base: Any


def _config_class(base: Any) -> Any:
    fields = {"__annotations__": {"medmoe": dict | None}, "medmoe": None}
    return type(f"MedMoE{base.__name__}", (base,), {"__module__": __name__, "model_type": f"medmoe_{base.model_type}", **fields})


_classes: dict[type[PreTrainedModel], Classes] = {}
for _name in REGISTERED:
    register(getattr(transformers, _name))
