"""Options that several commands have, and the error of options that do not fit; argparse reports what is wrong."""

from __future__ import annotations

import math
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Collection
from pathlib import Path

import torch

from purify_fast.cli.command import usable_device

from . import RESULTS


class Unfit(ValueError):
    """Existing files or settings do not fit the request."""


def at_least_one(text: str) -> int:
    """Read a whole number that is at least 1."""
    if (number := int(text)) < 1:
        raise ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def seconds(text: str) -> float:
    """Read a time above 0."""
    if not (number := float(text)) > 0:
        raise ArgumentTypeError(f"must be above 0, got {number:g}")
    return number


def one_of(known: Collection[str]) -> Callable[[str], str]:
    """Make a reader of one of the names; argparse's own choices refuse an empty list."""

    def name(text: str) -> str:
        if text not in known:
            raise ArgumentTypeError(f"there is no {text!r}; there are {'; '.join(known)}")
        return text

    return name


def device(text: str) -> torch.device:
    """Read a device of this machine."""
    try:
        return torch.device(usable_device(text))
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from error


def add_names(parser: ArgumentParser, known: Collection[str], option: str = "names", what: str = "which") -> None:
    """Add an option that takes some of the known names, all by default."""
    text = f"{what}; all by default: {'; '.join(known)}"
    parser.add_argument(option, nargs="*", default=list(known), metavar="NAME", type=one_of(known), help=text)


def add_out(parser: ArgumentParser, where: str) -> None:
    """Add ``--out``, the folder for the results, and ``--quick``, a trial without numbers."""
    parser.add_argument("--quick", action="store_true", help="a short trial on small inputs; no numbers")
    parser.add_argument("--out", type=Path, help=f"folder for the results; benchmarks/results{where} by default")


def out_of(chosen: Namespace, trial: bool, name: str) -> Path:
    """The folder for the results; a trial must not replace the committed results.

    Args:
        chosen: options of a command, with those of `add_out`.
        trial: whether the results are a trial's.
        name: name of the usual folder in benchmarks/results.
    """
    return chosen.out or (Path("runs/benchmarks") if trial else RESULTS) / name


def add_device(parser: ArgumentParser) -> None:
    """Add ``--device``."""
    parser.add_argument("--device", type=device, default="cpu", help="cpu or cuda; cpu by default")


def add_minutes(parser: ArgumentParser) -> None:
    """Add ``--minutes``."""
    text = "begin nothing that would probably end later"
    parser.add_argument("--minutes", type=seconds, default=math.inf, help=text)
