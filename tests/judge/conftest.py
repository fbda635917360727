"""Fixtures of the tests of evaluations."""

import sys
from pathlib import Path

import pytest

from purify_fast.judge.run.measure import Measure

# the helpers of this folder, and of all tests
sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1])]


@pytest.fixture
def made_rows(monkeypatch):
    """The rows that evaluations made, and did not read from a file."""
    rows = []
    original = Measure.new_row
    monkeypatch.setattr(Measure, "new_row", lambda *args, **values: rows.append(args) or original(*args, **values))
    return rows
