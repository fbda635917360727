"""Which changes throw a finished row away, and which do not."""

import importlib

import pytest
import torch
from torch import nn

from purify_fast.attacks import PGD
from purify_fast.evaluation import evaluate, measure, row_cache
from purify_fast.evaluation.fingerprint import fingerprint

pytestmark = pytest.mark.usefixtures("one_thread")

SOURCE = '''
import torch

class Model(torch.nn.Module):
    """{doc}"""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(27, 4)
        self.activation = activation

    def forward(self, x):
        """{doc}"""
        return self.activation(self.linear(x.flatten(1)))

def activation(x):
    """{doc}"""
    inner = lambda z: z * {factor}
    return inner(x)
'''


def model_of(tmp_path, monkeypatch, doc="First.", factor=1.0):
    """A model whose source is in a file of its own, as its user wrote it."""
    path = tmp_path / "source" / "model_of_the_cache_test.py"
    path.parent.mkdir(exist_ok=True)
    path.write_text(SOURCE.format(doc=doc, factor=factor))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.manual_seed(0)
    return module.Model()


@pytest.fixture
def counted(tmp_path, monkeypatch):
    """``evaluate`` into one folder, which tells how many rows it made anew."""
    made = []
    for name in ("_measure_clean", "_measure_attack"):
        original = getattr(measure.Measure, name)
        monkeypatch.setattr(
            measure.Measure, name, lambda *args, original=original: made.append(args) or original(*args)
        )
    x, y = torch.rand(6, 3, 3, 3, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 4

    def run(model, **change):
        made.clear()
        settings = {"eps": 0.1, "attacks": [PGD(steps=2)], "out": tmp_path, "progress": False} | change
        evaluate(model, x if "x" not in settings else settings.pop("x"), y, **settings)
        return len(made)

    return run


def test_an_edited_docstring_keeps_the_rows(tmp_path, monkeypatch, counted):
    assert counted(model_of(tmp_path, monkeypatch)) == 2
    assert counted(model_of(tmp_path, monkeypatch)) == 0
    assert counted(model_of(tmp_path, monkeypatch, doc="Another one,\n    of two lines.")) == 0
    # what the package computes is told by the version of the protocol, not by the text of its sources
    monkeypatch.setattr(row_cache, "__doc__", "edited")
    monkeypatch.setattr(PGD, "__doc__", "edited")
    assert counted(model_of(tmp_path, monkeypatch)) == 0


def test_what_decides_a_row_makes_it_anew(tmp_path, monkeypatch, counted):
    assert counted(model_of(tmp_path, monkeypatch)) == 2
    assert counted(model_of(tmp_path, monkeypatch), eps=0.2) == 1  # the clean row stays
    assert counted(model_of(tmp_path, monkeypatch), attacks=[PGD(steps=3)]) == 1
    assert counted(model_of(tmp_path, monkeypatch), seed=1) == 2
    assert counted(model_of(tmp_path, monkeypatch), x=torch.rand(6, 3, 3, 3)) == 2
    assert counted(model_of(tmp_path, monkeypatch, factor=2.0)) == 2
    changed = model_of(tmp_path, monkeypatch)
    with torch.no_grad():
        changed.linear.weight[0, 0] += 1
    assert counted(changed) == 2
    assert counted(model_of(tmp_path, monkeypatch)) == 0


def test_versions_and_backends(tmp_path, monkeypatch, counted):
    model = model_of(tmp_path, monkeypatch)
    assert counted(model) == 2
    with monkeypatch.context() as of_one_attack:
        of_one_attack.setattr(PGD, "revision", lambda self: "2")
        assert counted(model) == 1
    with monkeypatch.context() as of_the_backend:
        of_the_backend.setenv("PURIFY_FAST_BACKEND", "reference")
        assert counted(model) == 2
    monkeypatch.setattr(row_cache, "PROTOCOL_VERSION", row_cache.PROTOCOL_VERSION + 1)
    assert counted(model) == 2
    assert counted(model) == 0


def test_a_function_within_a_function_has_the_same_fingerprint_in_another_process(tmp_path, monkeypatch):
    """Its code once stood in the fingerprint with an address in memory."""
    first, second = (model_of(tmp_path, monkeypatch) for _ in "12")
    assert first.activation is not second.activation
    assert fingerprint(first) == fingerprint(second) is not None
    assert fingerprint(nn.Linear(2, 2)) != fingerprint(first)
