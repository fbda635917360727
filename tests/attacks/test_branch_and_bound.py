"""Branch and bound: what gradients lead away from, proofs that are the truth, and the networks that it refuses."""

import copy
from itertools import pairwise

import pytest
import torch
from evaluating import evaluate
from small_models import Made
from torch import nn

from benchmarks.robustness.truth import exact
from purify_fast.attacks import BranchAndBound, branch_and_bound, pgd
from purify_fast.attacks.base import ThreatModel
from purify_fast.attacks.relu_layers import MOST_WEIGHTS, affine_layers, forward
from purify_fast.evaluation.request.attack_lists import protocol_attacks
from purify_fast.evaluation.request.subject import Subject

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
        missed = pgd(model, x, y, eps=EPS, steps=20, restarts=3)
        assert int(model(missed).argmax(1)) == 0
        found = BranchAndBound().run(model, x, y, eps=EPS)
        assert int(model(found.images).argmax(1)) == 1 and float((found.images - x).abs().max()) <= EPS + 1e-6
        assert found.proved == 0
        # a little less of the radius has no such point
        found = BranchAndBound().run(model, x, y, eps=0.99 * EPS)
        assert torch.equal(found.images, x) and found.proved == 1


def test_its_decisions_are_those_of_the_integer_program():
    seen = []
    for seed in range(4):
        model = sharp(seed, 9, 10, 8, 4)
        x = torch.rand(3, 1, 3, 3, generator=torch.Generator().manual_seed(seed))
        y = model(x).argmax(1)
        layers = affine_layers(model, (1, 3, 3))
        for eps in (0.08, 0.2):
            for image, label in zip(x, y, strict=True):
                found = BranchAndBound().run(model, image[None], label[None], eps=eps)
                verdict = exact.decide(layers, image, int(label), eps).verdict
                fell = bool(model(found.images).argmax(1) != label)
                assert (fell, found.proved) == (verdict == exact.FALLS, int(verdict == exact.ROBUST))
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
    found = BranchAndBound().run(model, x, y, eps=0.05)
    verdicts = [exact.decide(layers, a, int(b), 0.05).verdict for a, b in zip(x, y, strict=True)]
    assert (model(found.images).argmax(1) != y).tolist() == [verdict == exact.FALLS for verdict in verdicts]
    assert found.proved == verdicts.count(exact.ROBUST)
    assert len(set(verdicts)) == 2


def residual(self, x):
    inner = self.a(x.flatten(1)).relu()
    return inner[:, :3] + self.b(inner).relu()


def behind(first):
    return Made(lambda self, x: self.net(first(x)), net=sharp(0, 9, 4, 3))


def detour(x):
    """The same images, which nothing that watches PyTorch's operations sees."""
    return torch.from_numpy(x.numpy())


REFUSED = {
    "too many ReLUs": (sharp(0, 9, 301, 3), "at most 300 ReLUs, got 301"),
    "residual": (Made(residual, a=nn.Linear(9, 9), b=nn.Linear(9, 3)), "do not reproduce its logits"),
    "SiLU": (nn.Sequential(nn.Flatten(), nn.Linear(9, 4), nn.SiLU(), nn.Linear(4, 3)), "operation silu is not affine"),
    "rounding": (behind(lambda x: torch.div(8 * x, 1, rounding_mode="floor") / 8), "the operation div is not affine"),
    "whole numbers": (behind(lambda x: (8 * x).long() / 8), "is not affine"),
    "a detour": (behind(detour), "affine between its ReLUs"),
    "noise": (behind(lambda x: x + 1e-9 * torch.rand_like(x)), "rand"),
    "a function": (lambda x: x.flatten(1)[:, :3], "a module of affine layers and ReLUs, got function"),
    "too many weights": (nn.Linear(9, MOST_WEIGHTS // 9), f"at most {MOST_WEIGHTS} weights"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_such_network_is_refused(name):
    model, message = REFUSED[name]
    x, y = torch.rand(2, 1, 3, 3), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match=message):
        branch_and_bound(model, x, y, eps=EPS)
    with pytest.raises(ValueError, match="norm must be one of linf, got 'l2'"):
        branch_and_bound(model, x, y, eps=EPS, norm="l2")


def labels_of(model, norm="linf"):
    x, y = torch.rand(4, 1, 3, 3), torch.zeros(4, dtype=torch.int64)
    with torch.random.fork_rng([]), torch.no_grad():
        subject = Subject(model, x, y, batch_size=4, n_eval=1, seed=0)
        specs = protocol_attacks("strong", subject, ThreatModel(norm, EPS))
    return [spec.attack.kind for spec in specs]


def test_strong_has_the_row_for_such_networks_alone():
    assert "branch_and_bound" in labels_of(sharp(0, 9, 300, 3))
    assert "branch_and_bound" not in labels_of(sharp(0, 9, 4, 3), "l2")
    for name in ("too many ReLUs", "residual", "noise", "a function"):
        assert "branch_and_bound" not in labels_of(REFUSED[name][0])


def test_too_few_nodes_prove_nothing():
    """What its first subproblems do not decide; no image is then said to be proved, or to fall."""
    model = sharp(2, 16, 24, 16, 4)
    x = torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    y = model(x).argmax(1)
    found = [attack.run(model, x, y, eps=0.08) for attack in (BranchAndBound(), BranchAndBound(nodes=1))]
    whole, few = (int((model(each.images).argmax(1) != y).sum()) + int(each.proved) for each in found)
    assert whole == 6 > few


def test_a_report_says_what_is_proved():
    model = sharp(2, 9, 10, 4)
    x = torch.rand(12, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    y = model(x).argmax(1)
    report = evaluate(model, x, y, eps=0.05, attacks=[BranchAndBound()], batch_size=5, progress=False)
    left = int(report.headline.robust.sum())
    assert 0 < left < 12
    assert f"{left} of 12 images are proved robust within this ball" in " ".join(report.notes)
    # a network without ReLUs is decided too
    line = nn.Sequential(nn.Flatten(), nn.Linear(9, 3)).eval()
    y = line(x).argmax(1)
    report = evaluate(line, x, y, eps=0.05, attacks=[BranchAndBound()], progress=False)
    assert report.row("branch and bound").proved == int(report.headline.robust.sum())
