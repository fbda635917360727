"""``python -m benchmarks study NAME``: run a study, or go on with it, and write its tables."""

from __future__ import annotations

import argparse
from pathlib import Path

from . import carso_digits, carso_mnist, carso_resnet18, run, tables

STUDIES = ("carso_digits", "carso_mnist", "carso_resnet18")
RESULTS = Path(__file__).parents[1] / "results" / "studies"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", choices=STUDIES)
    parser.add_argument("--data", default="data", help="the folder that holds mnist.npz or cifar10.npz")
    parser.add_argument("--full", action="store_true", help="the full budgets: days rather than an hour")
    parser.add_argument("--quick", action="store_true", help="the same path in a minute or two, no numbers")
    parser.add_argument("--seeds", type=int, default=3, help="of the digits study")
    parser.add_argument("--rows", nargs="*", metavar="ROW", help="only these rows of the digits study, and their needs")
    parser.add_argument("--workers", type=int, default=2, help="jobs side by side, one thread each")
    parser.add_argument("--out", type=Path, help="where the runs are kept; runs/studies/NAME by default")


def main(chosen: argparse.Namespace) -> Path:
    """Run what is not done yet; tables go to benchmarks/results/studies, those of other budgets to the runs' folder."""
    kind = "-quick" if chosen.quick else "-full" if chosen.full else ""
    root = chosen.out or Path("runs/studies") / f"{chosen.name}{kind}"
    results = root if kind else RESULTS
    if chosen.name == "carso_digits":
        jobs = carso_digits.jobs(chosen.seeds, chosen.quick, chosen.rows)
        return tables.write(run(jobs, root, chosen.workers), results, chosen.name)
    study = carso_mnist if chosen.name == "carso_mnist" else carso_resnet18
    budget = study.QUICK if chosen.quick else study.FULL if chosen.full else study.Budget()
    workers = chosen.workers if study is carso_mnist else 1  # the ResNet uses every core by itself
    run(study.jobs(chosen.data, budget=budget), root, workers)
    return study.write(chosen.data, root, results, budget=budget)
