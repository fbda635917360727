"""Run or resume a study, and write its tables: ``python -m benchmarks study NAME``."""

from __future__ import annotations

import argparse
from pathlib import Path

from purify_fast._files import folder_lock
from purify_fast.attacks.original_autoattack import implementation

from ... import RESULTS as ALL
from . import Study, run
from .carso_mnist import CarsoMnist
from .cifar10 import Cifar10
from .diffusion import Diffusion

STUDIES: dict[str, Study] = {study.name: study() for study in (CarsoMnist, Cifar10, Diffusion)}
RESULTS = ALL / "studies"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add a subparser for each study, with the options of this study and the common options."""
    studies = parser.add_subparsers(dest="name", required=True, metavar="NAME")
    for name, study in STUDIES.items():
        options = studies.add_parser(name, help=study.__doc__)
        options.set_defaults(data="data", amount="default")
        study.arguments(options)
        amounts = options.add_mutually_exclusive_group()
        for amount, text in study.amounts.items():
            amounts.add_argument(f"--{amount}", dest="amount", action="store_const", const=amount, help=text)
        options.add_argument(
            "--workers",
            type=int,
            default=study.workers,
            help=f"number of jobs that run in parallel; default: {study.workers}",
        )
        options.add_argument("--out", type=Path, help="folder of the runs; default: runs/studies/NAME")


def main(chosen: argparse.Namespace) -> str:
    """Run the unfinished jobs, and return the page with the tables.

    The tables are written to benchmarks/results/studies if the run has the usual budget. The tables of other
    runs are written to the folder of the runs.

    Raises:
        ModuleNotFoundError: the study needs AutoAttack, which is not installed.
    """
    study = STUDIES[chosen.name]
    root, results = places(chosen)
    if study.uses_autoattack:
        implementation()
    with folder_lock(root):
        study.begin(root, results, chosen)
        run(study.jobs(chosen), root, chosen.workers, lambda: study.after_each(root, results, chosen))
        return study.write(root, results, chosen).read_text()


def places(chosen: argparse.Namespace) -> tuple[Path, Path]:
    """Return the folder of the runs, and the folder of the tables."""
    usual = chosen.amount == "default"
    root = chosen.out or Path("runs/studies") / (chosen.name if usual else f"{chosen.name}-{chosen.amount}")
    return root, RESULTS if usual else root
