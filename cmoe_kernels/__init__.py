from cmoe_kernels.backends import use_backend
from cmoe_kernels.ops.soft_gate import soft_gate
from cmoe_kernels.ops.topk_gate import TopK, topk_gate
