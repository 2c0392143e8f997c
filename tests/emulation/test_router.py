"""The task router, emulated: more tokens and hidden units than a tile, more experts than its epilogue takes, every order of threads."""

import pytest
import torch

import cmoe_kernels as cmoe
from tests.emulation import library
from tests.ops import larger
from tests.ops.cases import DTYPES, Maker
from tests.ops.larger import results, with_leaves

if not library.WANTED:
    pytest.skip("for the process of emulated kernels (CMOE_EMULATE_CUDA=1)", allow_module_level=True)
pytestmark = pytest.mark.skipif(library.missing() is not None, reason=str(library.missing()))


def arguments_of(dtype, tokens, width, hidden, experts, groups, **settings):
    m = Maker(dtype, 0)
    task = 24
    weights = {"w1": m.x(hidden, task + width) / 8, "b1": m.x(hidden), "w2": m.x(experts, hidden) / 8, "b2": m.x(experts)}
    given = {"x": m.x(tokens, width), "task": m.x(groups, task), **weights, **settings}
    if groups > 1:
        given["group_ids"] = m.ids(groups, tokens)
    return with_leaves(given)


def check(arguments, dtype, capability=library.CAPABILITY):
    found = []
    for order in ("forward", "reverse", "shuffled"):
        with library.emulator(order, lazy=order != "reverse", capability=capability), cmoe.use_backend("cuda"):
            found.append(results("task_router", arguments))
        assert all(torch.equal(a, b) for a, b in zip(found[0], found[-1], strict=True)), order
    larger.check("task_router", arguments, dtype, found[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("experts", [5, 16, 20])
def test_many_tiles(dtype, experts):
    """Over several tiles and ranges of rows; 20 experts are past what the epilogue multiplies. Widths of whole chunks go by cp.async."""
    check(arguments_of(dtype, 150, 40, 200, experts, 3, activation="silu"), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("experts", [5, 20])
@pytest.mark.parametrize("tokens", [150, 40])
def test_sm90(tokens, experts, dtype):
    """Its products are those of sm_90a there: with a large tile for both warpgroups, and with tiles of their own for few tokens."""
    check(arguments_of(dtype, tokens, 40, 200, experts, 3), dtype, capability=90)


@pytest.mark.parametrize("settings", [{"recompute": True}, {"activation": "gelu_tanh"}], ids=str)
def test_odd_widths(settings):
    check(arguments_of(torch.bfloat16, 70, 13, 67, 3, 1, **settings), torch.bfloat16)


def test_a_group_that_does_not_exist_has_no_bias():
    given = arguments_of(torch.float32, 9, 16, 32, 4, 2)
    plain = {n: v.detach() if isinstance(v, torch.Tensor) else v for n, v in given.items()}
    split = plain["task"].shape[1]
    ops = torch.ops.cmoe_emulated
    ids = torch.tensor([0, 1, 2, -1, 1 << 40, 0, 1, 1, 0])
    inputs = [plain[n] for n in ("x", "task", "w1", "b1", "w2", "b2")]
    logits, u = ops.task_router(*inputs, ids, "relu", True)
    bare = plain["x"] @ plain["w1"][:, split:].T
    torch.testing.assert_close(u[2:5], bare[2:5])
    _, dtask, dw1, db1, _, _ = ops.task_router_backward(torch.ones_like(logits), *inputs, ids, u, "relu", [True] * 6)
    known = (ids >= 0) & (ids < 2)
    du = (torch.ones(9, 4) @ plain["w2"]) * (u > 0)
    torch.testing.assert_close(db1, du[known].sum(0))
    torch.testing.assert_close(dw1[:, split:], du.T @ plain["x"])
    torch.testing.assert_close(dtask[1], du[ids == 1].sum(0) @ plain["w1"][:, :split])
