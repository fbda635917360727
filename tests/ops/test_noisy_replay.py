import pytest
import torch

from purify_fast.ops import Stream, noisy_replay, philox

pytestmark = pytest.mark.interpreter

SEED = torch.tensor([0x0123456789ABCDEF])
EPS = 8 / 255


def inputs(*shape: int, dtype=torch.float32, seed: int = 0) -> tuple:
    """(x, x_adv, drift, sample_ids); every other sample has drifted beyond 0.5."""
    generator = torch.Generator().manual_seed(seed)
    x, adv = (torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    drift = torch.rand(shape[0], generator=generator) / 2
    drift[::2] += 0.5001
    return x, adv, drift, torch.arange(shape[0]) * 3 - 1


@pytest.mark.parametrize("tau", [0.1339746, torch.tensor(0.1339746)], ids=["number", "tensor"])
def test_published_mask(backend, tau):
    drift = torch.tensor([0, 0.10, 0.1339, 0.1340, 0.5])
    x, adv, _, ids = inputs(5, 3, 8, 8)
    out = noisy_replay(x, adv, drift, tau, EPS, SEED, ids)
    assert [not torch.equal(a, b) for a, b in zip(out, adv, strict=True)] == [False, False, False, True, True]
    assert torch.equal(out[:3], adv[:3])  # copies


def test_the_test_is_strict_and_nan_does_not_replay(backend):
    x, adv, _, ids = inputs(4, 10)
    drift = torch.tensor([0.25, torch.nan, torch.inf, 0.25 + 2**-20])
    for tau, replayed in ((0.25, [0, 0, 1, 1]), (torch.nan, [0] * 4), (torch.inf, [0] * 4), (-torch.inf, [1, 0, 1, 1])):
        out = noisy_replay(x, adv, drift, tau, 0.1, SEED, ids)
        assert [int(not torch.equal(a, b)) for a, b in zip(out, adv, strict=True)] == replayed
    # a threshold is rounded to drift's precision: 0.1 is above the float64 0.1 in float32, and not above itself
    same = torch.full((4,), 0.1)
    assert torch.equal(noisy_replay(x, adv, same, 0.1, 0.1, SEED, ids), adv)
    assert not torch.equal(noisy_replay(x, adv, same.double(), 0.1, 0.1, SEED, ids), adv)


def test_noise_is_the_named_stream(backend):
    x, adv, _, ids = inputs(3, 3, 5, 7)
    r = philox(SEED, ids, 105, stream=Stream.REPLAY_NOISE)[:, 0].view_as(x)
    out = noisy_replay(x, adv, torch.ones(3), 0.5, 0.1, SEED, ids)
    assert torch.equal(out, (x + torch.tensor(0.1) * (2 * r - 1)).clamp(0, 1))
    assert not torch.equal(out, noisy_replay(x, adv, torch.ones(3), 0.5, 0.1, SEED + 1, ids))


def test_the_box(backend):
    x = torch.tensor([[0.0, 1.0, 0.001, 0.999]]).repeat(1, 500)
    out = noisy_replay(x, x, torch.ones(1), 0.5, EPS, SEED, torch.zeros(1, dtype=torch.int64))
    assert out.min() == 0 and out.max() == 1 and (out - x).abs().max() <= EPS
    beyond = torch.full((1, 4), 3.0)  # what is not replayed is not clamped
    assert torch.equal(noisy_replay(x[:, :4], beyond, torch.zeros(1), 0.5, EPS, SEED, torch.zeros(1).long()), beyond)
