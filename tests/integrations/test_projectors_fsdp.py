"""Projectors under FSDP, with one process; units of device maps."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import cmoe_kernels.integrations.transformers as cmoe
from tests.integrations import tiny_models as tiny
from tests.integrations.test_projectors import swapped

pytest.importorskip("transformers")


def test_units_of_device_maps_and_fsdp():
    for model in (tiny.build("paligemma")[0], swapped("paligemma")[0]):
        names = {type(module).__name__ for module in model.modules()}
        if isinstance(model, cmoe.CMoEModel):
            assert "CMoEProjector" in model._no_split_modules
            assert model._no_split_modules <= names
        else:
            assert "PaliGemmaMultiModalProjector" in model._no_split_modules


# accelerate itself chooses FSDP for accelerators alone (AcceleratorState leaves MULTI_CPU as it is), so that its plugin decides here what
# is wrapped, as under `accelerate launch`, and torch wraps it.
FSDP = """
import sys, torch
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from cmoe_kernels.integrations.transformers import CMoEProjector, projectors
from tests.integrations import tiny_models as tiny
from tests.integrations.test_projectors import TASKS, swapped
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")


def check(version, family):
    model, images = swapped(family, init="random", aux_losses={"importance": 0.1})
    batch = tiny.batch(model, images, labels=True)
    expected = model(**batch, task=list(TASKS)).loss
    expected.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    plugin = FullyShardedDataParallelPlugin(fsdp_version=version, auto_wrap_policy="transformer_based_wrap")
    if version == 1:
        plugin.set_auto_wrap_policy(model)
        wrapped = FullyShardedDataParallel(
            model, auto_wrap_policy=plugin.auto_wrap_policy, use_orig_params=True, device_id=torch.device("cpu")
        )
        units = [m.module for m in wrapped.modules() if isinstance(m, FullyShardedDataParallel)]
    else:
        wanted = fsdp2_prepare_auto_wrap_policy(plugin, model)
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        for module in list(model.modules())[:0:-1]:
            if wanted(module):
                fully_shard(module, mesh=mesh)
        wrapped = fully_shard(model, mesh=mesh)
        units = [m for m in wrapped.modules() if isinstance(m, FSDPModule)]
    assert sum(isinstance(m, CMoEProjector) for m in units) == len(projectors(model)), units
    out = wrapped(**batch, task=list(TASKS))
    torch.testing.assert_close(out.loss, expected.detach(), rtol=0, atol=1e-5)
    out.loss.backward()
    seen = set()
    for name, p in wrapped.named_parameters():
        name = name.replace("_fsdp_wrapped_module.", "")
        if p.grad is not None and p.grad.numel():
            grad = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
            # FSDP 1 gives zeros to what the loss does not reach.
            torch.testing.assert_close(grad, grads.get(name, torch.zeros_like(grad)), rtol=1e-4, atol=1e-6)
            seen.add(name)
    assert seen >= set(grads)


for family in sys.argv[2:]:
    try:
        check(int(sys.argv[1]), family)
    except Exception as error:
        raise RuntimeError(family) from error
    print(family)
torch.distributed.destroy_process_group()
"""


@pytest.mark.costly
@pytest.mark.parametrize(
    "wrapped",
    [["qwen3_vl"], pytest.param([f for f in tiny.FAMILIES if f != "qwen3_vl"], marks=pytest.mark.full)],
    ids=["qwen3_vl", "the_others"],
)
@pytest.mark.parametrize("version", [1, 2])
def test_fsdp_of_one_process(version, wrapped):
    pytest.importorskip("accelerate")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environment = {**os.environ, **world, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", FSDP, str(version), *wrapped]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == wrapped
