"""The library, built under whatever torch is here, loads under a CUDA build of torch and registers there; no GPU is asked for."""

import json
import os
import subprocess

import pytest

from cmoe_kernels import native
from tests.builds import ROOT

PYTHON = os.environ.get("CMOE_CUDA_TORCH")
pytestmark = [
    pytest.mark.skipif(not PYTHON, reason="CMOE_CUDA_TORCH names no Python that has a CUDA build of torch (some GB)"),
    pytest.mark.skipif(not native.cuda_kernels().built, reason=f"there are no CUDA kernels: {native.cuda_kernels().error}"),
]
CODE = """
import json, torch
from cmoe_kernels import backends, native
names = [name for op in backends.OPS for name in (op, f"{op}_backward")]
logits = torch.randn(4, 5)
print(json.dumps({
    "cuda": torch.version.cuda,
    "library": str(native.library),
    "built": native.cuda_kernels().built,
    "missing": [n for n in names if not torch._C._dispatch_has_kernel_for_dispatch_key(f"cmoe_native::{n}", "CUDA")],
    "rows": torch.ops.cmoe_native.soft_gate(logits).sum(1).tolist(),
}))
"""


def test_it_loads_and_registers():
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([PYTHON, "-c", CODE], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["cuda"], "that torch was built without CUDA"
    assert found["library"] == str(native.library)
    assert found["built"] == native.cuda_kernels().built
    assert found["missing"] == []
    assert found["rows"] == pytest.approx([1.0] * 4)
