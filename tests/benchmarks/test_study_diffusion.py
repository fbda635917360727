"""The study of diffusion purifiers: every job that the table needs is there, and the table says what the jobs found."""

import argparse
import json

import pytest

from benchmarks.studies import RESULT
from benchmarks.studies.diffusion import BESIDE, GROUPS, Diffusion, attacks_of
from purify_fast import zoo

pytestmark = pytest.mark.usefixtures("one_thread")


def chosen(*data_sets, amount="default"):
    return argparse.Namespace(data="nowhere", data_sets=list(data_sets), amount=amount)


def test_each_model_meets_its_groups_of_attacks():
    jobs = Diffusion().jobs(chosen("digits"))
    groups = {}
    for job in jobs:
        if job.settings["process"] is None:
            groups.setdefault(job.settings["model"], set()).add(job.settings["group"])
    assert groups["digits-diffpure"] == groups["digits-diffpure-at"] == set(GROUPS)
    assert groups["digits-pgd-at"] == groups["digits-carso-pipeline"] == set(BESIDE)
    assert {job.settings["model"] for job in jobs} <= set(zoo.list())
    order = [GROUPS.index(job.settings["group"]) for job in jobs]
    assert order == sorted(order)


def test_a_quick_job_leaves_the_rows_of_its_report(tmp_path):
    study = Diffusion()
    job = next(
        job
        for job in study.jobs(chosen("digits", amount="quick"))
        if (job.settings["model"], job.settings["group"], job.settings["process"]) == ("digits-diffpure", "votes", None)
    )
    found = job.work(job, job.folder(tmp_path), tmp_path)
    kinds = {(row["kind"], row["variant"]) for row in found["rows"]}
    # the vote, and the purifier under fixed noise beside it
    assert {("clean", "random"), ("pgd", "random"), ("pgd", "fixed")} <= kinds
    assert all(len(row["robust"]) == 10 for row in found["rows"]) and found["cpu_seconds"] > 0
    exact = attacks_of("exact", 8 / 255, quick=False)["attacks"][0].resolved
    assert (exact.steps, exact.eot_iter) == (200, 20) and exact.alpha == pytest.approx(0.007)


def rows(**robust):
    """Rows of a report by their kinds."""
    return [
        {"attack": kind, "kind": kind, "variant": "random", "robust": right, "mean": 0.75, "reliable": True}
        for kind, right in robust.items()
    ]


def test_the_table_says_what_the_jobs_found(tmp_path):
    study, asked = Diffusion(), chosen("digits")
    told = {"exact": rows(clean="1111", pgd="1100"), "strong": rows(clean="1111", worst="1000")}
    for job in study.jobs(asked):
        s = job.settings
        if s["group"] not in told or s["model"] == "digits-atop-pipeline":
            continue
        given = told[s["group"]]
        if (s["model"], s["group"]) == ("digits-pgd-at", "strong"):
            given = rows(clean="1111", worst="1011")
        folder = job.folder(tmp_path)
        folder.mkdir(parents=True)
        facts = {name: s[name] for name in ("dataset", "model", "group", "process", "eps")}
        (folder / RESULT).write_text(json.dumps(facts | {"cpu_seconds": 8.0, "rows": given}))
    lines = study.write(tmp_path, tmp_path, asked).read_text().splitlines()
    cells = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in lines if "|" in line
    }
    purifier = 0
    assert cells["PGD-200, EOT 20: one draw"][purifier] == "75.0"
    assert cells["PGD-200, EOT 20: every one of ten draws"][purifier] == "50.0 ± 25.0"
    assert cells["`strong`, minus the classifier alone"][purifier].startswith("-50.0 ± 25.0")
    assert cells["CPU seconds of PGD-200 an image"][purifier] == "2.0"
    # what is not done yet
    assert cells["clean, one draw"][-1] == "-" and cells["PGD-200, EOT 20: fixed noise"][purifier] == "-"
    assert sum("t_star 0.05" in line for line in lines) == 1
