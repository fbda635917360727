"""Which backend was measured ahead, for eager calls and inside compiled graphs.

Two kinds of files say so, in one form: the user's own for this machine, in the folder of `_verdicts`, and
``races.json`` beside this module for machines that were measured with the benchmarks. The user's comes first. It also
holds hashes of the ops' sources, and what it says of other sources is not used. Of those that ship, the one of the same
device counts, else of the same instruction set, and for a CPU else the first: a kernel that was ahead on one CPU is
ahead on most.

A file has an entry for each op. It names the winners of eager calls and inside graphs, for the op as a whole, for each
of its ``variants``, and in ``cells`` for each variant, dtype and size that was raced. The narrowest that knows a call
decides. `_tune` writes such a file.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import _files
from . import _verdicts

logger = logging.getLogger("purify_fast")

SHIPPED = Path(__file__).with_name("races.json")


@dataclass(frozen=True)
class Winner:
    """Who won a race.

    Attributes:
        backend: the fastest that is right, in all that was measured.
        why: where and when it was measured, in words.
        gain: how many times as fast the kernel was as its reference, in words; empty where that was not kept.
    """

    backend: str
    why: str
    gain: str = ""


@dataclass(frozen=True)
class Call:
    """What of a call decides who serves it.

    Attributes:
        variant: a setting of the op that was raced on its own, or the empty string.
        dtype: None where what serves every dtype is asked for.
        bits: how many bits the number of elements has; 0 where what serves every size is asked for.
    """

    variant: str = ""
    dtype: torch.dtype | None = None
    bits: int = 0

    def cell(self) -> str:
        """The name of its cell in a file."""
        return cell(self.variant, self.dtype, size_of(self.bits))


#: The sizes that are raced, and the least number of bits of a number of elements that is beyond each: 2 ** 16 elements
#: are more than small, 2 ** 20 are large.
SIZES = {"small": 17, "medium": 21, "large": 1000}


def size_of(bits: int) -> str:
    """The bucket of a number of elements by its bits; empty where they are not known, which are 0."""
    return next(name for name, end in SIZES.items() if bits < end) if bits else ""


def cell(variant: str, dtype: torch.dtype | None, size: str) -> str:
    """How a file names the calls of a variant, a dtype and a size."""
    return " ".join(filter(None, (variant, str(dtype).removeprefix("torch.") if dtype else "", size)))


@functools.cache
def shipped() -> tuple[dict[str, Any], ...]:
    """The machines that were measured with the benchmarks."""
    return tuple(json.loads(SHIPPED.read_text(encoding="utf-8")))


def file_of(device: torch.device) -> Path:
    """The user's own file for a device."""
    path = _verdicts.file_of(device)
    return path.with_name(path.name.replace("verified-", "raced-"))


@functools.cache
def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        logger.warning("%s cannot be read (%s) and is not used", path, error)
        return {}


# once per process: after an upgrade it is so of most ops
@functools.cache
def _say_stale(path: Path) -> None:
    logger.warning(
        "%s is of other sources of some ops, or of another machine, and is not used for them: run `purify-fast tune` "
        "again; `purify-fast info --all` names them",
        path,
    )


def forget() -> None:
    """Read the files again when they are next needed."""
    _read.cache_clear()
    _say_stale.cache_clear()


def nearest(facts: dict[str, str], among: Sequence[dict[str, Any]] | None = None) -> dict[str, Any] | None:
    """The measured machine that is most like this one; None if none is like it.

    Args:
        facts: what this machine is.
        among: the measured machines; those that ship by default.
    """
    same = [one for one in (shipped() if among is None else among) if one["machine"]["kind"] == facts["kind"]]
    for what in ("device", "capability"):
        for one in same:
            if one["machine"].get(what) == facts[what]:
                return one
    return same[0] if same and facts["kind"] == "cpu" else None


def reported(entry: dict[str, Any], style: str, call: Call) -> str | None:
    """The backend that a file's entry of an op names for a call; None where it names none.

    Args:
        entry: the op's, in a file of races.
        style: ``eager`` or ``graph``.
        call: who serves it is asked.
    """
    for found in (
        entry.get("cells", {}).get(call.cell(), {}),
        entry.get("variants", {}).get(call.variant, {}),
        entry,
    ):
        if found.get(style):
            return found[style]
    return None


#: By kind of device, what holds in place of the files; see `held`.
_held: dict[str, dict[str, Any]] = {}


@contextlib.contextmanager
def held(kind: str, ops: dict[str, Any]) -> Iterator[None]:
    """Within the block these entries hold, whatever the files say.

    Args:
        kind: of the devices that they are about.
        ops: entries by op, as `entries` gives them.
    """
    before = dict(_held)
    _held[kind] = ops
    try:
        yield
    finally:
        _held.clear()
        _held.update(before)


