"""Copies for gradients: they follow their model, and only those that do what it does are attacked."""

import pytest
import torch
from small_models import Made
from torch import nn

from purify_fast import Atop, Carso
from purify_fast.attacks import APGD
from purify_fast.attacks.gradient_copy import Copies
from purify_fast.defences import MajorityVote, WithAggregation
from purify_fast.defences.base import Defence
from purify_fast.models.classifiers import SmallCNN

SHAPE = (3, 16, 16)


def skips_inside(self, x, mask):
    """A purifier that calls the layers of its Sequential one by one."""
    h = self.net[0](torch.cat([x, mask], 1))
    return torch.tanh(self.net[1:](h) + h)


@pytest.fixture(scope="module")
def defence():
    """One whose purifier a folded BatchNorm would change much."""
    torch.manual_seed(0)
    layers = nn.Conv2d(4, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Tanh()
    purifier, classifier = Made(skips_inside, net=nn.Sequential(*layers)), SmallCNN(3, 10, SHAPE[1:], 8)
    with torch.no_grad():
        purifier(2 * torch.rand(32, *SHAPE) - 1, torch.zeros(32, 1, *SHAPE[1:]))
        nn.init.uniform_(purifier.net[1].weight, 1, 3), nn.init.normal_(purifier.net[1].bias)
    return Atop(classifier.eval(), purifier.eval(), SHAPE, block=4).eval()


def images_and_gradient(model, x):
    with model.fixed_noise(1):
        leaf = x.clone().requires_grad_()
        first, second = model(leaf).topk(2, 1).values.unbind(1)
        return model.purify(x).detach(), torch.autograd.grad((first - second).sum(), leaf)[0].flatten()


def test_a_purifier_of_a_users_own_is_not_folded(defence):
    x = torch.rand(8, *SHAPE)
    made = Copies(x).copy_for(defence, "bfloat16")
    assert made is not defence and isinstance(made.purifier.module.net[1], nn.BatchNorm2d)
    (image, gradient), (other, found) = (images_and_gradient(model, x) for model in (defence, made))
    assert (other - image).abs().max() < 0.02 and torch.cosine_similarity(found, gradient, 0) > 0.99


def test_a_defence_is_copied_inside_another_view_of_it(defence):
    """A defence without its noise is attacked by its own fast copy, not in float32."""
    x = torch.rand(8, *SHAPE)
    quiet = WithAggregation(defence, deterministic=True).eval()
    made = Copies(x).copy_for(quiet, "bfloat16")
    assert type(made) is WithAggregation and made.without_noise and not made.training
    assert type(made.defence) is type(defence) and made.defence is not defence
    with torch.no_grad():
        want, found = quiet(x), made(x)
        assert torch.equal(made(x), found) and (found - want).abs().max() <= 0.1 * want.abs().max()


def test_a_view_that_does_something_else_keeps_it_around_a_copy(defence):
    """A subclass stays one; and a view whose copy would say something else is attacked itself."""
    x = torch.rand(8, *SHAPE)

    class Negative(WithAggregation):
        def forward(self, x):
            return -super().forward(x)

    class Forgets(Negative):
        def around(self, replace):
            return WithAggregation(replace(self.defence), self.aggregation, self.without_noise)

    view = Negative(defence, deterministic=True).eval()
    made = Copies(x).copy_for(view, "bfloat16")
    assert type(made) is Negative and made.defence is not defence and view.defence is defence
    with torch.no_grad():
        assert (made(x) - view(x)).abs().max() <= 0.1 * view(x).abs().max()
    forgets = Forgets(defence, deterministic=True).eval()
    assert Copies(x).copy_for(forgets, "bfloat16") is forgets


def without_norm(purifier):
    purifier.net[1] = nn.Identity()


def without_some_gradients(purifier):
    # the same values, of which every other column has no gradient
    refine, seen = purifier.forward, torch.arange(16) % 2 == 0
    purifier.forward = lambda z, mask: torch.where(seen, refine(z, mask), refine(z, mask).detach())


def fails(*_):
    raise IndexError("tuple index out of range")


def fails_with_gradients(*_):
    if torch.is_grad_enabled():
        fails()


@pytest.mark.parametrize("spoil", [without_norm, without_some_gradients, fails, fails_with_gradients])
def test_a_random_copy_that_does_something_else_is_refused(defence, spoil, monkeypatch):
    """The same noise in both tells them apart: one draw does not."""
    original, raises = Defence.make_frozen_copy, spoil in (fails, fails_with_gradients)

    def wrong(model, *given, **options):
        made = original(model, *given, **options)
        if raises:
            made.register_forward_pre_hook(spoil)
        else:
            spoil(made.purifier.module)
        return made

    monkeypatch.setattr(Defence, "make_frozen_copy", wrong)
    text = "Atop is attacked itself, .* IndexError: tuple index" if raises else "attacked itself, because"
    with pytest.warns(RuntimeWarning, match=text):
        assert Copies(torch.rand(8, *SHAPE)).copy_for(defence, "bfloat16") is defence


def test_making_a_copy_draws_no_numbers(defence, monkeypatch):
    """An evaluation that goes on after an interruption makes its copies at other moments."""
    original = Defence.make_frozen_copy
    monkeypatch.setattr(Defence, "make_frozen_copy", lambda *a, **k: torch.rand(3) is None or original(*a, **k))
    before = torch.get_rng_state()
    assert Copies(torch.rand(8, *SHAPE)).copy_for(defence, "bfloat16") is not defence
    torch.set_rng_state(before)
    x = torch.rand(8, *SHAPE)
    drawn = torch.get_rng_state()
    assert Copies(x).copy_for(defence, "bfloat16") is not defence
    assert torch.equal(torch.get_rng_state(), drawn) and defence.noise_is_fresh


def test_a_wrapper_has_the_copy_of_now(defence):
    """Other models of the evaluation take the place of a kept copy."""
    x = torch.rand(8, *SHAPE)
    copies, vote = Copies(x), MajorityVote(defence, 2)
    for model in (vote, *(shifted(float(number)) for number in range(3))):
        copies.copy_for(model, "bfloat16")
    with defence.deterministic():
        inside = copies.copy_for(vote, "bfloat16").model
        assert inside.noise_is_off and torch.equal(inside(x), inside(x))


def test_a_copy_draws_as_its_model_does_now():
    net = SmallCNN(1, 10, (16, 16), 8).eval()
    model = Carso(net, ["conv2", "conv4"], (1, 16, 16), cond_dim=16, latent_dim=4, samples=2, decoder_width=8).eval()
    x = torch.rand(4, 1, 16, 16)
    copies = Copies(x)
    for seed in (1, 2):
        with model.fixed_noise(seed):
            made = copies.copy_for(model, "bfloat16")
            assert made is not model and torch.allclose(made(x), model(x), atol=0.1)
    with model.deterministic():
        made = copies.copy_for(model, "bfloat16")
        assert torch.equal(made(x), made(x)) and torch.allclose(made(x), model(x), atol=0.1)
    made = copies.copy_for(model, "bfloat16")
    assert made.noise_is_fresh and not torch.equal(made(x), made(x))


def shifted(bias):
    """A classifier that decides as one of usual logits does, with a bias added to them."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 256, 32), nn.ReLU(), nn.Linear(32, 10)).eval()
    with torch.no_grad():
        net[3].weight.mul_(20)
        net[3].bias.add_(bias)
    return net


def one_hopeless():
    """Nine log-likelihoods, and a tenth class whose is lower than all by far."""
    bias = torch.full((10,), -1000.0)
    bias[9] = -1e5
    return bias


@pytest.mark.parametrize("bias", [-3000.0, -1e5, one_hopeless()], ids=["-3000", "-100000", "one hopeless class"])
def test_a_copy_that_rounds_the_differences_between_logits_away_is_refused(bias):
    """Large logits that are almost the same, as of a generative classifier: bfloat16 makes them the same."""
    net, plain, x = shifted(bias), shifted(0.0), torch.rand(16, *SHAPE)
    with pytest.warns(RuntimeWarning, match="other logits"):
        assert Copies(x).copy_for(net, "bfloat16").dtype == torch.float32
    assert Copies(x).copy_for(plain, "bfloat16").dtype == torch.bfloat16


@pytest.mark.parametrize("precision", ["bfloat16", "auto"])
def test_a_direct_attack_makes_a_copy_only_if_it_is_asked_to(precision, monkeypatch):
    net, x, made = shifted(0.0), torch.rand(4, *SHAPE), []
    monkeypatch.setattr("purify_fast.attacks.gradient_copy.copy_or_model", lambda *given: made.append(given) or net)
    APGD(steps=2, precision=precision)(net, x, net(x).argmax(1), eps=0.01)
    assert len(made) == (precision == "bfloat16")
