"""Other packages attack the defences of this one, and their attacks stand in its reports."""

import pytest
import torch
from torch import nn

from purify_fast import Carso
from purify_fast.attacks import PGD
from purify_fast.evaluation import AttackSpec, as_attack, evaluate

pytestmark = pytest.mark.usefixtures("one_thread")

EPS = 0.05


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 6, 3, padding=1), nn.Linear(6 * 64, 5)

    def forward(self, x):
        return self.head(self.conv(x).relu().flatten(1))


@pytest.fixture(scope="module")
def defended():
    """A CARSO around a little network, and images that it mostly classifies."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        net = Net()
        defence = Carso(net, ["conv"], (1, 8, 8), cond_dim=8, latent_dim=4, samples=2).eval()
        x = torch.rand(16, 1, 8, 8)
        with torch.no_grad(), defence.deterministic():
            y = defence(x).argmax(1)
    return defence, x, y


def check(defence, x, y, attack, name):
    """The attack as a row of an evaluation: it stays in the ball and moves images."""
    report = evaluate(
        defence, x, y, eps=EPS, attacks=[AttackSpec(as_attack(attack, name=name)), PGD(steps=3)], eot_iter=1,
        n_eval=1, progress=False,
    )  # fmt: skip
    row = report.row(name)
    moved = abs(row.examples.adversarial - row.examples.clean)
    assert 0.5 * EPS < moved.max() <= EPS + 1e-6
    assert name in report.row("worst").settings["over"]


def test_torchattacks(defended):
    torchattacks = pytest.importorskip("torchattacks")
    check(*defended, lambda m, x, y: torchattacks.PGD(m, eps=EPS, alpha=EPS / 4, steps=3)(x, y), "torchattacks PGD")


def test_foolbox(defended):
    foolbox = pytest.importorskip("foolbox")

    def attack(model, x, y):
        wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device=x.device)
        _, found, _ = foolbox.attacks.LinfPGD(steps=3)(wrapped, x, y, epsilons=EPS)
        return found

    check(*defended, attack, "Foolbox LinfPGD")


def test_art(defended):
    pytest.importorskip("art")
    from art.attacks.evasion import ProjectedGradientDescentPyTorch
    from art.estimators.classification import PyTorchClassifier

    def attack(model, x, y):
        classifier = PyTorchClassifier(
            model, nn.CrossEntropyLoss(), tuple(x.shape[1:]), 5, clip_values=(0, 1), device_type="cpu"
        )
        pgd = ProjectedGradientDescentPyTorch(classifier, eps=EPS, eps_step=EPS / 4, max_iter=3, verbose=False)
        return torch.from_numpy(pgd.generate(x.numpy(), y.numpy()))

    check(*defended, attack, "ART PGD")
