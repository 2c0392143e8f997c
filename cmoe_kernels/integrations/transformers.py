"""One import for transformers: its MoE layers on our kernels, and its multimodal models with a mixture of experts for a projector."""

from cmoe_kernels.integrations.adapters import Adapter
from cmoe_kernels.integrations.experts import experts_families, load_balancing_loss, use_cmoe
from cmoe_kernels.integrations.projectors import (
    AuxLossLogging,
    CMoEModel,
    CMoEProjector,
    adapters,
    projectors,
    register_adapter,
    replace_projector,
    use_task,
)

__all__ = [
    "Adapter",
    "AuxLossLogging",
    "CMoEModel",
    "CMoEProjector",
    "adapters",
    "experts_families",
    "load_balancing_loss",
    "projectors",
    "register_adapter",
    "replace_projector",
    "use_cmoe",
    "use_task",
]
