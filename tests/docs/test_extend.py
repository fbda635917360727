"""docs/extend.md leads to an op and an attack of few files, which run in a copy of the package."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "extend.md").read_text()
#: What a reader tries first. With a kernel the op is opaque: then its function alone knows the gradient.
TRIED = """
import torch
from purify_fast.ops import REGISTRY, swish
from purify_fast.ops.dispatch.registry import Op

for plain in (True, False):
    Op.uses_reference = lambda *_: plain
    x = torch.linspace(-3, 3, 7, dtype=torch.float64, requires_grad=True)
    y = swish(x)
    y.sum().backward()
    assert torch.equal(y.detach(), x.detach() * x.detach().sigmoid())
    assert torch.autograd.gradcheck(swish, x)
    assert x.grad.abs().min() > 0.01, x.grad
for name in ("swish", "swish_backward"):
    for example in REGISTRY[name].examples:
        torch.library.opcheck(REGISTRY[name].handle, example.make(torch.float32, 0))
"""


def add(copy: Path, texts: dict[str, str]) -> None:
    """Add a text to each file, at its end or above its ``__all__``."""
    for path, text in texts.items():
        file = copy / path
        file.parent.mkdir(parents=True, exist_ok=True)
        old = file.read_text() if file.exists() else ""
        before, exported, after = re.split(r"(^__all__|\Z)", old, maxsplit=1, flags=re.M)
        file.write_text(f"{before}\n\n{text}\n\n{exported}{after}")


def run(copy: Path, *arguments: str) -> None:
    env = os.environ | {"PYTHONPATH": str(copy), "PURIFY_FAST_CACHE": str(copy / "cache")}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True, timeout=600, env=env)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_the_op_of_the_page_passes_the_tests_of_every_op(tmp_path):
    unneeded = shutil.ignore_patterns("__pycache__", "zoo", "results", "robustness", "pages", "gpu")
    for folder in ("purify_fast", "benchmarks", "kernels", "tests/ops", "tests/fuzz"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=unneeded)
    for path in (ROOT / "tests").glob("*.py"):
        shutil.copy(path, tmp_path / "tests")
    blocks = re.findall(r"^```py\n# (\S+)\n(.*?)^```", PAGE, re.S | re.M)
    assert len(blocks) == len(dict(blocks)) == 4
    add(tmp_path, dict(blocks))
    run(tmp_path, "-c", TRIED)
    of_every_op = "tests/ops/test_contract.py", "tests/ops/test_gradients.py", "tests/fuzz/test_ops.py"
    run(tmp_path, "-m", "pytest", *of_every_op, "-q", "-p", "no:xdist", "-p", "no:cacheprovider", "-k", "swish")
