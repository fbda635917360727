"""A type checker knows every keyword of the attacks, and refuses a wrong one."""

import inspect
import re
import subprocess
import sys

import pytest

from purify_fast import attacks

CALLS = """
pgd(model, x, y, 8 / 255, norm="l2", steps=10, alpha=2 / 255, loss="margin", random_start=True, start_std=0.001)
pgd(model, x, y, 8 / 255, eot_iter=2, keep_best=True, stop_when_fallen=False, mode="keep", clip_min=0.0, clip_max=1.0)
pgd(model, x, None, 8 / 255, targeted=y, seed=torch.Generator())
fgsm(model, x, y, 8 / 255, norm="l1", loss=loss, targeted=None, eot_iter=1, mode="eval", clip_min=x, clip_max=1.0)
apgd(model, x, y, 8 / 255, norm="linf", steps=9, loss="dlr_targeted", n_target_classes=2, targeted=None, restarts=2)
apgd(model, x, y, 8 / 255, rho=0.75, eot_iter=2, leave_when_fallen=False)
apgd(model, x, y, 8 / 255, clip_min=0.0, clip_max=1.0, seed=3)
fab_t(model, x, y, 8 / 255, norm="l2", steps=9, n_target_classes=None, restarts=2, eot_iter=2)
fab_t(model, x, y, 8 / 255, clip_min=0.0, clip_max=1.0, seed=3)
square(model, x, y, 8 / 255, norm="l2", n_queries=9, restarts=2, eot_iter=2)
square(model, x, y, 8 / 255, clip_min=0.0, clip_max=1.0, seed=3)
stadv(model, x, y, 0.05, steps=9, loss="ce", targeted=None, random_start=True, keep_best=True, restarts=2)
stadv(model, x, y, rate=0.01, smoothness=0.05, eot_iter=2, seed=3)
"""
USERS_CODE = f"""
import purify_fast
import torch
from purify_fast.attacks import PGD, apgd, fab_t, fgsm, pgd, square, stadv

model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
x, y = torch.rand(2, 3, 2, 2), torch.tensor([0, 1])


def loss(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return logits.sum(1)


found: torch.Tensor = pgd(model, x, y, 8 / 255)
images: torch.Tensor = PGD(steps=3)(model, x, y, 8 / 255, norm="l2", seed=0, clip_max=1.0)
report: purify_fast.evaluation.Report = purify_fast.evaluate(model, x, y, eps=8 / 255, protocol="fast", seed=1)
{CALLS}"""
WRONG = {
    "pgd(model, x, y, 8 / 255, stepz=10)": "stepz",
    'pgd(model, x, y, 8 / 255, steps="10")': "steps",
    'apgd(model, x, y, 8 / 255, mode="keep")': "mode",
    'square(model, x, y, 8 / 255, norm="l3")': "norm",
    "PGD()(model, x, y, 8 / 255, batch_size=1)": "batch_size",
    "purify_fast.evaluatee(model, x, y, eps=8 / 255)": "evaluatee",
}


def test_the_calls_use_every_keyword():
    for name in ("pgd", "fgsm", "apgd", "fab_t", "square", "stadv"):
        used = {word for line in re.findall(rf"^{name}\(.*", CALLS, re.M) for word in re.findall(r"(\w+)=", line)}
        keywords = {*inspect.signature(getattr(attacks, name)).parameters} - {"model", "x", "y", "eps"}
        assert used == keywords, name


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
