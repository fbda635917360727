"""The attacks as parts of training loops of other people: starts, losses, radii, targets and modes."""

import copy
import importlib

import pytest
import torch
from search_calls import apgd, square
from torch import nn
from torch.nn import functional as F

from purify_fast.attacks import PGD, AttackContext, fgsm, frozen, pgd

EPS, ALPHA = 0.05, 0.02


@pytest.fixture
def network():
    """A network with BatchNorm in float64, in evaluation mode."""
    torch.manual_seed(0)
    parts = nn.Conv2d(3, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 5)
    return nn.Sequential(*parts).double().eval()


@pytest.fixture
def x():
    return torch.rand(4, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


Y = torch.tensor([0, 1, 2, 3])


def loop(model, x, loss, start, steps=3, eps=EPS, alpha=ALPHA, low=0.0, high=1.0):
    """A plain loop in the model's mode."""
    near = start
    for _ in range(steps):
        near = near.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(model(near)), near)
        near = near.detach() + alpha * gradient.sign()
        near = torch.minimum(torch.maximum(near, x - eps), x + eps)
        near = torch.minimum(torch.maximum(near, torch.as_tensor(low).to(x)), torch.as_tensor(high).to(x))
    return near


@pytest.mark.parametrize("attack", [pgd, apgd, square])
def test_starts_differ_between_calls_and_repeat_with_a_seed(network, x, attack):
    how = {"eps": EPS, "steps": 1} if attack is not square else {"eps": EPS, "n_queries": 1}
    how |= {"keep_best": False} if attack is pgd else {"leave_when_fallen": False} if attack is apgd else {}

    def call(**more):
        return attack(network, x, network(x).argmax(1), **how, **more)

    assert not torch.equal(call(), call())
    assert torch.equal(call(seed=3), call(seed=3)) and not torch.equal(call(seed=3), call(seed=4))
    torch.manual_seed(7)
    first = call()
    torch.manual_seed(7)
    assert torch.equal(first, call()) and torch.equal(*(call(seed=torch.Generator().manual_seed(2)) for _ in range(2)))


def test_fgsm_draws_no_random_number(network, x):
    state = torch.get_rng_state()
    fgsm(network, x, Y, EPS)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("alpha", [EPS, EPS / 4])
def test_a_step_has_the_bits_of_the_definition(network, x, alpha):
    network, x = network.float(), x.float()
    start = pgd(network, x, Y, EPS, steps=1, alpha=0.0, seed=2)
    # The package's attribute is the function.
    reference = importlib.import_module("purify_fast.attacks.pgd").reference
    with frozen(network):
        wanted = [reference(network, x, Y, begin, eps=EPS, alpha=alpha, steps=1) for begin in (start, x)]
    found = [pgd(network, x, Y, EPS, steps=1, alpha=alpha, seed=2, random_start=random) for random in (True, False)]
    assert all(map(torch.equal, found, wanted)) and not torch.equal(*wanted)


def test_the_inner_loop_of_trades_is_one_call(network, x):
    target = network(x).softmax(1).detach()
    begin = pgd(network, x, Y, EPS, steps=1, alpha=0.0, start_std=0.001, seed=5)

    def divergence(logits, y):
        return F.kl_div(logits.log_softmax(1), y, reduction="none").sum(1)

    got = pgd(network, x, target, EPS, loss=divergence, steps=3, alpha=ALPHA, start_std=0.001, seed=5)
    torch.testing.assert_close(got, loop(network, x, lambda logits: divergence(logits, target).sum(), begin))
    how = {"steps": 3, "alpha": ALPHA, "start_std": 0.001, "seed": 5}
    without = pgd(network, x, None, EPS, loss=lambda logits, y: divergence(logits, target), **how)
    assert torch.equal(got, without)


def test_several_draws_and_parts_of_a_batch_take_a_loss_function(network, x):

    def loss(logits, y):
        return (logits - y).square().sum(1)

    y = network(x).detach() + torch.randn(4, 5, dtype=torch.float64)
    how = {"loss": loss, "steps": 2, "alpha": ALPHA, "random_start": False}
    whole = pgd(network, x, y, EPS, **how)
    torch.testing.assert_close(pgd(network, x, y, EPS, eot_iter=2, **how), whole)
    parts = AttackContext(eps=EPS, loss_function=how.pop("loss"), max_forward_batch=3)
    torch.testing.assert_close(PGD(keep_best=False, **how).run(network, x, y, parts).images, whole)
    how["loss"] = loss
    best = pgd(network, x, y, EPS, keep_best=True, **how)
    assert (loss(network(best), y) >= loss(network(whole), y) - 1e-9).all()


@pytest.mark.parametrize("attack", [pgd, fgsm])
def test_radii_steps_and_ranges_of_channels_equal_a_plain_loop(network, x, attack):
    mean, std = torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1), torch.tensor([0.2, 0.3, 0.25]).view(3, 1, 1)
    normal = ((x - mean) / std).double()
    eps, low, high = EPS / std, (0 - mean) / std, (1 - mean) / std
    how = {"clip_min": low, "clip_max": high}
    plain = {"eps": eps, "alpha": eps if attack is fgsm else eps / 2, "low": low, "high": high}
    start, steps = normal, 1
    if attack is pgd:
        start = pgd(network, normal, Y, eps, steps=1, alpha=torch.zeros(3, 1, 1), seed=1, **how)
        assert ((start - normal).abs() <= eps + 1e-9).all() and ((start - normal).abs() > 0.9 * eps).any()
        how |= {"alpha": eps / 2, "steps": 3, "seed": 1}
        steps = 3
    got = attack(network, normal, Y, eps, **how)
    want = loop(network, normal, lambda logits: F.cross_entropy(logits, Y), start, steps=steps, **plain)
    torch.testing.assert_close(got, want)


def test_a_radius_per_pixel(network, x):
    eps = torch.rand_like(x) * EPS
    assert ((pgd(network, x, Y, eps, steps=2) - x).abs() <= eps + 1e-9).all()


def test_a_target_is_approached(network, x):
    target = (network(x).argmax(1) + 1) % 5
    got = pgd(network, x, None, EPS, targeted=target, steps=3, alpha=ALPHA, random_start=False)
    torch.testing.assert_close(got, loop(network, x, lambda logits: -F.cross_entropy(logits, target), x))


def test_keeping_the_mode_equals_a_plain_loop_in_training_mode(network, x):
    other, third = copy.deepcopy(network.train()), copy.deepcopy(network)
    got = pgd(network, x, Y, EPS, steps=3, alpha=ALPHA, random_start=False, mode="keep")
    torch.testing.assert_close(got, loop(other, x, lambda logits: F.cross_entropy(logits, Y), x))
    assert network.training and all(one.requires_grad and one.grad is None for one in network.parameters())
    for name, value in network.state_dict().items():
        torch.testing.assert_close(value, other.state_dict()[name])
    assert not torch.equal(got, pgd(third, x, Y, EPS, steps=3, alpha=ALPHA, random_start=False))


def test_an_attack_stops_when_all_images_have_fallen(network, x):
    calls, y = [], network(x).argmax(1)
    network.register_forward_hook(lambda *given: calls.append(len(given[1][0])))
    pgd(network, x, y, 0.5, steps=50, stop_when_fallen=True, seed=0)
    found, taken = pgd(network, x, y, 0.5, steps=50, stop_when_fallen=True, seed=0), len(calls) // 2
    assert taken < 25 and (network(found).argmax(1) != y).all()
