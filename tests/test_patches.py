"""Other packages' attacks run on this package, give the same robust accuracy, and are back after the undo."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

import purify_fast
from purify_fast.attacks import pgd
from purify_fast.autoattack import AutoAttack

pytestmark = pytest.mark.usefixtures("one_thread")
EPS, N = 0.1, 24


@pytest.fixture(scope="module")
def digits():
    data = purify_fast.load_dataset("digits")
    return purify_fast.zoo.load("digits-pgd-at"), data.x_test[:N].float() / 255, data.y_test[:N]


def robust(model, near, y):
    with torch.no_grad():
        return (model(near).argmax(1) == y).float().mean().item()


def test_torchattacks(digits, monkeypatch):
    torchattacks = pytest.importorskip("torchattacks")
    (model, x, y), theirs, calls = digits, torchattacks.PGD, []
    monkeypatch.setattr("purify_fast.attacks.pgd", lambda *a, **k: calls.append(1) or pgd(*a, **k))
    with purify_fast.patch("torchattacks"):
        attack = torchattacks.PGD(model, eps=EPS, alpha=EPS / 4, steps=10, random_start=False)
        near = attack(x, y)
        assert calls and isinstance(attack, theirs) and torchattacks.PGD is not theirs
        attack.set_mode_targeted_least_likely()
        before = len(calls)
        attack(x, y)
        assert len(calls) == before
        others = [torchattacks.FGSM(model, EPS)(x, y), torchattacks.APGD(model, eps=EPS, steps=10)(x, y)]
    assert torchattacks.PGD is theirs
    ours = pgd(model, x, y, EPS, alpha=EPS / 4, steps=10, random_start=False)
    assert robust(model, near, y) == robust(model, ours, y) < 1
    alone = theirs(model, eps=EPS, alpha=EPS / 4, steps=10, random_start=False)(x, y)
    # The sign of a vanishing gradient may differ.
    assert ((near - alone).abs() > 1e-5).float().mean() < 1e-3
    for one in others:
        assert ((one - x).abs() <= EPS + 1e-6).all() and robust(model, one, y) < robust(model, x, y)


def test_pyautoattack(digits):
    package = pytest.importorskip("pyautoattack")
    (model, x, y), theirs = digits, package.AutoAttack
    how = {"norm": "Linf", "eps": EPS, "seed": 0, "verbose": False}
    patched = purify_fast.patch("autoattack")
    attack = package.AutoAttack(model, attacks=["apgd-ce"], version="custom", **how)
    near, predicted = attack.run_standard_evaluation(x, y, batch_size=N)
    assert isinstance(attack, AutoAttack) and torch.equal(predicted, model(near).argmax(1))
    patched.undo()
    assert package.AutoAttack is theirs and package.autoattack.AutoAttack is theirs
    ours = AutoAttack(model, version="custom", attacks_to_run=["apgd-ce"], **how).run_standard_evaluation(x, y, bs=N)
    assert robust(model, near, y) == robust(model, ours, y) < robust(model, x, y)


def test_robustbench(digits, monkeypatch):
    # `make test` puts the last setuptools that has pkg_resources there, which RobustBench imports.
    monkeypatch.syspath_prepend(str(Path(sys.prefix) / "setuptools-80"))
    # RobustBench imports the name of the authors' repository, which is not in the package index.
    for name in ("autoattack", "autoattack.state"):
        monkeypatch.setitem(sys.modules, name, pytest.importorskip(f"py{name}"))
    pytest.importorskip("robustbench")
    module = importlib.import_module("robustbench.eval")
    model, x, y = digits
    theirs = module.AutoAttack
    with purify_fast.patch("robustbench"):
        attack = module.AutoAttack(model, norm="Linf", eps=EPS, version="custom", attacks_to_run=["apgd-ce"], seed=0)
        attack.verbose = False
        assert isinstance(attack, AutoAttack)
        near = attack.run_standard_evaluation(x, y, bs=N, state_path=None)
    assert module.AutoAttack is theirs
    assert robust(model, near, y) < robust(model, x, y)


def test_an_unknown_package_is_refused():
    with pytest.raises(ValueError, match="package must be one of autoattack, .*, got 'cleverhans'"):
        purify_fast.patch("cleverhans")
