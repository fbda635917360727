"""A fingerprint differs wherever models differ, and nowhere else: not between processes, nor between evaluations."""

import functools
import importlib
import linecache
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
from held_values import WAYS, Linear
from torch import nn

import purify_fast
from purify_fast.attacks import PGD
from purify_fast.judge.request.fingerprint import fingerprint, state_hash

PACKAGE = Path(purify_fast.__file__).parents[1]
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
    environment = os.environ | {"PYTHONPATH": f"{PACKAGE}:{Path(held_values.__file__).parent}", "PYTHONHASHSEED": "7"}
    command = [sys.executable, "-c", "import held_values; held_values.show()"]
    found = subprocess.check_output(command, text=True, env=environment).splitlines()
    here = [f"{name} {state_hash(make(1.0))}" for name, make in WAYS.items()]
    assert found == here and len(set(here)) == len(here)


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
        self.scale, self.slots = 1.0, Slots()
        self.slots.scale = 1.0
        self.function = lambda x: x * factor

    def forward(self, x):
        return table_helper.changed(self.layer(x)) * SIGMA
"""
HELPER = "SIGMA = 1\n\n\ndef changed(x):\n    return x * SIGMA\n"


def in_place(value):
    return lambda model, module, monkeypatch: eval(value, vars(module) | {"model": model, "module": module})


def attribute(name, value):
    def edit(model, module, monkeypatch):
        *path, last = name.split(".")
        monkeypatch.setattr(functools.reduce(getattr, path, model), last, value)

    return edit


def text(file, before, after):
    """Edit a source file, which is then imported anew."""
    return file, before, after


#: By name: an edit, and whether the fingerprint changes.
EDITS = {
    "nothing": (in_place("None"), False),
    "weight": (in_place("model.layer.weight.data.add_(1)"), True),
    "buffer that is not saved": (in_place("model.table.add_(1)"), True),
    "dtype of the weights": (in_place("model.layer.half()"), True),
    "mode of a part": (in_place("model.norm.eval()"), True),
    "attribute": (attribute("scale", 2.0), True),
    "attribute of a part": (attribute("norm.eps", 1e-3), True),
    "another part": (attribute("layer", nn.Linear(4, 2)), True),
    "hook": (in_place("model.layer.register_forward_hook(lambda *given: None)"), True),
    "closure": (attribute("function", (lambda factor: lambda x: x * factor)(2.0)), True),
    "forward of its own": (attribute("forward", lambda x: x[:, :2]), True),
    "class attribute": (in_place("setattr(Model, 'SHARE', 2)"), True),
    "code of the class": (text("table_model", "self.layer(x)", "self.layer(2 * x)"), True),
    "line of its file that nothing reads": (text("table_model", "SIGMA = 0.5", "SIGMA = 0.5\nUNUSED = 1"), True),
    "global variable in its file": (text("table_model", "SIGMA = 0.5", "SIGMA = 0.6"), True),
    "code of a function in another file": (text("table_helper", "return x", "return 2 * x"), True),
    "global variable set while the program runs": (in_place("vars(module).update(SIGMA=2)"), True),
    "variable of a module set while the program runs": (in_place("setattr(table_helper, 'SIGMA', 2)"), True),
    "argument of another program": (lambda model, module, monkeypatch: monkeypatch.setattr(sys, "argv", ["b"]), False),
    "object with slots": (attribute("slots.scale", 2.0), True),
}


@pytest.fixture
def imported(tmp_path, monkeypatch):
    """Import the first of some modules, which are given by their sources and written anew."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def imported(sources):
        folder = tmp_path / f"sources {len(list(tmp_path.iterdir()))}"
        for name, source in sources.items():
            file = folder / f"{name.replace('.', '/')}.py"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(source)
            for part in (name, name.partition(".")[0]):
                monkeypatch.delitem(sys.modules, part, raising=False)
        monkeypatch.syspath_prepend(str(folder))
        importlib.invalidate_caches()
        return importlib.import_module(next(iter(sources)))

    yield imported
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.mark.parametrize("name", EDITS)
def test_which_edits_change_the_fingerprint(name, imported, monkeypatch):
    edit, seen = EDITS[name]

    def made(file="", before="", after=""):
        sources = {"table_model": SOURCE, "table_helper": HELPER}
        module = imported(sources | ({file: sources[file].replace(before, after)} if file else {}))
        torch.manual_seed(0)
        return module.Model(), module

    model, module = made()
    before = fingerprint(model)
    assert before is not None and fingerprint(model, "2") != before
    if isinstance(edit, tuple):
        model, module = made(*edit)
    else:
        edit(model, module, monkeypatch)
    assert (fingerprint(model) != before) is seen


