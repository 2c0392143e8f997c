"""Wrong input: one line that names the argument, what it was and what it must be."""

import re

import pytest
import torch

import cmoe_kernels as cmoe
from cmoe_kernels import backends
from cmoe_kernels.ops import checked, groups
from cmoe_kernels.ops.arguments import CHECK_ON_DEVICE
from tests.ops.cases import CASES, DEVICE, backends_of, on_cpu

BY_NAME = {str(case): case for case in CASES}


def t(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


def ids(*values):
    return torch.tensor(values)


BAD = [
    ("soft_gate-logits", {"logits": [1.0]}, TypeError, r"logits must be a tensor \[T, E\], got list"),
    ("soft_gate-logits", {"logits": t(3)}, ValueError, r"logits must have the dimensions \[T, E\], got shape \(3,\)"),
    ("soft_gate-logits", {"logits": t(3, 2, dtype=torch.int64)}, TypeError, "logits must be float32, .* got torch.int64"),
    ("topk_gate-selection", {"k": 6}, ValueError, r"k is 6, must be in 1..5"),
    ("topk_gate-selection", {"k": 0}, ValueError, r"k is 0, must be in 1..5"),
    ("topk_gate-selection", {"k": 2.0}, TypeError, r"k is 2.0, must be an integer"),
    ("topk_gate-selection", {"score": "tanh"}, ValueError, "score is 'tanh', must be one of softmax, sigmoid"),
    ("topk_gate-selection", {"selection": t(11, 4)}, ValueError, "selection has 4 in dimension 1 .* must be 5"),
    ("task_router-task_token-groups", {"group_ids": None}, ValueError, "group_ids is None, must be given where task has more than one row"),
    ("task_router-task_token-groups", {"group_ids": t(11)}, TypeError, "group_ids must be torch.int64, got torch.float32"),
    ("task_router-task_token-groups", {"group_ids": ids(*[0] * 10, 3)}, ValueError, "group_ids holds 3, must be in 0..2"),
    ("task_router-task_token-groups", {"group_ids": ids(*[0] * 10, -1)}, ValueError, "group_ids holds -1, must be in 0..2"),
    ("task_router-task_token-groups", {"inputs": "image"}, ValueError, "inputs is 'image', must be one of task_token, token, task"),
    ("task_router-task_token-groups", {"task": None}, ValueError, "task must be given with inputs='task_token'"),
    ("task_router-token", {"task": t(1, 4)}, ValueError, "task must be None with inputs='token'"),
    ("task_router-task", {"x": t(11, 7)}, ValueError, "x must be None with inputs='task'"),
    ("task_router-task", {"group_ids": ids(0, 0)}, ValueError, "group_ids must be None with inputs='task'"),
    ("task_router-task_token", {"w1": t(13, 12)}, ValueError, "w1 has 12 in dimension 1 .* must be 11 .the width of the router's input"),
    ("task_router-task_token", {"b1": t(12)}, ValueError, "b1 has 12 .* must be 13"),
    ("task_router-task_token", {"w2": None}, ValueError, "b2 is given without w2"),
    ("task_router-task_token", {"w2": t(5, 12)}, ValueError, "w2 has 12 in dimension 1 .* must be 13"),
    ("task_router-task_token", {"activation": "swish"}, ValueError, "activation is 'swish', must be one of gelu, gelu_tanh, silu, relu"),
    ("grouped_linear-plain", {"w": t(5, 6, 8)}, ValueError, "w has 8 in dimension 2 .* must be 7 .width of x"),
    ("grouped_linear-plain", {"w": t(5, 6, 7, dtype=torch.bfloat16)}, TypeError, "w is torch.bfloat16, must be torch.float32 like x"),
    ("grouped_linear-plain", {"offsets": ids(0, 1, 2, 3, 4, 5)}, TypeError, "offsets must be torch.int32, got torch.int64"),
    ("grouped_linear-plain", {"offsets": ids(0, 3, 2, 7, 8, 11).int()}, ValueError, "offsets are .* must start at 0, not decrease"),
    ("grouped_linear-plain", {"offsets": ids(1, 3, 3, 7, 8, 11).int()}, ValueError, "must start at 0"),
    ("grouped_linear-plain", {"offsets": ids(0, 3, 3, 7, 8, 12).int()}, ValueError, "end at 11 rows or before"),
    ("grouped_linear-plain", {"offsets": ids(0, 3).int()}, ValueError, "offsets has 2 .* must be 6"),
    ("grouped_linear-plain", {"k": 0}, ValueError, "k is 0, must be at least 1"),
    ("grouped_linear-plain", {"k": 1.0}, TypeError, "k is 1.0, must be an integer"),
    ("grouped_linear-gather-scatter", {"gather_idx": torch.zeros(22, dtype=torch.int64)}, ValueError, "gather_idx must be a permutation"),
    ("grouped_linear-gather-scatter", {"scatter_idx": torch.arange(22) + 1}, ValueError, "scatter_idx must be a permutation"),
    ("grouped_linear-gather-scatter", {"scatter_idx": torch.arange(11)}, ValueError, "scatter_idx has 11 .* must be 22"),
    ("soft_experts-mlp", {"gates": t(3, 5)}, ValueError, "gates has 3 rows, must have 11 .* or 1; or give group_ids"),
    ("soft_experts-mlp", {"gates": t(11, 4)}, ValueError, "gates has 4 in dimension 1 .* must be 5 .experts in w1"),
    ("soft_experts-mlp", {"gates": t(11, 5, dtype=torch.float64)}, TypeError, "gates is torch.float64, must be torch.float32"),
    ("soft_experts-mlp", {"x": t(11, 8)}, ValueError, "w1 has 7 in dimension 2 .* must be 8 .width of x"),
    ("soft_experts-mlp", {"w2": t(4, 6, 9)}, ValueError, "w2 has 4 in dimension 0 .* must be 5 .experts in w1"),
    ("soft_experts-mlp", {"b2": t(5, 5)}, ValueError, "b2 has 5 in dimension 1 .* must be 6"),
    ("soft_experts-mlp-groups", {"group_ids": ids(*[0] * 10, 3)}, ValueError, "group_ids holds 3, must be in 0..2 .rows of gates"),
    (
        "sparse_experts-mlp",
        {"indices": torch.full((11, 2), 6)},
        ValueError,
        "indices holds 6, must be in -1..5 .5 experts; -1 and 5 mean no expert",
    ),
    ("sparse_experts-mlp", {"indices": torch.full((11, 2), -2)}, ValueError, "indices holds -2, must be in -1..5"),
    ("sparse_experts-mlp", {"weights": t(11, 1)}, ValueError, "weights has 1 in dimension 1 .* must be 2"),
    ("sparse_experts-mlp", {"weights": None, "indices": ids([0], [1])}, ValueError, "indices has 2 rows, must have 11 .* or 1"),
    ("sparse_experts-mlp", {"gated": True}, ValueError, "w1 has 9 in dimension 1 .* must be even"),
    ("sparse_experts-linear", {"gated": True}, ValueError, "w2 must be given with gated=True"),
    (
        "sparse_experts-linear",
        {"indices": torch.zeros(11, 0, dtype=torch.int64), "weights": None},
        ValueError,
        "at least one expert per token",
    ),
    ("sparse_experts-hard", {"group_ids": ids(*[0] * 10, 3)}, ValueError, "group_ids holds 3, must be in 0..2 .rows of indices"),
    ("balance_loss-switch", {"kind": "cv"}, ValueError, "kind is 'cv', must be one of switch, importance, z"),
    ("balance_loss-switch", {"indices": None}, ValueError, "kind='switch' needs either indices or counts"),
    ("balance_loss-switch", {"indices": torch.full((11, 2), 6)}, ValueError, "indices holds 6, must be in -1..5"),
    ("balance_loss-switch", {"indices": torch.full((11, 2), -2)}, ValueError, "indices holds -2, must be in -1..5"),
    ("balance_loss-switch", {"indices": torch.zeros(11, 0, dtype=torch.int64)}, ValueError, "at least one expert per token"),
    ("balance_loss-switch", {"counts": t(5)}, ValueError, "kind='switch' needs either indices or counts"),
    ("balance_loss-switch", {"mask": t(11)}, TypeError, "mask must be torch.bool, got torch.float32"),
    ("balance_loss-switch", {"total": 3}, ValueError, "total is given without counts"),
    ("balance_loss-switch-counts", {"segments": torch.zeros(11, dtype=torch.int64)}, ValueError, "counts cannot be combined with segments"),
    ("balance_loss-z", {"from_logits": True}, ValueError, "from_logits is given, is for kind='switch' and 'importance'"),
    ("balance_loss-z", {"indices": torch.zeros(11, 1, dtype=torch.int64)}, ValueError, "indices is given, is for kind='switch' alone"),
]


@pytest.mark.each
@pytest.mark.parametrize(
    ("case", "change", "error", "message"), BAD, ids=[f"{c}-{'-'.join(ch)}-{i}" for i, (c, ch, _, _) in enumerate(BAD)]
)
def test_wrong_input(case, change, error, message):
    if DEVICE != "cpu" and not CHECK_ON_DEVICE and re.search("holds|must start|end at|permutation", message):
        pytest.skip("values are read on a GPU only with CMOE_CHECK=1")
    case = BY_NAME[case]
    with cmoe.use_backend("reference"), pytest.raises(error, match=message) as raised:
        case.call(case.make(torch.float32) | change)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("backend", [b for b in backends_of("grouped_linear") if b in ("cpu", "cuda")])
def test_a_saved_tensor_of_another_size_is_not_read(backend):
    tensors = t(11, 6), t(11, 7), t(1, 6, 7), None, ids(0, 11).int(), None, None, t(0)
    with pytest.raises(RuntimeError, match=r"u has shape \(0\), must be \(11, 6\) like y"):
        torch.ops.cmoe.grouped_linear_backward(*tensors, 1, "gelu", [True, True, False], backend)


def test_devices_must_agree():
    case = BY_NAME["soft_experts-mlp"]
    with pytest.raises(ValueError, match=f"gates is on meta, must be on {DEVICE}.* like x"):
        case.call(case.make(torch.float32) | {"gates": torch.zeros(11, 5, device="meta")})


def test_a_bad_index_on_a_gpu_reads_and_writes_nothing(monkeypatch):
    """There the kernels do not check: the reference's own arithmetic must treat it as "no expert" (run here on the CPU, unchecked)."""
    monkeypatch.setattr(checked, "CHECKS", {})
    bad = ids(*[0, 1, 2] * 3, 99, -7)
    grouped = BY_NAME["soft_experts-mlp-groups"].make(torch.float32, grad=False) | {"group_ids": bad}
    with cmoe.use_backend("reference"):
        y = cmoe.soft_experts(**grouped)
        assert not y[-2:].any()
        assert y[:-2].any(-1).all()
        chosen = BY_NAME["sparse_experts-linear"].make(torch.float32, grad=False)
        chosen["indices"] = chosen["indices"].clone()
        chosen["indices"][3] = torch.tensor([77, -3])
        y = cmoe.sparse_experts(**chosen)
        assert not y[3].any()
        assert y[[0, 1, 2, 4]].any(-1).all()
        hard = BY_NAME["sparse_experts-hard"].make(torch.float32, grad=False) | {"group_ids": bad}
        assert not cmoe.sparse_experts(**hard)[-2:].any()
    assert not groups.per_token(torch.ones(3, 2), bad)[-2:].any()


@on_cpu
def test_an_unknown_backend_and_one_that_lacks_the_op():
    with (
        pytest.raises(ValueError, match="use_backend: 'tpu' is not a backend; choose one of reference, cpu, triton, cuda or auto"),
        cmoe.use_backend("tpu"),
    ):
        pass
    with (
        pytest.raises(RuntimeError, match="backend 'cuda' has no soft_gate for device 'cpu'; it is served there by"),
        cmoe.use_backend("cuda"),
    ):
        cmoe.soft_gate(torch.zeros(2, 3))
    with pytest.raises(RuntimeError, match="soft_gate was recorded with backend 'cuda', which is not there on this machine"):
        torch.ops.cmoe.soft_gate(torch.zeros(2, 3), "cuda")


def test_the_context_ends_with_an_exception():
    with pytest.raises(KeyError), cmoe.use_backend("reference"):
        raise KeyError
    assert backends._selected == "auto"
