"""The promises of every defence as a module: shapes, gradients, noise, and draws. The tests of settings, and of the
folder of a method, follow."""

import copy
import re
from pathlib import Path

import pytest
import small_models
import torch
from denoisers import defence as purifier
from small_models import atop as small_atop, configured

from purify_fast.methods import all_methods
from purify_fast.methods.arrest import ArrestConfig
from purify_fast.methods.atop import AtopConfig
from purify_fast.methods.carso import Carso, CarsoConfig
from purify_fast.methods.diffusion import Process
from purify_fast.models.classifiers import SmallCNN
from purify_fast.training import ClassifierConfig, FitConfig

DEFENCES = {
    "CARSO": lambda: Carso(SmallCNN(), ["conv1", "hidden"], (1, 16, 16), 16, 4, 2, decoder_width=4),
    "AToP, rt1": lambda: small_atop(transform="rt1", samples=2, sigma=0.3),
    "AToP, rt2": lambda: small_atop(shape=(3, 8, 16), transform="rt2", samples=2, sigma=0.3),
    "AToP, rt3": lambda: small_atop(transform="rt3", samples=2, sigma=0.3),
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


# -- settings that cannot be used --------------------------------------------------------------------------------------
# Settings of the methods that cannot be used: each is refused by an error that names it.


def arrest(**options):
    return configured(ArrestConfig, **{"alpha": 2 / 255, **options})


def atop(**options):
    return configured(AtopConfig, **options)


def carso(**options):
    return configured(CarsoConfig, **options)


def classifier(**options):
    return configured(ClassifierConfig, **options)


#: Classes, settings that each of them refuses, and the words of the error.
REFUSED = {
    arrest: [
        ({"eps": 0.0}, "eps must be above 0, got 0.0"),
        ({"distillation_weight": float("nan")}, "distillation_weight must be at least 0, got nan"),
        ({"angle": 91.0}, r"angle must be in \[0, 90\] degrees, got 91.0"),
        ({"norm": "l2"}, "replay draws noise in a ball of norm 'linf', got 'l2'"),
        ({"distance": "l2"}, "tau must be given for distance='l2'"),
    ],
    atop: [
        ({"eps": 0.0}, "eps must be above 0, got 0"),
        ({"attack_method": "none", "attack_target": "pipeline"}, "attack_target needs an attack_method"),
        ({"betas": (0.5, 1.0)}, r"each of betas must be in \[0, 1\), got 1.0"),
        ({"gan_weight": 0.5}, "gan_weight needs gan_grad=True, got gan_weight=0.5"),
        ({"steps": 7}, "steps needs attack_method='pgd', got steps=7"),
        ({"attack_method": "none", "alpha": 0.1}, "alpha needs attack_method='pgd', got alpha=0.1"),
    ],
    small_models.atop: [
        ({"transform": "rt4"}, "transform must be one of rt1, rt2, rt3, got 'rt4'"),
        ({"samples": 0}, "samples must be at least 1, got 0"),
        ({"block": 5}, "block"),
        ({"mask_ratio": 1.0}, r"mask_ratio must be in \[0, 1\), got 1.0"),
        ({"sigma": -0.1}, "sigma must be finite and not negative, got -0.1"),
        ({"transform": "rt3", "num_passes": 3}, "num_passes must be .* 16 blocks.*got 3"),
    ],
    carso: [
        ({"attack_target": "pipeline", "reduction": "sum"}, "reduction needs attack_target='classifier', got .*'sum'"),
        ({"eps": 0.0}, "eps must be above 0"),
        ({"targets": "classifier"}, "targets needs attack_target='pipeline'"),
        ({"random_start": False}, "random_start needs attack_target='pipeline'"),
        ({"kl_delay": 1.0}, r"kl_delay must be in \[0, 1\), got 1.0"),
        ({"beta": "1"}, "beta must be a number, got '1'"),
    ],
    CarsoConfig: [({"attack": 0.1}, "attack must be an object of TrainingAttack, got 0.1")],
    FitConfig: [
        ({"epochs": 2.5}, "epochs must be a whole number, got 2.5"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"epochs": 2, "drop_last": "no"}, "drop_last must be True or False, got 'no'"),
    ],
    classifier: [
        ({"learning_rate": 0.0}, "learning_rate must be above 0 and finite, got 0.0"),
        ({"eps": 0.0, "objective": "trades"}, "objective 'trades' needs attacked images: eps must be above 0"),
        ({"eps": 0.1, "beta": 2.0}, r"beta needs the objective .* got beta=2"),
    ],
}


REFUSED_ROWS = [(make, *row) for make, rows in REFUSED.items() for row in rows]


@pytest.mark.parametrize(("make", "options", "message"), REFUSED_ROWS)
def test_settings_that_cannot_be_used(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


# -- a method is its folder --------------------------------------------------------------------------------------------
# A method is its folder, and no other file of the package knows its name.

ROOT = Path(__file__).parents[2]


def test_no_other_file_knows_a_method_by_name():
    """A method has all that it needs in its own folder, except the names that users import."""
    public = {"purify_fast/__init__.py", "purify_fast/methods/recipes.py"}
    imports = re.compile(rf"^\s*(?:from|import) \S*methods\.(?:{'|'.join(all_methods())})\b", re.M)
    found = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "purify_fast").rglob("*.py")
        if imports.search(path.read_text())
        and path.relative_to(ROOT / "purify_fast").parts[:2] not in {("methods", name) for name in all_methods()}
    }
    assert found <= public, found
