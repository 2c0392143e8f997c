"""One import for transformers: its MoE layers on our kernels (experts_implementation="cmoe")."""

from cmoe_kernels.integrations.experts import experts_families, load_balancing_loss, use_cmoe

__all__ = [
    "experts_families",
    "load_balancing_loss",
    "use_cmoe",
]
