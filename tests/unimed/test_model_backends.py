"""The whole model on the kernels against the whole model on the reference."""

import pytest
import torch
from model_samples import QA, REFER, VQA, batch, lively, picture, small

from cmoe_kernels import use_backend

ROUTERS = {
    "soft, task and token": {},
    "soft, token": {"router_inputs": "token"},
    "soft, task": {"router_inputs": "task"},
    "sparse": {"router": "sparse", "aux_losses": {"switch": 0.1, "z": 0.01}},
    "hard": {"router": "hard"},
    "constant": {"router": "constant"},
    "linear experts": {"expert": "linear"},
    "pooled": {"resample": "avgpool"},
    "recompute": {"recompute": True},
}


def build(connector):
    sizes = {"hidden_features": 24, "router_features": 12, "task_features": 8, "aux_losses": {"importance": 0.1}}
    return small(connector={**sizes, **connector})


@pytest.mark.parametrize("connector", ROUTERS.values(), ids=ROUTERS.keys())
def test_loss_and_every_gradient_agree(connector):
    model, processor = build(connector)
    model.train()
    rows = batch(processor)
    losses, gradients = {}, {}
    for backend in ("reference", "auto"):
        model.zero_grad()
        with use_backend(backend):
            out = model(**rows)
            out.loss.backward()
        losses[backend] = (out.loss, out.lm_loss, out.aux_loss, out.gates)
        gradients[backend] = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    for ours, reference in zip(losses["auto"], losses["reference"], strict=True):
        torch.testing.assert_close(ours, reference, atol=1e-5, rtol=1e-5)
    assert gradients["auto"].keys() == gradients["reference"].keys()
    for name, reference in gradients["reference"].items():
        scale = reference.abs().max().item()
        torch.testing.assert_close(gradients["auto"][name], reference, atol=2e-5 * scale + 1e-8, rtol=1e-4, msg=name)


@pytest.mark.parametrize(
    "connector", [{}, {"router": "sparse", "aux_losses": {}}, {"router_inputs": "task"}], ids=["soft", "sparse", "task"]
)
def test_greedy_tokens_agree(connector):
    model, processor = build(connector)
    lively(model)
    asked = processor(text=[REFER, QA, VQA], images=[picture(1), picture(2)])
    answers = {}
    for backend in ("reference", "auto"):
        with use_backend(backend):
            answers[backend] = model.generate(**asked, max_new_tokens=16)
    assert torch.equal(answers["reference"], answers["auto"])
    assert len(set(answers["auto"][0, asked.input_ids.shape[1] :].tolist())) > 3
