"""An evaluation by several processes: they share each attack's batches and the probes; the first does the rest.

The first process of torch's default process group runs the evaluation as it would alone. When it comes to an attack, it
publishes the batches to make, and every process takes the next batch that nobody has taken, so that hard images keep no
process waiting. A finished batch is a file in a folder that all see, where an interrupted evaluation finds it too.
The contents of a batch depend on the images alone, and its seed on its number: its maker does not matter.

Everything goes through the store of the process group, without collective operations: nobody waits for a slow process,
and the first process makes the batches of a dead process.
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
from typing import Any, NamedTuple

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore

from .. import _distributed
from .._distributed import Heartbeat, ProcessLost
from .._process import processes, sendable
from .progress import Progress

logger = logging.getLogger("purify_fast")

LONGEST = 0.5  # longest pause between two looks into the store, in seconds
GOODBYE = 10.0  # longest time that the first process waits for the others at the end, in seconds
VISIBLE = 60.0  # longest time until a folder made by another machine becomes visible here, in seconds

_AGAIN = "Start the same command again, with any number of processes, to continue after the finished batches"


#: Values of `Task.attack` for tasks that are not an attack: PROBES for the parts of the probes, SIGNS for the signs
#: that the probes found.
PROBES, SIGNS = -1, -2


class Task(NamedTuple):
    """The batches of one attack on some images, or the parts of the probes.

    Args:
        attack: the number of the attack among those of the evaluation, or `PROBES` or `SIGNS`.
        first: the number of the first image of the attacked part.
        data: the checksum of that part.
        images: int64 as bytes, the attacked images of the part, in order. For probes empty; for signs their words, as
            JSON.
        batches: the numbers of the missing batches.
        folder: folder of the batches; none for probes, whose parts give values.
        draws_differ: whether the first process found that the attacked model varies from call to call.
        begins: whether the folder has the points at which the attack begins.
        number: number of this task in the evaluation.
    """

    attack: int
    first: int
    data: str
    images: bytes
    batches: list[int]
    folder: str = ""
    draws_differ: bool = False
    begins: bool = False
    number: int = 0


class Team:
    """The processes of an evaluation, a context manager: an error raised in one process is raised in all.

    Args:
        together: whether the processes of the group share the work; False: this process works alone.

    Attributes:
        rank: the number of this process.
        world: number of processes.
    """

    _evaluations = 0
    _scratch: Path | None = None

    def __init__(self, together: bool = True):
        self.rank, self.world = processes() if together else (0, 1)
        self._tasks, self._ended = 0, False
        if self.world > 1:
            Team._evaluations += 1
            name = f"purify_fast evaluation {Team._evaluations}"
            # PyTorch's public functions give the store only to the code that created the group, which may not be this
            # package.
            store = dist.distributed_c10d._get_default_store()
            self.store, self.signs = PrefixStore(name, store), Heartbeat(store.clone(), f"{name} alive")

    def __enter__(self) -> Team:
        if self.world > 1:
            self.signs.start()
        if self.rank > 0:
            # Silence this process, so that every message is logged once, by the first process.
            logger.addFilter(_nothing)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self.world == 1:
            return
        try:
            if error is not None and not isinstance(error, (dist.DistError, ProcessLost)):
                # Raise the error of this process even if the store does not answer, so that the others cannot be told.
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
                f"({str(error).splitlines()[0]}): the process or machine that keeps the store has ended. {_AGAIN}"
            ) from error

    # -- agreement of all processes -----------------------------------------------------------------------------------

    def from_first(self, name: str, make: Callable[[], Any]) -> Any:
        """Share the result of ``make`` in the first process with every process.

        Args:
            name: name under which the others find it.
            make: called by the first process alone.
        """
        if self.rank > 0:
            return self._wait_for_value(name)
        value = make()
        if self.world > 1:
            self.store.set(name, _as_text(value))
        return value

    def check_same(self, call: Mapping[str, Any]) -> None:
        """Refuse processes that evaluate something other than the first process.

        Args:
            call: the facts of the evaluation, by name.

        Raises:
            ValueError: anything differs; the message names it.
        """
        first = self.from_first("call", lambda: dict(call))
        different = [name for name, value in call.items() if value != first[name]]
        if different:
            raise ValueError(
                f"process {self.rank} evaluates something else than process 0 ({', '.join(different)} differ): give "
                "evaluate the same arguments in all processes of a group, or together=False, to let each work alone"
            )

    # -- the first process --------------------------------------------------------------------------------------------

    def folder(self, folder: Path | None, out: Path | None) -> Path | None:
        """The folder of an attack's batches: the folder that keeps them, or a temporary one for this evaluation.

        Args:
            folder: keeps the batches of a row; None: they are not kept.
            out: a folder that all processes see; None: the system's folder for temporary files.
        """
        if self.world == 1 or folder is not None:
            return folder
        if self._scratch is None:
            self._scratch = Path(tempfile.mkdtemp(prefix="shared-", dir=out))
        return self._scratch / str(self._tasks)

    def share(self, task: Task, make: Callable[[int], object], progress: Progress) -> None:
        """Let all processes make the batches of an attack; batches of lost processes are left out.

        Args:
            task: the batches.
            make: makes a batch.
            progress: counts the images of all processes.
        """
        if task.folder:
            Path(task.folder).mkdir(parents=True, exist_ok=True)
        task = task._replace(number=self._tasks)
        self._tasks += 1
        self.store.set(f"task {task.number}", _as_text(tuple(task)))
        for number in self.claimed(task, progress):
            make(number)
        for number in task.batches:
            owner = int(self.store.get(f"taken {task.number} {number}"))
            if owner > 0 and (images := self._wait_for(f"made {task.number} {number}", owner)):
                progress.count(int(images))

    def results_of_parts(self, task: Task, parts: Sequence[Callable[[], Any]], progress: Progress) -> list[Any]:
        """The results of some functions, each of which any process may call.

        Args:
            task: has a number for each.
            parts: the functions.
            progress: counts the images of all processes.
        """
        number, values = self._tasks, dict[int, Any]()
        if self.world > 1:
            self.share(task, lambda part: values.update({part: parts[part]()}), progress)
        for part in set(task.batches) - values.keys():
            name = f"value {number} {part}"
            there = self.world > 1 and self.store.check([name])
            values[part] = _as_value(self.store.get(name)) if there else parts[part]()
        return [values[part] for part in task.batches]

    def end(self, report: Callable[[], str]) -> None:
        """End the evaluation.

        Args:
            report: report for the other processes.
        """
        if self.world > 1:
            self._end(report())

    # -- the others ---------------------------------------------------------------------------------------------------

    def tasks(self) -> Iterator[Task]:
        """The tasks of a process other than the first, until the evaluation ends."""
        while (text := self._wait_for(f"task {self._tasks}", 0, "ended")) is not None:
            self._tasks += 1
            yield Task(*_as_value(text))

    def make_parts(self, task: Task, parts: Sequence[Callable[[], Any]], progress: Progress) -> None:
        """Call some of the functions of `results_of_parts`, for the first process.

        Args:
            task: has a number for each.
            parts: the functions.
            progress: counts the images of this process.
        """
        for part in self.claimed(task, progress):
            self.store.set(f"value {task.number} {part}", _as_text(parts[part]()))

    def report(self) -> str:
        """The report that the first process gave to `end`, once there are no more tasks."""
        report = self._wait_for_value("ended")
        self._ended = True
        self.store.set(f"left {self.rank}", "yes")
        if isinstance(report, BaseException):
            raise report
        return str(report)

    def check_folder(self, folder: Path) -> None:
        """Raise ValueError for a folder that this process does not see."""
        end = time.monotonic() + VISIBLE
        while not folder.is_dir():
            if time.monotonic() > end:
                raise ValueError(
                    f"process {self.rank} on {socket.gethostname()} does not see {folder}, in which process 0 expects "
                    "the finished batches: give out=FOLDER (--out), a folder that all machines share"
                )
            # Wait: a folder on another machine may become visible only after some time.
            time.sleep(LONGEST)

    # -- all processes ------------------------------------------------------------------------------------------------

    def claimed(self, task: Task, progress: Progress) -> Iterator[int]:
        """The batches that this process takes; a batch is finished when the next is asked for.

        Args:
            task: the batches.
            progress: counts the images of this process.
        """
        for number in task.batches:
            if self.store.check(["failed"]):
                raise _as_value(self.store.get("failed"))
            if self.store.check([f"lost {self.rank}"]):
                raise ProcessLost(
                    f"process {self.rank} gave no sign of life for too long, so process 0 went on without it"
                )
            own, place = str(self.rank).encode(), f"{task.number} {number}"
            if self.store.compare_set(f"taken {place}", "", str(self.rank)) == own:
                before = progress.images
                yield number
                self.store.set(f"made {place}", str(progress.images - before))

    def _wait_for(self, name: str, owner: int = 0, other: str | None = None) -> bytes | None:
        """Wait for the value of a name; None if the other name appears, or if its owner, another process, is lost.

        Raises:
            ProcessLost: the first process is lost, or does not begin.
        """
        pause = 0.01
        while not self.store.check([name]):
            if other is not None and self.store.check([other]):
                return None
            if self.rank == 0 and self.store.check(["failed"]):
                raise _as_value(self.store.get("failed"))
            if self.signs.is_silent(owner):
                if self.rank > 0:
                    raise ProcessLost(
                        f"process {self.rank} of {self.world} got no sign of life from process 0, which died, was "
                        f"stopped, cannot be reached, or evaluates nothing. {_AGAIN}"
                    )
                if self.store.compare_set(f"lost {owner}", "", "yes"):
                    silence = _distributed.SILENCE
                    logger.warning(
                        "process %d gave no sign of life for %g s: the evaluation goes on without it", owner, silence
                    )
                return None
            time.sleep(pause)
            pause = min(LONGEST, 1.5 * pause)
        return self.store.get(name)

    def _wait_for_value(self, name: str) -> Any:
        """Wait for the first process's value of a name."""
        text = self._wait_for(name)
        assert text is not None
        return _as_value(text)

    def _fail(self, error: BaseException) -> None:
        """Tell the others of an error; a process other than the first leaves once the first has heard of it."""
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
        """Give the others the result, and time to read it: the store may be in this process and end with it."""
        self._ended = True
        self.store.set("ended", _as_text(result))
        end = time.monotonic() + GOODBYE
        # Read the signs of life once more: a process that has only just started has given nothing else yet, and must be
        # waited for too.
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