#: What of an entry decides.
_DECIDE = ("eager", "graph", "variants", "cells")


def _mine(op: str, sources: str, device: torch.device) -> dict[str, Any] | None:
    """The user's entry of an op; None where there is none, or a stale one."""
    path = file_of(device)
    own = _read(path)
    if op not in own.get("ops", {}):
        return None
    if own.get("machine") == _verdicts.machine(device) and own["ops"][op].get("sources") == sources:
        return own["ops"][op]
    _say_stale(path)
    return None


def entries_of(op: str, sources: str, device: torch.device) -> list[tuple[dict[str, Any], str]]:
    """The entries that decide about an op on a device, the first that knows a call first; empty if there is none.

    Args:
        op: its name.
        sources: the hash of its kernel's sources as they are now.
        device: one that is here.

    Returns:
        The user's and the shipped one, each with where and when it was raced.
    """
    if device.type in _held:
        return [(entry, "as the run began") for entry in _held[device.type].get(op, [])]
    found = []
    mine, near = _mine(op, sources, device), nearest(_verdicts.machine(device))
    if mine is not None:
        found.append((mine, f"raced on this machine, {_read(file_of(device)).get('date')}"))
    if near is not None and op in near["ops"]:
        found.append((near["ops"][op], f"raced on {near['machine']['device']}, {near['date']}"))
    return found


def entries(sources: dict[str, str], device: torch.device) -> dict[str, Any]:
    """What decides about each op on a device, without times: what `held` takes.

    Args:
        sources: the hashes of the kernels' sources as they are now, by op.
        device: one that is here.
    """
    return {
        op: [{key: entry[key] for key in _DECIDE if key in entry} for entry, _ in entries_of(op, digest, device)]
        for op, digest in sources.items()
    }


def winner(op: str, sources: str, style: str, device: torch.device, call: Call) -> Winner | None:
    """Who won the race of an op on a device; None where there was none.

    Args:
        op: its name.
        sources: the hash of its kernel's sources as they are now.
        style: ``eager`` or ``graph``.
        device: one that is here.
        call: who serves it is asked.
    """
    for entry, why in entries_of(op, sources, device):
        backend = reported(entry, style, call)
        if backend is not None:
            return Winner(backend, why, entry.get("gain", {}).get(style, ""))
    return None


def calls(op: str, sources: str, style: str, device: torch.device) -> Iterator[Call]:
    """The calls of an op that were raced on their own: those that the first entry that decides knows by name.

    Args:
        op: its name.
        sources: the hash of its kernel's sources as they are now.
        style: ``eager`` or ``graph``.
        device: one that is here.
    """
    for entry, _ in entries_of(op, sources, device):
        known = {**entry.get("variants", {}), **entry.get("cells", {})}
        found = [_call(name) for name, winners in known.items() if style in winners]
        if found:
            # of those that are raced by size, the entries of all sizes say nothing more
            yield from [call for call in found if call.bits] or found
            return


def _call(name: str) -> Call:
    """What a file names by `cell`."""
    words = name.split()
    size = words.pop() if words and words[-1] in SIZES else ""
    dtype = getattr(torch, words[-1], None) if words else None
    dtype = dtype if isinstance(dtype, torch.dtype) else None
    return Call(" ".join(words[: len(words) - (dtype is not None)]), dtype, SIZES[size] - 1 if size else 0)


def read(device: torch.device) -> dict[str, Any]:
    """The user's file for a device as it is now; empty where there is none, or one that is of another machine."""
    _read.cache_clear()
    found = _read(file_of(device))
    return found if found.get("machine") == _verdicts.machine(device) else {}


def write(device: torch.device, ops: dict[str, Any], facts: dict[str, Any]) -> Path:
    """Put entries into the user's file for a device; those of other ops in it stay.

    Args:
        device: they were raced there.
        ops: entries by op.
        facts: what else the file says, such as its date.

    Returns:
        The file.

    Raises:
        OSError: the folder cannot be written; the message says how to name another.
    """
    path = file_of(device)
    with _verdicts.locked(path) as writable:
        try:
            if not writable:
                raise OSError("no file can be made there")
            kept = {**read(device).get("ops", {}), **ops}
            made = {"machine": _verdicts.machine(device), **facts, "ops": {op: kept[op] for op in sorted(kept)}}
            _files.write_text(path, json.dumps(made, indent=1) + "\n")
        except OSError as error:
            raise OSError(f"{path} cannot be written ({error}): PURIFY_FAST_CACHE names another folder") from error
    forget()
    return path
