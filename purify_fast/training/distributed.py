"""Training over several processes: what they share, how one that is lost is noticed, and torchrun's process group.

Every process has the whole model and its share of each batch. 92 % of CARSO's training is the attack on the frozen
classifier, which needs no communication; so gradients are averaged after the whole backward pass, without the overlap
that DistributedDataParallel buys by owning ``forward`` (tasks call other methods of their models too).

gloo's exchanges fail when another process ends. NCCL's return at once, and whatever then waits for their results waits
in the driver until the group's timeout. Neither hears of a process that was stopped, as by SIGSTOP. So within `fit`
every process gives signs of life in the store of the process group, and looks for those of the others. They tell of
processes alone: one that hangs in its own work is alive, and is named by its step when an exchange has waited in vain.
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

#: How long a process that fails waits for word that the first process failed too.
PATIENCE = timedelta(seconds=10)
NOTICE = 3.0  # seconds in which all processes notice that an exchange failed
GRACE = 20.0  # seconds in which a process may end by itself when another is lost

_AGAIN = "Start the same again to go on from the last checkpoint; torchrun --max-restarts does so by itself"
#: The beginning of gloo's errors, which are plain RuntimeErrors: the place in its sources where they arose.
_GLOO = re.compile(r"\[[^\]\s]*gloo/[^\]\s]*\.(cc|h):\d+\]")


# -- processes that are lost ------------------------------------------------------------------------------------------


def is_lost(error: RuntimeError) -> bool:
    """Tell whether an error comes from a failed exchange, and not from the model or anything else in the step.

    NCCL's and the store's errors have classes of their own. Words such as "timeout" in any other error mean nothing.
    """
    return isinstance(error, dist.DistError) or _GLOO.search(str(error)) is not None


@contextlib.contextmanager
def report_missing_process(step: int | None = None) -> Iterator[None]:
    """Within the block, a failed exchange raises an error that names the missing process.

    Args:
        step: step of the training, which tells the other processes how far this process is; None keeps the last step.

    Raises:
        ProcessLost: another process does not answer.
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
            f"process {_watch.rank} of {_watch.world} waited in vain in step {_watch.step} for: {_watch.missing()} "
            f"({str(error).splitlines()[0]}). {_AGAIN}"
        ) from error
    _watch.check()


class _Watch(_distributed.Heartbeat):
    """The signs of life of the processes within one training, and the end of a process that waits for a lost one."""

    lost = ""

    def watch(self) -> None:
        """Find a process that gives no signs any more, and end this process if it does not end by itself then."""
        while not self.lost:
            if self.over.wait(_distributed.BEAT):
                return
            self.count()
            quiet = [other for other in sorted(self.signs) if self.is_silent(other)]
            # a process that has ended its part no longer waits for the others
            if quiet and all(sign.state != "done" for sign in self.signs.values()):
                several = " (or of the store alone, through which the signs go)" if len(quiet) > 1 else ""
                self.lost = (
                    f"process {self.rank} of {self.world} had no sign of life for {_distributed.SILENCE:g} seconds of: "
                    f"{self.named(quiet)}{several}. It died, was stopped, or cannot be reached. {_AGAIN}"
                )
        if not self.over.wait(GRACE):
            # the main thread waits in a driver or a library, where no exception reaches it
            print(f"purify-fast: {self.lost}", file=sys.__stderr__, flush=True)
            os._exit(1)

    def check(self) -> None:
        """Raise ProcessLost if another process is lost."""
        if self.lost:
            raise ProcessLost(self.lost)

    def missing(self) -> str:
        """Name the processes that this one waited for in vain; processes that wait themselves are not among them."""
        self.state = "waits"
        self.give_and_read()
        # wait until the others have noticed
        time.sleep(NOTICE)
        self.give_and_read()
        gone = [other for other in self.missed if other not in self.signs or self.signs[other].state != "waits"]
        return self.named(gone) if gone else "all others wait too: the network between them failed"

    def named(self, ranks: list[int]) -> str:
        steps = {rank: f"last in step {self.signs[rank].step}" for rank in ranks if rank in self.signs}
        return "; ".join(f"process {rank}, {steps.get(rank, 'which has not begun')}" for rank in ranks)


_watch: _Watch | None = None
_watches = 0


