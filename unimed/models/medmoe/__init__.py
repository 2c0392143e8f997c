"""Med-MoE and CuMo: upcycled FFNs with a meta expert, and the router that is trained on modalities."""

from unimed.models.medmoe.config import MoESettings
from unimed.models.medmoe.losses import RoutingLosses, co_upcycle, record_routing, routing_losses
from unimed.models.medmoe.router import (
    RouterAccuracy,
    label_curve,
    label_curve_figure,
    load_router,
    plot_label_curve,
    router_accuracy,
    save_router,
    train_router,
)
from unimed.models.medmoe.upcycling import Parameters, count_parameters, moe_layers, register, upcycle

__all__ = [
    "MoESettings",
    "Parameters",
    "RouterAccuracy",
    "RoutingLosses",
    "co_upcycle",
    "count_parameters",
    "label_curve",
    "label_curve_figure",
    "load_router",
    "moe_layers",
    "plot_label_curve",
    "record_routing",
    "register",
    "router_accuracy",
    "routing_losses",
    "save_router",
    "train_router",
    "upcycle",
]