#: Another module of the user. The value 1.5 is edited.
HELPERS = """
import torch

FACTOR = 1.5


class Scale:
    factor = FACTOR

    def __call__(self, x):
        return x * self.factor


class Names(dict):
    def __missing__(self, name):
        return 1.5


class Square(torch.autograd.Function):
    @staticmethod
    def forward(context, x):
        return x * 1.5

    @staticmethod
    def backward(context, gradient):
        return gradient


def inner(x):
    return x * 1.5


def helper(x):
    return inner(x)


def decorated(function):
    return lambda *given: 1.5 * function(*given)


def made():
    def scaled(x):
        return helper(x)

    return scaled
"""
PROPERTY = """
import functools

class Holds:
    @functools.cached_property
    def scaled(self):
        return helper(torch.ones(2))
"""
#: By name: what is imported from the helpers, the lines before the class of a model, and what its forward pass returns.
REACHED = {
    "two functions": ("helper", "", "helper(x)"),
    "attribute of a module": ("", "import reached_helpers", "reached_helpers.helper(x)"),
    "attribute of a module of a folder": ("", "import reached.helpers", "reached.helpers.helper(x)"),
    "module that is handed on": ("", "import reached_helpers as h\ndef f(m, x): return m.inner(x)", "f(h, x)"),
    "module by the name of its attribute": ("", "import reached_helpers as h", "getattr(h, 'in' + 'ner')(x)"),
    "import inside of the function": ("", "", "[helper(x) for helper in [self.imported()]][0]"),
    "class attribute": ("Scale", "class Holds:\n    scale = Scale()", "Holds.scale(x)"),
    "object": ("Scale", "scale = Scale()", "scale(x)"),
    "class of a dictionary": ("Names", "names = Names()", "x * names['a']"),
    "closure": ("made", "scaled = made()", "scaled(x)"),
    "partial": ("helper", "import functools\nscaled = functools.partial(helper)", "scaled(x)"),
    "cache": ("helper", "import functools\nscaled = functools.cache(helper)", "scaled(x)"),
    "decorator": ("decorated", "@decorated\ndef scaled(x): return x", "scaled(x)"),
    "global constant": ("FACTOR", "", "x * FACTOR"),
    "comprehension": ("helper", "", "sum([helper(part) for part in x])"),
    "class inside of the function": ("helper", "", "type('A', (), {'f': lambda s, x: helper(x)})().f(x)"),
    "function of autograd": ("Square", "", "Square.apply(x)"),
    "function put into a library": ("helper", "nn.ReLU.forward_of_test = helper", "nn.ReLU.forward_of_test(x)"),
    "distribution": ("FACTOR", "NORMAL = torch.distributions.Normal(0.0, FACTOR)", "x + NORMAL.mean"),
    "object of a library": ("FACTOR", "import numpy\nLINE = numpy.poly1d([FACTOR, 0])", "x * float(LINE(1.0))"),
    "property that is made once": ("helper", PROPERTY, "x * Holds().scaled"),
    "scripted function": ("inner", "scripted = torch.jit.script(inner)", "scripted(x)"),
    "eval": ("helper", "", "eval('hel' + 'per')(x)"),
    "sequence that cannot be read": ("FACTOR", "from itertools import cycle\nA = cycle([FACTOR])", "x * next(A)"),
}


def reaching(way):
    """The source of a module whose model reaches the helpers."""
    names, lines, result = REACHED[way]
    imports = "import torch\nfrom torch import nn\n" + (f"from reached_helpers import {names}\n" if names else "")
    return (
        f"{imports}{lines}\n\n\nclass Model(nn.Module):\n"
        "    def imported(self):\n        from reached_helpers import helper\n\n        return helper\n\n"
        f"    def forward(self, x):\n        return {result}\n"
    )


@pytest.mark.parametrize("way", REACHED)
def test_an_edit_of_what_the_model_reaches_changes_its_fingerprint(way, imported):
    source = reaching(way)
    helpers = "reached.helpers" if "reached.helpers" in source else "reached_helpers"

    def marked(before, after):
        found = imported({"reached_model": source, helpers: HELPERS.replace(before, after)}).Model()
        assert found(torch.ones(2)).shape in [(2,), ()]
        return fingerprint(found)

    marks = [marked("", ""), marked("", ""), marked("1.5", "2.5")]
    assert None not in marks and marks[0] == marks[1] != marks[2]


def test_a_file_that_a_function_imports_later_counts(imported):
    def marked(factor):
        source = "def attack(model, x, y):\n    from later_helper import step\n\n    return step(x)\n"
        module = imported({"first_attack": source, "later_helper": f"def step(x):\n    return {factor} * x\n"})
        assert "later_helper" not in sys.modules
        return fingerprint(module.attack, "1")

    assert marked(1) == marked(1) != marked(2)


def test_code_without_a_file_counts_by_its_text_and_without_a_text_it_needs_a_revision(monkeypatch):
    """A notebook gives `linecache` the texts of its cells; `exec` does not."""
    helper = "def scaled(x):\n    return x * 1.5 * SIGMA\n\n\n"
    text = f"{helper}class Model(nn.Module):\n    def forward(self, x):\n        return scaled(x)\n"

    def marked(text, shown, revision=None, sigma=1.0):
        monkeypatch.setitem(sys.modules, "__main__", notebook := types.ModuleType("__main__"))
        # A script may read a global value from its command line.
        notebook.nn, notebook.SIGMA, name = nn, sigma, f"<cell {hash(text)}>"
        if shown:
            monkeypatch.setitem(linecache.cache, name, (len(text), None, text.splitlines(True), name))
        exec(compile(text, name, "exec"), vars(notebook))
        return fingerprint(notebook.Model(), revision)

    marks = [marked(text, True), marked(text, True), marked(text.replace("1.5", "2.5"), True)]
    assert None not in marks and marks[0] == marks[1] != marks[2] and marked(text, True, sigma=2.0) != marks[0]
    linecache.clearcache()
    assert marked(text, False) is None and marked(text, False, "1") not in (None, marked(text, False, "2"))


UNKNOWN = [
    lambda: torch.jit.script(nn.Linear(2, 2)),
    lambda: torch.eye(3).to_sparse(),
    lambda: torch.empty(2, device="meta"),
]


@pytest.mark.parametrize("held", UNKNOWN)
def test_what_cannot_be_compared_has_no_fingerprint_and_it_is_said(held, images, tmp_path, caplog, made_rows):
    model = Linear(held())
    assert fingerprint(model) is None
    for _ in "12":
        evaluate(model, *images, **QUIET, out=tmp_path, name="mine")
    assert len(made_rows) == 4 and not list((tmp_path / "rows").iterdir())
    assert "out: the rows of mine are not kept" in caplog.text


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
