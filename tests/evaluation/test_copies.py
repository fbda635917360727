"""An accelerated defence whose classifier was changed since is judged as it is now."""

import pytest
import torch
from evaluating import evaluate
from torch import nn

from purify_fast import zoo
from purify_fast.attacks import PGD
from purify_fast.evaluation import AttackSpec
from purify_fast.evaluation.request.preparation import refresh_copies

QUIET = {"eps": 0.1, "attacks": [], "eot_iter": 1, "n_eval": 1}


@pytest.fixture
def accelerated():
    return zoo.load("digits-carso-pipeline").accelerate(torch.float32)


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


def hooked(defence):
    defence.classifier.register_forward_hook(lambda module, args, output: 0 * output)


@pytest.mark.parametrize("change", [zeroed, zeroed_unseen, replaced, hooked])
def test_a_changed_classifier_is_copied_again(change, accelerated, images, tmp_path):
    evaluate(accelerated, *images, **QUIET, out=tmp_path)
    change(accelerated)
    got = evaluate(accelerated, *images, **QUIET, out=tmp_path)
    plain = zoo.load("digits-carso-pipeline")
    change(plain)
    plain.accelerate(torch.float32)
    assert got.row("clean").robust.tolist() == evaluate(plain, *images, **QUIET).row("clean").robust.tolist()
    with torch.no_grad(), plain.deterministic(), accelerated.deterministic():
        assert torch.equal(plain(images[0]), accelerated(images[0]))


@pytest.mark.parametrize(
    "around",
    [lambda d: nn.Sequential(d), lambda d: lambda x: d(x), lambda d: d.forward, lambda d: (d, d)],
    ids=["part", "function", "method", "base"],
)
def test_it_is_found_wherever_it_is(around, accelerated, images):
    zeroed(accelerated)
    made = around(accelerated)
    if isinstance(made, tuple):
        other = zoo.load("digits-standard")
        spec = AttackSpec(PGD(steps=1), target=accelerated)
        evaluate(other, *images, **QUIET | {"attacks": [spec]})
    else:
        evaluate(made, *images, **QUIET)
    logits = accelerated.fast.classifier(images[0])
    assert torch.equal(logits, torch.zeros_like(logits))


def test_packed_weights_are_packed_again(images):
    """A decoder's weights that its kernel reads; a write to ``data`` is counted nowhere."""
    defence = zoo.load("digits-carso-pipeline").accelerate(torch.bfloat16)
    with defence.fixed_noise(0), torch.no_grad():
        before = defence(images[0])
        for parameter in defence.decoder.parameters():
            parameter.data.mul_(0.5)
        refresh_copies(defence)
        after = defence(images[0])
        defence.refresh()
        assert torch.equal(after, defence(images[0])) and not torch.equal(before, after)
