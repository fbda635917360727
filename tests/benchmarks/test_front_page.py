"""README's numbers are those of the committed results."""

import re
from pathlib import Path

import pytest

from benchmarks.pages import front_page

ROOT = Path(__file__).parents[2]

RESULTS = ROOT / "benchmarks" / "results"


def test_ratios_are_those_of_the_times():
    devices = []
    for line in front_page.speed_table(RESULTS)[2:]:
        if not line.startswith("| "):
            continue
        device, _, *cells = line.strip("| ").split(" | ")
        plain, expert, own, times_plain, times_expert = (re.sub(r"[^0-9.]", "", cell) for cell in cells)
        assert (expert == "") == (times_expert == "")
        for other, times in ((expert, times_expert), (plain, times_plain)):
            if other:
                ratio = float(other) / float(own)
                # the times of the table are rounded
                assert float(times) == pytest.approx(ratio, abs=0.06 + ratio / float(own))
        devices.append(device)
    assert devices.count("one CPU core") == devices.count("NVIDIA H200") == 3


def test_the_pictures_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    front_page.pictures(RESULTS, tmp_path)
    for name in ("claim.png", "speed.png"):
        assert (tmp_path / name).stat().st_size > 10_000
