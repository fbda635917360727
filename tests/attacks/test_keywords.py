"""The keywords of the attacks as functions: an editor knows the same ones as the attacks."""

import subprocess
import sys
from dataclasses import fields

import pytest

from purify_fast.attacks import keywords
from purify_fast.attacks.context import AttackContext
from purify_fast.attacks.pgd import FGSM, PGD
from purify_fast.judge.searches.apgd import APGD
from purify_fast.judge.searches.fab import FABT
from purify_fast.judge.searches.square import Square
from purify_fast.judge.searches.stadv import StAdv

#: What an evaluation sets, what another keyword decides, and ``steps``, which only some attacks have.
NOT_KEYWORDS = {"eps", "copies", "counts_health", "keep_mode", "loss_function", "steps"}
OF_FUNCTIONS = {"generator", "health"}

KINDS = {
    FGSM: ("FgsmOptions", {"targeted", "mode"}),
    PGD: ("PgdOptions", {"targeted", "mode"}),
    APGD: ("ApgdOptions", {"targeted"}),
    FABT: ("FabOptions", set()),
    Square: ("SquareOptions", set()),
    StAdv: ("StAdvOptions", {"targeted"}),
}


@pytest.mark.parametrize("attack", KINDS)
def test_the_keywords_are_the_fields_of_the_attack_and_of_its_context(attack):
    name, more = KINDS[attack]
    own = {each.name: each.type for each in fields(attack) if each.name not in ("eps",)}
    context = {each.name: each.type for each in fields(AttackContext) if each.name not in NOT_KEYWORDS}
    given = getattr(keywords, name).__annotations__
    assert given.keys() == own.keys() | context.keys() | OF_FUNCTIONS | more
    for field, kind in (context | own).items():
        wanted, got = kind.strip("'"), given[field].__forward_arg__
        if field == "loss" and attack in (FGSM, PGD, APGD):
            assert got == f"{wanted} | LossFunction"
        elif field == "seed":
            assert got == "int | Tensor | None"
        elif field == "norm":
            assert got == "NormName"
        elif field not in ("eot_iter",):
            assert got == wanted, field


USERS_CODE = """
import purify_fast
import torch
from purify_fast.attacks import PGD, apgd, fab_t, fgsm, pgd, square

model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
x, y = torch.rand(2, 3, 2, 2), torch.tensor([0, 1])
found: torch.Tensor = pgd(model, x, y, 8 / 255, steps=10, alpha=2 / 255, restarts=2, norm="l2", seed=0)
pgd(model, x, None, 8 / 255, targeted=y, mode="keep", loss="margin")
apgd(model, x, y, 8 / 255, loss="dlr_targeted", n_target_classes=2)
fab_t(model, x, y, 8 / 255, give_up=True), fgsm(model, x, y, 8 / 255), square(model, x, y, 8 / 255, n_queries=9)
report: purify_fast.evaluation.Report = purify_fast.evaluate(model, x, y, eps=8 / 255, protocol="fast", seed=1)
images: torch.Tensor = PGD(steps=3)(model, x, y, eps=8 / 255)
"""
WRONG = {
    "pgd(model, x, y, 8 / 255, stepz=10)": "stepz",
    'pgd(model, x, y, 8 / 255, steps="10")': "steps",
    'apgd(model, x, y, 8 / 255, mode="keep")': "mode",
    'square(model, x, y, 8 / 255, norm="l3")': "norm",
    "purify_fast.evaluatee(model, x, y, eps=8 / 255)": "evaluatee",
}


@pytest.mark.slow
def test_a_type_checker_reads_a_users_code(tmp_path):
    file = tmp_path / "user.py"

    def errors(code):
        file.write_text(code)
        command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", str(file)]
        done = subprocess.run(command, capture_output=True, text=True)
        return [line for line in done.stdout.splitlines() if "user.py" in line and "error" in line]

    assert errors(USERS_CODE) == []
    found = errors(USERS_CODE + "\n".join(WRONG))
    assert len(found) == len(WRONG) and all(word in line for word, line in zip(WRONG.values(), found, strict=True))
