"""Fixtures of the tests of evaluations."""

import sys
from pathlib import Path

import pytest

from purify_fast.evaluation import measure

# the helpers of this folder, and of all tests
sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1])]


@pytest.fixture
def made_rows(monkeypatch):
    """The rows that evaluations made, and did not read from a file."""
    rows = []
    for name in ("_measure_clean", "_measure_attack"):
        original = getattr(measure.Measure, name)
        monkeypatch.setattr(
            measure.Measure, name, lambda *args, original=original: rows.append(args) or original(*args)
        )
    return rows
