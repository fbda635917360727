"""How options of the commands are read; argparse tells what is wrong with them."""

from __future__ import annotations

from argparse import ArgumentTypeError
from collections.abc import Callable, Iterable

import torch

from purify_fast.cli.command import usable_device


def at_least_one(text: str) -> int:
    """A whole number of which there must be one."""
    if (number := int(text)) < 1:
        raise ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def seconds(text: str) -> float:
    """A time above 0."""
    if not (number := float(text)) > 0:
        raise ArgumentTypeError(f"must be above 0, got {number:g}")
    return number


def one_of(names: Iterable[str]) -> Callable[[str], str]:
    """Reads one of the names; argparse's own choices refuse that none is given."""
    known = list(names)

    def name(text: str) -> str:
        if text not in known:
            raise ArgumentTypeError(f"there is no {text!r}; there are {'; '.join(known)}")
        return text

    return name


def device(text: str) -> torch.device:
    """A device of this machine."""
    try:
        return torch.device(usable_device(text))
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from error
