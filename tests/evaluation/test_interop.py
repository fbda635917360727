"""Other packages attack the defences of this one, and their attacks stand in its reports."""

import functools

import pytest
import torch
from evaluating import evaluate
from torch import nn

from purify_fast import Carso
from purify_fast.attacks import APGD, PGD, apgd, pgd
from purify_fast.evaluation import AttackSpec

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


def check(defence, x, y, attack, name, warned=False, **options):
    """The attack as a row of an evaluation: it stays in the ball, moves images and runs on the judged model."""
    calls = []
    hook = defence.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    settings = {"eps": EPS, "eot_iter": 1, "n_eval": 1, "progress": False, "probes": False} | options
    report = evaluate(defence, x, y, attacks=[attack, PGD(steps=3)], **settings)
    hook.remove()
    row = report.row(name)
    moved = torch.as_tensor(row.examples.adversarial - row.examples.clean)
    order = torch.inf if settings.get("norm", "linf") == "linf" else 2
    lengths = moved.flatten(1).norm(order, dim=1)
    assert 0.5 * settings["eps"] < lengths.max() <= settings["eps"] * (1 + 1e-5) + 1e-6
    assert sum(calls) >= 3, "the attack took no gradients of the judged model"
    assert name in report.row("worst").settings["over"]
    assert any("made for another model" in text for text in row.warnings) == warned
    return report


def test_torchattacks(defended):
    torchattacks = pytest.importorskip("torchattacks")
    defence, x, y = defended
    attack = torchattacks.PGD(defence, eps=EPS, alpha=EPS / 4, steps=3)
    check(*defended, attack, "torchattacks PGD")
    assert attack.model is defence
    # made for a model that is not the judged one, and of several attacks
    other = Net()
    check(*defended, torchattacks.PGD(other, eps=EPS, steps=3), "torchattacks PGD", warned=True)
    several = torchattacks.MultiAttack([torchattacks.FGSM(other, eps=0.3), torchattacks.PGD(other, eps=0.3, steps=3)])
    net = Net()
    with torch.no_grad():
        labels = net(x).argmax(1)
    check(net, x, labels, AttackSpec(several, label="two"), "two", warned=True, eps=0.3)
    assert several.model is other
    check(*defended, torchattacks.PGDL2(defence, eps=0.5, steps=3), "torchattacks PGDL2", norm="l2", eps=0.5)
    # one that looks for the nearest point finds what lies in the ball, and the rest counts as withstood
    report = evaluate(Net(), x, y, eps=EPS, attacks=[torchattacks.DeepFool(Net(), steps=5)], progress=False)
    assert report.row("torchattacks DeepFool").n == len(x)


def test_foolbox(defended):
    foolbox = pytest.importorskip("foolbox")
    check(*defended, foolbox.attacks.LinfPGD(steps=3), "Foolbox LinfProjectedGradientDescentAttack")
    name = "Foolbox L2DeepFoolAttack"
    check(*defended, foolbox.attacks.L2DeepFoolAttack(steps=5), name, norm="l2", eps=0.3)


def test_art(defended):
    pytest.importorskip("art")
    from art.attacks.evasion import AutoProjectedGradientDescent, ProjectedGradientDescent
    from art.estimators.classification import PyTorchClassifier

    defence, x, _ = defended

    def estimator(model, **options):
        settings = {"clip_values": (0, 1), "device_type": "cpu"} | options
        return PyTorchClassifier(model, nn.CrossEntropyLoss(), tuple(x.shape[1:]), 5, **settings)

    options = {"eps": EPS, "eps_step": EPS / 4, "max_iter": 3, "verbose": False}
    other = Net()
    for model in (defence, other):
        mine = estimator(model)
        attack = ProjectedGradientDescent(mine, **options)
        check(*defended, attack, "ART ProjectedGradientDescent", warned=model is other)
        assert mine.model is model
    # which makes estimators of its own
    auto = AutoProjectedGradientDescent(
        estimator(defence), loss_type="difference_logits_ratio", nb_random_init=1, **options
    )
    check(*defended, auto, "ART AutoProjectedGradientDescent")
    evaluated = functools.partial(evaluate, *defended, eps=EPS, progress=False)
    with pytest.raises(ValueError, match=r"ART ProjectedGradientDescent has targeted=True.*targeted=False"):
        evaluated(attacks=[ProjectedGradientDescent(estimator(defence), targeted=True, **options)])
    for wrong in ({"clip_values": (0, 255)}, {"preprocessing": (0.5, 0.5)}):
        with pytest.raises(ValueError, match=r"PyTorchClassifier\(model, .*eps="):
            evaluated(attacks=[ProjectedGradientDescent(estimator(defence, **wrong), **options)])


def test_wrong_use_is_refused_with_the_line_to_write(defended):
    torchattacks, foolbox = pytest.importorskip("torchattacks"), pytest.importorskip("foolbox")
    from art.attacks.evasion import FastGradientMethod

    defence, x, y = defended
    judged = functools.partial(evaluate, defence, x, y, eps=EPS, progress=False)
    for given, line in (
        (torchattacks.PGD, r"torchattacks\.PGD\(model, eps="),
        (foolbox.attacks.LinfPGD, r"foolbox\.attacks\.LinfProjectedGradientDescentAttack\(\)"),
        (FastGradientMethod, r"FastGradientMethod\(PyTorchClassifier\("),
    ):
        with pytest.raises(TypeError, match=rf"attacks\[0\]: .* is a class of .*{line}"):
            judged(attacks=[given])
    with pytest.raises(ValueError, match=r"torchattacks PGD has eps = 0.1, but the report's eps is 0.05.*eps=0.05\)"):
        judged(attacks=[torchattacks.PGD(defence, eps=0.1)])
    with pytest.raises(ValueError, match="torchattacks PGDL2 searches a ball in l2"):
        judged(attacks=[torchattacks.PGDL2(defence, eps=EPS)])
    with pytest.raises(ValueError, match=r"Foolbox L2.* searches a ball in l2.*linf"):
        judged(attacks=[foolbox.attacks.L2PGD()])
    normalized = torchattacks.PGD(defence, eps=EPS)
    normalized.set_normalization_used([0.5], [0.5])
    with pytest.raises(ValueError, match="torchattacks PGD normalizes images itself"):
        judged(attacks=[normalized])


def test_an_attack_of_this_package_is_called(defended):
    _, x, y = defended
    torch.manual_seed(0)
    net = Net()
    with torch.no_grad():
        y = net(x).argmax(1)
    for attack, function, options in (
        (PGD(steps=3), pgd, {"steps": 3}),
        (APGD(steps=5, loss="margin"), apgd, {"steps": 5, "loss": "margin"}),
    ):
        found = attack(net, x, y, eps=EPS, norm="l2", seed=3)
        assert torch.equal(found, function(net, x, y, eps=EPS, norm="l2", seed=3, **options))
        assert not torch.equal(found, x)
    with pytest.raises(ValueError, match=r"eps must be given: call PGD\(\.\.\.\)\(model, x, y, eps="):
        PGD()(net, x, y)
    assert (PGD(steps=2, eps=0.1)(net, x, y) - x).abs().max() <= 0.1 + 1e-6
