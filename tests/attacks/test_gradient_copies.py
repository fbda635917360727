"""Copies for gradients: they follow their model, and only those that do what it does are attacked."""

import gc

import pytest
import torch
from small_models import Made
from torch import nn

from purify_fast import Atop, Carso, zoo
from purify_fast.attacks import apgd
from purify_fast.attacks import gradient_copy as copies
from purify_fast.data import load_dataset
from purify_fast.defences import WithAggregation
from purify_fast.defences.base import Defence
from purify_fast.models.classifiers import SmallCNN
from purify_fast.speed.folding.inference_copy import InferenceCopy

pytestmark = pytest.mark.usefixtures("one_thread")

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
    made = copies.gradient_copy(defence, x, "bfloat16")
    assert made is not defence and isinstance(made.purifier.module.net[1], nn.BatchNorm2d)
    (image, gradient), (other, found) = (images_and_gradient(model, x) for model in (defence, made))
    assert (other - image).abs().max() < 0.02 and torch.cosine_similarity(found, gradient, 0) > 0.99


def test_a_defence_is_copied_inside_another_view_of_it(defence):
    """A defence without its noise is attacked by its own fast copy, not in float32."""
    x = torch.rand(8, *SHAPE)
    quiet = WithAggregation(defence, deterministic=True).eval()
    made = copies.gradient_copy(quiet, x, "bfloat16")
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
    made = copies.gradient_copy(view, x, "bfloat16")
    assert type(made) is Negative and made.defence is not defence and view.defence is defence
    with torch.no_grad():
        assert (made(x) - view(x)).abs().max() <= 0.1 * view(x).abs().max()
    forgets = Forgets(defence, deterministic=True).eval()
    assert copies.gradient_copy(forgets, x, "bfloat16") is forgets


@pytest.mark.parametrize("what", ["images", "gradients"])
def test_a_random_copy_that_does_something_else_is_refused(defence, what, monkeypatch):
    """The same noise in both tells them apart: one draw does not."""
    x, original = torch.rand(8, *SHAPE), copies._made

    def wrong(model, example):
        made = original(model, example)
        if what == "images":
            made.purifier.module.net[1] = nn.Identity()
        else:
            refine = made.purifier.module.forward
            # the same values, of which every other column has no gradient
            seen = torch.arange(16) % 2 == 0
            made.purifier.module.forward = lambda z, mask: torch.where(seen, refine(z, mask), refine(z, mask).detach())
        return made

    kept = copies.GradientCopies()
    monkeypatch.setattr(copies, "_made", wrong)
    assert copies.gradient_copy(defence, x, "bfloat16") is defence
    # what was found out about a copy with some images decides over these images only
    for _ in range(2):
        assert copies.gradient_copy(defence, x, "bfloat16", kept) is defence


def test_what_is_compared_does_not_depend_on_when_the_copy_was_made(defence, monkeypatch):
    """An evaluation that goes on after an interruption makes its copies at other moments."""
    x, kept, drawn, original = torch.rand(8, *SHAPE), copies.GradientCopies(), [], copies._run
    makes = copies._made
    monkeypatch.setattr(copies, "_made", lambda *given: torch.rand(3) is None or makes(*given))
    monkeypatch.setattr(copies, "_run", lambda *given: drawn.append(torch.get_rng_state()) or original(*given))
    before = torch.get_rng_state()
    for _ in range(2):
        assert copies.gradient_copy(defence, x, "bfloat16", kept) is not defence
    assert torch.equal(torch.get_rng_state(), before) and defence.noise_is_fresh
    assert len(drawn) == 12 and all(torch.equal(state, drawn[0]) for state in drawn)


def written_through_data(net):
    net[1].weight.data.mul_(-1)


def swapped(net):
    # no sum over the weights sees this
    net[1].weight.data.copy_(net[1].weight.data.flip(0))


def replaced(net):
    net[1].weight = nn.Parameter(torch.randn(10, 3 * 256))


