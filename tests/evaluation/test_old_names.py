"""What version 0.1 called otherwise still works, and says what it is called now."""

import pytest
import torch
from torch import nn

from purify_fast.attacks import APGD, BPDA, FGSM, PGD, AutoAttack, StAdv
from purify_fast.evaluation import Attack, AttackSpec, evaluate

MODEL = nn.Flatten()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (lambda: Attack(), AttackSpec(PGD())),
        (lambda: Attack("autoattack", version="rand"), AttackSpec(AutoAttack(version="rand"))),
        (lambda: Attack("bpda"), AttackSpec(BPDA())),
        (lambda: Attack("bpda", head="mean", start=False), AttackSpec(BPDA(aggregation="mean", random_start=False))),
        (lambda: Attack("apgd", norm="l2", eps=0.5), AttackSpec(APGD(norm="l2", eps=0.5))),
        (lambda: Attack(norm="l1", eps=12, restarts=5), AttackSpec(PGD(norm="l1", eps=12, restarts=5))),
        (lambda: Attack("stadv"), AttackSpec(StAdv())),
        (lambda: Attack("stadv", alpha=0.02, smoothness=0.0), AttackSpec(StAdv(rate=0.02, smoothness=0.0))),
        (lambda: Attack(target="classifier"), AttackSpec(PGD(), target="classifier")),
        (lambda: Attack(kind="fgsm", loss=None, eot=2), AttackSpec(FGSM(eot_iter=2))),
        (
            lambda: Attack("apgd", loss="dlr_targeted", targets=3),
            AttackSpec(APGD(loss="dlr_targeted", n_target_classes=3)),
        ),
        (
            lambda: Attack("autoattack", variant="fixed", steps=5, queries=20, survivors=True, limit=40, label="a"),
            AttackSpec(AutoAttack(steps=5, n_queries=20), "fixed", survivors_only=True, max_images=40, label="a"),
        ),
        (lambda: Attack(head="lse", loss="dlr"), AttackSpec(PGD(loss="dlr"), aggregation="lse")),
        # every attack took the others' options at their defaults
        (lambda: Attack("fgsm", start=True, restarts=1, queries=5000, steps=None), AttackSpec(FGSM())),
    ],
)
def test_attacks_by_their_kind(old, new):
    with pytest.warns(DeprecationWarning, match=rf"use purify_fast.attacks.{type(new.attack).__name__}\(") as caught:
        assert old() == new
    assert caught[0].filename == __file__


def test_arguments_of_evaluate():
    x, y = torch.rand(4, 1, 2, 2), torch.arange(4)
    settings = {"eps": 0.1, "attacks": [PGD(steps=1)], "progress": False}
    with pytest.warns(DeprecationWarning, match="'(eot|chunk)'"):
        old = evaluate(MODEL, x, y, eot=2, chunk=3, **settings)
    new = evaluate(MODEL, x, y, eot_iter=2, max_forward_batch=3, **settings)
    assert [row.robust.tolist() for row in old.rows] == [row.robust.tolist() for row in new.rows]


def test_norms_as_other_packages_write_them():
    x, y = torch.rand(4, 1, 2, 2), torch.arange(4)
    settings = {"attacks": [PGD(steps=1)], "progress": False}
    for name, own, eps in (("Linf", "linf", 0.1), ("L2", "l2", 0.5), ("L1", "l1", 1.0)):
        report = evaluate(MODEL, x, y, eps=eps, norm=name, **settings)
        assert report.row("PGD-1 ce").settings["norm"] == own and report.row("PGD-1 ce").threat is None
