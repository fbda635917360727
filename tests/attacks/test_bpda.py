import contextlib

import pytest
import torch
from input_gradients import input_gradient
from small_models import Purifying
from torch import nn

from purify_fast import Carso, frozen_copy
from purify_fast.attacks import BpdaModel, fgsm, frozen
from purify_fast.attacks.bpda import classifier_of
from purify_fast.models.classifiers import SmallCNN
from purify_fast.ops import aggregate


@pytest.fixture(scope="module")
def batch():
    return torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def defence():
    """Rounds images to a few levels before a linear classifier, so its gradients are 0."""
    torch.manual_seed(1)
    return Purifying(nn.Sequential(nn.Flatten(), nn.Linear(64, 4)))


def labels(model, x):
    return model(x).argmax(1)


def test_the_gradient_is_the_classifiers_at_the_purified_image(defence, batch):
    y = labels(defence, batch)
    wrapped = BpdaModel.of(defence)
    with frozen(wrapped):
        got, value = input_gradient(wrapped, batch, y)
        want, at = input_gradient(defence.classifier, defence.purify(batch), y)
        assert torch.equal(got, want) and torch.equal(value, at) and got.abs().max() > 0
        assert torch.equal(wrapped(batch), defence(batch))
        assert input_gradient(defence, batch, y)[0].abs().max() == 0  # what BPDA is for


@pytest.mark.parametrize("method", ["lse", "mean"])
def test_several_draws(batch, method):
    """K purified images: the logits are aggregated, and the gradient is the sum of those at each."""
    torch.manual_seed(2)
    classifier = SmallCNN(1, 4, (8, 8), 4).requires_grad_(False).eval()
    noise = 0.1 * torch.randn(3, 1, 8, 8)
    wrapped = BpdaModel(lambda x: (x[:, None] + noise).round(decimals=1), classifier, aggregation=method)
    y = torch.arange(40) % 4
    got, value = input_gradient(wrapped, batch, y)
    leaf = (batch[:, None] + noise).round(decimals=1).requires_grad_()
    logits = aggregate(classifier(leaf.flatten(0, 1)).unflatten(0, (40, 3)), method)
    each = nn.functional.cross_entropy(logits, y, reduction="none")
    torch.testing.assert_close(value, each.detach())
    torch.testing.assert_close(got, torch.autograd.grad(each.sum(), leaf)[0].sum(1))


def test_other_shapes_and_aggregations_are_refused(batch):
    wanted = r"purify must return images of the shape of x, \[40, 1, 8, 8\], .* got \[40, 1, 4, 4\]"
    with pytest.raises(ValueError, match=wanted):
        BpdaModel(nn.AvgPool2d(2), nn.Flatten())(batch)
    with pytest.raises(ValueError, match="aggregation must be one of lse"):
        BpdaModel(nn.AvgPool2d(2), nn.Flatten(), aggregation="max")
    with pytest.raises(TypeError, match=r"BPDA needs a defence with purify\(x\) and classifier, got Flatten"):
        BpdaModel.of(nn.Flatten())


def test_the_purifiers_module_is_frozen_too(batch):
    """The module of a method is named: no BatchNorm is in training mode under attack, and it comes back as it was."""

    class Normalising(Purifying):
        def __init__(self):
            super().__init__(nn.Sequential(nn.Flatten(), nn.Linear(64, 4)))
            self.norm = nn.BatchNorm2d(1)

        def purify(self, x):
            assert not self.training and not self.norm.weight.requires_grad
            return self.norm(x)

    model = Normalising()
    fgsm(BpdaModel(model.purify, model.classifier, modules=[model]), batch, torch.zeros(40, dtype=torch.int64), eps=0.1)
    assert model.training and model.norm.weight.requires_grad and model.norm.num_batches_tracked == 0


@pytest.mark.parametrize("mode", ["random", "fixed", "deterministic"])
@pytest.mark.parametrize("fast", [False, True])
def test_of_carso(batch, mode, fast):
    """Its forward pass is that of the defence, or of its copy, in every mode; x moves the purified image by itself."""
    torch.manual_seed(5)
    carso = Carso(SmallCNN(1, 4, (8, 8), 4), ["conv2"], (1, 8, 8), cond_dim=8, latent_dim=4, samples=3).eval()
    if fast:
        carso = frozen_copy(carso, batch, dtype=torch.bfloat16)
        assert classifier_of(carso) is carso.frozen_classifier
    contexts = {"fixed": lambda: carso.fixed_noise(3), "deterministic": carso.deterministic}
    wrapped = BpdaModel.of(carso)
    with contexts.get(mode, contextlib.nullcontext)(), frozen(wrapped):
        torch.manual_seed(6)
        want = carso(batch)
        torch.manual_seed(6)
        torch.testing.assert_close(wrapped(batch), want)
        gradient, _ = input_gradient(wrapped, batch, torch.zeros(40, dtype=torch.int64))
    assert gradient.isfinite().all() and (gradient != 0).flatten(1).any(1).all()
