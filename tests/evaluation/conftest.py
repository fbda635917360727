"""Fixtures of the tests of evaluations."""

import sys
from pathlib import Path

import pytest

from purify_fast.evaluation.run.row_judge import RowJudge

# the helpers of this folder, and of all tests
sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1])]


@pytest.fixture
def made_rows(monkeypatch):
    """The rows that evaluations made, and did not read from a file."""
    rows = []
    original = RowJudge.new_row
    monkeypatch.setattr(RowJudge, "new_row", lambda *args, **values: rows.append(args) or original(*args, **values))
    return rows
