"""The processes that share the work of an evaluation or of certificates."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch.distributed as dist

from .._process import processes, sendable

logger = logging.getLogger("purify_fast")

#: The longest wait for another process. A batch may take hours; a process that ends is noticed immediately.
PATIENCE = timedelta(days=7)


def _nothing(_: object) -> bool:
    return False


class Shards:
    """The processes of an evaluation. In a ``with`` block, an error in one process is raised in all of them."""

    def __init__(self, together: bool = True):
        self.rank, self.world = processes() if together else (0, 1)
        # Whether the other processes know that the evaluation has ended, or cannot be reached.
        self._over = self._finished = False
        self._failed: BaseException | None = None

    def __enter__(self) -> Shards:
        if self.world > 1:
            # This group works on the CPU, also if the default group does not.
            self._group: Any = dist.new_group(timeout=PATIENCE, backend="gloo")
        if self.rank > 0:
            # Only the first process logs messages, so that each message appears once.
            logger.addFilter(_nothing)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        logger.removeFilter(_nothing)
        if self.world == 1:
            return
        self._failed = error
        with contextlib.suppress(Exception):
            if error is not None and self.rank == 0 and not self._over:
                self._announce("error", sendable(error))
            while error is not None and self.rank > 0 and not self._over:
                self.follow()
            if self._finished:
                # A process that ends closes its connections, from which others may still read.
                dist.barrier(self._group)
                dist.destroy_process_group(self._group)

    def from_first(self, make: Callable[[], Any]) -> Any:
        """Call ``make`` in the first process, and return its result in all processes."""
        if self.rank > 0:
            return self.follow()
        value = make()
        if self.world > 1:
            self._announce("value", value)
        return value

    def check_same(self, call: Mapping[str, Any]) -> None:
        """Raise ValueError if this process evaluates something else than the first; ``call`` has the facts by name."""
        first = self.from_first(lambda: dict(call))
        different = [name for name, value in call.items() if value != first[name]]
        if different:
            raise ValueError(
                f"process {self.rank} evaluates something else than process 0 (different: {', '.join(different)}): "
                "call evaluate with the same arguments in all processes, or with together=False in each process"
            )

    def share(self, numbers: Sequence[int], make: Callable[[int], Any]) -> list[Any]:
        """In the first process: call ``make`` for each number, in one of the processes, and return the results."""
        if self.world == 1:
            return [make(number) for number in numbers]
        self._announce("share", list(numbers))
        return self._shared(numbers, make)

    def follow(self, make: Callable[[int], Any] = _nothing) -> Any:
        """In another process: do its part of each `share` until the first process sends a value; return the value."""
        while True:
            kind, content = self._announce()
            if kind == "share":
                self._shared(content, make)
                continue
            self._over, self._finished = kind != "value", kind == "end"
            if kind == "error":
                raise content
            return content

    def end(self, report: Callable[[], str]) -> None:
        """In the first process: send the report to the others, if there are any."""
        if self.world > 1:
            self._announce("end", report())
            self._over = self._finished = True

    def _announce(self, kind: str = "", content: Any = None) -> tuple[str, Any]:
        message = [(kind, content)]
        self._exchange(dist.broadcast_object_list, message, src=0)
        return message[0]

    def _shared(self, numbers: Sequence[int], make: Callable[[int], Any]) -> list[Any]:
        error, results = self._failed, list[Any]()
        try:
            results = [] if error else [make(number) for number in numbers[self.rank :: self.world]]
        except Exception as own:
            error = own
        every: list[Any] = [None] * self.world
        self._exchange(dist.all_gather_object, every, (results, None if error is None else sendable(error)))
        if failed := [reason for _, reason in every if reason is not None]:
            self._over = True
            raise error or failed[0]
        return [every[place % self.world][0][place // self.world] for place in range(len(numbers))]

    def _exchange(self, call: Callable[..., None], *content: Any, **options: Any) -> None:
        try:
            call(*content, group=self._group, **options)
        except RuntimeError as error:
            self._over = True
            raise ConnectionError(
                f"process {self.rank} of {self.world} does not reach the others ({str(error).splitlines()[0]}): start "
                "the same command again to continue after the finished attacks (torchrun --max-restarts does this)"
            ) from error
