"""The library's kernels and the schemas of Python agree. The dispatcher compares the numbers of arguments only, and only at a call."""

import pytest
import torch

from cmoe_kernels import backends, native
from tests.emulation import library

OPS = {name for op in backends.OPS for name in (op, f"{op}_backward")}
INTO = {f"{op}_backward_into" for op in ("grouped_linear", "soft_experts", "sparse_experts", "task_router")}
PACKED = {"prepack", "packed_router_bias", "packed_router", "packed_soft_experts", "packed_sparse_experts"}
INT8 = {"int8_experts", "int8_router"}
needs_library = pytest.mark.skipif(native.library is None, reason=str(native.error))


def schema(namespace: str, name: str) -> torch._C.FunctionSchema:
    return getattr(getattr(torch.ops, namespace), name).default._schema


def types(of: torch._C.FunctionSchema) -> str:
    return " -> ".join(", ".join(str(value.type) for value in values) for values in (of.arguments, of.returns))


@pytest.mark.each
@needs_library
@pytest.mark.parametrize("name", sorted(OPS | PACKED | INTO | INT8))
def test_types_are_those_of_the_schema(name):
    for backend, found in native.operations()[name].items():
        assert found == types(schema("cmoe_native", name)), backend


@needs_library
def test_every_operation_is_implemented():
    cuda = set() if native.cuda_kernels().error else OPS
    assert {name: set(found) for name, found in native.operations().items()} == {
        name: {"cpu"} | ({"cuda"} if name in cuda else set()) for name in OPS | PACKED | INTO | INT8
    }


@pytest.mark.skipif(not library.WANTED or library.missing() is not None, reason="runs with the emulated library (CMOE_EMULATE_CUDA=1)")
def test_types_of_the_emulated_cuda_kernels_are_those_of_the_schema():
    found = library.operations(library.library())
    assert found == {name: types(schema("cmoe_emulated", name)) for name in OPS}


@pytest.mark.each
@pytest.mark.parametrize("name", sorted(OPS | PACKED | INT8))
def test_the_schema_is_that_of_the_public_operation_without_its_backend(name):
    ours, public = (
        [(a.name, str(a.type)) for a in schema(namespace, name).arguments if a.name != "backend"] for namespace in ("cmoe_native", "cmoe")
    )
    assert ours == public
    assert len(schema("cmoe", name).arguments) == len(ours) + (name in OPS | INT8)
