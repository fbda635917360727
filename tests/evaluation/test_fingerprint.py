"""A fingerprint differs wherever models differ, and nowhere else: not between processes, nor between evaluations."""

import functools
import importlib
import logging
import os
import subprocess
import sys
import threading
import types
from pathlib import Path

import held_values
import pytest
import torch
from evaluating import evaluate
from held_values import WAYS, Linear, defences
from torch import nn

import purify_fast
from purify_fast.attacks import PGD
from purify_fast.model_state import fingerprint, state_hash

QUIET = {"eps": 0.02, "attacks": [PGD(steps=2)]}


@pytest.fixture
def images():
    return torch.rand(8, 1, 3, 3, generator=torch.Generator().manual_seed(0)), torch.arange(8) // 4


@pytest.mark.parametrize("way", WAYS)
def test_models_that_differ_in_a_value_have_other_states(way):
    make = WAYS[way]
    assert state_hash(make(1.0)) == state_hash(make(1.0)) != state_hash(make(0.0))


@pytest.mark.slow
def test_states_are_the_same_in_another_process():
    """Also where sets, and strings with them, are in another order there."""
    found = subprocess.run(
        [sys.executable, held_values.__file__],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": str(Path(purify_fast.__file__).parents[1]), "PYTHONHASHSEED": "7"},
    )
    here = [f"{name} {state_hash(make(1.0))}" for name, make in WAYS.items()]
    here += [f"{name} {mark}" for name, mark in defences()]
    assert found.stdout.splitlines() == here and len(set(here)) == len(here)


SOURCE = """
import torch
from torch import nn
import table_helper

SIGMA = 0.5


class Slots:
    __slots__ = ("scale",)


class Model(nn.Module):
    SHARE = 1

    def __init__(self, factor=1.0):
        super().__init__()
        self.layer, self.norm = nn.Linear(4, 2), nn.BatchNorm1d(2)
        self.register_buffer("table", torch.zeros(2), persistent=False)
        self.scale, self.sizes, self.slots, self.draws = 1.0, [1, 2], Slots(), random.Random(0)
        self.slots.scale = 1.0
        self.function = lambda x: x * factor

    def forward(self, x):
        return table_helper.changed(self.layer(x)) * SIGMA
"""
HELPER = "SIGMA = 1\n\n\ndef changed(x):\n    return x\n"


def in_place(value):
    return lambda model, module, monkeypatch: eval(value, vars(module) | {"model": model, "torch": torch})


def attribute(name, value):
    def edit(model, module, monkeypatch):
        *path, last = name.split(".")
        monkeypatch.setattr(functools.reduce(getattr, path, model), last, value)

    return edit


def text(file, before, after):
    """Edit a source file, which is then imported anew."""
    return file, before, after


#: By name: an edit, and whether the fingerprint changes. The pages of the documentation name the edits it misses.
EDITS = {
    "nothing": (in_place("None"), False),
    "weight": (in_place("model.layer.weight.data.add_(1)"), True),
    "buffer": (in_place("model.norm.running_mean.add_(1)"), True),
    "buffer that is not saved": (in_place("model.table.add_(1)"), True),
    "dtype of the weights": (in_place("model.layer.half()"), True),
    "mode of a part": (in_place("model.norm.eval()"), True),
    "attribute": (attribute("scale", 2.0), True),
    "attribute of a part": (attribute("norm.eps", 1e-3), True),
    "list": (in_place("model.sizes.append(3)"), True),
    "another part": (attribute("layer", nn.Linear(4, 2)), True),
    "hook": (in_place("model.layer.register_forward_hook(lambda *given: None)"), True),
    "closure": (attribute("function", (lambda factor: lambda x: x * factor)(2.0)), True),
    "forward of its own": (attribute("forward", lambda x: x[:, :2]), True),
    "class attribute": (in_place("setattr(Model, 'SHARE', 2)"), True),
    "code of the class": (text("table_model", "self.layer(x)", "self.layer(2 * x)"), True),
    "comment in its file": (text("table_model", "SHARE = 1", "SHARE = 1  # all"), True),
    "line of its file that nothing reads": (text("table_model", "SIGMA = 0.5", "SIGMA = 0.5\nUNUSED = 1"), True),
    "global variable in its file": (text("table_model", "SIGMA = 0.5", "SIGMA = 0.6"), True),
    "code of a function in another file": (text("table_helper", "return x", "return 2 * x"), True),
    "global variable set while the program runs": (in_place("globals().update(SIGMA=2)"), False),
    "variable of a module set while the program runs": (in_place("setattr(table_helper, 'SIGMA', 2)"), False),
    "state of another generator than PyTorch's": (in_place("model.draws.seed(1)"), False),
    "object with slots": (attribute("slots.scale", 2.0), False),
}