@contextlib.contextmanager
def heartbeat() -> Iterator[None]:
    """Within the block, a process that dies or is stopped is noticed by all others, whatever they wait for.

    They raise `ProcessLost` at their next exchange. One that waits elsewhere, as in a driver for the result of an
    exchange by NCCL, says so on stderr and ends with status 1. With one process, nothing.
    """
    global _watch, _watches
    if processes()[1] == 1:
        yield
        return
    before, _watches = _watch, _watches + 1
    # PyTorch gives the store publicly only to the code that makes the group, which may not be this package
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
    """Replace each tensor by its mean over the processes, in place; nothing changes with one process.

    Args:
        tensors: floating point, one device, the same shapes, strides and order in every process.
    """
    world = processes()[1]
    if world == 1:
        return
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        by_dtype.setdefault(tensor.dtype, []).append(tensor)
    for dtype in sorted(by_dtype, key=str):
        same = by_dtype[dtype]
        # in the order of memory, in which each tensor is a view that a copy can read and write together with others
        flat = torch.cat([in_memory_order(tensor).flatten() for tensor in same])
        dist.all_reduce(flat)
        flat /= world
        means = flat.split([tensor.numel() for tensor in same])
        torch._foreach_copy_(same, [laid_out_like(mean, one) for mean, one in zip(means, same, strict=True)])


def from_first(make: Callable[[], Any]) -> Any:
    """Call ``make`` in the first process, and return its value or raise its exception in every process.

    Ctrl-C and an exit in the first process are passed on too: otherwise the others would wait for it in vain. The
    first process raises the exception itself; the others raise RuntimeError with its words where it cannot be pickled.

    Args:
        make: called by the first process only; gives nested dicts and lists of tensors, numbers, strings and None.

    Returns:
        The same, tensors on the CPU; with one process what ``make`` gave.
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
            # raise what ended the first process, even if the others are gone and cannot be told
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
    """Within the block, the process group that torchrun's environment describes; without torchrun, nothing.

    All processes except the first print nothing. If the first process raises an exception too, it reports it, and the
    others end without a word. All processes leave the block together.

    Raises:
        ValueError: WORLD_SIZE is set without the rest of torchrun's environment.
    """
    if int(os.environ.get("WORLD_SIZE") or 1) == 1:
        yield
        return
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
        # The wait may last hours (the first process evaluates). dist.barrier would give up after half an hour, and
        # would not notice a process that failed; torchrun's own record of errors is for torchrun alone.
        if rank == 0:
            store.set("done", "yes")
        else:
            store.wait(["done"], timedelta(days=7))
    except BaseException as error:
        if rank == 0:
            store.set("failed", "yes")
            raise
        # if the wait fails, the first process is at work, or has ended and taken the store along
        with contextlib.suppress(Exception):
            store.wait(["failed"], PATIENCE)
            # give the first process time to speak and end before torchrun sees this process end
            time.sleep(2)
            raise error if isinstance(error, SystemExit) else SystemExit(1) from None
        raise  # the group stays as it is: to take it down, all processes would have to be here
    dist.destroy_process_group()


def _store_of_this_launch(store: Store, rank: int, world: int) -> Store:
    """The part of a store that belongs to the processes that started together; DistError if one of them is missing.

    torchrun keeps one store over all of its restarts. Processes that are gone wrote their addresses there, and later
    processes would read them and wait for the dead. No variable of torchrun identifies a start. So the first process
    names the start, each other process answers with a random word, and the name holds once the first process has
    confirmed every word.
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
            # An entry of an earlier launch holds another token.
            if len(words) == world and words[rank] == own:
                return PrefixStore(name, store)
        time.sleep(0.01)
    raise dist.DistStoreError("the first process did not answer")


def own_device(device: str) -> str:
    """The device this process trains on: of several processes on a machine, each has the GPU of its number.

    Raises:
        ValueError: several processes and neither ``cuda`` nor ``cpu``, or more processes than GPUs.
    """
    if processes()[1] == 1 or device == "cpu":
        return device
    if device != "cuda":
        raise ValueError(f"device must be cuda or cpu for several processes, which share the GPUs, got {device!r}")
    local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if local >= gpus:
        raise ValueError(f"device cuda: process {local} of this machine needs a GPU, and there are {gpus}: start fewer")
    torch.cuda.set_device(local)
    return f"cuda:{local}"
