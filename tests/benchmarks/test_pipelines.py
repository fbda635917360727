"""The pipelines' benchmark: contestants compute the same, rows and tables say what was measured."""

import math
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # the benchmarks are no part of the installed package

from benchmarks import __main__ as program  # noqa: E402
from benchmarks import race, report  # noqa: E402
from benchmarks.pipelines import Case, Contestant, Job, registry  # noqa: E402

CPU = torch.device("cpu")
CASES = [(name, case) for name, cases in registry().items() for case in cases(True)]


@pytest.mark.parametrize(("pipeline", "case"), CASES)
def test_every_contestant_computes_what_the_plain_form_does(pipeline, case):
    torch._dynamo.reset()
    chosen = registry()[pipeline](True)[case]
    truth = None
    for contestant in chosen.contestants.values():
        job = contestant.make(CPU, True)
        result = job.result().double()
        truth = result if truth is None else truth
        assert torch.isfinite(result).all()
        assert (result - truth).norm() <= chosen.tolerance * truth.norm()
        job.run()
        for part in job.parts.values():
            part()


def test_the_full_cases_are_the_same_contests():
    for cases in registry().values():
        small, full = cases(True), cases(False)
        assert list(small) == list(full)
        for name, case in full.items():
            assert list(case.contestants) == list(small[name].contestants) and case.tolerance <= 0.05
            assert "ours" in case.contestants


def test_quick_run_writes_rows_and_tables(tmp_path, capsys):
    program.main(["pipelines", "carso_inference", "--quick", "--out", str(tmp_path)])
    rows = report.read_csv(tmp_path / report.PIPELINES)
    contestants = registry()["carso_inference"](True)["prediction"].contestants
    assert [row["contestant"] for row in rows] == list(contestants)
    for row in rows:
        assert row["verdict"] == "right" and row["torch"] == torch.__version__
        assert math.isclose(float(row["speed_up"]), float(rows[0]["ms"]) / float(row["ms"]), rel_tol=0.05)
        assert (row["contestant"] == "ours") == bool(row["parts"])
    table = (tmp_path / report.PIPELINES_TABLE).read_text()
    assert table in capsys.readouterr().out and "| torch.compile of plain |" in table and "classifying" in table
    (tmp_path / report.PIPELINES_TABLE).unlink()
    program.main(["report", str(tmp_path)])
    assert (tmp_path / report.PIPELINES_TABLE).read_text() == table


def _other(device, quick):
    return Job(lambda: None, lambda: torch.ones(3))


def test_a_wrong_contestant_has_no_number(monkeypatch):
    answers = {"plain": torch.ones(3), "ours": torch.ones(3) * 1.1}

    class Fake:
        def __init__(self, pipeline, case, label, *rest):
            self.label = label

        def ask(self, command):
            parts = {"part": [0.25, 0.5, 0.5]}
            times = {"plain": 2.0, "ours": 1.0}
            return {"result": answers[self.label].numpy(), "time": times[self.label], "flops": 10**9, "rate": 4e9,
                    "parts": parts, "warm": None}[command]  # fmt: skip

        def end(self):
            pass

    monkeypatch.setattr(race, "_Process", Fake)
    contestants = {label: Contestant(_other, False) for label in answers}
    wrong = race.race("p", "c", Case("shape", 0.05, contestants), CPU, True)
    assert [row["verdict"] for row in wrong] == ["right", "wrong"] and wrong[1]["ms"] == ""
    right = race.race("p", "c", Case("shape", 0.15, contestants), CPU, True)[1]
    assert (right["ms"], right["speed_up"], right["share_of_matrix_rate"]) == ("1000.00", "2.00", "0.250")
    assert right["parts"] == "part:0.500"
    assert "wrong" in report.pipelines_markdown([{**row} for row in wrong])


def test_a_failure_in_a_contestants_process_is_an_error_with_its_traceback():
    process = race._Process("carso_inference", "no such case", "ours", "cpu", True, 1)
    with pytest.raises(RuntimeError, match=r"'result' failed in a contestant's process.*\n(.*\n)*.*KeyError"):
        process.ask("result")
    process.end()


def test_an_unknown_pipeline_is_refused():
    with pytest.raises(SystemExit):
        program.main(["pipelines", "nothing"])
