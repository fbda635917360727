"""Training with several processes: the exchanges between them, the detection of lost processes, and torchrun's group.

Every process has the whole model and its share of each batch. Gradients are averaged after the whole backward pass.
DistributedDataParallel would average them during it, but requires that a task calls only ``forward`` of its model, and
would save little time: 92 % of CARSO's training is the attack on the frozen classifier.

If a process ends, the exchanges of gloo fail in the others; with NCCL, the next operation that needs a result waits in
the driver until the group's timeout. Neither notices a process that was stopped, such as by SIGSTOP. So within `fit`,
every process writes signs of life into the store of the process group, and checks those of the other processes. If an
exchange with a process that hangs in its own work fails after the timeout, the error names its last step.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from .. import _distributed
from .._distributed import ProcessLost
from .._process import patience, processes, sendable
from .._tensors import in_memory_order, laid_out_like

#: The time that a failed process waits for the first to fail too. If it does, only the first reports its error.
PATIENCE = timedelta(seconds=10)
#: Seconds within which all processes notice that an exchange failed.
NOTICE = 3.0
#: A process that notices the loss of another process has this number of seconds to end. Then it is ended by force.
GRACE = 20.0

_AGAIN = "Start the same run again to continue from the last checkpoint; torchrun --max-restarts restarts it by itself"
#: gloo raises plain RuntimeErrors, whose text begins with a file and a line of gloo's source code.
_GLOO = re.compile(r"\[[^\]\s]*gloo/[^\]\s]*\.(cc|h):\d+\]")


# -- processes that are lost ------------------------------------------------------------------------------------------


def is_lost(error: RuntimeError) -> bool:
    """Tell whether an error comes from a failed exchange between processes, and not from the model.

    The errors of NCCL and of the store have classes of their own, and gloo's errors begin with a line of gloo's source
    code. Words such as "timeout" are not used, because any other error may contain them.
    """
    return isinstance(error, dist.DistError) or _GLOO.search(str(error)) is not None


@contextlib.contextmanager
def report_missing_process(step: int | None = None) -> Iterator[None]:
    """Within the block, a failed exchange raises an error that names the missing process.

    Args:
        step: number of the current step, for the errors of other processes. None means the number from the last call.

    Raises:
        ProcessLost: another process is lost or does not answer.
    """
    if _watch is None:
        yield
        return
    _watch.step = _watch.step if step is None else step
    _watch.check()
    try:
        yield
    except RuntimeError as error:
        if not is_lost(error):
            raise
        raise ProcessLost(
            f"process {_watch.rank} of {_watch.world} got no answer in step {_watch.step} from: {_watch.missing()} "
            f"({str(error).splitlines()[0]}). {_AGAIN}"
        ) from error
    _watch.check()


class _Watch(_distributed.Heartbeat):
    """Exchanges signs of life within one training, and ends this process if it waits for a lost process."""

    lost = ""

    def watch(self) -> None:
        """Wait until another process gives no signs of life. Then end this process, unless it ends by itself."""
        while not self.lost:
            if self.over.wait(_distributed.BEAT):
                return
            self.count()
            quiet = [other for other in sorted(self.signs) if self.is_silent(other)]
            # a process that has finished its training may end without a fault, so silence then says nothing
            if quiet and all(sign.state != "done" for sign in self.signs.values()):
                several = " (or the store that transmits the signs failed)" if len(quiet) > 1 else ""
                self.lost = (
                    f"process {self.rank} of {self.world} got no sign of life for {_distributed.SILENCE:g} seconds "
                    f"from: {self.named(quiet)}{several}. It died, was stopped, or cannot be reached. {_AGAIN}"
                )
        if not self.over.wait(GRACE):
            # the main thread waits in a driver or a library, where an exception cannot reach it
            print(f"purify-fast: {self.lost}", file=sys.__stderr__, flush=True)
            os._exit(1)

    def check(self) -> None:
        """Raise ProcessLost if another process is lost."""
        if self.lost:
            raise ProcessLost(self.lost)

    def missing(self) -> str:
        """Name the processes that did not take part in the exchange. Processes that also wait are not named."""
        self.state = "waits"
        self.give_and_read()
        # the other processes need time to notice that the exchange failed
        time.sleep(NOTICE)
        self.give_and_read()
        gone = [other for other in self.missed if other not in self.signs or self.signs[other].state != "waits"]
        return self.named(gone) if gone else "any process, but all others wait too: the network between them failed"

    def named(self, ranks: list[int]) -> str:
        steps = {rank: f"last in step {self.signs[rank].step}" for rank in ranks if rank in self.signs}
        return "; ".join(f"process {rank}, {steps.get(rank, 'which has not begun')}" for rank in ranks)


_watch: _Watch | None = None
_watches = 0


@contextlib.contextmanager
def heartbeat() -> Iterator[None]:
    """Within the block, every process notices if another process dies or is stopped. A single process checks nothing.

    The other processes raise `ProcessLost` at their next exchange. A process that waits elsewhere, such as in a driver
    for the result of NCCL, prints the error to stderr and ends with status 1.
    """
    global _watch, _watches
    if processes()[1] == 1:
        yield
        return
    before, _watches = _watch, _watches + 1
    # PyTorch has no public function for the store of a group that the user has made.
    store = dist.distributed_c10d._get_default_store().clone()
    _watch = watch = _Watch(store, f"purify_fast alive {_watches}")
    watch.start()
    try:
        yield
        watch.state = "done"
    finally:
        _watch = before
        watch.stop()


# -- what processes exchange -------------------------------------------------------------------------------------------


@torch.no_grad()
def average_(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by its mean over the processes, in place. With a single process, nothing changes.

    Args:
        tensors: floating-point tensors on one device, with the same shapes, strides and order in every process.
    """
    world = processes()[1]
    if world == 1:
        return
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        by_dtype.setdefault(tensor.dtype, []).append(tensor)
    for dtype in sorted(by_dtype, key=str):
        same = by_dtype[dtype]
        # Each tensor is flattened in its own memory order, and its mean is viewed with the tensor's strides. So one
        # call can copy all means back.
        flat = torch.cat([in_memory_order(tensor).flatten() for tensor in same])
        dist.all_reduce(flat)
        flat /= world
        means = flat.split([tensor.numel() for tensor in same])
        torch._foreach_copy_(same, [laid_out_like(mean, one) for mean, one in zip(means, same, strict=True)])


