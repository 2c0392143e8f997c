"""Every public op has an example in its docstring, and the examples run."""

import textwrap

import pytest
import torch

import cmoe_kernels as cmoe
from cmoe_kernels import backends


@pytest.mark.parametrize("op", backends.OPS)
def test_the_example_runs(op):
    text = getattr(cmoe, op).__doc__
    assert text.count("Example::") == 1
    code = textwrap.dedent(text.split("Example::\n")[1])
    exec(code, {"torch": torch, **{name: getattr(cmoe, name) for name in backends.OPS}})
