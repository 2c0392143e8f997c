"""The roofline's counts against the kernels' own loops: what they multiply, load and store in the interpreter, launch by launch.

At sizes that fill their tiles the products must be those of the model exactly; at odd sizes tiles are padded, so the model has less.
Bytes are those of every distinct element that the programs of a launch touch: a model that forgets an operand, or counts one that is not
read, differs. And what the model sees on the meta device, at any size, must be the launches that real tensors make.
"""

import math

import numpy as np
import pytest
import torch

from cmoe_kernels import backends

if not backends.INTERPRETED:
    pytest.skip("for the interpreter's process (TRITON_INTERPRET=1)", allow_module_level=True)

import triton.runtime.interpreter as interpreter

import cmoe_kernels as cmoe
from benchmarks.inspection import launch_counts
from tests.ops import cases

Builder = interpreter.InterpreterBuilder
# Whole tiles of fp32 and bf16 alike: every expert gets 128 rows, and the router's E is the width to which it pads its second product.
WHOLE = {"T": 128, "D": 128, "H": 128, "O": 128, "E": 2, "K": 2, "R": 256, "S": 128, "G": 16}
# Larger products fill their tiles at these sizes; smaller ones are of one task row, of one row of ones, or have 16 columns.
PADDED = 2**20
FORMS = [
    case
    for case in cases.CASES
    if str(case)
    in (
        "soft_gate-logits",
        "topk_gate-selection",
        "task_router-task_token",
        "task_router-task_token-groups",
        "task_router-token-one_layer",
        "soft_experts-mlp",
        "soft_experts-linear",
        "sparse_experts-mlp",
        "sparse_experts-gated",
        "sparse_experts-linear",
        "balance_loss-switch",
    )
]


class Executed:
    """What the programs of one launch did."""

    def __init__(self) -> None:
        self.flops = 0
        self.touched: dict[int, list[np.ndarray]] = {}

    def touch(self, pointers, mask):
        live = np.asarray(pointers.data)[np.broadcast_to(mask.data, np.shape(pointers.data)).astype(bool)]
        width = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        self.touched.setdefault(width, []).append(np.unique(live))

    @property
    def bytes(self) -> int:
        return sum(width * len(np.unique(np.concatenate(addresses))) for width, addresses in self.touched.items())


@pytest.fixture
def launches(monkeypatch):
    """Pairs of the step that the model predicts and what was executed, one for each launch of a Triton kernel."""
    pairs: list[tuple[launch_counts.Step, Executed]] = []
    dot, load, store, rmw = Builder.create_dot, Builder.create_masked_load, Builder.create_masked_store, Builder.create_atomic_rmw

    def counted_dot(self, a, b, *rest):
        pairs[-1][1].flops += 2 * math.prod(a.data.shape) * b.data.shape[-1]
        return dot(self, a, b, *rest)

    def counted_load(self, pointers, mask, *rest, **settings):
        pairs[-1][1].touch(pointers, mask)
        return load(self, pointers, mask, *rest, **settings)

    def counted_store(self, pointers, value, mask, *rest, **settings):
        pairs[-1][1].touch(pointers, mask)
        return store(self, pointers, value, mask, *rest, **settings)

    def counted_rmw(self, op, pointers, value, mask, *rest):
        pairs[-1][1].touch(pointers, mask)
        return rmw(self, op, pointers, value, mask, *rest)

    def launch(kernel, grid, args, settings):
        pairs.append((launch_counts.of_launch(kernel, args, settings), Executed()))
        kernel.run(*args, grid=grid, warmup=False, **settings)

    monkeypatch.setattr(Builder, "create_dot", counted_dot)
    monkeypatch.setattr(Builder, "create_masked_load", counted_load)
    monkeypatch.setattr(Builder, "create_masked_store", counted_store)
    monkeypatch.setattr(Builder, "create_atomic_rmw", counted_rmw)
    with launch_counts.intercepted(launch):
        yield pairs


def arguments_of(case, dtype):
    """With selections that give every expert the same number of rows."""
    arguments = case.make(dtype)
    if "indices" in arguments:
        tokens, k = arguments["indices"].shape
        arguments["indices"] = (torch.arange(tokens * k) % cases.E).view(tokens, k)
    return arguments


def run(case, arguments):
    y = case.call(arguments)
    torch.autograd.grad(y, [arguments[n] for n in cases.leaves(arguments)], torch.ones_like(y), allow_unused=True)


def sized(monkeypatch, **letters):
    for letter, value in letters.items():
        monkeypatch.setattr(cases, letter, value)


IN_CI = ("topk_gate-selection", "task_router-task_token", "soft_experts-mlp", "sparse_experts-gated", "balance_loss-switch")


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        pytest.param(case, dtype, marks=() if dtype == torch.bfloat16 and str(case) in IN_CI else pytest.mark.full)
        for case in FORMS
        for dtype in (torch.float32, torch.bfloat16)
    ],
    ids=str,
)
def test_whole_tiles(case, dtype, launches, monkeypatch):
    sized(monkeypatch, **WHOLE | ({"E": 16} if case.op == "task_router" else {}))
    arguments = arguments_of(case, dtype)
    with cmoe.use_backend("triton"):
        run(case, arguments)
    assert launches
    for step, executed in launches:
        assert step.flops <= executed.flops
        if step.flops > PADDED:
            assert executed.flops == step.flops, step
        # All of an argument is counted; not read are the ends of offsets, and gates that would only weigh a bias that is not there.
        assert step.bytes - max(16, step.bytes // 50) <= executed.bytes <= step.bytes, step

    meta = {n: v.detach().to("meta").requires_grad_(v.requires_grad) if isinstance(v, torch.Tensor) else v for n, v in arguments.items()}
    with cmoe.use_backend("reference"), launch_counts.Counter() as counter:
        run(case, meta)
    predicted = [step for step in counter.steps if not step.name.startswith("aten::")]
    assert predicted == [step for step, _ in launches]


@pytest.mark.full
@pytest.mark.parametrize("case", FORMS, ids=str)
def test_padded_tiles_do_more_and_touch_no_more(case, launches):
    with cmoe.use_backend("triton"):
        run(case, arguments_of(case, torch.float32))
    for step, executed in launches:
        assert step.flops <= executed.flops, step
        assert executed.bytes <= step.bytes, step


def test_idle_experts_are_not_read(launches, monkeypatch):
    """One token, two of sixteen experts. Their gradients are written for all, as zeros."""
    sized(monkeypatch, **WHOLE | {"T": 1, "E": 16})
    monkeypatch.setattr(launch_counts.of_launch, "__defaults__", (2 / 16,))
    case = next(c for c in FORMS if str(c) == "sparse_experts-mlp")
    with cmoe.use_backend("triton"):
        run(case, arguments_of(case, torch.float32))
    products = [(step, executed) for step, executed in launches if step.flops]
    assert len(products) == 6
    for step, executed in products:
        assert executed.bytes == pytest.approx(step.bytes, rel=0.02), step
