"""Shapes, sizes and gradients of both versions, and the parts whose result is known."""

import numpy as np
import pytest
import torch

from examples.vnnet.files import UserError
from examples.vnnet.fusion import DQAM, token_grid
from examples.vnnet.graph import AGCRN, DEGCN, NGCN, Diffusion, GCNDecoder, adaptive_graph, chebyshev
from examples.vnnet.model import MLVFEM, VLSTM, NNet, Settings, VNNet, build
from examples.vnnet.vision import middle_width

PLACES = [4, 8, 21, 16]


def inputs(settings, batch=2, size=16):
    s = settings
    x = torch.randn(batch, s.history, s.stations, s.variables)
    time = torch.stack([torch.randint(0, n, (batch, s.history + s.horizon)) for n in (12, 31, 24)], dim=-1)
    return x, time, torch.rand(batch, s.channels, s.frames, size, size)


def model_of(stations=5, **changes):
    settings = Settings.small(stations=stations, **changes)
    return build(settings, torch.rand(stations, 2) - 0.5, PLACES[: len(settings.factors)])


def test_mlvfem_has_the_released_parameters():
    assert sum(p.numel() for p in MLVFEM().parameters()) == 244_078


def test_factorised_convolutions_have_the_released_widths():
    assert [middle_width(*sizes, 3, 3) for sizes in ((16, 16), (16, 32), (32, 32))] == [36, 57, 72]
    assert [middle_width(*sizes, 1, 1) for sizes in ((16, 32), (32, 32))] == [10, 16]


def mlvfem_trains(frames, size, before_mean):
    model, seen = MLVFEM(), []
    model.blocks.register_forward_hook(lambda module, args, out: seen.append(tuple(out.shape)))
    out = model(torch.rand(1, 6, frames, size, size))
    assert seen == [(1, *before_mean)]
    assert tuple(out.shape) == (1, before_mean[0], *before_mean[2:])
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize(("frames", "size", "before_mean"), [(2, 160, (32, 1, 40, 40)), (12, 32, (32, 3, 8, 8))])
def test_mlvfem_shapes_and_gradients(frames, size, before_mean):
    mlvfem_trains(frames, size, before_mean)


@pytest.mark.full
def test_mlvfem_at_full_size():
    mlvfem_trains(12, 160, (32, 3, 40, 40))


def test_paper_version_at_full_size():
    settings = Settings(stations=4)
    model = build(settings, torch.rand(4, 2) - 0.5, PLACES)
    x, time, pictures = inputs(settings, 1, 160)
    out = model(x, time, pictures)
    assert tuple(out.values.shape) == (1, 12, 4, 4)
    assert out.grid == (40, 40)
    assert tuple(out.attention.shape) == (1, 4, 13 * 4, 1600)
    out.values.sum().backward()


@pytest.mark.parametrize("version", ["paper", "repository"])
@pytest.mark.parametrize("fusion", ["cmoe", "plain"])
def test_each_trainable_tensor_gets_a_gradient(version, fusion):
    model = model_of(version=version, fusion=fusion)
    assert isinstance(model.encoder, NGCN if version == "paper" else DEGCN)
    assert isinstance(model.decoder, GCNDecoder if version == "paper" else AGCRN)
    assert isinstance(model.vision, VLSTM if version == "paper" else MLVFEM)
    out = model(*inputs(model.settings, 4))
    assert tuple(out.values.shape) == (4, 12, 5, 4)
    (out.values.square().sum() + out.aux_loss).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # A softmax does not see what is added to all its logits alike: these biases have no effect, exactly.
    assert [name for name in without if name not in ("fusion.key.bias",)] == []


@pytest.mark.parametrize("version", ["paper", "repository"])
def test_nnet_is_the_model_without_pictures(version):
    settings = Settings.small(stations=5, version=version)
    model = NNet(settings, torch.zeros(5, 2), PLACES)
    assert not any(name.startswith(("vision", "fusion", "projection")) for name, _ in model.named_parameters())
    x, time, pictures = inputs(settings)
    assert torch.equal(model(x, time).values, model(x, time, pictures).values)
    full = VNNet(settings, torch.zeros(5, 2), PLACES)
    assert sum(p.numel() for p in full.parameters()) > sum(p.numel() for p in model.parameters())
    with pytest.raises(UserError, match="reads pictures"):
        full(x, time)


