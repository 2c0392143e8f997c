"""Between the released Uni-Med checkpoint layout and ours.

Released names: ``task_tokens.<task>`` [1, 1, S], ``router.fc1.*``, ``router.fc2.*``, ``moe_layers.<e>.0.*`` and ``moe_layers.<e>.2.*``,
and the same experts once more as ``llm_proj.<e>.*``.
Ours: ``router.task_tokens`` [G, S], ``router.{w1,b1,w2,b2}``, ``experts.{w1,b1,w2,b2}``.
"""

import dataclasses
import logging
import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from cmoe_kernels.nn.config import TASKS, CMoEConfig

logger = logging.getLogger(__name__)

_EXPERT = re.compile(r"(moe_layers|llm_proj)\.(\d+)\.([02])\.(weight|bias)")
_ROUTER = {"router.fc1.weight": "w1", "router.fc1.bias": "b1", "router.fc2.weight": "w2", "router.fc2.bias": "b2"}
_LAYER = {("0", "weight"): "w1", ("0", "bias"): "b1", ("2", "weight"): "w2", ("2", "bias"): "b2"}
# What a released checkpoint holds beside the connector.
_IGNORED = ("ln_vision.", "visual_encoder.", "llm_model.", "llama_model.")
# What shapes cannot tell.
_SETTINGS = (
    "router",
    "router_inputs",
    "top_k",
    "renormalize",
    "tasks",
    "resample",
    "resample_rate",
    "aux_losses",
    "activation",
    "recompute",
)


def from_unimed(state_dict: Mapping[str, Any], **settings: Any) -> tuple[CMoEConfig, dict[str, Tensor]]:
    """Read a released connector.

    Args:
        state_dict: tensors under the released names; a whole checkpoint ({"model": ...}) will do.
        settings: what shapes cannot tell: router, router_inputs, top_k, renormalize, tasks, resample, resample_rate, aux_losses,
            activation, recompute; the defaults are the release's (soft, task_token, projection, rate 4).

    Returns:
        (config, state_dict) for ``CMoEConnector(config).load_state_dict(state_dict)``. Tensors keep their dtype.

    Raises:
        ValueError: an unknown key, a missing one, the two names of an expert disagree, or shapes that do not fit the settings.
        TypeError: a setting that is read from the shapes.

    Keys that are not the connector's (ln_vision, LoRA, an unused router) are ignored and listed in the log.
    """
    known = set(_SETTINGS)
    if not set(settings) <= known:
        raise TypeError(
            f"{sorted(set(settings) - known)} cannot be given: read from the shapes, or unknown; settings are {', '.join(_SETTINGS)}"
        )
    if isinstance(state_dict.get("model"), Mapping):
        state_dict = state_dict["model"]
    experts, router, tokens, ignored = _sort_keys(state_dict)
    c = _read_config(experts, router, tokens, settings)

    converted = {f"experts.{name}": torch.stack([expert[name] for expert in experts]) for name in experts[0]}
    if c.learned:
        converted |= {f"router.{name}": tensor for name, tensor in router.items()}
    else:
        ignored += [name for name, short in _ROUTER.items() if short in router]
    if c.uses_task_tokens:
        converted["router.task_tokens"] = torch.stack([tokens[task].reshape(-1) for task in c.tasks])
    else:
        ignored += [f"task_tokens.{task}" for task in tokens]
    if ignored:
        logger.warning("from_unimed ignores %d keys that the connector does not use: %s", len(ignored), ", ".join(ignored))
    return c, converted


def to_unimed(state_dict: Mapping[str, Tensor | None], config: CMoEConfig) -> dict[str, Tensor]:
    """Write a connector's tensors under the released names.

    Args:
        state_dict: a connector's state_dict, or its gradients under the same keys; what is missing or None is left out.
        config: the connector's settings.

    Returns:
        tensors under ``task_tokens.*``, ``router.fc*.*`` and ``moe_layers.*`` (``llm_proj.*`` are other names of the same modules in the
        release, and need not be stored twice). They share memory with the input.

    Raises:
        ValueError: a key that a connector does not have, or a single-layer router, for which the release has no names.
    """
    if config.learned and config.router_layers == 1:
        raise ValueError("router_layers is 1, must be 2: the release has no name for a single-layer router")
    released: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        if tensor is None:
            continue
        part, _, short = name.partition(".")
        if name == "router.task_tokens":
            released |= {f"task_tokens.{task}": tensor[i].reshape(1, 1, -1) for i, task in enumerate(config.tasks)}
        elif part == "router" and short in _ROUTER.values():
            released |= {long: tensor for long, s in _ROUTER.items() if s == short}
        elif part == "experts" and short in _LAYER.values():
            ((layer, kind),) = (key for key, s in _LAYER.items() if s == short)
            released |= {f"moe_layers.{e}.{layer}.{kind}": tensor[e] for e in range(config.num_experts)}
        else:
            raise ValueError(f"{name!r} is no key of a CMoEConnector")
    return released


