"""The exact shortcuts save what they are there to save: products counted, not timed. Their values are tested with everything else."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from cmoe_kernels import backends

T, D, H, O, E, K, R, G, S = 32, 24, 20, 12, 5, 2, 64, 3, 16  # noqa: E741


def x(*shape):
    return torch.randn(shape)


def flops(op, *arguments):
    with FlopCounterMode(display=False) as counter:
        result = backends._kernels[op, "reference"](*arguments)
    return counter.get_total_flops() // 2, result


class Largest(TorchDispatchMode):
    """The largest tensor that any operation makes."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.elements = max(self.elements, result.numel())
        return result


def test_split_router_never_multiplies_the_task_columns_per_token():
    w1, b1, w2, b2 = x(R, S + D), x(R), x(E, R), x(E)
    ids = torch.arange(T) % G
    n, (_, u) = flops("task_router", x(T, D), x(G, S), w1, b1, w2, b2, ids, "gelu", True)
    assert n == T * D * R + G * S * R + T * R * E
    arguments = (x(T, E), x(T, D), x(G, S), w1, b1, w2, b2, ids, u, "gelu")
    n, _ = flops("task_router_backward", *arguments, [True] * 6)
    per_token = 2 * T * D * R + 2 * T * R * E  # dx and dw1; dh and dw2
    assert n == per_token + 2 * G * S * R + G * T * R  # dtask and its columns of dw1: one row per task; the sum over tokens by task
    frozen, _ = flops("task_router_backward", *arguments, [False, *[True] * 5])
    assert frozen == n - T * D * R


def test_task_router_runs_once_per_task():
    n, _ = flops("task_router", None, x(G, S), x(R, S), x(R), x(E, R), x(E), None, "gelu", True)
    assert n == G * S * R + G * R * E


def test_dense_experts_store_no_expert_output_and_no_gradient_for_a_frozen_encoder():
    # Many experts and a wide output: a stack [E, T, O] would be the largest tensor by far.
    experts, out = 16, 256
    weights = (x(experts, 4, D), x(experts, 4), x(experts, out, 4), x(experts, out))
    with Largest() as largest:
        _, u = backends._kernels["soft_experts", "reference"](x(T, D), x(T, experts), *weights, None, "gelu", True)
    assert largest.elements <= experts * out * 4  # the second weights, in views and casts
    assert largest.elements < experts * T * out
    arguments = (x(T, out), x(T, D), x(T, experts), *weights, None, u, "gelu")
    n, _ = flops("soft_experts_backward", *arguments, [True] * 6)
    frozen, _ = flops("soft_experts_backward", *arguments, [False, *[True] * 5])
    assert n - frozen == experts * T * 4 * D
    # dgate costs no product of its own beyond dy @ b2^T: dy @ w2 is what du needs.
    no_gate, _ = flops("soft_experts_backward", *arguments, [True, False, *[True] * 4])
    assert n - no_gate == T * out * experts


@pytest.mark.parametrize("ids", [None, torch.arange(T) % G], ids=["one_row", "groups"])
def test_single_linear_experts_merge(ids):
    groups = 1 if ids is None else G
    w, b, gates = x(E, O, D), x(E, O), x(groups, E)
    n, _ = flops("soft_experts", x(T, D), gates, w, b, None, None, ids, "gelu", False)
    assert n == T * D * O + groups * E * O * D + groups * E * O  # one Linear on the tokens; weights and biases merged
    dense, _ = flops("soft_experts", x(T, D), x(T, E), w, b, None, None, None, "gelu", False)
    assert dense == E * T * D * O + T * E * O


def test_hard_routing_runs_one_expert_per_token():
    weights = (x(E, H, D), x(E, H), x(E, O, H), x(E, O))
    indices, ids = torch.arange(G)[:, None], torch.arange(T) % G
    n, _ = flops("sparse_experts", x(T, D), None, indices, *weights, ids, "gelu", False, True)
    assert n == T * D * H + T * H * O


def test_sparse_experts_run_k_experts_per_token():
    weights = (x(E, H, D), x(E, H), x(E, O, H), x(E, O))
    indices = torch.rand(T, E).argsort(-1)[:, :K]
    n, _ = flops("sparse_experts", x(T, D), x(T, K), indices, *weights, None, "gelu", False, True)
    assert n == K * (T * D * H + T * H * O)
