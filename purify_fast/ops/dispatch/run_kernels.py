"""Keeps the choice of kernels the same during a run: the kernels in use at its start are used until it ends.

A kernel and its reference differ in the last bits. So the first process reads the results of the races once, when a run
begins (`kernels_now`). All processes use these results for the whole run, even if kernels are raced on the machine in
the meantime (`keep_kernels`). A training stores the results in its folder, and reads them from there when it is
resumed.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import torch

from . import races
from .registry import REGISTRY, forced_backends, forget_choices

logger = logging.getLogger("purify_fast")


def kernels_now(device: torch.device) -> dict[str, Any]:
    """Return the kernels that may change the bits of results on a device, and their races, as JSON values.

    The results of verifications are not included. Every kernel in use has been verified, and the reference replaces a
    wrong kernel from its first use on. So the results of a run do not depend on when a kernel was found to be wrong.

    Args:
        device: the device on which a run computes.
    """
    # Without a GPU the races of its kernels cannot be read, and none of the kernels is used.
    here = device.type != "cuda" or torch.cuda.is_available()
    ops = {
        name: {"kernel": op.kernel(device.type), "races": races.winners(op, device) if here else []}
        for name, op in REGISTRY.items()
        if op.kernel(device.type) != "reference" and not all(example.exact for example in op.examples)
    }
    return {"device": device.type, "forced": list(forced_backends()), "ops": ops}


@contextlib.contextmanager
def keep_kernels(kernels: dict[str, Any]) -> Iterator[None]:
    """Within the block, choose backends only by the given races. A kernel is still verified at its first use.

    Args:
        kernels: the value of `kernels_now`.
    """
    before, races.of_run = races.of_run, kernels
    forget_choices()
    try:
        yield
    finally:
        races.of_run = before
        forget_choices()


def tell_changes(begun: dict[str, Any], now: dict[str, Any]) -> None:
    """Warn if a resumed run cannot repeat its results. Log the ops for which other backends would be chosen today.

    Args:
        begun: value of `kernels_now` when the run began.
        now: value of `kernels_now` today.
    """

    def differing(what: str) -> str:
        before, today = ({name: op[what] for name, op in one["ops"].items()} for one in (begun, now))
        return ", ".join(sorted(name for name in before.keys() | today.keys() if before.get(name) != today.get(name)))

    changes = [
        f"{what} was {begun[what]} and is {now[what]}" for what in ("device", "forced") if begun[what] != now[what]
    ]
    if begun["device"] == now["device"] and (lost := differing("kernel")):
        changes.append(f"the kernels of {lost} are not those with which the run began")
    if changes:
        warnings.warn(
            f"this run will not repeat its results exactly: {'; '.join(changes)}", RuntimeWarning, stacklevel=2
        )
    elif raced := differing("races"):
        logger.warning(
            "this run continues with the kernels with which it began. A new run would use other kernels for %s: to use "
            "those, begin a run in another folder",
            raced,
        )
