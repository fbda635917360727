"""Arguments that are tensors, labels and losses are refused by name before any work."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from purify_fast.attacks import PGD, apgd, fab_t, fgsm, pgd, square, stadv
from purify_fast.autoattack import AutoAttack

FEW = {fgsm: {}, square: {"n_queries": 5}, pgd: {"steps": 2}, apgd: {"steps": 2}, fab_t: {"steps": 2}}


@pytest.fixture
def made():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Flatten(), nn.Linear(48, 4)).eval(), torch.rand(6, 3, 4, 4)
    return model, x, model(x).argmax(1)


@pytest.mark.parametrize("attack", FEW)
@pytest.mark.parametrize("eps", [8.0, -0.1, float("nan")])
def test_a_radius_for_each_image_is_checked_as_a_number_is(made, attack, eps):
    with pytest.raises(ValueError, match="eps must be at least 0 and at most the range's width"):
        attack(*made, torch.full((6,), eps), **FEW[attack])


def test_a_radius_and_a_range_for_each_channel_are_compared(made):
    model, x, y = made
    std = torch.tensor([0.25, 0.24, 0.26]).view(3, 1, 1)
    box = {"clip_min": 0 / std, "clip_max": 1 / std, "steps": 2}
    moved = pgd(model, x / std, y, (8 / 255) / std, **box)
    assert ((moved - x / std) * std).abs().max() <= 8 / 255 + 1e-6
    for eps in (8 / std, 8.0):
        with pytest.raises(ValueError, match="eps must be at least 0 and at most the range's width, got"):
            pgd(model, x / std, y, eps, **box)
    with pytest.raises(ValueError, match="clip_max must be above clip_min"):
        pgd(model, x, y, 0.1, clip_min=torch.ones(3, 1, 1), clip_max=torch.zeros(3, 1, 1))
    with pytest.raises(ValueError, match="alpha must be at least 0"):
        PGD(alpha=torch.tensor([0.1, -0.1]))
    # an l2 ball may be wider than a pixel's range
    assert pgd(model, x, y, torch.full((6,), 5.0), norm="l2", steps=2).shape == x.shape
    with pytest.raises(ValueError, match="eps must be"):
        pgd(model, x, y, torch.full((6,), 7.0), norm="l2", steps=2)


def two_classes(x):
    return x.flatten(1)[:, :2]


CHANNELS, OWN = torch.full((3, 1, 1), 0.05), lambda logits, y: logits[:, 0]
#: Attacks, what they are given, and the words of the error.
REFUSED = [
    *((attack, {"y": torch.full((6,), 4)}, "y must have class numbers from 0 to 3, got 4") for attack in FEW),
    (pgd, {"y": None}, "y is missing"),
    (pgd, {"y": torch.zeros(3, 5), "loss": OWN}, "y must have a row for each of the 6 images"),
    (pgd, {"y": None, "targeted": torch.zeros(6).long(), "loss": "nonsense"}, "targeted needs a loss among"),
    (pgd, {"eps": torch.ones(2, 1, 1)}, "eps must be a number"),
    (pgd, {"model": two_classes, "loss": "dlr"}, "at least 3 classes, got a model with 2: use the loss 'margin'"),
    (pgd, {"eps": CHANNELS, "norm": "l2", "random_start": False}, "norm must be linf"),
    (apgd, {"eps": CHANNELS}, "eps, clip_min and clip_max must be numbers"),
    (pgd, {"mode": "train"}, "mode must be one of eval, keep"),
    (pgd, {"loss": OWN, "stop_when_fallen": True}, "stop_when_fallen must be False"),
    (square, {"x": torch.rand(6, 5)}, r"x must be images \[B, C, H, W\] for Square, got \[6, 5\]"),
    (stadv, {"x": torch.rand(6, 12)}, r"x must be images \[B, C, H, W\], got \[6, 12\]"),
    (stadv, {"eps": torch.zeros(3)}, r"eps must be a number or a tensor \[B\] = \[6\]"),
]


@pytest.mark.parametrize(("attack", "change", "message"), REFUSED)
def test_wrong_arguments_are_named(made, attack, change, message):
    model, x, y = made
    with pytest.raises((TypeError, ValueError), match=message):
        attack(**{"model": model, "x": x, "y": y % 2, "eps": 0.1, **FEW.get(attack, {}), **change})


def test_targets_that_no_class_has_are_refused(made):
    model, x, y = made
    wrong = {"from 0 to 3, got 4": torch.full((6,), 4), "of at least 0, got -100": torch.full((6,), -100)}
    wrong |= {"torch.int32": y.int(), r"torch.int64 \[6, 1\]": y[:, None], "torch.float32": torch.eye(4)[y]}
    for message, targeted in wrong.items():
        with pytest.raises(ValueError, match=f"targeted must .*{message}"):
            pgd(model, x, None, 0.1, targeted=targeted)
    # the labels of a loss of one's own are free
    assert pgd(model, x, torch.full((6,), 9), 0.1, loss=lambda logits, _: logits[:, 0], steps=2).shape == x.shape


@pytest.mark.parametrize("label", [4, -1])
def test_the_drop_in_class_refuses_them_too(made, label):
    model, x, _ = made
    judge = AutoAttack(model, eps=0.1, version="custom", attacks_to_run=["apgd-ce"], verbose=False)
    with pytest.raises(ValueError, match=rf"y\[0\] is {label}, but the model has 4 classes"):
        judge.run_standard_evaluation(x, torch.full((6,), label))


@pytest.mark.parametrize(("attack", "options"), [(apgd, {}), (pgd, {}), (pgd, {"keep_best": True})])
@pytest.mark.parametrize("images", [6, 2])
def test_a_mean_over_the_batch_is_no_loss(made, attack, options, images):
    model, x, y = made
    with pytest.raises(ValueError, match=r"the loss must be a value for each image, \[B\] = .*reduction=\"none\""):
        attack(model, x[:images], y[:images], 0.01, loss=F.cross_entropy, steps=3, **options)
