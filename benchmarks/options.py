"""Command-line options that several commands share, and the error for options that cannot be used."""

from __future__ import annotations

import math
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Collection
from pathlib import Path

import torch

from purify_fast.cli.command import usable_device

from . import RESULTS


class Unfit(ValueError):
    """The options contradict each other, or contradict existing files. argparse prints the message."""


def at_least_one(text: str) -> int:
    """Read a whole number that is at least 1."""
    if (number := int(text)) < 1:
        raise ArgumentTypeError(f"must be a whole number of at least 1; it is {number}")
    return number


def seconds(text: str) -> float:
    """Read a number of seconds or minutes, which must be above 0."""
    if not (number := float(text)) > 0:
        raise ArgumentTypeError(f"must be a number above 0; it is {number:g}")
    return number


def one_of(known: Collection[str]) -> Callable[[str], str]:
    """Make a reader that accepts only the known names. The choices of argparse would refuse an empty list of names."""

    def name(text: str) -> str:
        if text not in known:
            raise ArgumentTypeError(f"{text!r} is unknown. Choose from: {'; '.join(known)}")
        return text

    return name


def device(text: str) -> torch.device:
    """Read the name of a device that this machine has."""
    try:
        return torch.device(usable_device(text))
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from error


def add_names(parser: ArgumentParser, known: Collection[str], option: str = "names", what: str = "which") -> None:
    """Add an option that takes some of the known names. All of them are the default."""
    text = f"{what}; default: all. Names: {'; '.join(known)}"
    # An option without a name is an error. Positional names may be left out.
    count = "+" if option.startswith("-") else "*"
    parser.add_argument(option, nargs=count, default=list(known), metavar="NAME", type=one_of(known), help=text)


def add_out(parser: ArgumentParser, where: str) -> None:
    """Add ``--out``, the folder for the results, and ``--quick``, a short trial whose numbers mean nothing."""
    parser.add_argument("--quick", action="store_true", help="a short trial on small inputs; its numbers mean nothing")
    parser.add_argument("--out", type=Path, help=f"folder for the results; default: benchmarks/results{where}")


def out_of(chosen: Namespace, trial: bool, name: str) -> Path:
    """Return the folder for the results. Without --out a trial writes to runs/, so that committed results remain.

    Args:
        chosen: options of a command that has the options of `add_out`.
        trial: True for a trial, whose numbers mean nothing.
        name: name of the usual folder in benchmarks/results.
    """
    return chosen.out or (Path("runs/benchmarks") if trial else RESULTS) / name


def add_device(parser: ArgumentParser) -> None:
    """Add ``--device``."""
    parser.add_argument("--device", type=device, default="cpu", help="cpu or cuda; default: cpu")


def add_minutes(parser: ArgumentParser) -> None:
    """Add ``--minutes``."""
    text = "time limit; work that would probably exceed the limit is not started; default: no limit"
    parser.add_argument("--minutes", type=seconds, default=math.inf, help=text)
