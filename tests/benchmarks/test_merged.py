"""The rows of several models: their table and their file."""

import json

import numpy as np
import pytest

from benchmarks.robustness.merged import comparison, read_rows, save_rows
from purify_fast.evaluation import Row


def row(attack="PGD", model="a", robust=(1, 0, 1, 1), **options):
    return Row(model, attack, "attack", np.array([robust], dtype=bool), seed=0, data="d", **options)


def test_the_table_and_the_file_of_two_models(tmp_path):
    rows = [row(robust=(1, 0, 0, 0)), row(model="b | c", reliable=False), row("other", model="b | c")]
    head, _, first, second = comparison(rows)
    assert head == r"| attack | a | b \| c |" and second == "| other | - | 75.0 ± 21.7 |"
    assert first.startswith("| PGD | 25.0 ± 21.7 | 75.0 ± 21.7 ") and "unreliable" in first
    path = tmp_path / "study" / "report.json"
    save_rows(path, rows, ["note"])
    assert [each.to_dict() for each in read_rows(path)] == [each.to_dict() for each in rows]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))
    with pytest.raises(ValueError, match="got 99"):
        read_rows(path)