def test_gates_are_of_the_factor():
    model = model_of()
    x, time, pictures = inputs(model.settings)
    out = model(x, time, pictures)
    assert tuple(out.gates.shape) == (2, 4, out.grid[0] * out.grid[1], 4)
    torch.testing.assert_close(out.gates.sum(-1), torch.ones(out.gates.shape[:-1]))
    assert not torch.equal(out.gates[:, 0], out.gates[:, 1])


def test_scheduled_truth_is_fed():
    model = model_of(vision=False).eval()
    x, time, _ = inputs(model.settings)
    truth = torch.randn(2, 12, 5, 4)
    never, always = (model(x, time, None, truth, torch.full((12,), use)).values for use in (False, True))
    torch.testing.assert_close(never, model(x, time).values)
    torch.testing.assert_close(always[:, 0], never[:, 0])
    assert not torch.allclose(always[:, 1], never[:, 1])


def test_chebyshev_terms():
    a = torch.tensor([[0.2, 0.8], [0.5, 0.5]])
    terms = chebyshev(a, 4)
    for k, expected in enumerate((torch.eye(2), a, 2 * a @ a - torch.eye(2))):
        torch.testing.assert_close(terms[k], expected)
    torch.testing.assert_close(terms[3], 2 * a @ terms[2] - a)
    graph = adaptive_graph(torch.randn(3, 5, 4))
    torch.testing.assert_close(graph.sum(-1), torch.ones(3, 5))


def test_diffusion_is_four_euler_steps():
    graph, z = torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([[[1.0], [0.0]]])
    diffusion = Diffusion()
    expected = z
    for _ in range(4):
        expected = expected + 0.25 * 0.5 * (graph @ expected - expected)
    torch.testing.assert_close(diffusion(z, graph), expected)


def test_dqam_looks_where_its_drift_points():
    """With query and key silenced, attention is the Gaussian around the station plus the drift of the hour."""
    fusion = DQAM(tokens=6, state=8, heads=2, horizon=4, layers=1)
    with torch.no_grad():
        for part in (fusion.query, fusion.key):
            part.weight.zero_()
            part.bias.zero_()
        fusion.drift[-1].weight.zero_()
        fusion.drift[-1].bias.copy_(torch.tensor([0.75, 0.0, 0.0, -0.75]))
    station = torch.tensor([[-0.1, 0.1]])
    _, _, attention = fusion(torch.randn(1, 1, 1, 8), torch.randn(1, 64, 6), torch.randn(1, 1, 64, 8), (8, 8), station)
    grid = token_grid(8, 8, station.device)
    for head, direction in enumerate(([0.75, 0.0], [0.0, -0.75])):
        for hour in range(5):
            aim = station[0] + hour / 4 * torch.tensor(direction)
            assert attention[0, head, hour].argmax() == torch.linalg.norm(grid - aim, dim=1).argmin()


def test_one_model_is_smaller_than_four():
    one = sum(p.numel() for p in model_of(24).parameters())
    four = sum(sum(p.numel() for p in model_of(24, fusion="plain", factors=(f,)).parameters()) for f in Settings.small(stations=1).factors)
    assert one <= 0.4 * four


@pytest.mark.parametrize(
    ("changes", "words"), [({"version": "third"}, "version"), ({"heads": 5}, "multiple of heads"), ({"fusion": "x"}, "fusion")]
)
def test_wrong_settings(changes, words):
    with pytest.raises(UserError, match=words):
        Settings.small(stations=3, **changes)


def test_same_seed_same_model():
    states = []
    for _ in range(2):
        torch.manual_seed(5)
        states.append(model_of().state_dict())
    assert all(np.array_equal(states[0][k], states[1][k]) for k in states[0])
