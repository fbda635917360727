"""Noisy copies: the control that purifies nothing."""

import pytest
import torch
from small_models import images

from purify_fast.defences import NoisyEnsemble
from purify_fast.models.classifiers import SmallCNN
from purify_fast.ops import aggregate


def control(sigma=0.2, samples=4):
    torch.manual_seed(0)
    return NoisyEnsemble(SmallCNN(width=4), sigma, samples)


def test_it_is_the_classifier_on_noisy_copies():
    made, x = control(), images(3)
    with made.fixed_noise(5):
        logits = made.sample_logits(x)
        assert logits.shape == (3, 4, 10)
        torch.testing.assert_close(made(x), aggregate(logits, "lse"))
        torch.testing.assert_close(made.sample_logits(x.flip(0)), logits.flip(0))
        assert not torch.allclose(logits[:, 0], logits[:, 1])
    assert not torch.equal(made(x), made(x))
    with made.deterministic():
        torch.testing.assert_close(made(x), made.classifier(x))
    seen = []
    made.classifier.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    many = control(0.1, 64)
    many.classifier.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    many(torch.full((8, 1, 16, 16), 0.5))
    assert abs(float(seen[0].std()) - 0.1) < 0.005 and abs(float(seen[0].mean()) - 0.5) < 0.005
    assert seen[0].min() >= 0 and seen[0].max() <= 1


@pytest.mark.parametrize(("sigma", "samples"), [(-0.1, 4), (float("nan"), 4), (0.1, 0)])
def test_refusals(sigma, samples):
    with pytest.raises(ValueError, match="sigma must be at least 0 and samples at least 1, got sigma="):
        control(sigma, samples)
