"""Who serves during a run: recorded with it, the same in all of its processes, and the same when it is resumed.

Kernels differ from their references in the last bits. So what decides who serves is read once, in the first process
when a run begins, and holds until it ends, whatever is raced or found out on the machine meanwhile.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from . import _races, _verify
from ._examples import of
from ._op import REGISTRY, Op, forced_backends, forget


def decisions(device: torch.device) -> dict[str, Any]:
    """What decides who serves on a device now, as JSON values; of the kernels those are wrong that are known to be.

    Args:
        device: where a run computes.
    """
    having = {name: op for name, op in REGISTRY.items() if op.kernel(device.type) != "reference"}
    known = _verify.kept_verdicts(device) if _verify.mode() != "off" else {}
    # without a GPU its races cannot be read, and nothing serves there
    here = device.type != "cuda" or torch.cuda.is_available()
    digests = {name: op.sources_digest(device.type) for name, op in having.items()}
    return {
        "device": device.type,
        "forced": list(forced_backends()),
        "kernels": {name: op.kernel(device.type) for name, op in having.items()},
        "wrong": sorted(name for name, one in known.items() if not one.passed),
        "races": _races.entries(digests, device) if here else {},
    }


def _changes_bits(op: Op) -> bool:
    """Whether an op's kernel may differ from its reference in any bit."""
    return not all(example.exact for example in of(op.name))


def changing_bits(decided: dict[str, Any]) -> dict[str, Any]:
    """What of `decisions` changes bits of what is computed: that of ops whose kernels may differ from the reference.

    Which kernels are known to be wrong is left out. A kernel that is served has been verified, and the reference serves
    in place of a wrong one from its first use on, so that what a run computes does not depend on when that was found.

    Args:
        decided: as `decisions` gives it.
    """
    bits = {name for name in decided["kernels"] if name in REGISTRY and _changes_bits(REGISTRY[name])}
    chosen = {what: {name: one for name, one in decided[what].items() if name in bits} for what in ("kernels", "races")}
    return {what: decided[what] for what in ("device", "forced")} | chosen


def as_begun(begun: dict[str, Any] | None, now: dict[str, Any]) -> tuple[dict[str, Any], list[str], list[str]]:
    """What decides in a run that goes on.

    Args:
        begun: `decisions` when it began; None where that was not recorded, or it begins now.
        now: `decisions` of today.

    Returns:
        What is to decide; ops that would be served by others today, but go on as they began; and in sentences what
        cannot go on as it began, because the kernels or the device are others.
    """
    if begun is None or begun == now:
        return now, [], []
    if begun["device"] != now["device"]:
        return now, [], [f"it began on {begun['device']} and goes on on {now['device']}: the last bits differ"]
    told = []
    if begun["forced"] != now["forced"]:
        before, here = (", ".join(one["forced"]) or "none" for one in (begun, now))
        told.append(f"it began with PURIFY_FAST_BACKEND {before}, and goes on with {here}")
    bits = {name for name, op in REGISTRY.items() if _changes_bits(op)}
    newly = {part.partition(" ")[0] for part in set(now["wrong"]) - set(begun["wrong"])}
    lost = [
        name for name, kernel in begun["kernels"].items()
        if name in bits and name not in begun["wrong"] and (now["kernels"].get(name) != kernel or name in newly)
    ]  # fmt: skip
    if lost:
        told.append(f"the kernels of {', '.join(sorted(lost))} that it began with are not here, or are wrong here")
    decided = {**now, "races": begun["races"], "wrong": sorted({*begun["wrong"], *now["wrong"]})}
    names = begun["races"].keys() | now["races"].keys()
    other = {name for name in names if begun["races"].get(name) != now["races"].get(name)}
    other |= {part.partition(" ")[0] for part in set(begun["wrong"]) - set(now["wrong"])}
    return decided, sorted(other & bits), told


@contextlib.contextmanager
def held(decided: dict[str, Any]) -> Iterator[None]:
    """Within the block, and no longer, these decisions hold; a kernel is verified at its first use as ever.

    Args:
        decided: as `decisions` gives them.
    """
    kind = decided["device"]
    with _races.held(kind, decided["races"]), _verify.agreed(decided["wrong"], kind):
        forget()
        try:
            yield
        finally:
            forget()
