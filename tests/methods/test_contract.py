"""The promises of every defence as a module: shapes, gradients, noise, and draws."""

import copy

import pytest
import torch
from denoisers import defence as purifier
from small_models import atop

from purify_fast.methods.carso import Carso
from purify_fast.methods.diffusion import Process
from purify_fast.models.classifiers import SmallCNN

DEFENCES = {
    "CARSO": lambda: Carso(SmallCNN(), ["conv1", "hidden"], (1, 16, 16), 16, 4, 2, decoder_width=4),
    "AToP, rt1": lambda: atop(transform="rt1", samples=2, sigma=0.3),
    "AToP, rt2": lambda: atop(shape=(3, 8, 16), transform="rt2", samples=2, sigma=0.3),
    "AToP, rt3": lambda: atop(transform="rt3", samples=2, sigma=0.3),
    "diffusion": lambda: purifier(process=Process(steps=3), samples=2),
    "diffusion, rounds": lambda: purifier(process=Process(steps=2, t_star=(0.1, 0.05)), samples=2),
}


@pytest.fixture(params=DEFENCES)
def made(request):
    torch.manual_seed(0)
    return DEFENCES[request.param]().eval()


def images(made, n=5):
    return torch.rand((n, *made.image_shape), generator=torch.Generator().manual_seed(1))


def test_logits_and_gradients_are_finite_and_a_call_changes_nothing(made):
    x = images(made)
    before, weights, leaf = x.clone(), copy.deepcopy(made.state_dict()), x.clone().requires_grad_()
    logits = made(leaf)
    (gradient,) = torch.autograd.grad(logits.square().sum(), leaf)
    assert logits.shape == (5, 10) and logits.dtype == torch.float32 and logits.isfinite().all()
    assert gradient.isfinite().all() and (gradient.flatten(1).norm(dim=1) > 0).all()
    assert torch.equal(x, before) and all(torch.equal(v, weights[k]) for k, v in made.state_dict().items())
    assert made(x[:0]).shape == (0, 10)
    with pytest.raises(ValueError, match=r"x must be \[B, "):
        made(torch.rand(2, 2, 4, 4))


def test_noise_is_fresh_fixed_or_absent_and_belongs_to_an_image(made):
    x, order = images(made), torch.tensor([4, 2, 0, 1, 3])
    assert not torch.equal(made(x), made(x))
    torch.manual_seed(5)
    first = made(x)
    torch.manual_seed(5)
    assert torch.equal(made(x), first)
    for mode in (made.fixed_noise(1), made.deterministic()):
        with torch.no_grad(), mode:
            whole = made(x)
            torch.testing.assert_close(made(x[order]), whole[order], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(torch.cat([made(x[:2]), made(x[2:])]), whole, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(made.draw_logits(x, 3), whole.expand(3, -1, -1))


def test_draws_of_one_call_are_those_of_several(made):
    x = images(made)
    torch.manual_seed(5)
    together = made.draw_sample_logits(x, 3)
    assert together.shape == (3, 5, 2, 10) and not torch.allclose(together[0], together[1])
    six = copy.deepcopy(made)
    six.samples = 6
    torch.manual_seed(5)
    torch.testing.assert_close(together, six.sample_logits(x).unflatten(1, (3, 2)).transpose(0, 1))


def test_the_gradient_may_be_taken_when_the_noise_is_no_longer_fixed(made):
    x = images(made).requires_grad_()
    with made.fixed_noise(0):
        (within,) = torch.autograd.grad(made(x).sum(), x)
        loss = made(x).sum()
    with made.fixed_noise(1), made.deterministic():
        (after,) = torch.autograd.grad(loss, x)
    assert within.abs().sum() > 0
    torch.testing.assert_close(within, after)


@pytest.mark.slow
def test_it_compiles_as_one_graph_with_its_gradient(made):
    torch._dynamo.reset()
    made.requires_grad_(False)
    results = []
    for call in (made, torch.compile(made, fullgraph=True, backend="aot_eager")):
        leaf = images(made).requires_grad_()
        with made.fixed_noise(2):
            logits = call(leaf)
        results.append((logits.detach(), torch.autograd.grad(logits.square().sum(), leaf)[0]))
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
