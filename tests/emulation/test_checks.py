"""CMOE_CHECK=1 reads index tensors before a CUDA kernel gets them; without it a bad index is no expert, and nothing is read."""

import json

import pytest

from tests import forked
from tests.emulation import library

pytestmark = pytest.mark.skipif(library.missing() is not None, reason=str(library.missing()))
CODE = """
import json
import torch
import cmoe_kernels as cmoe
from cmoe_kernels import backends
from tests.emulation import library

library.install()
x, w, ids = torch.randn(4, 6), torch.randn(3, 5, 6), torch.tensor([0, 1, 2, 0])
calls = (
    lambda: cmoe.task_router(x, torch.randn(2, 3), torch.randn(5, 9), None, group_ids=ids),
    lambda: cmoe.grouped_linear(x, w, None, torch.tensor([0, 3, 2, 9], dtype=torch.int32)),
    lambda: cmoe.grouped_linear(x, w, None, torch.tensor([0, 3, 3, 4], dtype=torch.int32), gather_idx=torch.tensor([0, 0, 1, 2])),
    lambda: cmoe.soft_experts(x, torch.rand(2, 3), w, None, group_ids=ids),
    lambda: cmoe.sparse_experts(x, None, torch.full((4, 1), 7), w, None),
    lambda: cmoe.sparse_experts(x, None, torch.ones(2, 1, dtype=torch.int64), w, None, group_ids=ids),
    lambda: cmoe.balance_loss(torch.rand(4, 3), torch.full((4, 1), -2)),
    lambda: cmoe.sparse_experts(x, None, torch.full((4, 1), -1), w, None),
    lambda: cmoe.balance_loss(torch.rand(4, 3), torch.full((4, 1), -1)),
)
said = []
with cmoe.use_backend("cuda"):
    for call in calls:
        try:
            call()
            said.append("served")
        except ValueError as error:
            said.append(str(error))
print(json.dumps(said))
"""
RAISED = [
    "group_ids holds 2, must be in 0..1 (rows of task)",
    "offsets are [0, 3, 2, 9], must start at 0, not decrease and end at 4 rows or before",
    "gather_idx must be a permutation of range(4)",
    "group_ids holds 2, must be in 0..1 (rows of gates)",
    "indices holds 7, must be in -1..3 (3 experts; -1 and 3 mean no expert)",
    "group_ids holds 2, must be in 0..1 (rows of indices)",
    "indices holds -2, must be in -1..3 (3 experts; -1 and 3 mean no expert)",
    "served",
    "served",
]


@pytest.mark.parametrize("check", ["1", "0"])
def test_values_of_indices_are_read_on_demand_alone(check):
    done = forked.run(CODE, timeout=300, CMOE_CHECK=check)
    assert done.returncode == 0, done.stderr[-2000:]
    # The last line: the library may have been built before.
    assert json.loads(done.stdout.splitlines()[-1]) == (RAISED if check == "1" else ["served"] * len(RAISED))
