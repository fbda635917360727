"""A frozen copy of a defence whose weights were changed since is judged as it is now."""

import pytest
import torch
from evaluating import evaluate
from torch import nn

from purify_fast import frozen_copy, zoo
from purify_fast.attacks import PGD
from purify_fast.evaluation import AttackSpec

QUIET = {"eps": 0.1, "attacks": [], "eot_iter": 1, "n_eval": 1}


@pytest.fixture
def images():
    return torch.rand(4, 1, 16, 16, generator=torch.Generator().manual_seed(0)), torch.arange(4)


def zeroed(defence):
    with torch.no_grad():
        for parameter in defence.classifier.parameters():
            parameter.zero_()


def zeroed_unseen(defence):
    """Without the writes that PyTorch counts."""
    for parameter in defence.classifier.parameters():
        parameter.data.zero_()


def replaced(defence):
    defence.classifier = zoo.load("digits-standard").requires_grad_(False).eval()


@pytest.mark.parametrize("change", [zeroed, zeroed_unseen, replaced])
def test_changed_weights_are_read_again(change, images, tmp_path):
    model = zoo.load("digits-carso-pipeline")
    copied = frozen_copy(model, images[0], dtype=torch.float32)
    evaluate(copied, *images, **QUIET, out=tmp_path)
    change(model)
    got = evaluate(copied, *images, **QUIET, out=tmp_path)
    plain = frozen_copy(model, images[0], dtype=torch.float32)
    assert got.row("clean").robust.tolist() == evaluate(plain, *images, **QUIET).row("clean").robust.tolist()
    with torch.no_grad(), plain.deterministic(), copied.deterministic():
        assert torch.equal(plain(images[0]), copied(images[0]))


@pytest.mark.parametrize(
    "around",
    [lambda d: nn.Sequential(d), lambda d: lambda x: d(x), lambda d: d.forward, None],
    ids=["part", "function", "method", "surrogate"],
)
def test_it_is_found_wherever_it_is(around, images):
    model = zoo.load("digits-carso-pipeline")
    copied = frozen_copy(model, images[0], dtype=torch.float32)
    zeroed_unseen(model)
    if around is None:
        attacks = {"attacks": [AttackSpec(PGD(steps=1), through=copied)]}
        evaluate(zoo.load("digits-standard"), *images, **QUIET | attacks)
    else:
        evaluate(around(copied), *images, **QUIET)
    assert not copied.classifier(images[0]).any()
