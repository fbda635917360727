"""A fingerprint differs wherever models differ, and nowhere else: not between processes, nor between evaluations."""

import functools
import importlib
import logging
import os
import random
import subprocess
import sys
import threading
from pathlib import Path

import held_values
import numpy as np
import pytest
import torch
from evaluating import evaluate
from held_values import WAYS, Linear, defences
from torch import nn

import purify_fast
from purify_fast.attacks import PGD
from purify_fast.model_state import fingerprint, fingerprint_or_reason

pytestmark = pytest.mark.usefixtures("one_thread")
QUIET = {"eps": 0.02, "attacks": [PGD(steps=2)], "progress": False}


@pytest.fixture
def images():
    return torch.rand(8, 1, 3, 3, generator=torch.Generator().manual_seed(0)), torch.arange(8) // 4


@pytest.mark.parametrize("way", WAYS)
def test_models_that_differ_in_anything_have_other_fingerprints(way):
    make = WAYS[way]
    assert fingerprint(make(1.0)) == fingerprint(make(1.0)) != fingerprint(make(0.0))
    assert None not in (fingerprint(make(1.0)), fingerprint(make(0.0)))


def test_what_a_model_reads_from_a_users_module_counts(tmp_path, monkeypatch):
    # An open file cannot be compared, but the model does not read it: its `log` is another one.
    settings = "SCALE, UNUSED, log = 1.0, 1, open(__file__)\n\n\ndef changed(x):\n    return x\n"
    (tmp_path / "settings_of_a_user.py").write_text(settings)
    (tmp_path / "model_of_a_user.py").write_text(
        "import settings_of_a_user as settings\nfrom torch import nn\n\n\nclass Model(nn.Module):\n"
        "    def forward(self, x):\n        return settings.changed(x.flatten(1)[:, :3]).log() * settings.SCALE\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    model, module = importlib.import_module("model_of_a_user").Model(), sys.modules["settings_of_a_user"]
    mark = fingerprint(model)
    monkeypatch.setattr(module, "UNUSED", 2)
    assert fingerprint(model) == mark is not None
    for name, value in (("SCALE", 2.0), ("changed", torch.neg)):
        with monkeypatch.context() as changed:
            changed.setattr(module, name, value)
            assert fingerprint(model) != mark
    assert fingerprint(model) == mark


@pytest.mark.slow
def test_fingerprints_are_the_same_in_another_process():
    """Also where sets, and strings with them, are in another order there."""
    found = subprocess.run(
        [sys.executable, held_values.__file__],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": str(Path(purify_fast.__file__).parents[1]), "PYTHONHASHSEED": "7"},
    )
    here = [f"{name} {fingerprint(make(1.0))}" for name, make in WAYS.items()]
    here += [f"{name} {mark}" for name, mark in defences()]
    assert found.stdout.splitlines() == here and not any("None" in line for line in here)
    assert len(set(here)) == len(here)


# -- what cannot be compared --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("held", "where"),
    [
        (lambda: open(os.devnull), "_held (TextIOWrapper)"),  # noqa: SIM115
        (lambda: [{"a": threading.local()}], "_held[0]['a'] (_local)"),
        (lambda: (i for i in range(3)), "_held (generator)"),
        (lambda: random.Random(0), "_held (Random)"),
        (lambda: np.random.default_rng(0), "_held (Generator)"),
        (lambda: torch.jit.script(nn.Linear(2, 2)), "_held (RecursiveScriptModule)"),
        (lambda: torch.eye(3).to_sparse(), "_held (Tensor)"),
        (lambda: torch.empty(2, device="meta"), "_held (Tensor)"),
    ],
)
def test_what_cannot_be_compared_has_no_fingerprint_and_it_is_said(held, where, images, tmp_path, caplog, made_rows):
    model = Linear(held())
    why = f"holds {where}, which cannot be compared by its value"
    assert fingerprint_or_reason(model) == (None, why)
    for _ in "12":
        evaluate(model, *images, **QUIET, out=tmp_path, name="mine")
    assert len(made_rows) == 4 and not list((tmp_path / "rows").iterdir())
    assert f"out: the finished rows of mine are not kept, because this model {why}." in caplog.text


def test_objects_inside_each_other_without_end_are_no_trouble():
    def chain(length):
        found = None
        for _ in range(length):
            found = [found]
        return found

    model = nn.Identity()
    model.held = chain(10)
    model.itself = [model]
    assert fingerprint(model) is not None
    model.held = chain(100_000)
    assert fingerprint_or_reason(model) == (None, "holds objects that are nested too deep to be compared")


# -- what is no difference ----------------------------------------------------------------------------------------


class Remembers(nn.Module):
    """Keeps what it saw last, a table that it makes at first use, locks and a log, as many models do."""

    def __init__(self):
        super().__init__()
        self.base = Linear()
        self._lock, self._log, self._drawn = threading.Lock(), logging.getLogger("mine"), torch.Generator()
        self._features, self._table = None, {}

    @functools.cached_property
    def zeros(self):
        return torch.zeros(3)

    def forward(self, x):
        self._features = self.base(x) + self.zeros
        self._table.setdefault("ones", torch.ones(3))
        noise = torch.rand(len(x), 3, generator=self._drawn)
        return self._features + self._table["ones"] + 1e-9 * noise


class Counts(nn.Module):
    """Counts its calls, which its predictions do not depend on."""

    not_dependencies = frozenset({"calls"})

    def __init__(self):
        super().__init__()
        self.base, self.calls = Linear(), 0

    def forward(self, x):
        self.calls += 1
        return self.base(x)