def from_first(make: Callable[[], Any]) -> Any:
    """Call ``make`` in the first process, and return its value or raise its exception in every process.

    KeyboardInterrupt and SystemExit are raised everywhere too, because otherwise the other processes would wait
    forever. If an exception cannot be pickled, the other processes raise RuntimeError with its message.

    Args:
        make: function that only the first process calls. It returns nested dicts and lists of tensors, numbers, strings
            and None.

    Returns:
        The value of ``make``. With several processes, its tensors are on the CPU.
    """
    rank, world = processes()
    if world == 1:
        return make()
    message: list[Any] = [None]
    if rank == 0:
        try:
            file = io.BytesIO()
            torch.save(make(), file)
            message = [file.getvalue()]
        except BaseException as error:
            message = [sendable(error)]
            # the first process raises its own exception, even if the broadcast fails because the others have ended
            with contextlib.suppress(BaseException):
                dist.broadcast_object_list(message, src=0)
            raise
    with report_missing_process():
        dist.broadcast_object_list(message, src=0)
    if isinstance(message[0], BaseException):
        raise message[0]
    return torch.load(io.BytesIO(message[0]), map_location="cpu", weights_only=True)


# -- torchrun's processes ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def torchrun_group() -> Iterator[None]:
    """Within the block, the process group of torchrun's environment exists.

    All processes except the first print nothing. If all processes fail, only the first reports its exception. All
    processes leave the block together.

    Raises:
        ValueError: WORLD_SIZE is set without the rest of torchrun's environment.
    """
    whole, rank, world = next(rendezvous("env://"))
    cuda = torch.cuda.is_available() and dist.is_nccl_available()
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    try:
        store = _store_of_this_launch(whole, rank, world)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=patience())
    except RuntimeError as error:
        if not is_lost(error):
            raise
        reason = str(error).partition("\n")[0]
        raise ProcessLost(f"process {rank} of {world} did not find the others ({reason}). {_AGAIN}") from error
    try:
        with contextlib.ExitStack() as silence:
            if rank > 0:
                nowhere = silence.enter_context(open(os.devnull, "w"))
                silence.enter_context(contextlib.redirect_stdout(nowhere))
                silence.enter_context(contextlib.redirect_stderr(nowhere))
            yield
        # This may last hours, while the first process evaluates. dist.barrier would give up after half an hour.
        if rank == 0:
            store.set("done", "yes")
        else:
            store.wait(["done"], timedelta(days=7))
    except BaseException as error:
        if rank == 0:
            store.set("failed", "yes")
            raise
        # this wait fails if the first process still works, or if it has ended and the store with it
        with contextlib.suppress(Exception):
            store.wait(["failed"], PATIENCE)
            # the first process needs time to print its error before torchrun notices that this process has ended
            time.sleep(2)
            raise error if isinstance(error, SystemExit) else SystemExit(1) from None
        # the group is not destroyed here, because all processes would have to take part in that
        raise
    dist.destroy_process_group()


def _store_of_this_launch(store: Store, rank: int, world: int) -> Store:
    """Return a part of torchrun's store that belongs to this start only; raise DistError if a process is missing.

    torchrun uses one store for all of its restarts. The store contains the addresses of processes from earlier starts,
    and new processes would try to reach these addresses. So the first process writes a random name for the start. Each
    other process adds a random word under this name. The first process confirms by writing the list of all words, and a
    process that finds its own word in the list uses the name.
    """
    own, key, until = os.urandom(8).hex(), "purify_fast start", time.monotonic() + patience().total_seconds()

    def told(name: str) -> str:
        # Some stores read a timeout of 0 as 'wait forever'.
        store.wait([name], timedelta(seconds=max(until - time.monotonic(), 0.001)))
        return store.get(name).decode()

    if rank == 0:
        store.set(key, own)
        words = [own, *(told(f"{key} {own} {other}") for other in range(1, world))]
        store.set(f"{key} {own}", " ".join(words))
        return PrefixStore(own, store)
    while time.monotonic() < until:
        name = told(key)
        store.set(f"{key} {name} {rank}", own)
        if store.check([f"{key} {name}"]):
            words = store.get(f"{key} {name}").decode().split()
            # a list of an earlier start has other words
            if len(words) == world and words[rank] == own:
                return PrefixStore(name, store)
        time.sleep(0.01)
    raise dist.DistStoreError("the first process did not answer")


def own_device(device: str) -> str:
    """Return the device of this process. With ``cuda``, each process of a machine has the GPU of its local number.

    Raises:
        ValueError: there are several processes and ``device`` is neither ``cuda`` nor ``cpu``, or there are more
            processes than GPUs.
    """
    if processes()[1] == 1 or device == "cpu":
        return device
    if device != "cuda":
        raise ValueError(f"device must be cuda or cpu for several processes, got {device!r}")
    local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if local >= gpus:
        raise ValueError(
            f"device cuda needs one GPU for each process of a machine, got {gpus} GPUs for at least {local + 1} "
            "processes: start fewer processes"
        )
    torch.cuda.set_device(local)
    return f"cuda:{local}"
