"""The file of the rows of several models."""

import json

import pytest

from benchmarks import RESULTS
from benchmarks.robustness.merged import FILE, percent, read_rows


def test_a_file_of_another_format_is_refused(tmp_path):
    kept = RESULTS / "studies" / "carso_mnist" / FILE
    rows = {(row.attack, row.model): row for row in read_rows(kept)}
    assert percent(rows["worst", "classifier"]) == "86.1 ± 1.1"
    path = tmp_path / FILE
    path.write_text(json.dumps(json.loads(kept.read_text()) | {"format": 99}))
    with pytest.raises(ValueError, match="got 99"):
        read_rows(path)
