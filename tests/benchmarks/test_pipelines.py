"""The pipelines' benchmark: contestants compute the same, rows and tables say what was measured. The tests of other
people's loops follow."""

import csv
import importlib.util
import io
import math
from argparse import Namespace
from dataclasses import replace

import pytest
import torch

from benchmarks import RESULTS, __main__ as program
from benchmarks.speed import elsewhere, pipelines, race, sheets
from benchmarks.speed.elsewhere import measuring, small_networks
from benchmarks.speed.elsewhere.loops import PKG_RESOURCES
from benchmarks.speed.flops import flop_of
from benchmarks.speed.pipelines import Case, Contestant, Job
from purify_fast.speed.precision import PER_VALUE, PRODUCTS, float32_settings

CPU = torch.device("cpu")
CASES = [(name, case) for name, cases in pipelines.registry().items() for case in cases(True)]


@pytest.mark.slow
@pytest.mark.parametrize(("pipeline", "case"), CASES)
def test_every_contestant_computes_what_the_plain_form_does(pipeline, case):
    torch._dynamo.reset()
    chosen = pipelines.registry()[pipeline](True)[case]
    truth = None
    for label, contestant in chosen.contestants.items():
        job = contestant.make(CPU, True)
        result = job.result().double()
        truth = result if truth is None else truth
        assert torch.isfinite(result).all()
        assert (result - truth).norm() <= chosen.tolerance * truth.norm(), label
        # what counts must not refuse to attack a model
        assert label != "ours" or flop_of(job.run) > 0
        job.run()


class _Commands:
    """The other end of a contestant's pipe: one command, then the end."""

    def __init__(self, *commands):
        self.commands, self.answers = [*commands, None], []

    def recv(self):
        return self.commands.pop(0)

    def send(self, answer):
        self.answers.append(answer)


@pytest.mark.parametrize("tf32", [False, True])
def test_float32_is_ieees_but_for_the_column_of_tf32(tf32, monkeypatch):
    """PyTorch rounds the operands of convolutions on a GPU by default; the settings are put back after a job."""
    seen = []
    now = lambda: seen.append(float32_settings()[0]) or torch.ones(2)  # noqa: E731
    job = Job(now, now)
    contestants = {"plain": Contestant(lambda device, quick: now() is None or job, False, tf32)}
    monkeypatch.setattr(race, "registry", lambda: {"some": lambda quick: {"case": Case("", 0.1, contestants)}})
    before, threads, pipe = float32_settings(), torch.get_num_threads(), _Commands("result", "time")
    race._work(pipe, "some", "case", "plain", "cpu", True, threads)
    assert all(done for done, _ in pipe.answers) and len(seen) >= 3
    assert set(seen) == {(True, "high") if tf32 else (False, "highest")} and float32_settings() == before


@pytest.mark.slow
def test_quick_run_writes_rows_and_tables(tmp_path, capsys, monkeypatch, forking):
    case = pipelines.registry()["carso_inference"](True)["prediction"]
    contestants = {label: case.contestants[label] for label in ("plain", "expert", "ours")}
    few = {"carso_inference": lambda quick: {"prediction": replace(case, contestants=contestants)}}
    monkeypatch.setattr(race, "registry", lambda: few)
    monkeypatch.setattr(pipelines, "registry", lambda: few)
    program.main(["pipelines", "carso_inference", "--quick", "--out", str(tmp_path)])
    rows = sheets.read_csv(tmp_path / sheets.PIPELINES)
    assert [row["contestant"] for row in rows] == list(contestants)
    for row in rows:
        assert row["verdict"] == "right" and row["torch"] == torch.__version__
        assert math.isclose(float(row["speed_up"]), float(rows[0]["ms"]) / float(row["ms"]), rel_tol=0.05)
    table = (tmp_path / sheets.PIPELINES_TABLE).read_text()
    assert table in capsys.readouterr().out and "| expert |" in table
    (tmp_path / sheets.PIPELINES_TABLE).unlink()
    sheets.report(tmp_path)
    assert (tmp_path / sheets.PIPELINES_TABLE).read_text() == table


def _other(device, quick):
    return Job(lambda: None, lambda: torch.ones(3))


