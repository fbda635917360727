"""Command-line options that several commands share."""

from __future__ import annotations

from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Collection
from pathlib import Path

import torch

from purify_fast._files import usable_device

from . import RESULTS


def one_of(known: Collection[str]) -> Callable[[str], str]:
    """Return a function that reads a name, and refuses unknown names.

    argparse's parameter ``choices`` is not used, because it would also refuse an empty list of names.
    """

    def name(text: str) -> str:
        if text not in known:
            raise ArgumentTypeError(f"{text!r} is unknown. Choose from: {'; '.join(known)}")
        return text

    return name


def device(text: str) -> torch.device:
    """Read the name of a device, and refuse devices that this machine does not have."""
    try:
        return torch.device(usable_device(text))
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from error


def add_names(parser: ArgumentParser, known: Collection[str], option: str = "names", what: str = "which") -> None:
    """Add an option or a positional argument that takes some of the known names. The default is all known names."""
    text = f"{what}; default: all. Names: {'; '.join(known)}"
    # An option needs at least one name after it. A positional argument may be left out.
    count = "+" if option.startswith("-") else "*"
    parser.add_argument(option, nargs=count, default=list(known), metavar="NAME", type=one_of(known), help=text)


def add_out(parser: ArgumentParser, where: str, quick: bool = True) -> None:
    """Add ``--out`` for the folder of the results, and ``--quick`` for a short trial whose numbers mean nothing."""
    if quick:
        text = "a short trial on small inputs; its numbers mean nothing"
        parser.add_argument("--quick", action="store_true", help=text)
    parser.add_argument("--out", type=Path, help=f"folder for the results; default: benchmarks/results{where}")


def out_of(chosen: Namespace, trial: bool, name: str) -> Path:
    """Return the folder for the results: the folder of ``--out``, or else a folder in benchmarks/results.

    Without ``--out``, a trial writes into runs/benchmarks, so that it does not overwrite committed results.
    """
    return chosen.out or (Path("runs/benchmarks") if trial else RESULTS) / name


def add_device(parser: ArgumentParser) -> None:
    """Add the option ``--device``, which is a CPU by default."""
    parser.add_argument("--device", type=device, default="cpu", help="cpu or cuda; default: cpu")