@pytest.mark.parametrize("name", EDITS)
def test_which_edits_change_the_fingerprint(name, tmp_path, monkeypatch):
    edit, seen = EDITS[name]
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def made(number, file="", before="", after=""):
        folder = tmp_path / str(number)
        folder.mkdir()
        for module, source in {"table_helper": HELPER, "table_model": f"import random\n{SOURCE}"}.items():
            (folder / f"{module}.py").write_text(source.replace(before, after) if module == file else source)
            monkeypatch.delitem(sys.modules, module, raising=False)
        monkeypatch.syspath_prepend(str(folder))
        torch.manual_seed(0)
        model = importlib.import_module("table_model").Model()
        return model, sys.modules["table_model"]

    model, module = made(0)
    before = fingerprint(model)
    assert before is not None and fingerprint(model, "2") != before
    if isinstance(edit, tuple):
        model, module = made(1, *edit)
    else:
        edit(model, module, monkeypatch)
    assert (fingerprint(model) != before) is seen
    for name in ("table_helper", "table_model"):
        sys.modules.pop(name)


def test_the_arguments_of_a_script_count_and_those_of_an_installed_command_do_not(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "__main__", main := types.ModuleType("__main__"))
    for main.__file__, counts in ((str(tmp_path / "script.py"), True), (str(torch.__file__), False)):
        marks = []
        for argument in ("--a", "--a", "--b"):
            monkeypatch.setattr(sys, "argv", ["command", argument])
            marks.append(fingerprint(nn.ReLU()))
        assert marks[0] == marks[1] and (marks[1] != marks[2]) is counts


@pytest.mark.parametrize(
    "held",
    [
        lambda: torch.jit.script(nn.Linear(2, 2)),
        lambda: torch.eye(3).to_sparse(),
        lambda: torch.empty(2, device="meta"),
    ],
)
def test_what_cannot_be_compared_has_no_fingerprint_and_it_is_said(held, images, tmp_path, caplog, made_rows):
    model = Linear(held())
    assert fingerprint(model) is None
    for _ in "12":
        evaluate(model, *images, **QUIET, out=tmp_path, name="mine")
    assert len(made_rows) == 4 and not list((tmp_path / "rows").iterdir())
    assert "out: the rows of mine are not kept" in caplog.text
    marks = {fingerprint(model, revision) for revision in "112"}
    assert len(marks) == 2 and None not in marks


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
    report = evaluate(Remembers(), *images, eps=0.02, attacks=[PGD(steps=2)], probes=True)
    (finding,) = (finding for finding in report.findings if finding.alarm == "same answer again")
    assert finding.verdict == "passed"


def test_rows_of_copies_and_random_defences_are_found_again(tmp_path, made_rows):
    x, y = torch.rand(2, 1, 16, 16), torch.arange(2)
    for _ in "12":
        carso = purify_fast.frozen_copy(purify_fast.zoo.load("digits-carso-pipeline"), x, dtype=torch.float32)
        evaluate(carso, x, y, eps=0.1, attacks=[PGD(steps=1)], eot_iter=1, n_eval=1, out=tmp_path)
        evaluate(carso, x, y, eps=0.1, attacks=[PGD(steps=1)], eot_iter=1, n_eval=1, out=tmp_path)
    assert len(made_rows) == 2


def test_compiled_it_is_the_same_model():
    model = Linear()
    before = fingerprint(model)
    model.compile()
    assert fingerprint(model) == before
    one, other = (torch.compile(WAYS["private"](value)) for value in (1.0, 0.0))
    assert fingerprint(one) != fingerprint(other)


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


@pytest.mark.parametrize("function", [False, True])
def test_with_a_revision_the_rows_of_every_model_are_kept(function, images, tmp_path, made_rows):
    model = Linear(torch.empty(2, device="meta"))
    given = (lambda x: model(x)) if function else model
    for revision, rows in (("1", 2), ("1", 2), ("2", 4), (None, 6), (None, 8)):
        evaluate(given, *images, **QUIET, out=tmp_path, revision=revision)
        assert len(made_rows) == rows
