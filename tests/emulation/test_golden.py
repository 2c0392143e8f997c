"""The released connector's own outputs, gates and gradients through the emulated CUDA kernels."""

import pytest

from tests.emulation import library

if not library.WANTED:
    pytest.skip("for the process of emulated kernels (CMOE_EMULATE_CUDA=1)", allow_module_level=True)

from tests.triton.test_golden import test_golden  # noqa: F401
