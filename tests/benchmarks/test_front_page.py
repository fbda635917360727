"""README's numbers are those of the committed results."""

import re
from pathlib import Path

import pytest

from benchmarks.pages import front_page

ROOT = Path(__file__).parents[2]

RESULTS = ROOT / "benchmarks" / "results"
README = (ROOT / "README.md").read_text()


def test_readme_is_short_and_its_first_snippets_too():
    assert len(README.splitlines()) <= 140
    first = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)[:3]
    assert all(len([line for line in code.splitlines() if line]) <= 8 for code in first)


def test_a_number_without_gradients_is_not_believed():
    table = front_page.results_table(RESULTS)
    (masked,) = [line for line in table if "through its own output" in line]
    assert "**ALARM**" in masked
    assert sum("**ALARM**" in line for line in table) == 1


def test_ratios_are_those_of_the_times():
    for line in front_page.speed_table(RESULTS)[2:-1]:
        _, plain, compiled, own, times_plain, times_compiled, _ = line.strip("| ").split(" | ")
        plain, compiled, own = (float(re.sub(r"[^0-9.]", "", one)) for one in (plain, compiled, own))
        assert float(times_plain) == pytest.approx(plain / own, abs=0.06)
        assert float(times_compiled) == pytest.approx(compiled / own, abs=0.06)


def test_the_default_never_leaves_more_than_the_official_attack():
    (sentence,) = front_page.contests_sentence(RESULTS)
    models, most, above, runs = map(float, re.findall(r"[0-9.]*[0-9]", sentence))
    assert models >= 3 and most > 0 and above == 0 < runs


def test_the_picture_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    front_page.picture(RESULTS, tmp_path / "claim.png")
    assert (tmp_path / "claim.png").stat().st_size > 10_000
