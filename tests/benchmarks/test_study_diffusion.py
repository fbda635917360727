"""The study of diffusion purifiers: the jobs that the tables need, and what the tables say of them."""

import argparse
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.robustness.studies import diffusion, run
from benchmarks.robustness.studies.diffusion import found_by_pgd, images_of, predictions, told
from benchmarks.robustness.studies.run_study import RESULTS
from purify_fast import zoo
from purify_fast._hashes import weights_fingerprint
from purify_fast.evaluation import lee_kim_2023


def chosen(amount="default"):
    return argparse.Namespace(data="nowhere", amount=amount)


def jobs_of(dataset, amount="default"):
    return [job for job in diffusion.jobs_of(chosen(amount)) if job.settings["dataset"] == dataset]


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


def test_differences_are_paired_on_the_first_images():
    assert diffusion.difference(np.array([1.0, 0.0]), np.array([0.0, 0.0, 1.0])) == "+50.0 ± 35.4"
    assert diffusion.share(None) == diffusion.difference(None, np.zeros(2)) == "-"
