"""Connector mixture of experts for multimodal LLMs: fused routing, expert and load-balancing ops, and the connector made of them.

Letters in shapes, here and everywhere: T tokens, B samples, P patches of the encoder, C encoder width, N tokens after resampling,
D connector input width, H expert hidden width, O output width, E experts, K experts per token, R router hidden width, G groups
(tasks), S task-token width. Weights are stored as torch.nn.Linear stores them: [out, in].
"""

from cmoe_kernels.backends import use_backend
from cmoe_kernels.nn.config import CMoEConfig
from cmoe_kernels.nn.connector import CMoEConnector, ConnectorOutput
from cmoe_kernels.ops.accumulate import accumulate_grads
from cmoe_kernels.ops.balance_loss import balance_loss
from cmoe_kernels.ops.grouped_linear import grouped_linear
from cmoe_kernels.ops.soft_experts import soft_experts
from cmoe_kernels.ops.soft_gate import soft_gate
from cmoe_kernels.ops.sparse_experts import sparse_experts
from cmoe_kernels.ops.task_router import task_router
from cmoe_kernels.ops.topk_gate import TopK, topk_gate

__version__ = "0.1.0"
__all__ = [
    "CMoEConfig",
    "CMoEConnector",
    "ConnectorOutput",
    "TopK",
    "accumulate_grads",
    "balance_loss",
    "grouped_linear",
    "soft_experts",
    "soft_gate",
    "sparse_experts",
    "task_router",
    "topk_gate",
    "use_backend",
]
