"""``python -m benchmarks study NAME``: run or resume a study, and write its tables."""

from __future__ import annotations

import argparse
from pathlib import Path

from purify_fast import data
from purify_fast._files import folder_lock
from purify_fast.attacks.original_autoattack import implementation

from ... import RESULTS as ALL
from ...options import at_least_one
from . import Study, run
from .arrest_mnist import ArrestMnist
from .atop_digits import AtopDigits
from .atop_mnist import AtopMnist
from .carso_digits import CarsoDigits
from .carso_mnist import CarsoMnist
from .carso_resnet18 import CarsoResnet18
from .cifar10 import Cifar10
from .diffusion_study import Diffusion

EVERY = (CarsoDigits, CarsoMnist, CarsoResnet18, Cifar10, AtopDigits, AtopMnist, ArrestMnist, Diffusion)
STUDIES: dict[str, Study] = {study.name: study() for study in EVERY}
RESULTS = ALL / "studies"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add a parser for each study, with its own and the common options."""
    studies = parser.add_subparsers(dest="name", required=True, metavar="NAME")
    for name, study in STUDIES.items():
        options = studies.add_parser(name, help=study.__doc__)
        options.set_defaults(data="data", so_far=False, amount="default")
        study.arguments(options)
        amounts = options.add_mutually_exclusive_group()
        for amount, text in study.amounts.items():
            amounts.add_argument(f"--{amount}", dest="amount", action="store_const", const=amount, help=text)
        options.add_argument(
            "--workers",
            type=at_least_one,
            default=study.workers,
            help=f"jobs side by side; {study.workers} by default",
        )
        options.add_argument("--out", type=Path, help="folder of the runs; runs/studies/NAME by default")


def check(chosen: argparse.Namespace) -> None:
    """Raise errors that would stop the study later.

    Raises:
        ValueError: an option does not fit. FileNotFoundError: there is no data. ModuleNotFoundError: AutoAttack or a
            package for the data is missing.
    """
    study = STUDIES[chosen.name]
    study.check(chosen, places(chosen)[1])
    if chosen.so_far:
        return
    if study.uses_autoattack:
        implementation()
    data.load_dataset(study.dataset, chosen.data)


def main(chosen: argparse.Namespace) -> str:
    """Run unfinished jobs; return the page of tables. The tables go to benchmarks/results/studies; tables of other
    budgets or widths, of some rows or of fewer seeds go to the runs' folder."""
    study = STUDIES[chosen.name]
    root, results = places(chosen)
    if chosen.so_far:
        # Take no lock, since the study may be running: this only reads the folders of its jobs.
        return study.write(root, results, chosen).read_text()
    with folder_lock(root):
        study.begin(root, results, chosen)
        run(study.jobs(chosen), root, chosen.workers, lambda: study.after_each(root, results, chosen))
        return study.write(root, results, chosen).read_text()


def places(chosen: argparse.Namespace) -> tuple[Path, Path]:
    """The folder of the runs, and that of the tables."""
    study = STUDIES[chosen.name]
    root = chosen.out or Path("runs/studies") / f"{chosen.name}{study.variant(chosen)}"
    return root, RESULTS if study.is_whole(chosen) else root
