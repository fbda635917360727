"""Fixtures of the tests of evaluations."""

import sys
from pathlib import Path

import pytest

from purify_fast.evaluation.run.measure import Measure

# the helpers of this folder, and of all tests
sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1])]


@pytest.fixture
def made_rows(monkeypatch):
    """The rows that evaluations made, and did not read from a file."""
    rows = []
    original = Measure.new_row
    monkeypatch.setattr(Measure, "new_row", lambda *args, **values: rows.append(args) or original(*args, **values))
    return rows


@pytest.fixture(autouse=True)
def other_tests_are_not_loaded(request, monkeypatch):
    """A model's fingerprint reads all loaded modules that its file mentions, here the other tests: some seconds."""
    for name, module in list(sys.modules.items()):
        file = Path(getattr(module, "__file__", None) or "")
        if file.name.startswith("test_") and file.parent.parent.name == "tests" and module is not request.module:
            monkeypatch.delitem(sys.modules, name)
