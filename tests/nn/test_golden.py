"""The released connector's own outputs, gates and gradients (48 cases in fp64), reproduced to 1e-9."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import cmoe_kernels as cmoe
from tests.ops.cases import DEVICE

FILE = Path(__file__).parents[1] / "golden" / "unimed_cmoe.safetensors"
with safe_open(FILE, "pt") as golden:
    CASES = json.loads(golden.metadata()["cases"])


def tensors(case: str) -> dict[str, torch.Tensor]:
    with safe_open(FILE, "pt") as f:
        return {key.removeprefix(f"{case}."): f.get_tensor(key).to(DEVICE) for key in f.keys() if key.startswith(f"{case}.")}  # noqa: SIM118


def part(values: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)}


def build(case: dict, parameters: dict[str, torch.Tensor], **settings) -> cmoe.CMoEConnector:
    config, state = cmoe.nn.convert.from_unimed(
        parameters,
        router=case["router_type"],
        router_inputs=case["router_method"].removeprefix("router_"),
        resample=case["resample_method"],
        **settings,
    )
    connector = cmoe.CMoEConnector(config, dtype=torch.float64)
    connector.load_state_dict(state)
    return connector


def test_there_are_48_cases():
    assert len(CASES) == 48


@pytest.mark.parametrize("recompute", [False, True], ids=["save", "recompute"])
@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize(
    "case", CASES, ids=lambda c: "-".join([c["case"], *(c[k] for k in ("projector_type", "router_type", "router_method"))])
)
def test_golden(case, backend, recompute):
    values = tensors(case["case"])
    parameters, expected = part(values, "p."), part(values, "g.")
    connector = build(case, parameters, recompute=recompute)
    # The stand-in encoder's last norm and class token are not the connector's.
    norm = torch.nn.LayerNorm(case["feat"], dtype=torch.float64)
    norm.load_state_dict(part(parameters, "ln_vision."))
    with cmoe.use_backend(backend):
        out = connector(norm(values["x"])[:, 1:], task=case["task"])
        out.embeddings.backward(values["gy"])
    torch.testing.assert_close(out.embeddings, values["y"], rtol=0, atol=1e-9)
    torch.testing.assert_close(out.gates, values["w"], rtol=0, atol=1e-9)

    got = cmoe.nn.convert.to_unimed({name: p.grad for name, p in connector.named_parameters()}, connector.config)
    got |= {f"ln_vision.{name}": p.grad for name, p in norm.named_parameters()}
    for name, grad in expected.items():
        torch.testing.assert_close(got[name], grad, rtol=0, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
    # What the release left without a gradient (the tokens of other tasks) is zero here, as the tokens are one parameter.
    assert not any(got[name].any() for name in got.keys() - expected.keys())
