"""Signs of life between the processes of one training or evaluation, through the store of their process group."""

from __future__ import annotations

import contextlib
import threading
from typing import NamedTuple

from torch.distributed.distributed_c10d import Store

from ._process import patience, processes

BEAT = 5.0  # seconds between two signs of life
SILENCE = 75.0  # seconds of silence after which a process counts as lost


class ProcessLost(ConnectionError):
    """Another process of the training or evaluation does not answer: it died, or hangs."""


class Sign(NamedTuple):
    """A sign of life: the number of its beat, the step of its process, and the state: works, waits or done."""

    beat: str
    step: str
    state: str


class Heartbeat:
    """The signs of life of several processes.

    One thread exchanges the signs and another counts the silence, because an exchange may wait long for a store whose
    process was stopped. Silence is counted in beats of the second thread and not by a clock. So a process that was
    stopped and continues does not mistake its own pause for silence of the others.

    Args:
        store: a connection that is used for the signs alone. The connection of the work would delay the signs while it
            waits.
        name: name of this training or evaluation, the same in all processes.

    Attributes:
        signs: the last sign of each other process that gave one.
        missed: for each other process, the beats since its last sign, or since the start.
    """

    def __init__(self, store: Store, name: str):
        self.store, self.name = store, name
        self.rank, self.world = processes()
        self.signs: dict[int, Sign] = {}
        self.missed = {other: 0 for other in range(self.world) if other != self.rank}
        self.beats, self.step, self.state = 0, 0, "works"
        self.over = threading.Event()
        self.threads = [threading.Thread(target=each, daemon=True) for each in (self._exchange, self.watch)]

    def start(self) -> None:
        """Begin to give signs."""
        for thread in self.threads:
            thread.start()

    def stop(self) -> None:
        """Give the last sign, unless the store is gone."""
        self.over.set()
        self.threads[0].join(BEAT)

    def give_and_read(self) -> None:
        """Give a sign of life, and read those of the others; a store that does not answer is silence."""
        with contextlib.suppress(Exception):
            self.beats += 1
            self.store.set(f"{self.name} {self.rank}", f"{self.beats} {self.step} {self.state}")
            for other in self.missed:
                if self.store.check([f"{self.name} {other}"]):
                    sign = Sign(*self.store.get(f"{self.name} {other}").decode().split())
                    if sign != self.signs.get(other):
                        self.signs[other], self.missed[other] = sign, 0

    def _exchange(self) -> None:
        """Exchange signs at every beat, and once more when this process has done its part."""
        self.give_and_read()
        while not self.over.wait(BEAT):
            self.give_and_read()
        if self.state == "done":
            self.give_and_read()

    def watch(self) -> None:
        """Count the beats without a sign."""
        while not self.over.wait(BEAT):
            self.count()

    def count(self) -> None:
        """Count a beat."""
        for other in self.missed:
            self.missed[other] += 1

    def is_silent(self, other: int) -> bool:
        """Tell whether another process has fallen silent; its first sign may take as long as an exchange."""
        return self.missed[other] * BEAT >= (SILENCE if other in self.signs else patience().total_seconds())
