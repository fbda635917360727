"""Processes that test something together: forks of this one, which begin at once, since none imports PyTorch again."""

import os
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist

#: Seconds after which a process that has not ended hangs.
LONGEST = 600.0
#: Where the processes meet: in a file, as torchrun's do, or nowhere.
Store = Literal["file", "torchrun"] | None


class Ended(NamedTuple):
    """The ends of processes, in their order."""

    codes: list[int]  # exit statuses; a signal as a negative number
    # The output of each process.
    errors: list[str]
    results: list[Any]  # None where their work did not return


class Processes:
    """Forks that are at work."""

    def __init__(self, folder: Path, pids: Sequence[int]):
        self.folder, self.pids = folder, pids
        self._status: dict[int, int] = {}

    def _ended(self, rank: int) -> bool:
        if rank not in self._status:
            pid, status = os.waitpid(self.pids[rank], os.WNOHANG)
            if pid:
                self._status[rank] = os.waitstatus_to_exitcode(status)
        return rank in self._status

    def wait(self, *ranks: int) -> None:
        """Until these have ended."""
        until(lambda: all(map(self._ended, ranks)))

    def kill(self) -> None:
        """End those that are still there."""
        for rank, pid in enumerate(self.pids):
            if not self._ended(rank):
                os.kill(pid, signal.SIGKILL)
                self.wait(rank)

    def ended(self) -> Ended:
        """The ends of the processes."""
        errors, results = [], []
        for rank in range(len(self.pids)):
            errors.append((self.folder / f"errors-{rank}").read_text())
            result = self.folder / f"result-{rank}"
            results.append(pickle.loads(result.read_bytes()) if result.exists() else None)
        return Ended([self._status[rank] for rank in range(len(self.pids))], errors, results)


def until(condition: Callable[[], bool]) -> None:
    """Wait for something that happens, if nothing hangs."""
    end = time.monotonic() + LONGEST
    while not condition():
        assert time.monotonic() < end, "it hangs"
        time.sleep(0.01)


def together(folder: Path, world: int, work: Callable[[], Any], store: Store = "file") -> Ended:
    """The ends of forks in a process group that all end by themselves; after an error here, they are killed."""
    number = 0
    while (own := folder / f"forks-{number}").exists():
        number += 1
    own.mkdir(parents=True)
    pids: list[int] = []
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            _live(own, rank, world, work, store)
        pids.append(pid)
    made = Processes(own, pids)
    try:
        # torchrun has the store itself
        _ = _open_store(own, world) if store == "torchrun" else None
        made.wait(*range(world))
    finally:
        made.kill()
    return made.ended()


def results_of(folder: Path, world: int, work: Callable[[], Any]) -> list[Any]:
    """The results of processes that all end without an error."""
    done = together(folder, world, work)
    assert done.codes == [0] * world, done.errors
    return done.results


def kill_at_call(place: Any, name: str, number: int) -> None:
    """This process is killed at its first, second, ... call of a function."""
    original, calls = getattr(place, name), []

    def call(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **options)

    setattr(place, name, call)


def _live(folder: Path, rank: int, world: int, work: Callable[[], Any], store: Store) -> None:
    """A fork's whole life."""
    code = 1
    try:
        file = (folder / f"errors-{rank}").open("w", buffering=1)
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
        sys.stdout = sys.stderr = sys.__stdout__ = sys.__stderr__ = file
        torch.set_num_threads(1)
        _meet(folder, rank, world, store)
        result = pickle.dumps(work())
        if dist.is_initialized():
            dist.destroy_process_group()
        (folder / f"result-{rank}").write_bytes(result)
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        # the fork does nothing else that the test's process would do: no fixture ends, nothing is reported
        os._exit(code)


def _meet(folder: Path, rank: int, world: int, store: Store) -> None:
    """Join the group; its exchanges wait for half an hour, as they do without a setting."""
    if store is None:
        return
    port = folder / "port"
    if store == "torchrun":
        until(port.exists)
        ranks = dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank)) | {"WORLD_SIZE": str(world)}
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port.read_text()}
        os.environ |= ranks | address | {"TORCHELASTIC_USE_AGENT_STORE": "True"}
        return
    found = dist.FileStore(str(folder / "store"), world)
    dist.init_process_group("gloo", store=found, rank=rank, world_size=world, timeout=timedelta(minutes=30))


def _open_store(folder: Path, world: int) -> dist.TCPStore:
    """A store at a port that the system chooses, and the others read."""
    store = dist.TCPStore("127.0.0.1", 0, world, is_master=True, wait_for_workers=False)
    new = folder / "port.new"
    new.write_text(str(store.port))
    new.rename(folder / "port")
    return store
