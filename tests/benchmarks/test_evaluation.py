"""The contest against the official AutoAttack: finished contests are kept, and the table says what the results say."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from benchmarks import __main__ as program
from benchmarks import evaluation

pytestmark = pytest.mark.usefixtures("one_thread")


class Noisy(nn.Sequential):
    """Every prediction is another one."""

    def forward(self, x):
        logits = super().forward(x)
        return logits + 1e-3 * torch.randn_like(logits)


@pytest.fixture
def contests(monkeypatch):
    """Two models that are not trained, on few images, in the place of the real ones."""
    pytest.importorskip("pyautoattack")
    torch.manual_seed(0)
    layers = nn.Flatten(), nn.Linear(64, 10)
    plain, noisy = nn.Sequential(*layers).eval(), Noisy(*layers).eval()
    x = torch.rand(12, 1, 8, 8)
    with torch.no_grad():
        y = plain(x).argmax(1)
    made = []

    def subject(model, random):
        def make(sources):
            made.append(random)
            return evaluation.Subject(model, x, y, 0.05, random)

        return make

    known = {
        "plain": (subject(plain, False), evaluation.STANDARD_CONTESTANTS),
        "noisy": (subject(noisy, True), evaluation.RAND_CONTESTANTS),
    }
    monkeypatch.setattr(evaluation, "CONTESTS", known)
    return made


def test_contests_are_kept_and_the_table_says_what_was_found(contests, tmp_path, capsys):
    program.main(["evaluation", "--quick", "--out", str(tmp_path)])
    rows = json.loads((tmp_path / evaluation.FILE).read_text())
    quiet, random = ["AutoAttack", "standard", "fast"], ["AutoAttack rand", "rand", "rand, 60 steps"]
    assert [row["contestant"] for row in rows] == quiet + random
    assert contests == [False, True] and {row["images"] for row in rows} == {4}
    assert all(0 <= row["robust"] <= row["clean"] <= 100 and len(row["seconds"]) == 1 for row in rows)
    assert [row["error"] > 0 for row in rows] == [False, False, False, True, True, True]
    lines = (tmp_path / evaluation.TABLE).read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")][2:]
    heads = next(line for line in lines if line.startswith("|")).strip("|").split("|")
    assert {len(line) for line in cells} == {len(heads)} == {9}
    assert len(cells) == 6 and cells[0][:4] == ["plain", "4", f"{rows[0]['clean']:.1f}", "AutoAttack"]
    assert cells[1][3] == "**standard**" and float(cells[1][5]) == pytest.approx(
        rows[1]["robust"] - rows[0]["robust"], abs=0.06
    )
    assert float(cells[1][7]) == pytest.approx(rows[0]["seconds"][0] / rows[1]["seconds"][0], abs=0.06)
    # finished contests are not run again, unless they are another amount or it is asked for
    program.main(["evaluation", "--quick", "--out", str(tmp_path)])
    assert contests == [False, True]
    program.main(["evaluation", "noisy", "--quick", "--images", "3", "--out", str(tmp_path)])
    assert contests == [False, True, True]
    again = json.loads((tmp_path / evaluation.FILE).read_text())
    assert [row["images"] for row in again] == [4, 4, 4, 3, 3, 3] and again[:3] == rows[:3]
    program.main(["evaluation", "plain", "--quick", "--redo", "--rounds", "1", "--out", str(tmp_path)])
    assert contests == [False, True, True, False]
    assert "standard leaves" in capsys.readouterr().out


def test_an_interrupted_contest_goes_on_where_it_was(contests, tmp_path, monkeypatch):
    """Runs that are finished are kept, also of a contest that is not, and are made no second time."""
    arguments = ["evaluation", "plain", "--quick", "--rounds", "2", "--out", str(tmp_path)]
    made, (make, contestants) = [], evaluation.CONTESTS["plain"]

    def counted(who, attack):
        def run(*given):
            if len(made) == 4:
                raise KeyboardInterrupt
            made.append(who)
            return attack(*given)

        return run

    watched = {who: counted(who, attack) for who, attack in contestants.items()}
    monkeypatch.setitem(evaluation.CONTESTS, "plain", (make, watched))
    with pytest.raises(KeyboardInterrupt):
        program.main(arguments)
    kept = {row["contestant"]: row["seconds"] for row in evaluation.read(tmp_path)}
    assert made == ["AutoAttack", "standard", "fast", "AutoAttack"]
    assert {who: len(seconds) for who, seconds in kept.items()} == {"AutoAttack": 2, "standard": 1, "fast": 1}
    monkeypatch.setitem(evaluation.CONTESTS, "plain", (make, contestants))
    program.main(arguments)
    now = {row["contestant"]: row["seconds"] for row in evaluation.read(tmp_path)}
    assert {len(seconds) for seconds in now.values()} == {2}
    assert all(now[who][: len(seconds)] == seconds for who, seconds in kept.items())


def test_our_attacks_leave_no_more_than_the_official_ones(contests):
    """With as many steps, on a model where both find something and both leave something."""
    amount = replace(evaluation.QUICK, images=12, steps=8, queries=60)
    *_, last = evaluation.contest("plain", None, amount)
    rows = {row["contestant"]: row for row in last}
    assert rows["standard"]["robust"] <= rows["AutoAttack"]["robust"] + 100 / 12
    assert rows["standard"]["robust"] < rows["standard"]["clean"]


def test_mistakes(contests, capsys):
    for arguments, message in (
        (["digits"], "there is no 'digits'; there are plain; noisy"),
        (["--images", "0"], "argument --images: must be at least 1, got 0"),
        (["--rounds", "0"], "argument --rounds: must be at least 1, got 0"),
    ):
        with pytest.raises(SystemExit):
            program.main(["evaluation", *arguments])
        assert message in capsys.readouterr().err
