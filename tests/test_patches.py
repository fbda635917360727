"""Other packages' classes on this package's attacks: the numbers are ours, and the undo gives theirs back."""

import importlib
import importlib.util
import sys
import types
from pathlib import Path

import pytest
import torch

import purify_fast
from purify_fast import attacks
from purify_fast.autoattack import AutoAttack

pytestmark = pytest.mark.usefixtures("one_thread")
#: Where `make test` puts the last setuptools that has pkg_resources, which RobustBench imports.
PKG_RESOURCES = Path(sys.prefix) / "setuptools-80"
EPS, ATTACKS = 0.1, ["apgd-ce", "apgd-t", "square"]


@pytest.fixture(scope="module")
def digits():
    pytest.importorskip("sklearn")
    data = purify_fast.load_dataset("digits")
    x, y = purify_fast.data.to_float(data.x_test[:24]), data.y_test[:24]
    return purify_fast.zoo.load("digits-pgd-at").eval(), x, y


def quick(adversary):
    """The adversary with a few steps, and three attacks; with these, some images fall and some do not."""
    adversary.apgd.n_iter = adversary.apgd_targeted.n_iter = 4
    adversary.apgd_targeted.n_target_classes, adversary.square.n_queries = 2, 20
    adversary.attacks_to_run, adversary.verbose = list(ATTACKS), False
    return adversary


def accuracy(model, x, y):
    return (model(x).argmax(1) == y).float().mean().item()


@pytest.fixture
def ours(digits):
    """Our class called directly: its images."""
    model, x, y = digits
    found = quick(AutoAttack(model, eps=EPS, seed=3)).run_standard_evaluation(x, y)
    assert 0 < accuracy(model, found, y) < accuracy(model, x, y)
    return found


def adapted():
    """A module ``autoattack`` as RobustBench imports it: PyPI has the same attacks, with other names of arguments."""
    packaged = pytest.importorskip("pyautoattack").AutoAttack

    class AsTheAuthors(packaged):
        def __init__(self, model, norm="Linf", eps=0.3, seed=None, version="standard", device="cuda", log_path=None):
            super().__init__(model, norm=norm, eps=eps, seed=3, version=version, device=device)
            quick(self)

        def run_standard_evaluation(self, x_orig, y_orig, bs=250, return_labels=False, state_path=None):
            found, labels = super().run_standard_evaluation(x_orig, y_orig, batch_size=bs, state_path=state_path)
            return (found, labels) if return_labels else found

    module = types.ModuleType("autoattack")
    module.AutoAttack = AsTheAuthors
    return module


def test_autoattack(digits, ours, tmp_path, monkeypatch):
    from_before = pytest.importorskip("pyautoattack").AutoAttack
    authors = adapted()
    monkeypatch.setitem(sys.modules, "autoattack", authors)
    model, x, y = digits
    theirs = from_before.run_standard_evaluation, authors.AutoAttack.run_standard_evaluation
    made_before = quick(from_before(model, eps=EPS, seed=3))
    by_theirs, _ = made_before.run_standard_evaluation(x, y)
    with purify_fast.patch("autoattack"):
        for adversary in (made_before, quick(from_before(model, eps=EPS, seed=3))):
            found, labels = adversary.run_standard_evaluation(x, y, batch_size=250)
            assert torch.equal(found, ours) and torch.equal(labels, model(found).argmax(1))
        alone = quick(from_before(model, eps=EPS, seed=3)).run_standard_evaluation_individual(x, y)
        assert list(alone) == ATTACKS and all(accuracy(model, each, y) < 1 for each, _ in alone.values())
        adversary = authors.AutoAttack(model, eps=EPS, device="cpu")
        assert torch.equal(adversary.run_standard_evaluation(x, y, 250), ours)
        assert torch.equal(adversary.run_standard_evaluation(x, y, return_labels=True)[1], labels)
        with pytest.raises(TypeError, match="unexpected keyword argument 'bs'"):
            made_before.run_standard_evaluation(x, y, bs=250)
        # ours do not have these
        assert torch.equal(made_before.run_standard_evaluation(x, y, state_path=tmp_path / "state.json")[0], by_theirs)
        assert (tmp_path / "state.json").is_file()
        for part, name, value in (("square", "p_init", 0.7), ("apgd", "use_largereps", True), ("fab", "eta", 1.01)):
            changed = quick(from_before(model, eps=EPS, seed=3))
            changed.attacks_to_run = ["square"]
            setattr(getattr(changed, part), name, value)
            packaged = theirs[0](changed, x, y)[0]
            assert torch.equal(changed.run_standard_evaluation(x, y)[0], packaged)
            assert not torch.equal(packaged, ours)
    assert (from_before.run_standard_evaluation, authors.AutoAttack.run_standard_evaluation) == theirs
    assert torch.equal(made_before.run_standard_evaluation(x, y)[0], by_theirs) and not torch.equal(by_theirs, ours)


def test_the_official_attack_remains_the_authors(digits):
    pytest.importorskip("pyautoattack")
    model, x, y = digits
    official, options = attacks.AutoAttack(steps=3, n_queries=5), {"eps": EPS, "num_classes": 10, "draws_differ": False}

    def found():
        with torch.random.fork_rng([]):
            return official.search(model, x, y, attacks.AttackContext(**options)).images

    before, revision = found(), official.revision()
    with purify_fast.patch("autoattack"):
        assert torch.equal(found(), before) and official.revision() == revision
    assert torch.equal(found(), before)


def test_robustbench(digits, ours, monkeypatch):
    monkeypatch.setitem(sys.modules, "autoattack", adapted())
    monkeypatch.setitem(sys.modules, "autoattack.state", pytest.importorskip("pyautoattack.state"))
    if importlib.util.find_spec("robustbench") is None or not PKG_RESOURCES.is_dir():
        pytest.skip("robustbench is not installed with a setuptools that has pkg_resources")
    monkeypatch.setattr(sys, "path", [*sys.path, str(PKG_RESOURCES)])
    monkeypatch.delitem(sys.modules, "robustbench.eval", raising=False)
    model, x, y = digits
    theirs = sys.modules["autoattack"].AutoAttack.run_standard_evaluation
    undo = purify_fast.patch("robustbench")
    evaluation = importlib.import_module("robustbench.eval")
    monkeypatch.setattr(evaluation, "load_clean_dataset", lambda *args: (x, y))
    clean, robust = evaluation.benchmark(model, n_examples=len(x), eps=EPS, batch_size=250)
    assert (clean, robust) == (pytest.approx(accuracy(model, x, y)), pytest.approx(accuracy(model, ours, y)))
    assert evaluation.AutoAttack.run_standard_evaluation is not theirs
    undo()
    assert evaluation.AutoAttack.run_standard_evaluation is theirs


def test_missing_packages_and_other_names_are_named(monkeypatch):
    with pytest.raises(ValueError, match="package must be one of autoattack, robustbench, got 'foolbox'"):
        purify_fast.patch("foolbox")
    for name in ("pyautoattack", "autoattack", "robustbench", "robustbench.eval"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("autoattack", "robustbench"):
        with pytest.raises(ImportError, match=name):
            purify_fast.patch(name)
