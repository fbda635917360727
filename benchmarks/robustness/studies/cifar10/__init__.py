"""A study of CARSO, AToP and ARREST on CIFAR-10 at L-inf 8/255, compared with single networks."""

from __future__ import annotations

import argparse
from pathlib import Path

from purify_fast._validation import usable_device

from .. import Job, Study
from .job_list import clean_accuracy, jobs
from .study import Budget, budget_of
from .table import write

__all__ = ["Budget", "Cifar10", "budget_of", "clean_accuracy", "jobs", "write"]


class Cifar10(Study):
    """The study of CARSO, AToP and ARREST on CIFAR-10, compared with single networks."""

    name = "cifar10"
    #: The networks are large enough to use all cores, so the jobs run one after the other.
    workers = 1
    uses_autoattack = False

    def arguments(self, parser: argparse.ArgumentParser) -> None:
        super().arguments(parser)
        parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N; default: auto")

    def jobs(self, chosen: argparse.Namespace) -> list[Job]:
        return jobs(chosen.data, budget_of(chosen.amount), usable_device(chosen.device))

    def write(self, root: Path, folder: Path, chosen: argparse.Namespace) -> Path:
        return write(root, folder, budget_of(chosen.amount))
