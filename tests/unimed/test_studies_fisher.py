"""Spectra with known answers: a linear model, a quadratic, matrices made to order; and the probe in a real training."""

import json
import math

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from unimed.errors import UserError
from unimed.studies.fisher import EXACT, FisherProbe, gram_of_samples, spectrum


def made(values, n, p, seed=0):
    """Gradients [n, p] whose Fisher information has these eigenvalues."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(n, len(values), generator=generator, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(p, len(values), generator=generator, dtype=torch.float64))[0]
    return left @ torch.diag((torch.tensor(values, dtype=torch.float64) * n).sqrt()) @ right.T


@pytest.mark.parametrize(("n", "p"), [(12, 40), (40, 12), (12, 12)])
def test_eigenvalues_that_were_put_in(n, p):
    values = [5.0, 2.0, 1.0, 0.25]
    found = spectrum(made(values, n, p))
    assert found.eigenvalues[:4].tolist() == pytest.approx(values, rel=1e-10)
    assert found.eigenvalues[4:].abs().max() < 1e-12
    shares = [v / sum(values) for v in values]
    assert found.entropy == pytest.approx(-sum(q * math.log(q) for q in shares) / math.log(12), rel=1e-10)
    assert found.dominant_ratio == pytest.approx(shares[0], rel=1e-10)


def test_a_linear_model_has_the_spectrum_of_its_data():
    """Loss (w x - t)^2 / 2 with residual 1 for all: the gradient is x, so F is the second moment of x."""
    x = torch.tensor([[3.0, 0.0, 0.0], [-3.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, -1.0, 0.0]])
    layer = nn.Linear(3, 1, bias=False)

    def loss(i):
        out = layer(x[i])
        return (out - out.detach() + 1).square().sum() / 2

    gram, passes = gram_of_samples(loss, 4, [layer.weight])
    found = spectrum(torch.stack([torch.autograd.grad(loss(i), layer.weight)[0].flatten() for i in range(4)]))
    assert found.eigenvalues.tolist() == pytest.approx([4.5, 0.5, 0], abs=1e-4)
    assert found.dominant_ratio == pytest.approx(0.9, abs=1e-4)
    assert torch.allclose(torch.linalg.eigvalsh(gram / 4).flip(0)[:3], found.eigenvalues, atol=1e-10)
    assert passes == 4


def test_a_quadratic_with_noise_has_the_spectrum_of_its_noise():
    """Loss a/2 (w - c_i)^2 at w = 0: gradients -a c_i, here on the axes, so that eigenvalues are a_k^2 c_k^2 / axes."""
    curvature, offsets = torch.tensor([4.0, 2.0, 1.0]), torch.diag(torch.tensor([1.0, 2.0, 3.0]))
    w = nn.Parameter(torch.zeros(3))
    gram, _ = gram_of_samples(lambda i: (curvature * (w - offsets[i]).square()).sum() / 2, 3, [w])
    wanted = sorted(((curvature * torch.diag(offsets)).square() / 3).tolist(), reverse=True)
    assert torch.linalg.eigvalsh(gram / 3).flip(0).tolist() == pytest.approx(wanted, abs=1e-4)


def test_ends_of_both_numbers():
    one = spectrum(torch.ones(8, 1) @ torch.randn(1, 20, generator=torch.Generator().manual_seed(1)))
    assert (one.entropy, one.dominant_ratio) == (pytest.approx(0, abs=1e-6), pytest.approx(1))
    alike = spectrum(torch.eye(8, 20))
    assert (alike.entropy, alike.dominant_ratio) == (pytest.approx(1), pytest.approx(1 / 8))
    nothing = spectrum(torch.zeros(3, 5))
    assert (nothing.entropy, nothing.dominant_ratio) == (0, 0)
    single = spectrum(torch.ones(1, 5))
    assert (single.entropy, single.dominant_ratio) == (0, 1)


def test_lanczos_agrees_with_the_gram_matrix():
    grads = torch.randn(300, 400, generator=torch.Generator().manual_seed(2)) * torch.linspace(0.05, 1, 400).square()
    exact, large = spectrum(grads), spectrum(grads, exact=64)
    assert EXACT > 300
    assert len(large.eigenvalues) >= 5
    assert large.eigenvalues[:5].tolist() == pytest.approx(exact.eigenvalues[:5].tolist(), rel=1e-4)
    assert large.dominant_ratio == pytest.approx(exact.dominant_ratio, rel=1e-4)
    assert large.entropy == pytest.approx(exact.entropy, abs=0.01)
    assert spectrum(grads, exact=64).entropy == large.entropy
    low = spectrum(made([5.0, 2.0, 1.0], 300, 400), exact=64)  # it breaks down after three steps, and is exact
    assert low.eigenvalues.tolist()[:3] == pytest.approx([5, 2, 1], rel=1e-6)


@pytest.mark.parametrize("wrong", [torch.zeros(3), torch.zeros(0, 4), torch.tensor([[1.0, math.nan]])])
def test_gradients_that_have_no_spectrum(wrong):
    with pytest.raises(ValueError, match="grads h"):
        spectrum(wrong)


def test_memory_is_held_at_the_cost_of_more_passes():
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 8), nn.Linear(8, 8))  # the last one is unused
    x = torch.randn(16, 64)
    parameters = list(layers.parameters())

    def loss(i):
        return layers[:3](x[i]).square().sum()

    whole, once = gram_of_samples(loss, 16, parameters)
    parts, often = gram_of_samples(loss, 16, parameters, memory=4 * 16 * 3000)
    assert (once, often) == (16, 16 * math.ceil(sum(p.numel() for p in parameters) / 3000))
    assert torch.allclose(whole, parts, rtol=1e-12)


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.tower, self.connector, self.drop = nn.Linear(4, 8), nn.Linear(8, 8), nn.Dropout(0.5)
        self.head = nn.Linear(8, 1)
        for p in self.tower.parameters():
            p.requires_grad_(False)

    def forward(self, x, labels):
        out = self.head(self.drop(self.connector(self.tower(x)).tanh()))
        return type("Output", (dict,), {"loss": property(lambda self: self["loss"])})(loss=(out - labels).square().mean(), logits=out)


def train(folder, callbacks):
    torch.manual_seed(3)
    data = [{"x": torch.randn(4), "labels": torch.randn(1)} for _ in range(40)]
    settings = TrainingArguments(
        output_dir=str(folder), max_steps=16, per_device_train_batch_size=4, learning_rate=0.01, report_to="none", disable_tqdm=True,
        save_strategy="no", use_cpu=True, seed=5,
    )  # fmt: skip
    trainer = Trainer(model=Toy(), args=settings, train_dataset=data, callbacks=callbacks)
    trainer.train()
    return data, {name: value.clone() for name, value in trainer.model.state_dict().items()}


def collate(samples):
    return {name: torch.stack([one[name] for one in samples]) for name in samples[0]}


def test_the_probe_leaves_the_training_as_it_is(tmp_path):
    data, plain = train(tmp_path, [])
    probe = FisherProbe(data, collate, modules=("connector", "head"), count=12, out=tmp_path / "fisher.jsonl")
    _, probed = train(tmp_path, [probe])
    assert all(torch.equal(plain[name], probed[name]) for name in plain)
    lines = [json.loads(line) for line in (tmp_path / "fisher.jsonl").read_text().splitlines()]
    assert [(one["step"], one["module"]) for one in lines] == [(s, m) for s in range(2, 17, 2) for m in ("connector", "head")]
    assert lines == probe.points
    assert {one["parameters"] for one in lines} == {72, 9}
    assert all(0 <= one["entropy"] <= 1 and 0 < one["dominant_ratio"] <= 1 and one["samples"] == 12 for one in lines)
    assert probe.seconds > 0


def test_the_probe_gives_the_spectrum_of_the_gradients():
    torch.manual_seed(4)
    model, data = Toy().train(), [{"x": torch.randn(4), "labels": torch.randn(1)} for _ in range(6)]
    (point,) = FisherProbe(data, collate).measure(model, 7)
    assert model.drop.training
    model.eval()
    grads = [torch.autograd.grad(model(**collate([one])).loss, list(model.connector.parameters())) for one in data]
    wanted = spectrum(torch.stack([torch.cat([g.flatten() for g in one]) for one in grads]))
    assert (point["step"], point["entropy"]) == (7, pytest.approx(wanted.entropy, rel=1e-6))
    assert point["eigenvalues"] == pytest.approx(wanted.eigenvalues.tolist(), rel=1e-5, abs=1e-12)


def test_a_probe_that_could_see_nothing_is_one_line():
    with pytest.raises(UserError, match="no samples"):
        FisherProbe([], collate)
    with pytest.raises(UserError, match="no trained parameter with 'tower'"):
        FisherProbe([{"x": torch.zeros(4), "labels": torch.zeros(1)}], collate, modules=("tower",)).measure(Toy())
