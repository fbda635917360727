"""The study of diffusion purifiers: the jobs that the tables need, and what the tables say of them."""

import argparse
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.robustness.studies import diffusion, run
from benchmarks.robustness.studies.diffusion import ALONE, GROUPS, found_by_pgd, images_of, predictions, told
from benchmarks.robustness.studies.run_study import RESULTS
from purify_fast import zoo
from purify_fast._tensors import weights_fingerprint
from purify_fast.evaluation import lee_kim_2023


def chosen(amount="default"):
    return argparse.Namespace(data="nowhere", amount=amount)


def jobs_of(dataset, amount="default"):
    return [job for job in diffusion.jobs_of(chosen(amount)) if job.settings["dataset"] == dataset]


def test_each_model_meets_its_groups_of_attacks_and_the_fastest_come_first():
    jobs, groups = jobs_of("digits"), {}
    for job in jobs:
        assert (job.settings["budget"].images, job.settings["budget"].autoattack_images) == (40, 20)
        if job.settings["process"] is None:
            groups.setdefault(job.settings["model"], set()).add(job.settings["group"])
    purifiers = ("digits-diffpure", "digits-diffpure-at", "digits-consistency-at")
    assert all(groups[name] == set(GROUPS) for name in purifiers)
    assert groups["digits-standard"] == groups["digits-pgd-at"] == set(ALONE)
    assert groups["digits-carso-pipeline"] == groups["digits-atop-pipeline"] == {"exact"}
    assert {job.settings["model"] for job in jobs} <= set(zoo.list())
    order = [GROUPS.index(job.settings["group"]) for job in jobs]
    assert order == sorted(order) and sum(job.settings["process"] is not None for job in jobs) == 7
    colour = {job.settings["model"]: job.settings.get("first") for job in jobs_of("cifar10")}
    assert colour["cifar10-carso-pipeline-w16"] == 20 and colour["cifar10-diffpure-w16"] is None
    usual = jobs_of("cifar10")[0].settings["budget"]
    assert (usual.images, usual.autoattack_images, usual.steps, usual.eot, usual.draws) == (100, 10, 200, 20, 10)
    quick = jobs_of("cifar10", "quick")[0].settings["budget"]
    assert (quick.images, quick.autoattack_images) == (6, 3)


def test_the_committed_rows_and_tables_are_those_of_the_command(tmp_path):
    asked = {(job.name, job.settings["dataset"]): job.asked() for job in diffusion.jobs_of(chosen())}
    rows = json.loads((RESULTS / "diffusion.json").read_text())
    assert {(row["name"], row["dataset"]): row["asked"] for row in rows} == asked
    text = diffusion.write_tables(tmp_path, rows, "default").read_text()
    assert text == (RESULTS / "diffusion.md").read_text()


def test_the_attack_is_lee_and_kims_and_each_rule_counts_the_same_predictions():
    eps = lee_kim_2023(8 / 255).attack
    assert (eps.steps, eps.eot_iter, eps.random_start) == (200, 20, False) and eps.alpha == pytest.approx(0.007)
    classes = torch.tensor([[0, 1, 2], [0, 2, 2], [1, 1, 2]])
    assert told(classes, torch.tensor([0, 1, 0])) == {"draws": ["110", "100", "010"], "vote": "110"}


def test_an_attack_in_bfloat16_leaves_the_model_as_it_is_and_lowers_its_accuracy():
    (job,) = [job for job in jobs_of("digits") if job.name == "digits-diffpure exact"]
    # Without AVX512-BF16, a step takes nine times as long.
    budget = vars(job.settings["budget"]) | {"steps": 10, "eot": 3}
    settings = job.settings | {"budget": argparse.Namespace(**budget)}
    job = replace(job, settings=settings)
    x, y = (part[:8] for part in images_of(job))
    model = zoo.load("digits-diffpure")
    before = weights_fingerprint(model)
    found = found_by_pgd(model, x, y, settings)
    assert weights_fingerprint(model) == before and model.compute_dtype is None
    assert (found - x).abs().max() <= 0.1 + 1e-6 and found.min() >= 0 and found.max() <= 1
    right = [(predictions(model, each, 2, 5) == y).float().mean() for each in (x, found)]
    assert right[0] > 0.8 and right[1] <= right[0] - 0.1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*have no image:UserWarning")
def test_jobs_attack_and_predict(tmp_path, forking):
    names = ("digits-diffpure exact", "digits-diffpure fixed", "digits-diffpure authors")
    exact, fixed, authors = run([job for job in jobs_of("digits", "quick") if job.name in names], tmp_path)
    assert all(len(bits) == 6 for bits in (*exact["clean"]["draws"], exact["attacked"]["vote"]))
    assert len(exact["attacked"]["draws"]) == 2 and len(fixed["attacked"]["draws"]) == 1
    assert [row["kind"] for row in authors["rows"]] == ["pgd"] * 2


def test_the_tables_say_what_the_jobs_found(tmp_path):
    clean = {"draws": ["1111", "1110"], "vote": "1111"}
    row = {"attack": "as somebody", "kind": "pgd", "robust": "1110", "n": 4}
    groups = {
        "exact": {"clean": clean, "attacked": {"draws": ["1100", "1000"], "vote": "1100"}},
        "fixed": {"attacked": {"draws": ["0000"], "vote": "0000"}},
        "authors": {"rows": [row]},
    }
    rows = []
    for job in jobs_of("digits"):
        s = job.settings
        facts = {name: s[name] for name in ("dataset", "model", "group", "process", "eps")} | groups[s["group"]]
        few = s["model"] == "digits-carso-pipeline"
        rows.append(facts | {"name": job.name, "images": 2 if few else 4, "cpu_seconds": 8.0})
    lines = diffusion.write_tables(tmp_path, rows, "default").read_text().splitlines()
    assert "digits, 4 images, L-inf eps 0.1:" in lines
    split = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    told = {name: first for name, first, *_ in split}
    assert split[0][-2] == "`digits-carso-pipeline`, 2 images" and split[0][1] == "`digits-diffpure`"
    assert told["clean: mean of the draws"] == "87.5 ± 10.8" and told["as somebody"] == "75.0 ± 21.7 (4)"
    start = "PGD-200, EOT 20, exact: "
    rules = ("one draw", "mean of the draws", "every draw right", "majority", "one draw, fixed and known")
    assert [told[start + rule].split(" ")[0] for rule in rules] == ["50.0", "37.5", "25.0", "50.0", "0.0"]
    # the mean of its draws is right in 1, 1/2, 0, 0 of four images, as that of the classifier is
    assert told[f"{start}mean, minus `digits-pgd-at` alone"] == "+0.0 ± 0.0"
    assert told["CPU seconds of PGD-200 per image"] == "2.0" and len(split[0]) == 8
    assert sum("t_star 0.05" in line for line in lines) == 1


def test_differences_are_paired_on_the_first_images():
    assert diffusion.difference(np.array([1.0, 0.0]), np.array([0.0, 0.0, 1.0])) == "+50.0 ± 35.4"
    assert diffusion.share(None) == diffusion.difference(None, np.zeros(2)) == "-"
