"""Run or resume a study, and write its tables: ``python -m benchmarks study NAME``."""

from __future__ import annotations

import argparse
from pathlib import Path

from purify_fast._files import folder_lock
from purify_fast.judge.searches.original_autoattack import implementation

from ... import RESULTS as ALL
from . import carso_mnist, run, settings_of

STUDIES = {"carso_mnist": carso_mnist}
RESULTS = ALL / "studies"
#: The budgets other than the default, of which a study has those that settings.yaml gives it.
AMOUNTS = {
    "full": "use the full budget, which takes days instead of an hour",
    "quick": "run everything in a minute or two; the numbers mean nothing",
}


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add a subparser for each study."""
    studies = parser.add_subparsers(dest="name", required=True, metavar="NAME")
    for name, study in STUDIES.items():
        options = studies.add_parser(name, help=study.__doc__)
        options.set_defaults(amount="default")
        amounts = options.add_mutually_exclusive_group()
        for amount in sorted(AMOUNTS.keys() & settings_of(name).keys()):
            amounts.add_argument(f"--{amount}", dest="amount", action="store_const", const=amount, help=AMOUNTS[amount])
        options.add_argument("--data", default="data", help="folder of the images; default: data")
        options.add_argument("--out", type=Path, help="folder of the runs; default: runs/studies/NAME")


def main(chosen: argparse.Namespace) -> str:
    """Run the unfinished jobs, and return the page with the tables.

    The tables are written to benchmarks/results/studies if the run has the usual budget. The tables of other
    runs are written to the folder of the runs.
    """
    study = STUDIES[chosen.name]
    root, results = places(chosen)
    # Without AutoAttack, nothing is trained.
    implementation()
    with folder_lock(root):
        run(study.jobs_of(chosen), root)
        return study.write_results(root, results, chosen).read_text()


def places(chosen: argparse.Namespace) -> tuple[Path, Path]:
    """Return the folder of the runs, and the folder of the tables."""
    usual = chosen.amount == "default"
    root = chosen.out or Path("runs/studies") / (chosen.name if usual else f"{chosen.name}-{chosen.amount}")
    return root, RESULTS if usual else root
