"""Shares an evaluation among processes.

The first process of torch's default process group runs the evaluation. At each attack it publishes a list of the
batches, and then of those that the next attacks will probably need. Every process repeatedly takes the next free batch
of the newest list. A finished batch is a file in a folder that all processes, and a resumed evaluation, can read. A
batch does not depend on the process that makes it, nor on the time, because its random seed depends only on its number
or its image.

The processes communicate only through the store of the process group, because a dead process would block collective
operations. The first process makes the batches of a dead process.
"""

from __future__ import annotations

import contextlib
import logging
import pickle
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore

from ... import _distributed
from ..._distributed import Heartbeat, ProcessLost
from ..._files import atomic
from ..._process import processes, sendable
from .progress import Progress

logger = logging.getLogger("purify_fast")

#: The longest pause between two reads of the store, in seconds.
LONGEST = 0.1
#: The longest time that the first process waits for all other processes at the end, in seconds.
GOODBYE = 10.0
#: The longest time until a folder of another machine becomes visible on this machine, in seconds.
VISIBLE = 60.0

Result = TypeVar("Result")
_AGAIN = "Start the same command again, with as many processes, to continue after the finished batches"


class Task(NamedTuple):
    """The batches of an attack that are missing.

    Args:
        attack: the number of the attack in the evaluation.
        run: counts the runs of this attack; the first has the number 0.
        images: the indices of the attacked images in order, int64 as bytes.
        batches: the number and the name of each missing batch.
        folder: the folder of the batches.
        draws_differ: whether the attacked model is random, by the test of the first process.
        begins: whether the folder has a file with the first points of the attack.
    """

    attack: int
    run: int
    images: bytes
    batches: list[tuple[int, str]]
    folder: str
    draws_differ: bool
    begins: bool = False

    def place(self, name: str) -> str:
        """The name of a batch in the store, the same in every list of tasks."""
        return f"{self.attack} {self.run} {name}"


