"""Packages that import their names when they are first used: what they list is what they have."""

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


def run_alone(code: str) -> None:
    """Run code in a new process."""
    done = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", LAZY)
def test_every_listed_name_is_there(name):
    module = importlib.import_module(name)
    assert module.__all__ == sorted(module.__all__)
    for public in module.__all__:
        assert getattr(module, public) is not None and public in dir(module)
    with pytest.raises(AttributeError, match=f"module '{name}' has no attribute 'nothing'"):
        module.nothing  # noqa: B018


def test_the_settings_of_every_training_come_without_pytorch():
    code = (
        "import sys, purify_fast\n"
        "from purify_fast.methods.arrest import ArrestConfig\n"
        "from purify_fast.methods.atop import AtopConfig\n"
        "from purify_fast.methods.carso import CarsoConfig\n"
        "from purify_fast.training import ClassifierConfig, FitConfig, TrainingAttack\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules\n"
        "purify_fast.Carso\nassert 'torch' in sys.modules\n"
        # The drop-in class needs no further import.
        "assert purify_fast.autoattack.AutoAttack.__module__ == 'purify_fast.autoattack'"
    )
    run_alone(code)


@pytest.mark.slow
def test_judging_a_model_does_not_import_the_compiler():
    """It took as long as PyTorch itself, in every process; a model is made, wrapped and judged without it."""
    code = (
        "import sys, purify_fast.evaluation\n"
        "names = {'torch._dynamo', 'sympy', 'jinja2', 'PIL', 'filelock'} & {*sys.modules}\n"
        "assert not names, names\n"
        "import torch\n"
        "from purify_fast import zoo\n"
        "model, x = zoo.load('digits-carso-pipeline'), torch.rand(2, 1, 16, 16)\n"
        "how = {'protocol': 'fast', 'progress': False}\n"
        "report = purify_fast.evaluate(model, x, model(x).argmax(1), eps=0.1, **how)\n"
        "assert report.rows and 'torch._dynamo' not in sys.modules"
    )
    run_alone(code)
