"""README's numbers are those of the committed results."""

import shutil
from pathlib import Path

import pytest

from benchmarks.pages import front_page, methods_table

ROOT = Path(__file__).parents[2]

RESULTS = ROOT / "benchmarks" / "results"


def test_what_has_no_result_is_not_measured(tmp_path):
    lines = {line.split(" | ")[0]: line for line in methods_table.table(RESULTS)}
    assert "98.7 / 78.6 (99.1 / 86.1) | 57.6 / 24.0 (65.9 / 31.3) | 2.3 | 6.8" in lines["| **CARSO**"]
    assert lines["| **AToP**"].startswith("| **AToP** | not measured | 61.6 / 24.6")
    for folder in ("carso_mnist", ""):
        (tmp_path / "studies" / folder).mkdir(parents=True, exist_ok=True)
    shutil.copy(RESULTS / "studies" / "carso_mnist" / "report.json", tmp_path / "studies" / "carso_mnist")
    carso = methods_table.table(tmp_path)[2]
    assert carso.endswith("78.6 (99.1 / 86.1) | not measured | not measured | not measured |"), carso


def test_the_pictures_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    front_page.pictures(RESULTS, tmp_path)
    for name in ("claim.png", "speed.png"):
        assert (tmp_path / name).stat().st_size > 10_000
