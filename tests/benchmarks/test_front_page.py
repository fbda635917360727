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
    assert len(README.splitlines()) <= 120
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
        if not line.startswith("| "):
            continue
        _, _, *cells, _ = line.strip("| ").split(" | ")
        expert, own, times_expert, plain, times_plain = (float(re.sub(r"[^0-9.]", "", cell)) for cell in cells)
        for other, times in ((expert, times_expert), (plain, times_plain)):
            # the milliseconds of the table are rounded
            assert times == pytest.approx(other / own, abs=0.06 + other / own / min(other, own))
        compared += 1
    assert compared >= 1


def test_readme_quotes_ratios_against_the_expert(tmp_path):
    """The faster of the expert's two forms, whose rows decide what is shown; a loss is said in words."""
    table = front_page.speed_table(RESULTS)
    assert "\n".join(line for line in table if line.startswith("|")) in README
    assert table[0].index("speedup over the expert") < table[0].index("speedup over plain")
    forms = {row["form"]: float(row["ms"]) for row in sheets.read_csv(RESULTS / "nvidia-h200" / gpu_tables.PGD)}
    theirs, ours = (min(ms for form, ms in forms.items() if form.startswith(kind)) for kind in ("expert", "ours"))
    (attack,) = [line for line in table if line.startswith("| NVIDIA H200 | attack")]
    assert theirs < ours and f"| {theirs / ours:.2f} |" in attack
    assert table[-1].startswith(
        "**The expert is faster where the speedup over it is below 1.** With two threads, it is "
    )
    assert "With our matrix products, the expert's attack by PGD-10 takes 1,454 ms." in table[-1]
    # every factor of speed outside of the generated blocks would be one against something else
    written = re.sub(r"<!-- table: .*?<!-- end -->", "", README, flags=re.DOTALL)
    assert not re.search(r"\d times as fast|times faster|speedup of", written)
    for device in front_page.NAMES:
        (tmp_path / device).mkdir()
        for file in (RESULTS / device).glob("*.csv"):
            (tmp_path / device / file.name).write_bytes(file.read_bytes())
    row = {"pipeline": "arrest_step", "case": "all attacked", "share_of_matrix_rate": "0.5"}
    row |= {"threads": "1", "p20": "50"}
    times = {"plain": "900", "torch.compile of plain, bfloat16": "300", "expert": "250", "expert, compiled": "200"}
    times |= {"ours": "110", "ours, compiled": "100"}
    rows = [row | {"contestant": name, "ms": ms} for name, ms in times.items()]
    rows += [one | {"ms": "100", "threads": "2"} for one in rows]
    path = tmp_path / front_page.CPU / sheets.PIPELINES
    sheets.write_csv(path, rows)
    (line,) = [line for line in front_page.speed_table(tmp_path) if "ARREST" in line]
    assert "| 200 ms | **100 ms** | 2.0 | 900 ms | 9.0 | 50 % |" in line
    assert "2.00 times as fast as an expert's code in PyTorch alone (one CPU core)" in front_page.claim(tmp_path)[0]
    assert "With two threads, it is 1.00 in 1 race (" in front_page.speed_table(tmp_path)[-1]
    sheets.write_csv(path, [one for one in rows if not one["contestant"].startswith("expert")])
    assert not any("ARREST" in line for line in front_page.speed_table(tmp_path))


def test_a_gpu_is_compared_with_pytorchs_default(monkeypatch):
    """TF32 is PyTorch's default, though the plain form of the table of pipelines computes in float32."""
    read = front_page.read_csv

    def with_expert(path):
        rows = read(path)
        added = [row | {"contestant": "expert"} for row in rows if row.get("contestant") == "ours, captured"]
        return rows + added

    monkeypatch.setattr(front_page, "read_csv", with_expert)
    rows = sheets.read_csv(RESULTS / "nvidia-h200" / sheets.PIPELINES)
    (default,) = [row for row in rows if (row["pipeline"], row["contestant"]) == ("arrest_step", "plain, TF32")]
    (arrest,) = [one for one in front_page.speeds(RESULTS) if (one.device, one.title[:6]) == ("nvidia-h200", "ARREST")]
    assert arrest.plain == float(default["ms"]) and arrest.gain == 1


def test_the_default_never_leaves_more_than_the_official_attack():
    (sentence,) = front_page.contests_sentence(RESULTS)
    models, most, runs, equal = map(float, re.findall(r"[0-9.]*[0-9]", sentence))
    assert models >= 3 and most > 0 and equal < runs and "never higher" in sentence


def test_the_picture_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    front_page.picture(RESULTS, tmp_path / "claim.png")
    assert (tmp_path / "claim.png").stat().st_size > 10_000