def _sort_keys(state_dict: Mapping[str, Any]) -> tuple[list[dict[str, Tensor]], dict[str, Tensor], dict[str, Tensor], list[str]]:
    named: dict[str, dict[int, dict[str, Tensor]]] = {"moe_layers": {}, "llm_proj": {}}
    router, tokens, ignored, unknown = {}, {}, [], []
    for key, tensor in state_dict.items():
        if match := _EXPERT.fullmatch(key):
            module, number, layer, kind = match.groups()
            named[module].setdefault(int(number), {})[_LAYER[layer, kind]] = tensor
        elif key in _ROUTER:
            router[_ROUTER[key]] = tensor
        elif key.startswith("task_tokens."):
            tokens[key.removeprefix("task_tokens.")] = tensor
        elif key.startswith(_IGNORED):
            ignored.append(key)
        else:
            unknown.append(key)
    if unknown:
        raise ValueError(f"unknown keys: {', '.join(sorted(unknown))}")
    experts = named["moe_layers"] or named["llm_proj"]
    if not experts:
        raise ValueError("no experts (moe_layers.<e>.0.weight or llm_proj.<e>.0.weight): not a connector mixture of experts")
    if sorted(experts) != list(range(len(experts))):
        raise ValueError(f"experts are numbered {sorted(experts)}, must be 0..{len(experts) - 1}")
    first = set(experts[0])
    for e, tensors in experts.items():
        if set(tensors) != first or "w1" not in first:
            raise ValueError(
                f"expert {e} has {sorted(tensors)}, expert 0 has {sorted(first)}: must be the same layers, the first one included"
            )
    module = "moe_layers" if named["moe_layers"] else "llm_proj"
    _require_whole(first, {short: f"{module}.<e>.{layer}.{kind}" for (layer, kind), short in _LAYER.items()})
    if named["moe_layers"] and named["llm_proj"]:
        _check_agreement(named["moe_layers"], named["llm_proj"])
    return [experts[e] for e in range(len(experts))], router, tokens, ignored


def _require_whole(found: Collection[str], names: Mapping[str, str]) -> None:
    """Of two layers both have a bias, or neither has; one layer has no second bias. ``names`` are the released ones."""
    wanted = {"w1", "w2"} if "w2" in found or "b2" in found else {"w1"}
    if "b1" in found or "b2" in found:
        wanted |= {w.replace("w", "b") for w in wanted}
    if missing := sorted(wanted.difference(found)):
        raise ValueError(f"{names[missing[0]]} is missing")


def _check_agreement(moe_layers: dict[int, dict[str, Tensor]], llm_proj: dict[int, dict[str, Tensor]]) -> None:
    for e in sorted(moe_layers.keys() | llm_proj.keys()):
        ours, theirs = moe_layers.get(e, {}), llm_proj.get(e, {})
        if ours.keys() != theirs.keys() or not all(torch.equal(ours[n], theirs[n]) for n in ours):
            raise ValueError(f"expert {e} differs between its two names moe_layers.{e} and llm_proj.{e}")


def _read_config(
    experts: list[dict[str, Tensor]], router: dict[str, Tensor], tokens: dict[str, Tensor], settings: dict[str, Any]
) -> CMoEConfig:
    expert = experts[0]
    for e, tensors in enumerate(experts):
        for name, tensor in tensors.items():
            if tensor.shape != expert[name].shape:
                raise ValueError(f"expert {e} has {name} of shape {tuple(tensor.shape)}, expert 0 {tuple(expert[name].shape)}")
    width = expert["w1"].shape[1]
    rate = settings.get("resample_rate", 4) if settings.get("resample", "projection") == "projection" else 1
    if width % rate:
        raise ValueError(f"experts read {width} features, which is no multiple of resample_rate={rate}")
    if "tasks" not in settings and tokens:
        # The released order decides which expert a task gets under hard routing, so other names need it stated.
        if not set(tokens) <= set(TASKS):
            raise ValueError(f"task_tokens are {sorted(tokens)}: give tasks=(...) in their order")
        if settings.get("router") != "hard":
            settings = {**settings, "tasks": tuple(task for task in TASKS if task in tokens)}
    c = CMoEConfig(
        in_features=width // rate,
        out_features=(expert["w2"] if "w2" in expert else expert["w1"]).shape[0],
        hidden_features=expert["w1"].shape[0] if "w2" in expert else None,
        num_experts=len(experts),
        expert="mlp" if "w2" in expert else "linear",
        expert_bias="b1" in expert,
        **settings,
    )
    if not c.learned:
        return c
    missing = {"w1", "w2"} - router.keys()
    if missing:
        raise ValueError(f"router.fc1.weight and router.fc2.weight must be there with router={c.router!r}")
    _require_whole(router.keys(), {short: long for long, short in _ROUTER.items()})
    task_width = None
    if c.uses_task_tokens:
        absent = [task for task in c.tasks if task not in tokens]
        if absent:
            raise ValueError(f"task_tokens.{absent[0]} is missing with router_inputs={c.router_inputs!r}")
        for task, token in tokens.items():
            if token.dim() != 3 or token.shape[:2] != (1, 1):
                raise ValueError(f"task_tokens.{task} has shape {tuple(token.shape)}, must be [1, 1, S]: one token per task")
        task_width = tokens[c.tasks[0]].shape[2]
    c = dataclasses.replace(c, task_features=task_width, router_features=router["w1"].shape[0], router_bias="b1" in router)
    if router["w1"].shape[1] != c.router_in:
        raise ValueError(
            f"router.fc1.weight reads {router['w1'].shape[1]} features, but router_inputs={c.router_inputs!r} gives {c.router_in}: "
            "give the router_inputs it was trained with"
        )
    if router["w2"].shape[0] != c.num_experts:
        raise ValueError(f"router.fc2.weight gives {router['w2'].shape[0]} logits for {c.num_experts} experts")
    return c
