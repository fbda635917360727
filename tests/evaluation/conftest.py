"""Fixtures of the tests of evaluations."""

import pytest

from purify_fast.evaluation import measure


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
