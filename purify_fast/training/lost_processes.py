"""Processes of a training that die, hang or are stopped, as the others notice it.

gloo's exchanges fail when another process ends. NCCL's return at once, and whatever then waits for their results waits
in the driver until the group's timeout. Neither hears of a process that was stopped, as by SIGSTOP. So within `fit`
every process gives signs of life in the store of the process group, and looks for those of the others. They tell of
processes alone: one that hangs in its own work is alive, and is found at the timeout.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import threading
import time
from collections.abc import Iterator

import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from .._process import processes

NOTICE = 3.0  # seconds in which all notice that an exchange failed
BEAT = 5.0  # seconds between two signs of life
SILENCE = 75.0  # seconds without one after which a process is lost
GRACE = 20.0  # seconds in which a process may end by itself when another one is lost

_AGAIN = "Start the same again to go on from the last checkpoint; torchrun --max-restarts does so by itself"


class ProcessLost(ConnectionError):
    """Another process of the training does not answer: it died, or hangs."""


def report_step(step: int) -> None:
    """Tell the other processes how far this one is, so that one that hangs can be named.

    Args:
        step: the step that begins.
    """
    rank, world = processes()
    if world > 1:
        # PyTorch's public names for the store are those of its group's constructor, which may not be this package's
        dist.distributed_c10d._get_default_store().set(f"purify_fast step {rank}", str(step))
    if _watch is not None:
        _watch.step = step


#: How gloo's errors begin, which have no class of their own: with the place in its sources where they arose.
_GLOO = re.compile(r"\[[^\]\s]*gloo/[^\]\s]*\.(cc|h):\d+\]")


def is_lost(error: RuntimeError) -> bool:
    """Whether an error is of an exchange that failed, and not one of the model or of anything else in the step.

    NCCL's and the store's errors have classes of their own. Words such as "timeout" in any other error mean nothing.

    Args:
        error: what the step raised.
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
        raise ProcessLost(_missing(str(error).splitlines()[0])) from error
    _raise_if_lost()


def _missing(why: str) -> str:
    """What is known of the others, in words: those that wait in vain too are not the ones that are missing."""
    rank, world = processes()
    steps, waiting = dict[int, int](), set[int]()
    store = dist.distributed_c10d._get_default_store()
    # the store goes with the first process
    with contextlib.suppress(Exception):
        store.set(f"purify_fast waits {rank}", "yes")
        # until the others have noticed
        time.sleep(NOTICE)
        for other in range(world):
            if store.check([f"purify_fast step {other}"]):
                steps[other] = int(store.get(f"purify_fast step {other}"))
            if store.check([f"purify_fast waits {other}"]):
                waiting.add(other)
    missing = [
        f"process {other}, {f'in step {steps[other]}' if other in steps else 'which has not begun'}"
        for other in range(world)
        if other not in waiting and other != rank
    ]
    who = "; ".join(missing) if missing else "all others wait too: the network between them failed"
    if not steps:
        who = "the first process, which holds what the others tell, is gone"
    return f"process {rank} of {world} waited in vain in step {steps.get(rank, 0)} for: {who} ({why}). {_AGAIN}"


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
        #: of each process that gave a sign of life: the beats since its last one
        self.missed: dict[int, int] = {}
        self.last: dict[int, str] = {}
        self.step, self.lost = 0, ""
        # whether this process has done its part, and whether any other has: then none waits for the rest any more
        self.done = self.others_done = False
        self.over = threading.Event()
        self.threads = [threading.Thread(target=each, daemon=True) for each in (self.exchange, self.judge)]

    def exchange(self) -> None:
        """Give a sign of life at every beat, the last one when this process is done, and read those of the others."""
        beats, last = 0, False
        while not last:
            last = self.over.wait(BEAT if beats else 0)
            # a store that does not answer is silence too
            with contextlib.suppress(Exception):
                if not last or self.done:
                    self.store.set(f"{self.name} {self.rank}", f"done {self.step}" if last else f"{beats} {self.step}")
                for other in range(self.world):
                    if other != self.rank and self.store.check([f"{self.name} {other}"]):
                        self.hear(other, self.store.get(f"{self.name} {other}").decode())
            beats += 1

    def hear(self, other: int, sign: str) -> None:
        if sign != self.last.get(other):
            self.last[other], self.missed[other] = sign, 0
            self.others_done |= sign.startswith("done")

    def judge(self) -> None:
        """Find a process that gives no signs any more; end this one if it does not end by itself then."""
        while not self.lost:
            if self.over.wait(BEAT):
                return
            for other in list(self.missed):
                self.missed[other] += 1
            lost = [other for other, beats in self.missed.items() if beats * BEAT >= SILENCE]
            if lost and not self.others_done:
                self.lost = self.message(sorted(lost))
        if not self.over.wait(GRACE):
            # the main thread waits in a driver or a library, where no exception reaches it
            print(f"purify-fast: {self.lost}", file=sys.__stderr__, flush=True)
            os._exit(1)

    def message(self, lost: list[int]) -> str:
        who = "; ".join(f"process {other}, last in step {self.last[other].split()[1]}" for other in lost)
        several = " (or of the store alone, through which the signs go)" if len(lost) > 1 else ""
        return (
            f"process {self.rank} of {self.world} had no sign of life for {SILENCE:g} seconds of: {who}{several}. "
            f"It died, was stopped, or cannot be reached. {_AGAIN}"
        )


_watch: _Watch | None = None
_watches = 0


def _raise_if_lost() -> None:
    if _watch is not None and _watch.lost:
        raise ProcessLost(_watch.lost)


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
    _watch = watch = _Watch(dist.distributed_c10d._get_default_store().clone(), f"purify_fast alive {_watches}")
    for thread in watch.threads:
        thread.start()
    try:
        yield
        watch.done = True
    finally:
        _watch = before
        watch.over.set()
        # the last sign is written, unless the store is gone
        watch.threads[0].join(BEAT)
