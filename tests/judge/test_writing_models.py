"""Models that write to the images that they are given are refused, and the caller's images stay as they are."""

import numpy as np
import pytest
import torch
from digit_nets import digits, standard
from evaluating import evaluate
from input_gradients import input_gradient
from search_calls import apgd, fab_t, square, stadv
from small_models import Made, labelled

from purify_fast.attacks import APGD, FABT, PGD, Square, StAdv, fgsm, pgd
from purify_fast.evaluation import AttackSpec

pytestmark = pytest.mark.usefixtures("trained")

QUIET = {"eps": 0.1}
WRITES = "model must not write to its input"


@pytest.fixture(scope="module")
def trained():
    """The network is trained before a model asks for it, which may record no gradients."""
    return standard()


@pytest.fixture
def images():
    """Eight images and their labels. At the end the images are as they were."""
    x, y = (part[:8].clone() for part in digits()[2:])
    before = x.clone()
    yield x, y
    assert torch.equal(x, before)


def at_once(x):
    x.sub_(0.02)
    return standard()(x)


def without_gradients_only(x):
    if x.requires_grad:
        x = x.clone()
    x.sub_(0.02)
    return standard()(x)


def with_gradients_only(x):
    if x.requires_grad:
        with torch.no_grad():
            x.mul_(0.95)
    return standard()(x)


def unrecorded(x):
    """Scaling by hand as a quantiser does it, so that the gradient goes straight through."""
    x = x.contiguous()
    with torch.no_grad():
        x.mul_(7).round_().div_(7)
    return standard()(x)


def unwatched(self, x):
    return unrecorded(x)


def uncounted(x):
    """PyTorch does not count this write."""
    x.data.mul_(0.95)
    return standard()(x)


def through_numpy(x):
    x.detach().numpy()[:, :, :4] = 0
    return standard()(x)


ALL = [at_once, without_gradients_only, with_gradients_only, unrecorded, uncounted, through_numpy, Made(unwatched)]


@pytest.mark.parametrize("model", ALL)
def test_an_evaluation_refuses_them_before_any_attack(model, images):
    def never(model, x, y):
        raise AssertionError("an attack was begun")

    with pytest.raises(ValueError, match=WRITES):
        evaluate(model, *images, attacks=[never], **QUIET)


def test_the_model_of_a_surrogate_is_refused_too(images):
    for given in ({"base": unrecorded}, {"attacks": [AttackSpec(PGD(steps=1), through=unrecorded)]}):
        with pytest.raises(ValueError, match=WRITES):
            evaluate(standard(), *images, **QUIET, **given)


@pytest.mark.parametrize("model", [at_once, unrecorded])
@pytest.mark.parametrize("attack", [pgd, apgd, fab_t, square, fgsm, stadv])
def test_attacks_refuse_them(model, attack, images):
    options = {} if attack is stadv else {"eps": 0.1}
    more = {"n_queries": 3} if attack is square else {} if attack is fgsm else {"steps": 3}
    # PyTorch itself refuses a write to images whose gradient is recorded.
    with pytest.raises((ValueError, RuntimeError), match=f"{WRITES}|in-place operation"):
        attack(model, *images, **options, **more)


def test_models_that_cannot_be_differentiated_are_evaluated():
    x, y = (part[:8] for part in digits()[2:])

    def black_box(x):
        if x.requires_grad:
            raise RuntimeError("no gradients here")
        return standard()(x)

    found, open_box = (evaluate(m, x, y, attacks=[Square(n_queries=5)], **QUIET) for m in (black_box, standard()))
    assert [row.accuracy for row in found.rows] == [row.accuracy for row in open_box.rows]


@pytest.fixture(scope="module")
def trio():
    return labelled(12, classes=4)


@pytest.mark.parametrize("attack", [apgd, pgd, fab_t, fgsm, stadv, input_gradient])
def test_attacks_by_gradients_refuse_it(trio, attack):
    options = {} if attack in (stadv, input_gradient) else {"eps": 0.1}
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"torch.inference_mode\(\)"):
        attack(*trio, **options)
    with torch.no_grad():
        attack(*trio, **options)


@pytest.mark.parametrize("form", ["as they are", "bytes"])
def test_an_evaluation_finds_what_it_finds_outside(trio, form):
    model, x, y = trio

    def found():
        # made within the block, as a data loader's images are
        images, labels = (x * 255).byte() if form == "bytes" else x.clone(), y.clone()
        attacks = [APGD(), FABT(), PGD(), StAdv()]
        report = evaluate(model, images, labels, eps=0.1, steps=5, attacks=attacks)
        return {row.attack: row.robust for row in report.rows}, [row.reliable for row in report.rows]

    outside = found()
    with torch.inference_mode():
        inside = found()
        assert torch.is_inference_mode_enabled()
    assert inside[1] == outside[1] and outside[0]["worst"].mean() < 0.5
    for attack, robust in outside[0].items():
        assert np.array_equal(inside[0][attack], robust)
