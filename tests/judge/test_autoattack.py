"""AutoAttack's class by this engine: the names of the original, what it refuses, and RobustBench, which calls it."""

import copy
import dataclasses
import importlib
import importlib.util
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from small_models import Made, labelled

from purify_fast.attacks import APGD, FABT, Square
from purify_fast.autoattack import RUN, AutoAttack

#: Where `make test` puts the last setuptools that has pkg_resources, which RobustBench imports.
PKG_RESOURCES = Path(sys.prefix) / "setuptools-80"
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def plain():
    return labelled(30)


class Short(AutoAttack):
    """AutoAttack with a few steps."""

    def __init__(self, model, norm="Linf", eps=0.1, verbose=False, **options):
        super().__init__(model, norm, eps, verbose=verbose, **options)
        for part in (self.apgd, self.apgd_targeted, self.fab):
            part.n_iter, part.n_restarts = 5, 1
        self.square.n_queries = 20


@pytest.mark.parametrize("norm, order, eps", [("Linf", torch.inf, 0.1), ("L2", 2, 0.3), ("L1", 1, 1.5)])
def test_what_is_returned_is_in_the_ball_and_labelled(plain, norm, order, eps):
    model, x, y = plain
    adversary = Short(model, norm, eps)
    found, labels = adversary.run_standard_evaluation(x, y, bs=8, return_labels=True)
    length, fell = torch.linalg.vector_norm((found - x).flatten(1), ord=order, dim=1), labels != y
    assert 0 < fell.sum() < len(y) and length.max() <= eps * (1 + 1e-5) and 0 <= found.min() <= found.max() <= 1
    assert torch.equal(labels, model(found).argmax(1)) and torch.equal(found[~fell], x[~fell])
    assert adversary.clean_accuracy(found, y) == pytest.approx((~fell).float().mean())
    # batches change no more than how a matrix product is rounded
    whole = adversary.run_standard_evaluation(x, y, bs=30)
    torch.testing.assert_close(whole, found, rtol=0, atol=1e-6)
    assert torch.equal(model(whole).argmax(1), labels)


def test_settings_are_the_originals_and_the_log_tells_the_accuracy(plain, tmp_path, capsys):
    model, x, y = plain
    standard, plus, rand = (AutoAttack(model, version=version).apgd for version in RUN)
    assert (standard.n_restarts, plus.n_restarts, rand.n_restarts, rand.eot_iter) == (1, 5, 1, 20)
    l1 = AutoAttack(model, norm="L1")
    assert (l1.apgd.n_restarts, l1.apgd_targeted.n_target_classes, l1.square.n_queries) == (5, 5, 5000)
    assert list(Short(model, version="plus").run_standard_evaluation_individual(x, y)) == list(RUN["plus"])
    log = tmp_path / "log.txt"
    adversary = Short(model, version="custom", attacks_to_run=["square"], log_path=log, verbose=True)
    left = adversary.clean_accuracy(adversary.run_standard_evaluation(x, y), y)
    assert f"robust accuracy after SQUARE: {left:.2%}" in log.read_text() and "APGD" not in log.read_text()
    assert capsys.readouterr().out == log.read_text()
    # as scripts for the original choose attacks
    later = Short(model, version="custom")
    later.attacks_to_run = ["square"]
    assert torch.equal(later.run_standard_evaluation(x, y), adversary.run_standard_evaluation(x, y))


def test_a_random_model_falls_by_fresh_draws_alone(plain, capsys):
    model, x, y = plain
    noisy = lambda images: model(images) + 0.02 * torch.randn(len(images), 10)  # noqa: E731
    adversary, state = Short(noisy, version="rand"), torch.get_rng_state()
    found = adversary.run_standard_evaluation(x, y)
    assert torch.equal(state, torch.get_rng_state()) and torch.equal(found, adversary.run_standard_evaluation(x, y))
    wrong = torch.stack([noisy(found).argmax(1) != y for _ in range(20)]).float().mean(0)
    assert 0 < (wrong > 0.9).sum() < len(y)
    Short(noisy, version="custom", attacks_to_run=["square"], verbose=True).run_standard_evaluation(x, y)
    assert "WARNING: the model is random" in capsys.readouterr().out


