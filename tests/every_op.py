"""Runs every public operation and a connector, forward and backward, on the cmoe_kernels of this interpreter, and prints what it met.

test_wheel.py starts it in environments of its own; it imports nothing but the package and torch.
"""

import importlib.util
import json
import sys
import warnings

import torch

with warnings.catch_warnings(record=True) as notices:
    warnings.simplefilter("always")
    import cmoe_kernels as cmoe
    from cmoe_kernels import backends, native

T, D, H, E, K = 6, 8, 4, 3, 2
torch.manual_seed(0)


def leaf(*shape):
    return torch.randn(*shape, requires_grad=True)


x, logits, gates = leaf(T, D), leaf(T, E), leaf(T, E)
experts = leaf(E, H, D), leaf(E, H), leaf(E, D, H), leaf(E, D)
indices = torch.tensor([[0, 2]] * T)
calls = {
    "soft_gate": lambda: cmoe.soft_gate(logits),
    "topk_gate": lambda: cmoe.topk_gate(logits, K).weights,
    "task_router": lambda: cmoe.task_router(x, leaf(1, D), leaf(H, 2 * D), leaf(H), leaf(E, H), leaf(E)),
    "grouped_linear": lambda: cmoe.grouped_linear(x, experts[0], experts[1], torch.tensor([0, 1, 1, T], dtype=torch.int32)),
    "soft_experts": lambda: cmoe.soft_experts(x, gates, *experts),
    "sparse_experts": lambda: cmoe.sparse_experts(x, leaf(T, K), indices, *experts),
    "balance_loss": lambda: cmoe.balance_loss(logits.softmax(-1), indices),
}
assert set(calls) == set(backends.OPS), "every operation has its line above"

for name, call in calls.items():
    y = call()
    assert y.isfinite().all(), name
    y.square().sum().backward()

connector = cmoe.CMoEConnector(cmoe.CMoEConfig(in_features=4, out_features=8, num_experts=2, resample="avgpool"))
embeddings = connector(torch.randn(2, 16, 4), task="vqa").embeddings
embeddings.sum().backward()

expected = cmoe.CMoEConnector(connector.config)
expected.load_state_dict(connector.state_dict())
features = torch.randn(2, 16, 4)
with cmoe.use_backend("reference"):
    reference = expected(features, task="cls").embeddings
torch.testing.assert_close(connector(features, task="cls").embeddings, reference)

print(
    json.dumps(
        {
            "file": cmoe.__file__,
            "library": str(native.library),
            "notices": [str(n.message) for n in notices],
            "served": {op: backends.serving(op, "cpu") for op in calls},
            # torch.compile imports triton wherever it is installed; our own kernels for it are what must stay out.
            "extras": [
                m
                for m in sys.modules
                if m in ("unimed", "transformers", "peft", "accelerate")
                or (m.startswith("cmoe_kernels") and ("triton" in m or m.startswith(("cmoe_kernels.ops.gemm", "cmoe_kernels.ops.rows"))))
            ],
            "unimed": importlib.util.find_spec("unimed") is not None,
        }
    )
)
