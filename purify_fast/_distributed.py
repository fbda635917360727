"""Exchange signs of life between the processes of one training or evaluation.

The signs are sent through the store of the process group. If a process dies or hangs, its signs stop, and the other
processes notice this.
"""

from __future__ import annotations

import contextlib
import threading
from typing import NamedTuple

from torch.distributed.distributed_c10d import Store

from ._process import patience, processes

#: Seconds between two signs of life.
BEAT = 5.0
#: Seconds without a sign of life after which a process counts as lost.
SILENCE = 75.0


class ProcessLost(ConnectionError):
    """Raised if another process of the training or evaluation does not answer, because it died or hangs."""


class Sign(NamedTuple):
    """A sign of life of a process."""

    beat: str
    step: str
    state: str


class Heartbeat:
    """Exchanges signs of life with the other processes."""

    def __init__(self, store: Store, name: str):
        self.store, self.name = store, name
        self.rank, self.world = processes()
        self.signs: dict[int, Sign] = {}
        self.missed = {other: 0 for other in range(self.world) if other != self.rank}
        self.beats, self.step, self.state = 0, 0, "works"
        self.over = threading.Event()
        self.threads = [threading.Thread(target=each, daemon=True) for each in (self._exchange, self.watch)]

    def start(self) -> None:
        """Start both threads."""
        for thread in self.threads:
            thread.start()

    def stop(self) -> None:
        """End both threads, and wait at most `BEAT` seconds for the last exchange."""
        self.over.set()
        self.threads[0].join(BEAT)

    def give_and_read(self) -> None:
        """Give a sign of life, and read the signs of the other processes. Errors of the store are ignored."""
        with contextlib.suppress(Exception):
            self.beats += 1
            self.store.set(f"{self.name} {self.rank}", f"{self.beats} {self.step} {self.state}")
            for other in self.missed:
                if self.store.check([f"{self.name} {other}"]):
                    sign = Sign(*self.store.get(f"{self.name} {other}").decode().split())
                    if sign != self.signs.get(other):
                        self.signs[other], self.missed[other] = sign, 0

    def _exchange(self) -> None:
        """Exchange signs at every beat, and once more at the end if this process has finished its work."""
        self.give_and_read()
        while not self.over.wait(BEAT):
            self.give_and_read()
        if self.state == "done":
            self.give_and_read()

    def watch(self) -> None:
        """Count beats until `stop` is called."""
        while not self.over.wait(BEAT):
            self.count()

    def count(self) -> None:
        """Add a beat to the missed beats of every other process."""
        for other in self.missed:
            self.missed[other] += 1

    def is_silent(self, other: int) -> bool:
        """Tell whether another process counts as lost: no first sign within `patience`, or no sign for `SILENCE`."""
        return self.missed[other] * BEAT >= (SILENCE if other in self.signs else patience().total_seconds())
