"""The trained projector of a model: its layers, the connector's settings that follow from them, and experts as copies of it."""

from typing import Any, NamedTuple

import torch
from torch import nn

from cmoe_kernels.integrations.activations import activation_name
from cmoe_kernels.integrations.adapters import Adapter
from cmoe_kernels.nn.config import CMoEConfig
from cmoe_kernels.nn.connector import CMoEConnector
from cmoe_kernels.ops.activation import ACTIVATIONS


class Layers(NamedTuple):
    """The trained linear layers: w1 [H, D], w2 [O, H]; or w1 [O, D] alone."""

    first: nn.Linear
    second: nn.Linear | None
    activation: str | None

    @property
    def shape(self) -> tuple[torch.Size, torch.Size | None]:
        return self.first.weight.shape, None if self.second is None else self.second.weight.shape


def read(projector: nn.Module, adapter: Adapter) -> Layers:
    if adapter.rebuild is not None:
        projector = adapter.rebuild(projector)
    layers: list[Any] = [projector.get_submodule(name) for name in adapter.layers]
    for name, layer in zip(adapter.layers[::2], layers[::2], strict=True):
        if not isinstance(layer, nn.Linear) or not layer.weight.is_floating_point():
            raise TypeError(
                f"the projector's layer {name or adapter.projector!r} is a {type(layer).__name__}, must be an unquantised Linear"
            )
        if layer.weight.device.type == "meta":
            raise ValueError(f"the projector's layer {name or adapter.projector!r} is on the meta device, must be loaded")
    if len(layers) == 1:
        return Layers(layers[0], None, None)
    return Layers(layers[0], layers[2], activation_name(layers[1]))


def configure(trained: Layers, config: CMoEConfig | None, settings: dict[str, Any], init: str) -> CMoEConfig:
    """The connector's settings; those that the trained projector fixes are filled in, or checked."""
    if config is not None and settings:
        raise TypeError(f"config and {', '.join(settings)} are given, must be one or the other")
    widths: dict[str, Any] = {
        "in_features": trained.first.weight.shape[1],
        "out_features": (trained.second or trained.first).weight.shape[0],
        "resample": "none",
    }
    kind: dict[str, Any] = {"expert": "linear", "expert_bias": trained.first.bias is not None}
    if trained.second is not None:
        kind |= {"expert": "mlp", "hidden_features": trained.first.weight.shape[0], "activation": trained.activation}
        if trained.activation is None and "activation" not in settings and config is None:
            raise ValueError(f"the projector's activation is none of {', '.join(ACTIVATIONS)}: give activation and init='random'")
    if config is None:
        config = CMoEConfig.from_dict({**widths, **kind, **settings})
    elif not isinstance(config, CMoEConfig):
        raise TypeError(f"config is a {type(config).__name__}, must be a CMoEConfig; settings are given by name: num_experts=4")
    fixed = {**widths, **kind} if init == "upcycle" else widths
    for name, value in fixed.items():
        found = config.hidden if name == "hidden_features" else getattr(config, name)
        if found != value:
            raise ValueError(
                f"{name} is {found!r}, must be {value!r} "
                + ("(what is trained is copied; init='random' is free of this)" if name in kind else "(the model around the projector)")
            )
    return config


@torch.no_grad()
def upcycle(connector: CMoEConnector, trained: Layers, noise: float) -> None:
    experts = connector.experts
    for layer, weight, bias in ((trained.first, experts.w1, experts.b1), (trained.second, experts.w2, experts.b2)):
        if layer is not None and isinstance(weight, nn.Parameter):
            weight.copy_(layer.weight)  # to every expert
            if bias is not None:
                bias.copy_(layer.bias)
            if noise:
                weight.add_(torch.randn_like(weight), alpha=noise * float(layer.weight.std()))
