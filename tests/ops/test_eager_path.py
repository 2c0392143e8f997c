"""The short way of a call in eager mode: to the kernel past the dispatcher, with the graph that the registered op makes."""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import cmoe_kernels as cmoe
from cmoe_kernels.ops import registration
from tests.ops.cases import ONE_PER_OP, leaves, on_backends
from tests.ops.test_promises import SAMPLED, output_grad


@pytest.fixture(params=["eager", "registered"])
def way(request, monkeypatch):
    if request.param == "registered":
        monkeypatch.setattr(registration, "eager", lambda arguments: None)
    return request.param


def graph(case, arguments):
    """What a call saves, gives, and leaves for backward to walk, and the gradients."""
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.detach().clone()) or t, lambda t: t):
        outputs = getattr(cmoe, case.op)(**arguments)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    node = outputs[0].grad_fn
    while "cmoe_" not in node.name():  # a view or cast of the public function
        node = node.next_functions[0][0]
    edges = [(next_node and next_node.name(), place) for next_node, place in node.next_functions]
    flags = [(y.requires_grad, y.is_leaf, y.dtype, y.shape, y.stride()) for y in outputs]
    y = outputs[0]
    gradients = torch.autograd.grad(y, [arguments[name] for name in leaves(arguments)], output_grad(y).to(y.dtype))
    return [*outputs, *saved, *gradients], (flags, edges, len(saved))


@on_backends(SAMPLED)
def test_both_ways_make_the_same_graph(case, backend, monkeypatch):
    with cmoe.use_backend(backend):
        tensors, facts = graph(case, case.make(torch.float32))
        monkeypatch.setattr(registration, "eager", lambda arguments: None)
        expected, expected_facts = graph(case, case.make(torch.float32))
    assert facts == expected_facts
    assert all(torch.equal(a, b) for a, b in zip(tensors, expected, strict=True))


@pytest.mark.parametrize("case", ONE_PER_OP, ids=str)
def test_a_saved_input_that_changes_is_an_error(case, way):
    arguments = case.make(torch.float32)
    name = leaves(arguments)[0]
    leaf = arguments[name]
    arguments[name] = leaf * 1
    y = case.call(arguments)
    arguments[name].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("case", ONE_PER_OP, ids=str)
def test_backward_twice(case, way):
    arguments = case.make(torch.float32)
    inputs = [arguments[name] for name in leaves(arguments)]
    y = case.call(arguments)
    first = torch.autograd.grad(y.sum(), inputs, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(y.sum(), inputs, retain_graph=True), strict=True))
    (again,) = torch.autograd.grad(y.square().sum(), inputs[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        again.sum().backward()
    torch.autograd.grad(y.sum(), inputs)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(y.sum(), inputs)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("case", ONE_PER_OP, ids=str)
def test_checkpoint(case, reentrant, way):
    arguments = case.make(torch.float32)
    inputs = [arguments[name] for name in leaves(arguments)]

    def call(*tensors):
        return case.call({**arguments, **dict(zip(leaves(arguments), tensors, strict=True))})

    y = torch.utils.checkpoint.checkpoint(call, *inputs, use_reentrant=reentrant)
    y.sum().backward()
    expected = torch.autograd.grad(call(*inputs).sum(), inputs)
    assert all(torch.equal(leaf.grad, grad) for leaf, grad in zip(inputs, expected, strict=True))


class Subclass(Tensor):
    pass


class SeenFunctions(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Seen(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


X = torch.ones(2, 3)
PLACEHOLDER = next(iter(torch.fx.symbolic_trace(torch.nn.Identity()).graph.nodes))


def test_plain_tensors_take_the_short_way():
    leaf = X.clone().requires_grad_()
    assert registration.eager((X, 2, "softmax", True, 1.0, None, [True])) is False
    assert registration.eager((leaf, torch.nn.Parameter(X), 2)) is True
    with torch.no_grad():
        assert registration.eager((leaf,)) is False
    with torch.inference_mode():
        assert registration.eager((leaf,)) is False


@pytest.mark.parametrize(
    "arguments",
    [(X.as_subclass(Subclass),), (X.to("meta"),), (X, torch.fx.Proxy(PLACEHOLDER)), (X, [X])],
    ids=["subclass", "meta", "proxy", "tensors"],
)
def test_other_arguments_meet_the_dispatcher(arguments):
    assert registration.eager(arguments) is None


@pytest.mark.parametrize("mode", [Seen, FakeTensorMode, SeenFunctions, forward_ad.dual_level, torch.profiler.profile])
def test_modes_meet_the_dispatcher(mode):
    with mode():
        assert registration.eager((X,)) is None
    assert registration.eager((X,)) is False


def test_functorch_meets_the_dispatcher():
    answers, kept = [], []
    torch.func.vmap(lambda x: answers.append(registration.eager((x,))) or kept.append(x) or x)(X)
    torch.func.grad(lambda x: answers.append(registration.eager((X,))) or x.sum())(X)
    assert answers == [None, None]
    assert registration.eager((kept[0],)) is None  # a wrapper that outlived its transform


def test_jit_trace_and_flop_counter_meet_the_dispatcher():
    traced = torch.jit.trace(lambda x: cmoe.soft_gate(x), (X,))
    assert "cmoe::soft_gate" in str(traced.graph)
    with FlopCounterMode(display=False) as counter:
        cmoe.soft_gate(X)
    assert counter.get_total_flops() == 0


def test_the_profiler_shows_an_op_by_its_name():
    with torch.profiler.profile() as profiler:
        cmoe.soft_gate(X)
    assert "cmoe::soft_gate" in {event.key for event in profiler.key_averages()}
