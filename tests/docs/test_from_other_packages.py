"""The page for users of other packages: RobustBench's lines run, with a model and images that need no download."""

import importlib
import importlib.util
import re
import sys
from pathlib import Path

import pytest
from small_models import labelled

from purify_fast.autoattack import AutoAttack
from purify_fast.evaluation import evaluate

pytestmark = pytest.mark.usefixtures("one_thread")

PAGE = (Path(__file__).parents[2] / "docs/from_other_packages.md").read_text()
#: Where `make test` puts the last setuptools that has pkg_resources, which RobustBench imports.
PKG_RESOURCES = Path(sys.prefix) / "setuptools-80"


class Quick(AutoAttack):
    """This package's AutoAttack with few steps. The original, which RobustBench imports, is not on PyPI."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.apgd.n_iter = self.apgd_targeted.n_iter = self.fab.n_iter = 5
        self.square.n_queries, self.verbose = 20, False


@pytest.mark.slow
def test_the_lines_of_robustbench_run(monkeypatch, short_signs):
    for name in ("autoattack", "autoattack.state"):
        monkeypatch.setitem(sys.modules, name, sys.modules.get(name, pytest.importorskip(f"py{name}")))
    if importlib.util.find_spec("robustbench") is None or not PKG_RESOURCES.is_dir():
        pytest.skip("robustbench is not installed with a setuptools that has pkg_resources")
    monkeypatch.setattr(sys, "path", [*sys.path, str(PKG_RESOURCES)])
    modules = {name: importlib.import_module(f"robustbench.{name}") for name in ("data", "eval", "utils")}
    model, x, y = labelled(30)
    asked = []

    def read(*arguments, **options):
        asked.append(options)
        return x, y

    monkeypatch.setattr(modules["eval"], "AutoAttack", Quick)
    monkeypatch.setattr(modules["eval"], "load_clean_dataset", read)
    monkeypatch.setattr(modules["data"], "load_cifar10", read)
    monkeypatch.setattr(modules["utils"], "load_model", lambda name, dataset, threat_model: model.eval())
    section = re.search(r"^## RobustBench\n(.*?)^## ", PAGE, re.S | re.M)[1]
    theirs, ours = re.findall(r"^```py\n(.*?)^```", section, re.S | re.M)
    scope = {"evaluate": evaluate}
    exec(theirs, scope)
    clean, robust = scope["clean"], scope["robust"]
    exec(ours, scope)
    assert len(asked) == 2 and asked[1] == {"n_examples": 200}
    assert (scope["clean"], clean) == (1, 1) and scope["robust"] <= robust