class Team:
    """The processes of an evaluation. In a ``with`` block of a team, an error in one process is raised in all of them.

    Args:
        together: whether the processes of the group share the work. If not, this process evaluates alone.
        evenly: whether the processes divide the images of each attack evenly. If not, only the batch size divides them.

    Attributes:
        rank: the number of this process.
        world: number of processes.
        shares: number of parts into which the images of each attack are divided; 1 if only the batch size divides them.
    """

    _evaluations = 0
    _scratch: Path | None = None

    def __init__(self, together: bool = True, evenly: bool = False):
        self.rank, self.world = processes() if together else (0, 1)
        self.shares = self.world if evenly else 1
        self._tasks, self._lists, self._ended = list[Task](), 0, False
        # The batches that a process is known to have taken, and those of them that are not known to be finished.
        self._taken, self._open = set[str](), dict[str, Task]()
        if self.world > 1:
            Team._evaluations += 1
            name = f"purify_fast evaluation {Team._evaluations}"
            # PyTorch's public functions return the store only to the code that has created the group.
            store = dist.distributed_c10d._get_default_store()
            self.store, self.signs = PrefixStore(name, store), Heartbeat(store.clone(), f"{name} alive")

    def __enter__(self) -> Team:
        if self.world > 1:
            self.signs.start()
        if self.rank > 0:
            # Only the first process logs messages, so that each message appears once.
            logger.addFilter(_nothing)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self.world == 1:
            return
        try:
            if error is not None and not isinstance(error, (dist.DistError, ProcessLost)):
                # If the store cannot be reached, the other processes cannot be informed, but the error is still raised.
                with contextlib.suppress(dist.DistError):
                    self._fail(error)
        finally:
            self.signs.over.set()
            logger.removeFilter(_nothing)
            if self._scratch is not None:
                shutil.rmtree(self._scratch, ignore_errors=True)
        if isinstance(error, dist.DistError):
            raise ProcessLost(
                f"process {self.rank} of {self.world} cannot reach the store of the process group "
                f"({str(error).splitlines()[0]}): the process or machine with the store has ended. {_AGAIN}"
            ) from error

    def divided(self) -> dict[str, int]:
        """The number of shares for the cache's names; empty for a single share, as in names of earlier versions."""
        return {"shares": self.shares} if self.shares > 1 else {}

    # -- agreement of all processes -----------------------------------------------------------------------------------

    def from_first(self, name: str, make: Callable[[], Any]) -> Any:
        """Call ``make`` in the first process, and return its result in all processes.

        Args:
            name: the name of the result in the store.
            make: a function that only the first process calls.
        """
        if self.rank > 0:
            text = self._wait_for(name, 0, "ended")
            # If the first process has already ended, `report` raises its error.
            return self.report() if text is None else _as_value(text)
        value = make()
        if self.world > 1:
            self.store.set(name, _as_text(value))
        return value

    def check_same(self, call: Mapping[str, Any]) -> None:
        """Compare the evaluation of this process with that of the first process.

        Args:
            call: the facts of the evaluation, by name.

        Raises:
            ValueError: a fact differs; the message names it.
        """
        first = self.from_first("call", lambda: dict(call))
        different = [name for name, value in call.items() if value != first[name]]
        if different:
            raise ValueError(
                f"process {self.rank} evaluates something else than process 0 (different: {', '.join(different)}): "
                "call evaluate with the same arguments in all processes, or with together=False in each process"
            )

    # -- the first process --------------------------------------------------------------------------------------------

    def folder(self, folder: Path | None, out: Path | None, name: str) -> Path | None:
        """The folder for an attack's batches: ``folder``, or a temporary folder.

        Args:
            folder: the folder for the batches in the cache; None if the batches are not cached.
            out: a folder that all processes can read, in which a temporary folder is made. None takes the system's
                folder for temporary files.
            name: name of the temporary folder.
        """
        if self.world == 1 or folder is not None:
            return folder
        if self._scratch is None:
            self._scratch = Path(tempfile.mkdtemp(prefix="shared-", dir=out))
        return self._scratch / name

    def publish(self, tasks: Sequence[Task]) -> None:
        """Replace the list of the batches that all processes take, in the order in which they are taken."""
        for task in tasks:
            Path(task.folder).mkdir(parents=True, exist_ok=True)
        self._tasks = list(tasks)
        self._open |= {task.place(name): task for task in tasks for _, name in task.batches}
        self.store.set(f"tasks {self._lists}", _as_text([tuple(task) for task in tasks]))
        self._lists += 1

    def obtain(
        self, place: str, read: Callable[[], Result], make: Callable[[Task, int], object], progress: Progress
    ) -> Result | None:
        """Make free batches until a batch of the newest list is finished.

        Args:
            place: the place of the wanted batch, see `Task.place`.
            read: a function that reads the wanted batch.
            make: a function that makes the batch with a number of a task.
            progress: counts the images of all processes.

        Returns:
            The result of ``read``. None if the process that has taken the batch is dead.
        """
        while not self.store.check([f"made {place}"]):
            if (claim := self.claimed()) is not None:
                with self._making(*claim, progress):
                    make(*claim)
                continue
            owner = int(self.store.get(f"taken {place}"))
            if owner == self.rank or self._wait_for(f"made {place}", owner) is None:
                return None
        if int(self.store.get(f"taken {place}")) != self.rank:
            progress.count(int(self.store.get(f"made {place}")))
        return read()

    def withdraw(self, folder: str) -> bool:
        """Withdraw the batches of a folder that no process has taken.

        Returns:
            Whether another process still makes a batch of this folder.
        """
        for place in [place for place, task in self._open.items() if task.folder == folder]:
            owner = self.store.compare_set(f"taken {place}", "", str(self.rank))
            if int(owner) == self.rank or self.store.check([f"made {place}"]):
                del self._open[place]
        return folder in [task.folder for task in self._open.values()]

    def wait_for_idle(self) -> None:
        """Wait until no other process makes a batch."""
        for place in self._open:
            owner = int(self.store.compare_set(f"taken {place}", "", str(self.rank)))
            if owner != self.rank:
                self._wait_for(f"made {place}", owner)

    def end(self, report: Callable[[], str]) -> None:
        """End the evaluation, after `wait_for_idle`.

        Args:
            report: a function that returns the report as text, for the other processes.
        """
        if self.world > 1:
            self._end(report())

    # -- the other processes ------------------------------------------------------------------------------------------

    def batches(self, progress: Progress, until: str = "ended") -> Iterator[tuple[Task, int]]:
        """Take free batches until the evaluation ends; a batch is finished when the caller asks for the next.

        Args:
            progress: counts the images of this process.
            until: the name of a value that the first process sets, after which this process takes no more batches.

        Yields:
            The task of the batch, and the number of the batch in this task.
        """
        while True:
            # Only the newest list counts.
            while self.store.check([f"tasks {self._lists}"]):
                # The first process may already have published the next list, whose batches this caller cannot make.
                if self.store.check([until]):
                    return
                self._tasks = [Task(*values) for values in _as_value(self.store.get(f"tasks {self._lists}"))]
                self._lists += 1
            if (claim := self.claimed()) is not None:
                with self._making(*claim, progress):
                    yield claim
            elif self._wait_for(f"tasks {self._lists}", 0, until, "ended") is None:
                return

    def report(self) -> str:
        """Wait for the report that the first process passes to `end`, and return it."""
        report = self._wait_for_value("ended")
        self._ended = True
        self.store.set(f"left {self.rank}", "yes")
        if isinstance(report, BaseException):
            raise report
        return str(report)

    def check_folder(self, folder: Path) -> None:
        """Raise ValueError for a folder that this process cannot see."""
        end = time.monotonic() + VISIBLE
        while not folder.is_dir():
            if time.monotonic() > end:
                raise ValueError(
                    f"process {self.rank} on {socket.gethostname()} does not see {folder}, in which process 0 expects "
                    "the finished batches: give out=FOLDER (--out) with a folder that all machines share"
                )
            # A folder of another machine may become visible only after some time.
            time.sleep(LONGEST)

    # -- all processes ------------------------------------------------------------------------------------------------

    def shared(self, works: Sequence[Callable[[], Any]], out: Path | None, progress: Progress, until: str) -> list[Any]:
        """Call functions, each in one of the processes, which all call this method.

        Args:
            works: the functions; they have no side effects.
            out: see `folder`; only the first process uses it.
            progress: counts the images of this process.
            until: the name of a value that the first process sets afterwards.

        Returns:
            The results in the first process, and an empty list in other processes.
        """
        if self.world == 1:
            return [work() for work in works]

        def make(task: Task, number: int) -> None:
            with atomic(Path(task.folder) / str(number)) as path:
                path.write_bytes(pickle.dumps(works[number]()))

        if self.rank > 0:
            for task, number in self.batches(progress, until):
                self.check_folder(Path(task.folder))
                make(task, number)
            return []
        folder = self.folder(None, out, until)
        assert folder is not None
        names = [(number, str(number)) for number in range(len(works))]
        # This is no attack, so it has no number.
        task = Task(-1, 0, b"", names, str(folder.resolve()), draws_differ=False)
        self.publish([task])

        def result(number: int) -> Any:
            def read() -> bytes:
                return (folder / str(number)).read_bytes()

            found = self.obtain(task.place(str(number)), read, make, progress)
            return works[number]() if found is None else pickle.loads(found)

        return [result(number) for number, _ in names]

    def claimed(self) -> tuple[Task, int] | None:
        """Take the first free batch of the list.

        Returns:
            The task of the batch, and the number of the batch in this task. None if no batch is free.
        """
        if self.store.check(["failed"]):
            raise _as_value(self.store.get("failed"))
        if self.store.check([f"lost {self.rank}"]):
            raise ProcessLost(
                f"process {self.rank} gave no sign of life for too long, so process 0 continued without it"
            )
        for task in self._tasks:
            for number, name in task.batches:
                place = task.place(name)
                if place not in self._taken:
                    self._taken.add(place)
                    if self.store.compare_set(f"taken {place}", "", str(self.rank)) == str(self.rank).encode():
                        return task, number
        return None

    @contextlib.contextmanager
    def _making(self, task: Task, number: int, progress: Progress) -> Iterator[None]:
        """A context in which this process makes a batch, and after which it tells the others that it is finished."""
        before = progress.images
        yield
        name = dict(task.batches)[number]
        self.store.set(f"made {task.place(name)}", str(progress.images - before))

    def _wait_for(self, name: str, owner: int = 0, *others: str) -> bytes | None:
        """Wait for the value of a name in the store.

        Args:
            name: the name.
            owner: the process that will set the value.
            *others: other names; if one of them appears first, the result is None.

        Returns:
            The value. None if the other name has appeared first, or if the first process waits for a dead process.

        Raises:
            ProcessLost: the first process is dead, or has not started its evaluation.
        """
        pause = 0.01
        while not self.store.check([name]):
            # If both names have appeared by now, the value is returned, so its name is checked again.
            if any(self.store.check([other]) for other in others) and not self.store.check([name]):
                return None
            if self.rank == 0 and self.store.check(["failed"]):
                raise _as_value(self.store.get("failed"))
            if self.signs.is_silent(owner):
                if self.rank > 0:
                    raise ProcessLost(
                        f"process {self.rank} of {self.world} got no sign of life from process 0: it has died, was "
                        f"stopped, cannot be reached, or does not evaluate. {_AGAIN}"
                    )
                if self.store.compare_set(f"lost {owner}", "", "yes"):
                    silence = _distributed.SILENCE
                    logger.warning(
                        "process %d gave no sign of life for %g s: the evaluation continues without it", owner, silence
                    )
                return None
            time.sleep(pause)
            pause = min(LONGEST, 1.5 * pause)
        return self.store.get(name)

    def _wait_for_value(self, name: str) -> Any:
        """Wait for a value that the first process sets, and decode it."""
        text = self._wait_for(name)
        assert text is not None
        return _as_value(text)

    def _fail(self, error: BaseException) -> None:
        """Send an error to the other processes; a process other than the first waits until the first has read it."""
        if self._ended or self.store.check([f"lost {self.rank}"]):
            return
        self.store.compare_set("failed", "", _as_text(sendable(error)))
        if self.rank == 0:
            self._end(sendable(error))
        else:
            with contextlib.suppress(ProcessLost):
                self._wait_for("ended")
                self.store.set(f"left {self.rank}", "yes")

    def _end(self, result: object) -> None:
        """Send the result to the other processes, and wait until they have read it: the store may end with this
        process.
        """
        self._ended = True
        self.store.set("ended", _as_text(result))
        end = time.monotonic() + GOODBYE
        # Read once more, to find processes that have just started: this process waits for them too.
        self.signs.give_and_read()
        for other in range(1, self.world):
            here = other in self.signs.signs and not self.store.check([f"lost {other}"])
            while here and not self.store.check([f"left {other}"]) and time.monotonic() < end:
                time.sleep(0.01)


def _as_text(value: Any) -> str:
    return pickle.dumps(value).hex()


def _as_value(text: bytes) -> Any:
    return pickle.loads(bytes.fromhex(text.decode()))


def _nothing(_: logging.LogRecord) -> bool:
    return False
