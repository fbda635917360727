"""docs/extend.md leads to an op of few files, which runs in a copy of the package."""

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


def files() -> dict[str, str]:
    """By their paths, the files and additions of the page."""
    blocks = re.findall(r"^```py\n# (\S+)\n(.*?)^```", PAGE, re.S | re.M)
    assert len(blocks) == len(dict(blocks)) == 3
    return dict(blocks)


def followed(copy: Path) -> None:
    """Do what the page says, in a copy of what an op consists of."""
    unneeded = shutil.ignore_patterns("__pycache__", "models", "results", "studies", "pipelines")
    for folder in ("purify_fast/ops", "purify_fast/kernels", "benchmarks/speed/ops", "kernels", "tests/ops"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=unneeded)
    for path in [
        *(ROOT / "purify_fast").glob("*.*"),
        *(ROOT / "benchmarks").glob("*.py"),
        *(ROOT / "benchmarks" / "speed").glob("*.py"),
        ROOT / "tests" / "conftest.py",
        ROOT / "tests" / "slow_shares.py",
        ROOT / "tests" / "captures.py",
    ]:
        shutil.copy(path, copy / path.relative_to(ROOT))
    for path, text in files().items():
        with (copy / path).open("a") as file:
            file.write(f"\n\n{text}")
    registry = copy / "benchmarks" / "speed" / "ops" / "__init__.py"
    text = registry.read_text()
    assert text.count('"stitch",') == 1
    registry.write_text(text.replace('"stitch",', '"stitch", "swish",'))


def run(copy: Path, *arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=copy,
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"PYTHONPATH": str(copy), "PURIFY_FAST_CACHE": str(copy / "cache")},
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_the_op_of_the_page_has_gradients(tmp_path):
    followed(tmp_path)
    run(tmp_path, "-c", TRIED)
    options = ("-q", "-p", "no:xdist", "-p", "no:cacheprovider", "-k", "swish")
    run(tmp_path, "-m", "pytest", "tests/ops/test_gradients.py", *options)
