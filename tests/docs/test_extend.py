"""docs/extend.md leads to an op and an attack of few files, which run in a copy of the package."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from purify_fast.ops import REGISTRY

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "extend.md").read_text()
OPS = {name for name in REGISTRY if not name.endswith("_backward")}
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
    assert len(blocks) == len(dict(blocks)) == 4
    return dict(blocks)


def add(copy: Path, texts: dict[str, str]) -> None:
    """Add a text to each file, at its end or above its ``__all__``."""
    for path, text in texts.items():
        file = copy / path
        file.parent.mkdir(parents=True, exist_ok=True)
        old = file.read_text() if file.exists() else ""
        before, exported, after = re.split(r"(^__all__|\Z)", old, maxsplit=1, flags=re.M)
        file.write_text(f"{before}\n\n{text}\n\n{exported}{after}")


def followed(copy: Path) -> None:
    """Do what the page says, in a copy of what an op consists of."""
    unneeded = shutil.ignore_patterns("__pycache__", "zoo", "results", "robustness", "pages", "gpu")
    for folder in ("purify_fast", "benchmarks", "kernels", "tests/ops", "tests/fuzz"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=unneeded)
    for path in (ROOT / "tests").glob("*.py"):
        shutil.copy(path, copy / "tests")
    add(copy, files())


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
def test_the_op_of_the_page_passes_the_tests_of_every_op(tmp_path):
    followed(tmp_path)
    run(tmp_path, "-c", TRIED)
    of_every_op = "tests/ops/test_contract.py", "tests/ops/test_gradients.py", "tests/fuzz/test_ops.py"
    run(tmp_path, "-m", "pytest", *of_every_op, "-q", "-p", "no:xdist", "-p", "no:cacheprovider", "-k", "swish")


#: The file of an op beside those whose text is on the page: its own tests.
OTHER_FILES_OF_AN_OP = 1


def test_the_files_of_an_op_exist_and_no_other_has_a_list_of_ops():
    """A list that every new op must extend names nearly all ops. The page must name its file."""
    named = set(re.findall(r"(?:tests|benchmarks|csrc|kernels|purify_fast)/[\w/<>.]+", PAGE.partition("## An op")[2]))
    paths = {path.replace("<op>", "gated_elu") for path in named}
    assert len(paths) > 8 and not [path for path in paths - {"purify_fast/ops/swish.py"} if not (ROOT / path).exists()]
    listing = []
    for path in sorted(path for folder in ("tests", "benchmarks") for path in (ROOT / folder).rglob("*.py")):
        words = set(re.findall(r"[a-z_]+", path.read_text()))
        if len(OPS & words) > 0.75 * len(OPS):
            listing.append(path.relative_to(ROOT).as_posix())
    assert "tests/op_table.py" in listing and set(listing) <= paths, listing


ATTACK = {
    "purify_fast/attacks/corners.py": '''
from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..protocols import Classifier
from .base import Attack, AttackResult


@dataclass(frozen=True)
class Corners(Attack):
    """A random corner of the ball for each image."""

    kind: ClassVar[str] = "corners"
    code_version: ClassVar[str] = "1"
    norms: ClassVar[tuple[str, ...]] = ("linf",)

    eps: float | None = None
    norm: str | None = None

    def name(self, context):
        return "a random corner"

    def search(self, target, x, y, context):
        return AttackResult((x + context.eps * x.new_empty(x.shape).uniform_(-1, 1).sign()).clamp(0, 1))
''',
    "purify_fast/attacks/__init__.py": "from .corners import Corners as Corners",
    "tests/attacks/test_corners.py": "",
}
OF_ALL = """
import torch
from purify_fast import evaluate
from purify_fast.attacks import Corners
from purify_fast.models.classifiers import SmallCNN

model = SmallCNN(1, 10, (16, 16), 4).eval()
report = evaluate(model, torch.rand(4, 1, 16, 16), torch.arange(4), eps=0.1, attacks=[Corners()], progress=False)
assert "a random corner" in report.attacks
"""


@pytest.mark.slow
def test_few_files_add_an_op_and_an_attack(tmp_path):
    """The op of the page runs above. tests/methods/test_new_method.py adds a method, which is one folder."""
    assert len(files()) + OTHER_FILES_OF_AN_OP <= 5 and len(ATTACK) <= 3
    zoo = str(ROOT / "purify_fast" / "zoo")
    for folder in ("purify_fast", "kernels"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=lambda at, names: names if at == zoo else ())
    add(tmp_path, ATTACK)
    run(tmp_path, "-c", OF_ALL)