class _Fake:
    """A contestant's process. Each run takes longer than the one before, as on a machine that others use."""

    answers = {"plain": torch.ones(3), "ours": torch.ones(3) * 1.1}  # noqa: RUF012
    seconds = {"plain": 2.0, "ours": 1.0}  # noqa: RUF012
    lucky = None

    def __init__(self, pipeline, case, label, *rest):
        self.label, self.slower = label, 0

    def order(self, *commands):
        pass

    def answer(self, command, seconds):
        return self.ask(command)

    def ask(self, command, seconds=math.inf):
        self.slower += command == "time"
        time = self.seconds[self.label] * self.slower * (0.1 if (self.label, self.slower) == self.lucky else 1)
        result = self.answers[self.label].numpy()
        other = {"flops": 10**9, "rate": 4e9, "memory": 3 * 10**6}
        return {"result": result, "time": time, **other}[command]

    def end(self, at_once):
        assert not at_once


def test_a_wrong_contestant_has_no_number(monkeypatch):
    monkeypatch.setattr(race, "Process", _Fake)
    contestants = {label: Contestant(_other, False) for label in _Fake.answers}
    wrong = race.race("p", "c", Case("shape", 0.05, contestants), CPU, True)
    assert [row["verdict"] for row in wrong] == ["right", "wrong"] and wrong[1]["ms"] == ""
    right = race.race("p", "c", Case("shape", 0.15, contestants), CPU, True)[1]
    assert (right["ms"], right["speed_up"], right["share_of_matrix_rate"]) == ("2500.00", "2.00", "0.100")
    assert right["peak_MB"] == "3" and wrong[1]["peak_MB"] == ""
    assert "wrong" in sheets.pipelines_markdown([{**row} for row in wrong])


# -- loops of other people ---------------------------------------------------------------------------------------------
# Loops of other people: the contestants agree, and the table has the numbers of the results file.

#: These rows need no further package.
OWN = [name for name, row in elsewhere.registry().items() if not row.package]


def measured(folder, names, **options):
    measuring.main(Namespace(names=names, quick=True, out=folder, **{"resume": False} | options))
    (path,) = folder.iterdir()
    return {row["row"]: row for row in csv.DictReader(io.StringIO(path.read_text()))}


@pytest.mark.slow
def test_this_package_and_the_expert_compute_what_the_loops_of_others_compute(tmp_path):
    rows = measured(tmp_path, OWN)
    assert list(rows) == OWN
    for name, row in rows.items():
        assert float(row["loss_ours"]) < 1e-4 and float(row["logits_ours"]) < 1e-4, name
        assert float(row["theirs_ms"]) > 0 and float(row["loss_expert"]) < 1e-4, name
        # A sign of a vanishing gradient may differ in the expert's attack.
        assert float(row["gradients_ours"]) < 1e-2 and float(row["gradients_expert"] or 0) < 1e-2, name
        assert int(row["lines_ours"]) <= 6 < int(row["lines_expert"]), name


@pytest.mark.parametrize("name", [name for name in elsewhere.registry() if name not in OWN])
def test_attacks_of_packages_run(name, tmp_path):
    package = elsewhere.registry()[name].package
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    if package == "robustbench" and not PKG_RESOURCES.is_dir():
        pytest.skip("robustbench is not installed with a setuptools that has pkg_resources")
    row = measured(tmp_path, [name])[name]
    assert float(row["theirs_ms"]) > 0 and float(row["loss_expert"]) < 1e-3


def test_the_committed_rows_of_copies_follow_the_present_rule():
    rows = sheets.read_csv(RESULTS / "cpu" / "elsewhere_copies.csv")
    assert len(rows) == 40
    for row in rows:
        products, values = int(row["products"]), int(row["values"])
        dense = products >= PER_VALUE * values and int(row["images"]) * products >= PRODUCTS
        assert row["auto"] == ("bfloat16" if dense else "float32"), row["row"]


def test_all_rows_of_small_networks_are_measured_and_committed(tmp_path):
    small_networks.run([small_networks.NAME], quick=True, out=tmp_path, resume=False)
    written, committed = (sheets.read_csv(folder / small_networks.FILE) for folder in (tmp_path, RESULTS / "cpu"))
    for rows in (written, committed):
        assert [(row["row"], int(row["images"])) for row in rows] == [*small_networks.ROWS]
    for row in committed:
        timed = ("call", "call_copy") if row["row"] == small_networks.CALL else small_networks.ATTACKS
        assert all(float(row[f"{who}_us"]) > 0 for who in timed), row["row"]
