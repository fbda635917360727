"""README's numbers are those of the committed results."""

import re
from pathlib import Path

import pytest

from benchmarks.pages import front_page, gpu_tables
from benchmarks.speed import sheets

ROOT = Path(__file__).parents[2]

RESULTS = ROOT / "benchmarks" / "results"
README = (ROOT / "README.md").read_text()


def test_readme_is_short_and_its_first_snippets_too():
    assert len(README.splitlines()) <= 145
    first = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)[:3]
    assert all(len([line for line in code.splitlines() if line]) <= 8 for code in first)


def test_a_number_without_gradients_is_not_believed():
    table = front_page.results_table(RESULTS)
    (masked,) = [line for line in table if "through its own output" in line]
    assert "**ALARM**" in masked
    assert sum("**ALARM**" in line for line in table) == 1


def test_ratios_are_those_of_the_times():
    compared = 0
    for line in front_page.speed_table(RESULTS)[2:]:
        _, title, *cells, _ = line.strip("| ").split(" | ")
        if title.startswith("single operations"):
            continue
        plain, compiled, own, times_plain, times_compiled = (
            None if cell == "-" else float(re.sub(r"[^0-9.]", "", cell)) for cell in cells
        )
        for other, times in ((plain, times_plain), (compiled, times_compiled)):
            assert (other is None) == (times is None)
            if other is not None:
                assert times == pytest.approx(other / own, abs=0.06)
                compared += 1
    assert compared >= 13


def test_a_gpu_is_compared_with_pytorchs_default_and_its_loss_is_shown():
    """TF32 is PyTorch's default, though the plain form of the table of pipelines computes in float32."""
    lines = [line for line in front_page.speed_table(RESULTS) if line.startswith("| NVIDIA H200 | ")]
    rows = sheets.read_csv(RESULTS / "nvidia-h200" / sheets.PIPELINES)
    (default,) = [row for row in rows if (row["pipeline"], row["contestant"]) == ("arrest_step", "plain, TF32")]
    (arrest,) = [line for line in lines if "ARREST" in line]
    assert f"| {float(default['ms']):,.0f} ms |" in arrest
    forms = {row["form"]: float(row["ms"]) for row in sheets.read_csv(RESULTS / "nvidia-h200" / gpu_tables.PGD)}
    theirs, ours = (min(ms for form, ms in forms.items() if form.startswith("ours") == own) for own in (False, True))
    (attack,) = [line for line in lines if "attack" in line]
    assert theirs < ours and f"| {theirs / ours:.2f} |" in attack
    assert all(line in README for line in lines)


def test_the_default_never_leaves_more_than_the_official_attack():
    (sentence,) = front_page.contests_sentence(RESULTS)
    models, most, above, runs = map(float, re.findall(r"[0-9.]*[0-9]", sentence))
    assert models >= 3 and most > 0 and above == 0 < runs


def test_the_picture_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    front_page.picture(RESULTS, tmp_path / "claim.png")
    assert (tmp_path / "claim.png").stat().st_size > 10_000
