"""A study of CARSO, AToP and ARREST on CIFAR-10 at L-inf 8/255, compared with single networks.

The defences are trained with the objectives of the papers, and through the pipeline. The module `models` trains the
models. `job_list` lists the jobs, and evaluates the models by the protocols of this package. `results` collects the
numbers, and `table` makes the page.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from purify_fast import zoo
from purify_fast.cli.command import usable_device

from .. import Job, Study
from .job_list import clean_accuracy, jobs
from .results import GIVEN, STEM, check_budget
from .study import Budget, budget_of
from .table import write

__all__ = ["Budget", "Cifar10", "budget_of", "clean_accuracy", "jobs", "write"]


class Cifar10(Study):
    """The study of CARSO, AToP and ARREST on CIFAR-10, compared with single networks."""

    name = dataset = "cifar10"
    #: The networks are large enough to use all cores, so the jobs run one after the other.
    workers = 1

    def arguments(self, parser: argparse.ArgumentParser) -> None:
        super().arguments(parser)
        parser.add_argument(
            "--width",
            type=int,
            help="channels of the networks' first stage; default: 16, or 64 with --full. Only at the default width the "
            "larger base has the size of base and purifier together.",
        )
        parser.add_argument(
            "--base",
            metavar="NAME",
            help="use this classifier of the zoo as the base. Then only AToP, ARREST and a new standard classifier are "
            "trained, and they have a separate table.",
        )
        parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N; default: auto")
        parser.add_argument("--so-far", action="store_true", help="train nothing; write the table of the finished jobs")

    def begin(self, root: Path, folder: Path, chosen: argparse.Namespace) -> None:
        # Refuse results of another budget now. Otherwise the study would fail hours later, when it writes the table.
        check_budget(folder, self.budget(chosen), STEM if chosen.base is None else GIVEN)
        if chosen.base is not None:
            zoo.card(chosen.base)

    def budget(self, chosen: argparse.Namespace) -> Budget:
        usual = budget_of(chosen.amount)
        return usual if chosen.width is None else usual.of_width(chosen.width)

    def is_whole(self, chosen: argparse.Namespace) -> bool:
        return self.budget(chosen) == budget_of("default")

    def variant(self, chosen: argparse.Namespace) -> str:
        budget = self.budget(chosen)
        width = "" if budget == budget_of(chosen.amount) else f"-width-{chosen.width}"
        return super().variant(chosen) + width + ("" if chosen.base is None else f"-on-{chosen.base}")

    def jobs(self, chosen: argparse.Namespace) -> list[Job]:
        return jobs(chosen.data, self.budget(chosen), usable_device(chosen.device), chosen.base)

    def write(self, root: Path, folder: Path, chosen: argparse.Namespace) -> Path:
        """Write the page of the study. With ``--base``, write the page of the rows that have this base."""
        return write(root, folder, self.budget(chosen), chosen.base)
