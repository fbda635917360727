import importlib
import itertools
import warnings

import pytest
import torch
from direct import direct
from search_calls import apgd
from small_models import accuracy
from torch.nn import functional as F

from purify_fast.attacks import GradientHealth, JudgeContext
from purify_fast.attacks.base import Ball
from purify_fast.judge.searches import engine
from purify_fast.judge.searches.apgd import checkpoints
from purify_fast.judge.searches.engine import ActiveSet, Judge


def test_checkpoints():
    """The paper's for 100 steps: 22, 41, 57, 70, 80, 87, 93, 99."""
    assert checkpoints(100) == {22: 22, 41: 19, 57: 16, 70: 13, 80: 10, 87: 7, 93: 6, 99: 6}
    assert checkpoints(1) == {} and checkpoints(3) == {1: 1, 2: 1}


def test_the_steps_are_those_of_the_algorithm(monkeypatch):
    """By hand, on one number: a peak at 0.6 that is overshot halves the step, and the search goes on from the best."""
    module = importlib.import_module("purify_fast.judge.searches.apgd")
    moves, gradients = {}, []
    original = module.apgd_step

    def step(x, gradient, x_nat, previous, alpha, **options):
        # the last move after a gradient counts
        moves[len(gradients)] = (float(x), float(previous), float(alpha), options["momentum"])
        return original(x, gradient, x_nat, previous, alpha, **options)

    monkeypatch.setattr(module, "apgd_step", step)

    def peak(x):  # the margin loss is -|x - 0.6|
        if x.requires_grad:
            gradients.append(x)
        return torch.cat([(x - 0.6).abs(), torch.zeros_like(x)], 1)

    x, y = torch.full((1, 1), 0.5), torch.zeros(1, dtype=torch.int64)
    found = apgd(peak, x, y, eps=0.3, steps=40, loss="margin")
    seen = list(moves.values())
    assert len(seen) == 40
    assert seen[0][0] == seen[0][1] and seen[0][3] == 1.0 and {s[3] for s in seen[1:]} == {0.75}
    sizes = [s[2] for s in seen]
    assert sizes[0] == pytest.approx(0.6) and sizes[7] == sizes[0] and sizes[8] == sizes[0] / 2  # 22 % of 40 steps
    assert all(later in (size, size / 2) for size, later in itertools.pairwise(sizes))
    assert {i for i in range(1, 40) if sizes[i] != sizes[i - 1]} <= set(checkpoints(40))
    best = min((s[0] for s in seen[:9]), key=lambda at: abs(at - 0.6))
    assert seen[8][0] == pytest.approx(best, abs=1e-7)
    assert abs(float(found) - 0.6) < 0.02


def test_misclassified_points_come_before_those_of_higher_loss():
    """Below 0.75 the image is misclassified; at 1, where the gradient leads, it is not, but the loss is highest."""

    def model(x):
        v = x[:, 0]
        return torch.stack([0 * v, 0.3 - 0.4 * v, -10 + 9.9 * v], 1)

    x, y = torch.full((60, 1), 0.5), torch.zeros(60, dtype=torch.int64)
    lost, gone = (F.cross_entropy(model(torch.full((1, 1), v)), y[:1]) for v in (0.5, 1.0))
    assert lost < gone
    found = apgd(model, x, y, eps=0.5, steps=10, leave_when_fallen=False)[:, 0]
    assert 35 < (found < 0.75).sum() < 55 and bool((found[found >= 0.75] == 1).all())


@pytest.mark.parametrize("padded", [False, True])
def test_every_image_gets_every_run_in_waves_that_are_filled(monkeypatch, padded):
    """On a GPU most waves have one size; each image is searched in each run until it falls, and no longer."""
    monkeypatch.setattr(engine, "takes_every_size", lambda device: not padded)
    x, y = torch.rand(90, 2), torch.zeros(90, dtype=torch.int64)
    judge = Judge(lambda z: torch.tensor([[1.0, 0.0]]).expand(len(z), 2))
    active = ActiveSet(x, y, Ball(torch.full((90,), 0.1)), judge, JudgeContext())
    active.judge_clean_images()
    goals = tuple(torch.full_like(y, goal) for goal in (1, 2, 3, 4, 5))
    sizes, seen = [], []
    for rows in engine.waves(active, goals, 1, JudgeContext(batch_size=90)):
        sizes.append(len(rows.x))
        assert torch.equal(rows.x, x[rows.owner])
        assert not active.fallen[rows.owner].any()
        seen += list(dict.fromkeys(zip(rows.owner.tolist(), rows.labels[:, 1].tolist(), strict=True)))
        # images fall: the last ones of the first run, then one of those that every wave is about
        active.fallen[[*range(60, 90), int(rows.owner[0])]] = True
    assert len(seen) == len(set(seen))
    standing = (~active.fallen).nonzero()[:, 0].tolist()
    assert standing and all({(image, goal) for goal in (1, 2, 3, 4, 5)} <= set(seen) for image in standing)
    # copies of rows fill the last wave
    assert sizes == ([90, 90, 90, 64] if padded else [90, 59, 58, 57, 56])


def test_the_targets_are_the_wrong_classes_of_highest_logit():
    x = torch.tensor([[0.6, 0.35, 0.35, 0.35, 0.4]])  # the likeliest wrong class wins
    common = {"eps": 0.2, "steps": 20, "n_target_classes": 1, "leave_when_fallen": False}
    for loss in ("dlr_targeted", "margin_targeted"):
        assert int(apgd(lambda z: z, x, torch.tensor([0]), loss=loss, **common).argmax(1)) == 4


STEPS = 30


def by_autoattack(model, x, y, norm, eps, loss):
    base = pytest.importorskip("pyautoattack.autopgd_base")
    options = {"n_iter": STEPS, "norm": {"linf": "Linf", "l2": "L2"}[norm], "eps": eps, "device": "cpu"}
    with torch.random.fork_rng([]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if loss == "dlr_targeted":
            return base.APGDAttack_targeted(model, n_target_classes=9, **options).perturb(x, y)
        return base.APGDAttack(model, loss=loss, **options).perturb(x, y)


@pytest.mark.slow
def test_robust_accuracy_beside_autoattack(digits):
    """Within two points of the authors' attack of as many steps, and in the mean not behind it."""
    net, x, y = digits
    assert accuracy(net, x, y) > 85
    behind = []
    for norm, eps in (("linf", 0.1), ("linf", 0.15), ("l2", 0.4), ("l2", 0.6)):
        for loss in ("ce", "dlr", "dlr_targeted") if eps in (0.15, 0.6) else ("ce", "dlr"):
            health = GradientHealth()
            ours = accuracy(net, direct(apgd, net, x, y, eps=eps, norm=norm, loss=loss, steps=STEPS, health=health), y)
            theirs = accuracy(net, by_autoattack(net, x, y, norm, eps, loss), y)
            assert 20 < theirs < 85 and abs(ours - theirs) <= 2, (norm, eps, loss, ours, theirs)
            assert health.reliable and health.count("gradients") >= STEPS * ours * len(x) / 100
            behind.append(ours - theirs)
    assert sum(behind) / len(behind) <= 0.4, behind
