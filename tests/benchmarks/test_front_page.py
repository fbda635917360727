"""README's numbers are those of the committed results."""

import re
from pathlib import Path

import pytest

from benchmarks.pages import front_page

ROOT = Path(__file__).parents[2]

RESULTS = ROOT / "benchmarks" / "results"


def test_ratios_are_those_of_the_times():
    compared = 0
    for line in front_page.speed_table(RESULTS)[2:]:
        if not line.startswith("| "):
            continue
        _, _, *cells, _ = line.strip("| ").split(" | ")
        expert, own, times_expert, plain, times_plain = (float(re.sub(r"[^0-9.]", "", cell)) for cell in cells)
        for other, times in ((expert, times_expert), (plain, times_plain)):
            # the milliseconds of the table are rounded
            assert times == pytest.approx(other / own, abs=0.06 + other / own / min(other, own))
        compared += 1
    assert compared >= 1


def test_the_picture_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    front_page.picture(RESULTS, tmp_path / "claim.png")
    assert (tmp_path / "claim.png").stat().st_size > 10_000
