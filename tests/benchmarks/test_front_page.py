"""README's numbers are those of the committed results."""

import re
from pathlib import Path

import pytest

from benchmarks.pages import front_page
from benchmarks.speed import sheets

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


def test_readme_quotes_ratios_against_the_expert(tmp_path):
    """The faster of the expert's two forms, whose rows decide what is shown."""
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


def test_the_picture_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    front_page.picture(RESULTS, tmp_path / "claim.png")
    assert (tmp_path / "claim.png").stat().st_size > 10_000