@pytest.mark.parametrize("kind", [Remembers, Counts])
def test_what_predictions_leave_behind_makes_no_row_anew(kind, images, tmp_path, made_rows):
    model = kind()
    for rows in (2, 2, 2):
        evaluate(model, *images, **QUIET, out=tmp_path)
        assert len(made_rows) == rows
    evaluate(kind(), *images, **QUIET, out=tmp_path)
    assert len(made_rows) == 2


def test_what_is_kept_of_the_last_prediction_is_no_changed_state(images):
    report = evaluate(Remembers(), *images, eps=0.02, attacks=[PGD(steps=2)], probes=True, progress=False)
    (finding,) = (finding for finding in report.findings if finding.alarm == "same answer again")
    assert finding.verdict == "passed"


def test_rows_of_accelerated_and_random_defences_are_found_again(tmp_path, made_rows):
    x, y = torch.rand(2, 1, 16, 16), torch.arange(2)
    for _ in "12":
        carso = purify_fast.zoo.load("digits-carso-pipeline").accelerate(torch.float32)
        evaluate(carso, x, y, eps=0.1, attacks=[PGD(steps=1)], eot_iter=1, n_eval=1, out=tmp_path, progress=False)
        evaluate(carso, x, y, eps=0.1, attacks=[PGD(steps=1)], eot_iter=1, n_eval=1, out=tmp_path, progress=False)
    assert len(made_rows) == 2


def test_compiled_it_is_the_same_model():
    model = Linear()
    before = fingerprint(model)
    model.compile()
    assert fingerprint(model) == before
    one, other = (torch.compile(WAYS["private"](value)) for value in (1.0, 0.0))
    assert fingerprint(one) != fingerprint(other)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="the columns of code are not known")
def test_two_lambdas_in_one_line_are_two_functions():
    one, other = (Linear(held) for held in (lambda x: x + 1, lambda x: x - 1))
    assert fingerprint(one) != fingerprint(other)


def test_a_wrapper_with_the_name_of_a_library_function_is_told_by_what_it_holds():
    """`functools.wraps` copies the module's name, so the wrapper looks like the library's function."""

    def scaled(strength):
        model = nn.Sequential(nn.Flatten(), nn.Linear(9, 2))
        torch.nn.init.ones_(model[1].weight), torch.nn.init.zeros_(model[1].bias)
        inner = model.forward
        model.forward = functools.wraps(inner)(lambda x: strength * inner(x))
        return model

    assert None is not fingerprint(scaled(0.1)) == fingerprint(scaled(0.1)) != fingerprint(scaled(0.2))


def test_a_function_without_source_cannot_be_compared():
    names = {"__name__": "mine"}
    exec("def forward(x): return x", names)
    found = fingerprint_or_reason(Linear(names["forward"]))
    assert found == (None, "holds _held (function), which cannot be compared by its value")


def test_the_base_of_a_class_counts():
    one, other = (type("Activation", (base,), {"__module__": __name__}) for base in (nn.Tanh, nn.Sigmoid))
    assert fingerprint(one()) != fingerprint(other())


def test_a_traced_model_is_told_by_what_it_calls():
    class Traced(nn.Module):
        def __init__(self, call, scale):
            super().__init__()
            self.call, self.scale = call, scale

        def forward(self, x):
            return self.call(x) * self.scale

    def traced(*held):
        return fingerprint(torch.fx.symbolic_trace(Traced(*held)))

    assert traced(torch.tanh, 2) == traced(torch.tanh, 2)
    assert len({traced(torch.tanh, 2), traced(torch.tanh, 3), traced(torch.relu, 2)}) == 3


def test_a_class_of_an_installed_library_is_told_by_its_version(tmp_path, monkeypatch):
    def marked(version, factor):
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}" / "site-packages"
        folder.mkdir(parents=True)
        (folder / "library_of_the_test.py").write_text(
            f"import threading, torch\n__version__ = '{version}'\nSTATE = threading.local()\n"
            "class Model(torch.nn.Module):\n"
            f"    def forward(self, x): return STATE, x * {factor}\n"
        )
        monkeypatch.syspath_prepend(str(folder))
        sys.modules.pop("library_of_the_test", None)
        return fingerprint(importlib.import_module("library_of_the_test").Model())

    assert marked(1, 1) == marked(1, 2) != marked(2, 1)


def test_functions_imported_from_another_file_of_the_user_count(tmp_path, monkeypatch):
    def marked(name, factor):
        for module in ("helpers_of_mine", "model_of_mine"):
            sys.modules.pop(module, None)
        (tmp_path / "helpers_of_mine.py").write_text(f"def {name}(x): return x * {factor}\n")
        (tmp_path / "model_of_mine.py").write_text(
            f"import torch\nfrom helpers_of_mine import {name}\n"
            "class Model(torch.nn.Module):\n"
            f"    def forward(self, x): return {name}(x)\n"
        )
        return fingerprint(importlib.import_module("model_of_mine").Model())

    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert len({marked("scale", 1), marked("scale", 2), marked("rescale", 1)}) == 3


@pytest.mark.parametrize("function", [False, True])
def test_with_a_revision_the_rows_of_every_model_are_kept(function, images, tmp_path, made_rows):
    model = Linear(threading.local())
    given = (lambda x: model(x)) if function else model
    for revision, rows in (("1", 2), ("1", 2), ("2", 4), (None, 6), (None, 8)):
        evaluate(given, *images, **QUIET, out=tmp_path, revision=revision)
        assert len(made_rows) == rows