def test_unusable_gradients_and_nan_are_told(plain, capsys):
    model, x, y = plain
    half = torch.arange(len(x)) % 2 == 0

    def told(model, x=x):
        Short(model, version="custom", attacks_to_run=["apgd-ce", "fab-t"], verbose=True).run_standard_evaluation(x, y)
        return [line for line in capsys.readouterr().out.splitlines() if line.startswith("WARNING")]

    zero = "had unusable gradients: 0 % of the gradients are not finite, 100 % are zero"
    assert told(model) == []
    for flat in (torch.no_grad()(lambda images: model(images)), lambda images: model((16 * images).round() / 16)):
        assert [line.partition(zero)[0] for line in told(flat)] == ["WARNING: APGD-CE ", "WARNING: FAB-T "]
    # a dark image has no prediction
    some = x * torch.where(half, 0.0, 1.0).view(-1, 1, 1, 1)
    bright = lambda images: (images.flatten(1).amax(1, keepdim=True) > 0.5).float()  # noqa: E731
    lost = told(lambda images: model(images) * (bright(images) / bright(images)), some)
    assert f"WARNING: {int(half.sum())} predictions are not finite, and count as wrong" in lost


def test_what_scripts_for_the_original_call(plain, tmp_path, capsys):
    model, x, _ = plain
    adversary = AutoAttack(model, version="custom", attacks_to_run=["square"], log_path=tmp_path / "log.txt")
    adversary.apgd.n_iter = 7
    for version, *numbers in (("rand", 1, 20, 1), ("plus", 5, 1, 5), ("standard", 1, 1, 1)):
        adversary.set_version(version)
        assert adversary.version == version and adversary.attacks_to_run == list(RUN[version])
        assert [adversary.apgd.n_restarts, adversary.apgd.eot_iter, adversary.fab.n_restarts] == numbers
    assert adversary.apgd.n_iter == 7
    l1 = AutoAttack(model, norm="L1", version="rand")
    l1.set_version()
    same = AutoAttack(model, norm="L1")
    assert (l1.apgd.attack, l1.apgd_targeted.attack) == (same.apgd.attack, same.apgd_targeted.attack)
    with pytest.raises(ValueError, match="version must be one of standard, plus, rand, custom"):
        adversary.set_version("fast")
    assert torch.equal(adversary.get_logits(x), model(x))
    assert abs(adversary.get_seed() - time.time()) < 60 and AutoAttack(model, seed=3).get_seed() == 3
    adversary.logger.log("shown")
    adversary.verbose = False
    adversary.logger.log("only written")
    assert (tmp_path / "log.txt").read_text() == "shown\nonly written\n" and capsys.readouterr().out == "shown\n"


def test_robustbench(plain, monkeypatch):
    if importlib.util.find_spec("robustbench") is None or not PKG_RESOURCES.is_dir():
        pytest.skip("robustbench is not installed with a setuptools that has pkg_resources")
    # the package that RobustBench imports is not on PyPI
    theirs = types.ModuleType("autoattack")
    theirs.AutoAttack = None
    monkeypatch.setitem(sys.modules, "autoattack", theirs)
    monkeypatch.setitem(sys.modules, "autoattack.state", pytest.importorskip("pyautoattack.state"))
    monkeypatch.setattr(sys, "path", [*sys.path, str(PKG_RESOURCES)])
    monkeypatch.delitem(sys.modules, "robustbench.eval", raising=False)
    evaluation, (model, x, y) = importlib.import_module("robustbench.eval"), plain
    evaluation.AutoAttack = Short
    monkeypatch.setattr(evaluation, "load_clean_dataset", lambda *args: (x, y))
    clean, robust = evaluation.benchmark(model, n_examples=len(x), eps=0.1, batch_size=250)
    found, right = Short(model).run_standard_evaluation(x, y), Short(model).clean_accuracy
    assert (clean, robust) == (pytest.approx(right(x, y)), pytest.approx(right(found, y)))


REFUSED = [
    ({"norm": "L0"}, {}, "norm must be .*L0.* as in Linf"),
    ({"eps": 8}, {}, "eps must be at most 1 for linf, in image units, got 8"),
    ({"eps": "8/255"}, {}, "eps must be .*'8/255'"),
    ({"is_tf_model": True}, {}, "is_tf_model must be False, got True"),
    ({"attacks_to_run": ["square"]}, {}, "attacks_to_run needs version='custom'"),
    ({"version": "custom", "attacks_to_run": ["pgd"]}, {}, "attacks_to_run must be .*pgd"),
    ({}, {"bs": 0}, "bs must be at least 1"),
    ({}, {"state_path": __file__}, "state_path must be a folder"),
]


