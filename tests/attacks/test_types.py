"""A type checker knows every keyword of the attacks, and refuses a wrong one."""

import subprocess
import sys

import pytest

USERS_CODE = """
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
"""
WRONG = {
    "pgd(model, x, y, 8 / 255, stepz=10)": "stepz",
    'pgd(model, x, y, 8 / 255, steps="10")': "steps",
    'apgd(model, x, y, 8 / 255, mode="keep")': "mode",
    'square(model, x, y, 8 / 255, norm="l3")': "norm",
    "PGD()(model, x, y, 8 / 255, batch_size=1)": "batch_size",
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
