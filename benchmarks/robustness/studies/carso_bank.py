"""The study of a bank of adversarial images: CARSO on MNIST with the paper's objective, with and without a bank."""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from purify_fast import load_defence
from purify_fast._files import write_text
from purify_fast.evaluation import evaluate
from purify_fast.methods.carso.config import atom_size
from purify_fast.training.classifier import load_classifier

from . import Job, settings_of, write_page
from .carso_mnist import CLASSIFIER, EPS, images_of, train_classifier, train_purifier

NAME, MODEL = "carso_bank", "model"


def train(job: Job, folder: Path, root: Path) -> dict[str, Any]:
    """Train a purifier. Return the time of the training, and the number of images that it attacked."""
    # An interrupted training begins again, with an empty bank, so that the time is that of the whole training.
    shutil.rmtree(folder / MODEL, ignore_errors=True)
    began = time.process_time()
    train_purifier(job, folder / MODEL, root)
    spent = time.process_time() - began
    log = json.loads((folder / MODEL / "log.jsonl").read_text().splitlines()[-1])
    every = 4 * atom_size(job.settings["budget"].objective["batch_size"], 0.5) * log["step"]
    attacked = log["bank"]["made"] if "bank" in log else every
    return {"epochs": log["epoch"] + 1, "attacked": attacked, "of": every, "cpu_seconds": round(spent, 1)}


def judge(job: Job, folder: Path, root: Path) -> dict[str, Any]:
    """Attack the deployed defence of a training by the protocol. Return the accuracies, and the training's result."""
    images, trained = images_of(job), job.settings["trained"]
    defence = load_defence(job.folder(root, trained) / MODEL, load_classifier(job.folder(root, CLASSIFIER)))
    amount = {"seed": job.seed, "progress": False, "name": trained} | job.settings["judging"]
    report = evaluate(defence, images.x_test, images.y_test, eps=EPS, **amount)
    clean, worst = report.row("clean"), report.row("worst")
    found = {"images": worst.n, "clean": clean.accuracy, "worst": worst.accuracy, "reliable": worst.reliable}
    return {"trained": trained} | found | {"training": job.result(root, trained)}


def jobs_of(chosen: argparse.Namespace) -> list[Job]:
    """Return, for each seed, the training of a classifier, and the trainings and evaluations of all variants."""
    settings, jobs = settings_of(NAME)[chosen.amount], list[Job]()
    for seed in range(settings["seeds"]):
        base = {"data": chosen.data, "budget": SimpleNamespace(**settings["classifier"])}
        jobs.append(Job(CLASSIFIER, seed, train_classifier, (), base))
        for name, other in settings["variants"].items():
            own = settings["purifier"] | {"objective": settings["purifier"]["objective"] | other}
            shared = {"data": chosen.data, "budget": SimpleNamespace(**own)}
            judging = shared | {"trained": name, "judging": settings["judging"]}
            jobs.append(Job(name, seed, train, (CLASSIFIER,), shared))
            jobs.append(Job(f"{name}, judged", seed, judge, (CLASSIFIER, name), judging))
    return jobs


def write_results(root: Path, folder: Path, chosen: argparse.Namespace) -> Path:
    """Write ``carso_bank.json`` with the results of all jobs, and the page ``carso_bank.md``."""
    rows = [job.result(root) for job in jobs_of(chosen) if job.work is judge]
    write_text(folder / f"{NAME}.json", json.dumps(rows, indent=1) + "\n")
    return write_page(folder, NAME, rows=rows, s=settings_of(NAME)[chosen.amount])
