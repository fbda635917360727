"""Branch and bound: what gradients lead away from, proofs that are the truth, and the networks that it refuses."""

import copy
from itertools import pairwise

import pytest
import torch
from small_models import Made
from torch import nn

from benchmarks.robustness.truth import exact
from benchmarks.robustness.truth.branch_and_bound import branch_and_bound
from benchmarks.robustness.truth.relu_layers import affine_layers, forward
from purify_fast.attacks import PGD

EPS = 0.1


class Hidden(nn.Module):
    """Two classes of 12 pixels; a corner of the ball around 0.5 is class 1, and elsewhere the lead rises towards it."""

    def __init__(self, signs):
        super().__init__()
        self.corner = nn.Linear(12, 1)
        self.out = nn.Linear(1, 2)
        with torch.no_grad():
            # 12 EPS at the corner, and at least a tenth of a pixel's way less one pixel from it
            self.corner.weight.copy_(signs[None])
            self.corner.bias.copy_(-0.5 * signs.sum() - 11.9 * EPS)
            self.out.weight.copy_(torch.tensor([[-400.0], [400.0]]))
            self.out.bias.copy_(torch.tensor([1.0, 0.0]))
        self.slope = nn.Linear(12, 1, bias=False)
        self.slope.weight.data.copy_(0.1 * signs[None])
        self.register_buffer("first", torch.tensor([1.0, 0.0]))

    def forward(self, x):
        flat = x.flatten(1)
        # a line and a ReLU in two ReLUs: images are never below 0, and the line is above -2
        parts = torch.cat([self.corner(flat), self.slope(flat) + 2], 1).relu()
        return self.out(parts[:, :1]) + parts[:, 1:] * self.first


def sharp(seed, *widths):
    """An untrained perceptron whose classes change within small distances."""
    torch.manual_seed(seed)
    layers = [nn.Flatten()]
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
        layers[-2].weight.data *= 2
    return nn.Sequential(*layers[:-1]).eval()


def signs_of(seed):
    return torch.randint(0, 2, (12,), generator=torch.Generator().manual_seed(seed)) * 2.0 - 1


def test_a_corner_is_found_that_gradients_lead_away_from():
    x, y = torch.full((1, 1, 3, 4), 0.5), torch.zeros(1, dtype=torch.int64)
    for seed in range(2):
        model = Hidden(signs_of(seed))
        missed = PGD(steps=20, restarts=3)(model, x, y, eps=EPS)
        assert int(model(missed).argmax(1)) == 0
        found, proved = branch_and_bound(model, x, y, EPS)
        assert int(model(found).argmax(1)) == 1 and float((found - x).abs().max()) <= EPS + 1e-6
        assert not proved.any()
        # a little less of the radius has no such point
        found, proved = branch_and_bound(model, x, y, 0.99 * EPS)
        assert torch.equal(found, x) and proved.all()


def test_its_decisions_are_those_of_the_integer_program():
    seen = []
    for seed in range(4):
        model = sharp(seed, 9, 10, 8, 4)
        x = torch.rand(3, 1, 3, 3, generator=torch.Generator().manual_seed(seed))
        y = model(x).argmax(1)
        layers = affine_layers(model, (1, 3, 3))
        for eps in (0.08, 0.2):
            for image, label in zip(x, y, strict=True):
                found, proved = branch_and_bound(model, image[None], label[None], eps)
                verdict = exact.decide(layers, image, int(label), eps).verdict
                fell = bool(model(found).argmax(1) != label)
                assert (fell, bool(proved)) == (verdict == exact.FALLS, verdict == exact.ROBUST)
                seen.append(verdict)
    assert min(seen.count(exact.FALLS), seen.count(exact.ROBUST)) >= 5


def normalized(self, x):
    """A convolution, batch normalization, pooling and a normalization, in the words of a user's module."""
    inner = torch.relu_(self.norm(self.conv((x - 0.4) / 0.2)))
    return self.out(self.drop(nn.functional.avg_pool2d(inner, 3).flatten(1)))


def test_a_network_is_read_as_matrices_whatever_its_words():
    torch.manual_seed(0)
    parts = {"conv": nn.Conv2d(1, 3, 3, stride=2), "norm": nn.BatchNorm2d(3), "drop": nn.Dropout()}
    model = Made(normalized, out=nn.Sequential(nn.Identity(), nn.Linear(3, 4)), **parts)
    model.norm.running_mean.uniform_(-1, 1), model.norm.running_var.uniform_(0.1, 1)
    state = copy.deepcopy(model.state_dict())
    layers = affine_layers(model, (1, 7, 7))
    assert model.training and all(torch.equal(one, model.state_dict()[name]) for name, one in state.items())
    assert [tuple(layer.weight.shape) for layer in layers] == [(27, 49), (4, 27)]
    x = torch.rand(6, 1, 7, 7)
    model.eval()
    torch.testing.assert_close(forward(layers, x.flatten(1).double()).float(), model(x))
    y = model(x).argmax(1)
    found, proved = branch_and_bound(model, x, y, 0.05)
    verdicts = [exact.decide(layers, a, int(b), 0.05).verdict for a, b in zip(x, y, strict=True)]
    assert (model(found).argmax(1) != y).tolist() == [verdict == exact.FALLS for verdict in verdicts]
    assert proved.tolist() == [verdict == exact.ROBUST for verdict in verdicts]
    assert len(set(verdicts)) == 2


def residual(self, x):
    inner = self.a(x.flatten(1)).relu()
    return inner[:, :3] + self.b(inner).relu()


def behind(first):
    return Made(lambda self, x: self.net(first(x)), net=sharp(0, 9, 4, 3))


REFUSED = {
    "residual": (Made(residual, a=nn.Linear(9, 9), b=nn.Linear(9, 3)), "do not reproduce its logits"),
    "SiLU": (nn.Sequential(nn.Flatten(), nn.Linear(9, 4), nn.SiLU(), nn.Linear(4, 3)), "operation silu is not affine"),
    "rounding": (behind(lambda x: torch.div(8 * x, 1, rounding_mode="floor") / 8), "the operation div is not affine"),
    "whole numbers": (behind(lambda x: (8 * x).long() / 8), "is not affine"),
    "noise": (behind(lambda x: x + 1e-9 * torch.rand_like(x)), "rand"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_such_network_is_refused(name):
    model, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        branch_and_bound(model, torch.rand(2, 1, 3, 3), torch.zeros(2, dtype=torch.int64), EPS)


def test_logits_that_are_not_those_of_the_layers_are_refused():
    """A network that computes otherwise in float32 than in float64, as TF32 does."""
    net = sharp(0, 9, 4, 3)
    model = Made(lambda self, x: self.net(x) + (0.01 if x.dtype == torch.float32 else 0.0), net=net)
    with pytest.raises(ValueError, match="differ from the logits that its layers give"):
        branch_and_bound(model, torch.rand(2, 1, 3, 3), torch.zeros(2, dtype=torch.int64), EPS)


def test_too_few_nodes_prove_nothing():
    """What its first subproblems do not decide; no image is then said to be proved, or to fall."""
    model = sharp(2, 16, 24, 16, 4)
    x = torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    y = model(x).argmax(1)
    found = [branch_and_bound(model, x, y, 0.08, **nodes) for nodes in ({}, {"nodes": 1})]
    whole, few = (int((model(points).argmax(1) != y).sum() + proved.sum()) for points, proved in found)
    assert whole == 6 > few
