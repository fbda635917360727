"""Processes of a training that die, hang or are stopped, as the others notice it.

gloo's exchanges fail when another process ends. NCCL's return at once, and whatever then waits for their results waits
in the driver until the group's timeout. Neither hears of a process that was stopped, as by SIGSTOP. So within `fit`
every process gives signs of life in the store of the process group, and looks for those of the others. They tell of
processes alone: one that hangs in its own work is alive, and is named by its step when an exchange has waited in vain.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from typing import NamedTuple

import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from .._process import processes

NOTICE = 3.0  # seconds in which all notice that an exchange failed
BEAT = 5.0  # seconds between two signs of life
SILENCE = 75.0  # seconds without one after which a process is lost
GRACE = 20.0  # seconds in which a process may end by itself when another one is lost

_AGAIN = "Start the same again to go on from the last checkpoint; torchrun --max-restarts does so by itself"
#: How gloo's errors begin, which have no class of their own: with the place in its sources where they arose.
_GLOO = re.compile(r"\[[^\]\s]*gloo/[^\]\s]*\.(cc|h):\d+\]")


class ProcessLost(ConnectionError):
    """Another process of the training does not answer: it died, or hangs."""


def report_step(step: int) -> None:
    """Tell the other processes how far this one is, so that one that hangs can be named."""
    if _watch is not None:
        _watch.step = step


def is_lost(error: RuntimeError) -> bool:
    """Whether an error is of an exchange that failed, and not one of the model or of anything else in the step.

    NCCL's and the store's errors have classes of their own. Words such as "timeout" in any other error mean nothing.
    """
    return isinstance(error, dist.DistError) or _GLOO.search(str(error)) is not None


@contextlib.contextmanager
def named_when_lost() -> Iterator[None]:
    """Within the block, an exchange that fails says which process is missing.

    Raises:
        ProcessLost: another process does not answer.
    """
    _raise_if_lost()
    try:
        yield
    except RuntimeError as error:
        if processes()[1] == 1 or not is_lost(error):
            raise
        who = "another process" if _watch is None else _watch.missing()
        where = "" if _watch is None else f" in step {_watch.step}"
        raise ProcessLost(
            f"process {processes()[0]} of {processes()[1]} waited in vain{where} for: {who} "
            f"({str(error).splitlines()[0]}). {_AGAIN}"
        ) from error
    _raise_if_lost()


def _raise_if_lost() -> None:
    if _watch is not None and _watch.lost:
        raise ProcessLost(_watch.lost)


class _Sign(NamedTuple):
    """A sign of life: its beat, the step of its process, and whether that works, waits in vain or is done."""

    beat: str
    step: str
    state: str


class _Watch:
    """The signs of life of the processes within one training.

    One thread exchanges them, and another judges them: an exchange may wait long, for a store in a process that was
    stopped. Silence is counted in beats of the second thread and not by a clock, so that a process that was stopped and
    goes on does not take the time in which it heard nothing for the others' silence.

    Args:
        store: a connection of its own; one that the training waits at would keep the signs back.
        name: of this training, the same in all processes.
    """

    def __init__(self, store: Store, name: str):
        self.store, self.name = store, name
        self.rank, self.world = processes()
        #: of each process that gave a sign of life: the last one, and the beats since
        self.signs: dict[int, _Sign] = {}
        self.missed: dict[int, int] = {}
        self.beats, self.step, self.state, self.lost = 0, 0, "works", ""
        self.over = threading.Event()
        self.threads = [threading.Thread(target=each, daemon=True) for each in (self.exchange, self.judge)]

    def give_and_read(self) -> None:
        """Give a sign of life, and read those of the others; a store that does not answer is silence."""
        with contextlib.suppress(Exception):
            self.beats += 1
            self.store.set(f"{self.name} {self.rank}", f"{self.beats} {self.step} {self.state}")
            for other in range(self.world):
                if other != self.rank and self.store.check([f"{self.name} {other}"]):
                    sign = _Sign(*self.store.get(f"{self.name} {other}").decode().split())
                    if sign != self.signs.get(other):
                        self.signs[other], self.missed[other] = sign, 0

    def exchange(self) -> None:
        """Exchange signs at every beat, and once more when this process has done its part."""
        self.give_and_read()
        while not self.over.wait(BEAT):
            self.give_and_read()
        if self.state == "done":
            self.give_and_read()

    def judge(self) -> None:
        """Find a process that gives no signs any more; end this one if it does not end by itself then."""
        while not self.lost:
            if self.over.wait(BEAT):
                return
            for other in list(self.missed):
                self.missed[other] += 1
            quiet = sorted(other for other, beats in self.missed.items() if beats * BEAT >= SILENCE)
            # when one has done its part, none waits for the rest any more
            if quiet and all(sign.state != "done" for sign in self.signs.values()):
                several = " (or of the store alone, through which the signs go)" if len(quiet) > 1 else ""
                self.lost = (
                    f"process {self.rank} of {self.world} had no sign of life for {SILENCE:g} seconds of: "
                    f"{self.named(quiet)}{several}. It died, was stopped, or cannot be reached. {_AGAIN}"
                )
        if not self.over.wait(GRACE):
            # the main thread waits in a driver or a library, where no exception reaches it
            print(f"purify-fast: {self.lost}", file=sys.__stderr__, flush=True)
            os._exit(1)

    def missing(self) -> str:
        """The processes that this one waited for in vain, in words: those that wait too are not the ones."""
        self.state = "waits"
        self.give_and_read()
        # until the others have noticed
        time.sleep(NOTICE)
        self.give_and_read()
        others = [other for other in range(self.world) if other != self.rank]
        gone = [other for other in others if other not in self.signs or self.signs[other].state != "waits"]
        return self.named(gone) if gone else "all others wait too: the network between them failed"

    def named(self, ranks: list[int]) -> str:
        steps = {rank: f"last in step {self.signs[rank].step}" for rank in ranks if rank in self.signs}
        return "; ".join(f"process {rank}, {steps.get(rank, 'which has not begun')}" for rank in ranks)


_watch: _Watch | None = None
_watches = 0


@contextlib.contextmanager
def signs_of_life() -> Iterator[None]:
    """Within the block, a process that dies or is stopped is noticed by all others, whatever they wait for.

    They raise `ProcessLost` at their next exchange. One that waits elsewhere, as in a driver for the result of an
    exchange by NCCL, says so on stderr and ends with status 1. With one process, nothing.
    """
    global _watch, _watches
    if processes()[1] == 1:
        yield
        return
    before, _watches = _watch, _watches + 1
    # PyTorch's public names for the store are those of its group's constructor, which may not be this package's
    store = dist.distributed_c10d._get_default_store().clone()
    _watch = watch = _Watch(store, f"purify_fast alive {_watches}")
    for thread in watch.threads:
        thread.start()
    try:
        yield
        watch.state = "done"
    finally:
        _watch = before
        watch.over.set()
        # the last sign is written, unless the store is gone
        watch.threads[0].join(BEAT)