def attribute(net):
    net[0].gate.mul_(1.05)


@pytest.mark.parametrize("change", [written_through_data, swapped, replaced, attribute])
def test_a_copy_never_outlives_what_its_model_was(change):
    torch.manual_seed(0)
    # a tensor that is neither a parameter nor a buffer
    gate = Made(lambda self, x: x.flatten(1) * self.gate, gate=torch.ones(1))
    net, x, kept = nn.Sequential(gate, nn.Linear(3 * 256, 10)).eval(), torch.rand(4, *SHAPE), copies.GradientCopies()
    before = copies.gradient_copy(net, x, "bfloat16", kept)
    for _ in range(2):
        change(net)
        # the memory that a replaced weight leaves is what the next one gets
        gc.collect()
        made = copies.gradient_copy(net, x, "bfloat16", kept)
        assert isinstance(made, InferenceCopy) and made is not before
        inside = made.classifier
        assert torch.equal(inside[1].weight, net[1].weight)
        assert torch.equal(inside[0].gate, net[0].gate)
        assert copies.gradient_copy(net, x, "bfloat16", kept) is made
        before = made


def test_fixed_noise_has_one_copy_for_each_seed():
    torch.manual_seed(0)
    net = SmallCNN(1, 10, (16, 16), 8).eval()
    model = Carso(net, ["conv2", "conv4"], (1, 16, 16), cond_dim=16, latent_dim=4, samples=2, decoder_width=8).eval()
    x, kept = torch.rand(4, 1, 16, 16), copies.GradientCopies()

    def of(seed):
        with model.fixed_noise(seed):
            made = copies.gradient_copy(model, x, "bfloat16", kept)
            assert made is not model and torch.allclose(made(x), model(x), atol=0.1)
            return made

    first = of(1)
    assert of(1) is first and of(2) is not first
    fresh = copies.gradient_copy(model, x, "bfloat16", kept)
    assert fresh.noise_is_fresh and copies.gradient_copy(model, x, "bfloat16", kept) is fresh


@pytest.mark.parametrize("only_with_gradients", [False, True])
def test_a_copy_that_raises_anything_is_refused(defence, only_with_gradients, monkeypatch):
    original = copies._made

    def fails(*_):
        if torch.is_grad_enabled() or not only_with_gradients:
            raise IndexError("tuple index out of range")

    def wrong(model, example):
        made = original(model, example)
        made.register_forward_pre_hook(fails)
        return made

    monkeypatch.setattr(copies, "_made", wrong)
    assert copies.gradient_copy(defence, torch.rand(4, *SHAPE), "bfloat16") is defence


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
    with torch.no_grad():
        made = copies._made(net, x)
        assert len(made(x)[:, :9].unique()) < 16 < len(net(x)[:, :9].unique())
    assert copies.gradient_copy(net, x, "bfloat16") is net
    assert isinstance(copies.gradient_copy(plain, x, "bfloat16"), InferenceCopy)
    y = net(x).argmax(1)
    found, same = (apgd(net, x, y, eps=0.01, steps=10, precision=kind) for kind in ("bfloat16", "float32"))
    assert torch.equal(found, same)


@pytest.mark.parametrize("name", [name for name in zoo.list() if name.startswith("digits")])
def test_the_copies_of_the_digits_models_serve(name):
    model, x = zoo.load(name), load_dataset("digits").x_test[:8].float() / 255
    made = copies.gradient_copy(model, x, "bfloat16")
    assert made is not model and isinstance(made, (InferenceCopy, Defence))


def returning(output):
    """A network whose output is changed."""
    torch.manual_seed(0)
    return Made(lambda self, x: output(self.net(x)), net=SmallCNN(SHAPE[0], 6, SHAPE[1:], width=4)).eval()


def test_the_error_of_a_model_itself_is_left_to_the_attack():
    model = returning(lambda z: z @ torch.zeros(3, 3))
    assert copies.gradient_copy(model, torch.rand(8, *SHAPE), "bfloat16") is model
