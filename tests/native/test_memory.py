"""Where memory ends and where processes fork: one clear error, or a result; never the end of the process, never a wait without end."""

import platform

import pytest

from cmoe_kernels import native
from tests import forked

pytestmark = [
    pytest.mark.skipif(native.library is None, reason=str(native.error)),
    pytest.mark.skipif(platform.system() != "Linux", reason="limits and forks as Linux has them"),
]


def python(code: str) -> str:
    run = forked.run(code)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


LIMITED = """
import resource, torch, cmoe_kernels as cmoe
torch.set_num_threads(2)
T, E, H = 1 << 14, 16, 1 << 10
x, gates, indices = torch.ones(T, 1), torch.ones(T, E), torch.arange(E).expand(T, E)
w1, w2 = torch.full((E, H, 1), 1.0), torch.full((E, 1, H), 1 / H)
wide = torch.ones(1, 1 << 16, 1)

def call(op, tokens):
    if op == "soft_experts":
        return cmoe.soft_experts(x[:tokens], gates[:tokens], w1, None, w2, None, "relu")
    if op == "sparse_experts":
        return cmoe.sparse_experts(x[:tokens], gates[:tokens], indices[:tokens], w1, None, w2, None, "relu")
    return cmoe.grouped_linear(x[:tokens], wide, None, torch.tensor([0, tokens], dtype=torch.int32))

op = "{op}"
before = call(op, 5)
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (300 << 20),) * 2)
try:
    call(op, T)
except RuntimeError as error:
    print(error)
else:
    print("no error")
assert torch.equal(call(op, 5), before)
"""


@pytest.mark.parametrize("op", ["soft_experts", "sparse_experts"])
def test_scratch_that_does_not_fit_is_an_error(op):
    """1 GiB of it where 300 MiB are left: the op says so, and the next call works."""
    message = python(LIMITED.replace("{op}", op)).strip().splitlines()
    assert "not enough memory for the scratch of an operation on x of shape (16384, 1)" in message[0]


def test_an_output_that_does_not_fit_is_an_error():
    """4 GiB, where 300 MiB are left."""
    assert "not enough memory for a result of shape (16384, 65536)" in python(LIMITED.replace("{op}", "grouped_linear"))


def test_a_forked_worker_computes_after_its_parent_did():
    """DataLoader forks, and gives each worker one thread: that is what makes it work, for torch's own operators too."""
    code = """
import torch, cmoe_kernels as cmoe
from torch.utils.data import DataLoader, Dataset

torch.set_num_threads(2)
generator = torch.Generator().manual_seed(0)
x, w1, w2 = (torch.randn(shape, generator=generator) for shape in ((64, 32), (3, 48, 32), (3, 16, 48)))
gates = torch.ones(64, 3)

class Batches(Dataset):
    def __len__(self):
        return 3
    def __getitem__(self, i):
        return cmoe.soft_experts(x * (i + 1), gates, w1, None, w2)

mine = [Batches()[i] for i in range(3)]  # the threads of this process are up
for i, theirs in enumerate(DataLoader(Batches(), batch_size=None, num_workers=1, multiprocessing_context="fork", timeout=60)):
    torch.testing.assert_close(theirs, mine[i], rtol=1e-5, atol=1e-5)
print("done")
"""
    assert python(code).strip() == "done"
