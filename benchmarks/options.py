"""Readers of the commands' options, and the error of those that do not fit; argparse reports what is wrong."""

from __future__ import annotations

from argparse import ArgumentTypeError
from collections.abc import Callable, Iterable

import torch

from purify_fast.cli.command import usable_device


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


def one_of(names: Iterable[str]) -> Callable[[str], str]:
    """Make a reader of one of the names; argparse's own choices refuse an empty list."""
    known = list(names)

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
