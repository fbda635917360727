"""Packages that import their names when they are asked for: what they list is what they have."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import purify_fast

PACKAGE = Path(purify_fast.__file__).parent
LAZY = sorted(
    ".".join(path.relative_to(PACKAGE.parent).parts[:-1])
    for path in PACKAGE.rglob("__init__.py")
    if "lazy_exports(" in path.read_text()
)


def seen_by_type_checkers(tree):
    """The names imported under TYPE_CHECKING."""
    blocks = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    return {
        alias.asname
        for block in blocks
        for node in ast.walk(block)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


@pytest.mark.parametrize("name", LAZY)
def test_every_name_is_listed_three_times_alike(name):
    module = importlib.import_module(name)
    tree = ast.parse(Path(module.__file__).read_text())
    call = next(n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) == "lazy_exports")
    homes = {keyword.arg for keyword in call.keywords}
    assert sorted(module.__all__) == sorted(homes) == sorted(seen_by_type_checkers(tree))
    for public in module.__all__:
        assert getattr(module, public) is not None and public in dir(module)
    with pytest.raises(AttributeError, match=f"module '{name}' has no attribute 'nothing'"):
        module.nothing  # noqa: B018


def test_there_are_lazy_packages():
    assert {"purify_fast", "purify_fast.training", "purify_fast.methods.carso"} <= set(LAZY)


def test_the_settings_of_every_training_come_without_pytorch():
    code = (
        "import sys, purify_fast\n"
        "from purify_fast.methods.arrest import AblationConfig, ArrestConfig\n"
        "from purify_fast.methods.atop import AtopConfig\n"
        "from purify_fast.methods.carso import CarsoConfig\n"
        "from purify_fast.training import ClassifierConfig, FitConfig, TrainingAttack\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules\n"
        "purify_fast.Carso\nassert 'torch' in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
