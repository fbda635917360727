"""Who serves during a run: recorded with it, the same in all of its processes, and the same when it is resumed.

Kernels differ from their references in the last bits. So what decides who serves is read once, in the first process
when a run begins, and holds until the run ends, whatever is raced or verified on the machine meanwhile.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from . import races, verify
from .registry import REGISTRY, Op, forced_backends, forget


def kernel_choices(device: torch.device) -> dict[str, Any]:
    """What decides who serves on a device now, as JSON values; ``wrong`` has the kernels that are known to be.

    Args:
        device: where a run computes.
    """
    with_kernel = {name: op for name, op in REGISTRY.items() if op.kernel(device.type) != "reference"}
    verdicts = verify.known_verdicts(with_kernel, device) if verify.mode() != "off" else {}
    # without a GPU its races cannot be read, and nothing serves there
    here = device.type != "cuda" or torch.cuda.is_available()
    return {
        "device": device.type,
        "forced": list(forced_backends()),
        "kernels": {name: op.kernel(device.type) for name, op in with_kernel.items()},
        "wrong": sorted(name for name, verdict in verdicts.items() if not verdict.passed),
        "races": {name: races.decisive(op, device) for name, op in with_kernel.items()} if here else {},
    }


def _changes_bits(op: Op) -> bool:
    """Whether an op's kernel may differ from its reference in any bit."""
    return not all(example.exact for example in op.examples)


def choices_of_bits(choices: dict[str, Any]) -> dict[str, Any]:
    """What of `kernel_choices` changes bits of what is computed: that of ops whose kernels may differ from references.

    Which kernels are known to be wrong is left out. A kernel that is served has been verified, and the reference serves
    in place of a wrong one from its first use on, so that what a run computes does not depend on when that was learned.

    Args:
        choices: as `kernel_choices` gives them.
    """
    names = {name for name in choices["kernels"] if name in REGISTRY and _changes_bits(REGISTRY[name])}
    chosen = {
        what: {name: one for name, one in choices[what].items() if name in names} for what in ("kernels", "races")
    }
    return {what: choices[what] for what in ("device", "forced")} | chosen


def resume_choices(begun: dict[str, Any] | None, now: dict[str, Any]) -> tuple[dict[str, Any], list[str], list[str]]:
    """What decides in a run that goes on.

    Args:
        begun: `kernel_choices` when it began; None where that was not recorded, or it begins now.
        now: `kernel_choices` of today.

    Returns:
        What is to decide; ops that would be served by others today, but go on as they began; and in sentences what
        cannot go on as it began, because the kernels or the device are others.
    """
    if begun is None or begun == now:
        return now, [], []
    if begun["device"] != now["device"]:
        return now, [], [f"it began on {begun['device']} and goes on on {now['device']}: the last bits differ"]
    changes = []
    if begun["forced"] != now["forced"]:
        before, here = (", ".join(one["forced"]) or "none" for one in (begun, now))
        changes.append(f"it began with PURIFY_FAST_BACKEND {before}, and goes on with {here}")
    bits = {name for name, op in REGISTRY.items() if _changes_bits(op)}
    newly = {part.partition(" ")[0] for part in set(now["wrong"]) - set(begun["wrong"])}
    lost = [
        name for name, kernel in begun["kernels"].items()
        if name in bits and name not in begun["wrong"] and (now["kernels"].get(name) != kernel or name in newly)
    ]  # fmt: skip
    if lost:
        changes.append(f"the kernels of {', '.join(sorted(lost))} that it began with are not here, or are wrong here")
    choices = {**now, "races": begun["races"], "wrong": sorted({*begun["wrong"], *now["wrong"]})}
    names = begun["races"].keys() | now["races"].keys()
    others = {name for name in names if begun["races"].get(name) != now["races"].get(name)}
    others |= {part.partition(" ")[0] for part in set(begun["wrong"]) - set(now["wrong"])}
    return choices, sorted(others & bits), changes


@contextlib.contextmanager
def pin_kernels(choices: dict[str, Any]) -> Iterator[None]:
    """Within the block, and no longer, these choices hold; a kernel is verified at its first use as ever.

    Args:
        choices: as `kernel_choices` gives them.
    """
    kind = choices["device"]
    before = races.PINNED.get(kind)
    races.PINNED[kind] = choices
    forget()
    try:
        yield
    finally:
        races.PINNED.pop(kind)
        if before is not None:
            races.PINNED[kind] = before
        forget()
