"""One of everything, primes, more experts than tokens, K = E: the ops with products at sizes that the table of calls does not have."""

import pytest
import torch

from cmoe_kernels import backends
from tests.ops import test_edges, test_promises
from tests.ops.cases import Case

pytestmark = pytest.mark.skipif(not backends.INTERPRETED, reason="needs TRITON_INTERPRET=1")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.full)], ids=str)
@pytest.mark.parametrize("sizes", test_edges.SIZES, ids=str)
@pytest.mark.parametrize("op", ["soft_experts", "sparse_experts", "task_router"])
def test_sizes(op, sizes, dtype):
    case = Case(op, "sizes", lambda m: test_edges.sized(op, m, *sizes))
    test_promises.test_precision(case, "triton", dtype)
