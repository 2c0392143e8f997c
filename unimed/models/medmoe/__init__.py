"""Med-MoE and CuMo: upcycled FFNs with a meta expert, and the router that is trained on modalities."""

from unimed.models.medmoe.config import MoESettings
from unimed.models.medmoe.losses import RoutingLosses, co_upcycle, record_routing, routing_losses
from unimed.models.medmoe.router import RouterAccuracy, load_router, router_accuracy, save_router, train_router
from unimed.models.medmoe.upcycle import Parameters, count_parameters, moe_layers, register, upcycle

__all__ = [
    "MoESettings",
    "Parameters",
    "RouterAccuracy",
    "RoutingLosses",
    "co_upcycle",
    "count_parameters",
    "load_router",
    "moe_layers",
    "record_routing",
    "register",
    "router_accuracy",
    "routing_losses",
    "save_router",
    "train_router",
    "upcycle",
]