@pytest.mark.parametrize("options, run, message", REFUSED)
def test_what_cannot_be_honoured_is_refused(plain, options, run, message):
    model, x, y = plain
    with pytest.raises((ValueError, TypeError), match=message):
        AutoAttack(model, **{"eps": 0.1} | options).run_standard_evaluation(x, y, **run)
    for name in ("n_queries", "use_largereps"):
        with pytest.raises(AttributeError, match=name):
            setattr(AutoAttack(model).apgd, name, 1)
        with pytest.raises(AttributeError, match=name):
            setattr(AutoAttack(model), name, 1)
    for part, name in (("fab", "eot_iter"), ("square", "n_iter"), ("apgd", "steps"), ("apgd", "n_restart")):
        with pytest.raises(AttributeError, match=f"{name} is not supported: the settings of this attack are n_"):
            setattr(getattr(AutoAttack(model), part), name, 1)


def test_the_settings_are_those_of_the_attacks(plain):
    adversary = AutoAttack(plain[0], version="plus")
    assert adversary._attack("apgd-ce") == APGD(loss="ce", steps=100, restarts=5, eot_iter=1, give_up=True)
    targeted = APGD(loss="dlr_targeted", steps=100, restarts=1, eot_iter=1, give_up=True)
    assert adversary._attack("apgd-t") == targeted and adversary._attack("square") == Square(give_up=True)
    assert [adversary._attack(name).restarts for name in ("fab", "fab-t")] == [5, 1]
    adversary.apgd.n_restarts, adversary.apgd_targeted.n_iter, adversary.apgd.eot_iter = 2, 50, 3
    adversary.fab.n_target_classes, adversary.fab.n_iter = 3, 7
    adversary.square.n_queries, adversary.square.n_restarts = 100, 2
    adversary.apgd_targeted.thr_decr = 0.4
    other = copy.deepcopy(adversary.apgd)
    other.n_restarts = 4
    expected = APGD(loss="dlr", steps=100, restarts=2, eot_iter=3, give_up=True)
    assert (adversary._attack("apgd-dlr"), other.n_restarts) == (expected, 4)
    assert adversary._attack("apgd-t") == dataclasses.replace(targeted, steps=50, rho=0.4)
    assert not hasattr(adversary.apgd, "rho")
    assert adversary._attack("fab") == FABT(steps=7, restarts=5, n_target_classes=3, give_up=True)
    assert adversary._attack("square") == Square(n_queries=100, restarts=2, give_up=True)
    with pytest.raises(ValueError, match="restarts must be"):
        adversary.fab.n_restarts = 0


def test_a_run_with_a_state_makes_no_search_again(plain, tmp_path, monkeypatch):
    (model, x, y), folder = plain, tmp_path / "state"
    ran, search = [], APGD.search
    monkeypatch.setattr(APGD, "search", lambda self, *arguments: ran.append(self.loss) or search(self, *arguments))

    def run(eps=0.1, **options):
        ran.clear()
        return Short(model, eps=eps).run_standard_evaluation(x, y, bs=5, **options)

    found = run(state_path=folder)
    assert ran[0] == "ce" and "dlr_targeted" in ran
    assert torch.equal(found, run(state_path=folder)) and ran == []
    assert torch.equal(found, run()) and ran[0] == "ce"
    # with another radius, another run begins
    run(eps=0.05, state_path=folder)
    assert ran[0] == "ce"


def test_a_prediction_with_nan_has_no_class():
    model = Made(lambda self, x: torch.where(torch.arange(4) == 3, torch.nan, x.flatten(1)[:, :4]))
    x, y = torch.rand(6, 1, 2, 2), torch.full((6,), 3)
    judge = AutoAttack(model, eps=0.1, version="custom", attacks_to_run=["apgd-ce"], verbose=False)
    assert judge.clean_accuracy(x, y) == 0 and (judge.run_standard_evaluation(x, y, return_labels=True)[1] == -1).all()
