"""The studies' runner resumes, refuses what it cannot run before any work, and the tables say what the results say."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from study_work import work
from torch.nn import functional as F

from benchmarks import __main__ as program
from benchmarks.robustness.merged import FILE, read_rows
from benchmarks.robustness.studies import RESULT, Job, run, run_study
from purify_fast import data


def test_needs_come_first_a_failure_is_named_and_a_second_run_goes_on(tmp_path, capfd, forking):
    jobs = [
        Job("last", 0, work, ("first/of all", "bad")),
        Job("bad", 0, work, ("first/of all",), {"fail": True}),
        Job("first/of all", 0, work, settings={"budget": SimpleNamespace(width=16), "data": "here"}),
    ]
    with pytest.raises(RuntimeError, match="no luck"):
        run(jobs, tmp_path)
    assert capfd.readouterr().err.strip().endswith("2/3 bad, seed 0")
    assert [job.done(tmp_path) for job in jobs] == [False, False, True]
    (tmp_path / "mended").touch()
    got = run(jobs, tmp_path)
    assert [result["name"] for result in got] == [job.name for job in jobs]  # in the order of jobs
    assert got[0]["saw"] == ["first/of all", "bad"] and got[1]["seed"] == 0 and got[2]["minutes"] >= 0
    log = (tmp_path / "log").read_text()
    assert log.splitlines() == ["first/of all 0", "bad 0", "bad 0", "last 0"]
    moved = replace(jobs[2], settings={"budget": SimpleNamespace(width=16), "data": "there"})  # the same data, moved
    assert run([*jobs[:2], moved], tmp_path) == got and (tmp_path / "log").read_text() == log
    other = replace(jobs[2], settings={"budget": SimpleNamespace(width=4)})
    with pytest.raises(ValueError, match=r"'first/of all' with other settings \(.*16.*, not .*4.*\)"):
        run([*jobs[:2], other], tmp_path)
    assert (tmp_path / "log").read_text() == log


def lines_of(text: str) -> dict[str, list[str]]:
    """Rows of the Markdown tables by their first cell."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return {row[0]: row[1:] for row in rows if row[0] != "---"}


def chosen(*words: str):
    parser = program.argparse.ArgumentParser()
    run_study.arguments(parser)
    return parser.parse_args(words)


@pytest.fixture
def mnist(tmp_path):
    """A folder with digits, which stand in for MNIST."""
    digits = data.load_dataset("digits")
    arrays = {name: getattr(digits, name) for name in ("x_train", "y_train", "x_test", "y_test")}
    wide = {name: F.pad(a, (6, 6, 6, 6)) if a.dim() == 4 else a for name, a in arrays.items()}
    np.savez(tmp_path / "mnist.npz", **{name: a.numpy() for name, a in wide.items()})
    return tmp_path


@pytest.mark.slow
def test_carso_on_mnist_end_to_end(mnist, tmp_path, capsys, monkeypatch, forking, short_signs):
    """Digits stand in for MNIST."""
    pytest.importorskip("pyautoattack")
    monkeypatch.setattr(run_study, "RESULTS", tmp_path / "results")
    runs = tmp_path / "runs"
    words = ["study", "carso_mnist", "--quick", "--data", str(mnist), "--out", str(runs)]
    program.main(words)
    rows = lines_of(capsys.readouterr().out)
    first = {path: path.stat().st_mtime_ns for path in runs.glob(f"*/{RESULT}")}
    program.main(words)
    assert {path: path.stat().st_mtime_ns for path in runs.glob(f"*/{RESULT}")} == first
    assert lines_of(capsys.readouterr().out) == rows and not (tmp_path / "results").exists()
    found_rows = {(row.attack, row.model): row for row in read_rows(runs / "carso_mnist" / FILE)}
    models = {model for _, model in found_rows}
    attacks = [job for job in run_study.STUDIES["carso_mnist"].jobs_of(chosen(*words[1:])) if "group" in job.settings]
    # The table has what the jobs found.
    for job in attacks:
        zero = job.settings["group"] == "APGD" and job.settings["model"] != "classifier"
        model = job.settings["model"] + ", z = 0" * zero
        made = [row.attack for row in found_rows.values() if row.model == model and row.is_attack]
        found = {label: accuracy for label, accuracy in job.result(runs).items() if label in made}
        assert found and found == {label: found_rows[label, model].accuracy for label in found}
    labels = ("PGD-2 ce + dlr, EOT 2", "APGD ce + APGD-T, z = 0", "AutoAttack rand (classifier: standard), first 4")
    assert all(len(rows[label]) == 7 for label in labels) and len(models) == 7
    # Groups that were attacked apart have one worst.
    withstood = found_rows[labels[0], "classifier"].robust & found_rows[labels[1], "classifier"].robust
    assert found_rows["worst", "classifier"].robust.tolist() == withstood.tolist()
    for name in (name for name in models if name.endswith(", z = 0")):
        assert found_rows["worst", name].robust.tolist() == found_rows[labels[1], name].robust.tolist()
    with pytest.raises(ValueError, match=r"'classifier' with other settings"):
        program.main([word for word in words if word != "--quick"])
