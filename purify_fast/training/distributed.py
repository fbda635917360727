"""Training over several processes: what they share, and the group that torchrun's environment describes.

Every process has the whole model and its share of each batch. 92 % of CARSO's training is the attack on the frozen
classifier, which needs no communication; so gradients are averaged after the whole backward pass, without the overlap
that DistributedDataParallel buys by owning ``forward`` (tasks call other methods of their models too).
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from itertools import groupby
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from .._process import processes
from .._tensors import in_memory_order, laid_out_like
from .lost_processes import ProcessLost, is_lost, named_when_lost

T = TypeVar("T")

BUCKET = 2**25  # numbers sent at once: bounds the memory of the copy
PATIENCE = timedelta(seconds=10)  # of a process that fails, for word that the first one failed too

# torchrun's store, within `torchrun_group`. What the processes wait for here may take hours, a download or the first
# one's evaluation, and a process that has failed is to be heard by others that are in no collective call:
# dist.barrier would end such a wait after half an hour, and elastic's record tells torchrun alone.
_store: Store | None = None


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    for _, same in groupby(sorted(tensors, key=lambda t: str(t.dtype)), lambda t: t.dtype):
        bucket: list[Tensor] = []
        for tensor in same:
            if bucket and sum(map(torch.numel, bucket)) + tensor.numel() > BUCKET:
                yield bucket
                bucket = []
            bucket.append(tensor)
        yield bucket


@torch.no_grad()
def average_(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by its mean over the processes, in place; nothing changes with one process.

    Args:
        tensors: floating point, one device, the same shapes, strides and order in every process.
    """
    world = processes()[1]
    if world == 1:
        return
    for bucket in _buckets(tensors):
        # in the order of their memory, in which a tensor is a view that one copy can read and write among many
        flat = torch.cat([in_memory_order(tensor).flatten() for tensor in bucket])
        with named_when_lost():
            dist.all_reduce(flat)
        flat /= world
        means = flat.split([tensor.numel() for tensor in bucket])
        torch._foreach_copy_(bucket, [laid_out_like(mean, one) for mean, one in zip(means, bucket, strict=True)])


def from_first(make: Callable[[], Any]) -> Any:
    """What ``make`` gives in the first process, or the exception it raises there, in every process.

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
    cuda = dist.get_backend() in ("nccl", "cuda:nccl")  # which has no exchange on the CPU
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    message: list[Any] = [None]
    if rank == 0:
        try:
            file = io.BytesIO()
            torch.save(make(), file)
            message = [file.getvalue()]
        except BaseException as error:
            message = [_sendable(error)]
            # what ended the first process is raised here, even where the others are gone and cannot be told
            with contextlib.suppress(BaseException):
                dist.broadcast_object_list(message, src=0, device=device)
            raise
    with named_when_lost():
        dist.broadcast_object_list(message, src=0, device=device)
    if isinstance(message[0], BaseException):
        raise message[0]
    return torch.load(io.BytesIO(message[0]), map_location="cpu", weights_only=True)


def _sendable(error: BaseException) -> BaseException:
    """An exception as the other processes can read it: itself, or what it says where it cannot be pickled."""
    try:
        read = pickle.loads(pickle.dumps(error))
    except Exception:  # whatever a class of the user's raises when it is pickled or made anew
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error if type(read) is type(error) else RuntimeError(f"{type(error).__name__}: {error}")


def gathered(value: Any) -> list[Any]:
    """What each process gives, anything that can be pickled, by rank; in every process."""
    world = processes()[1]
    values: list[Any] = [value] * world
    if world > 1:
        dist.all_gather_object(values, value)
    return values


def patience() -> timedelta:
    """How long an exchange waits for another process: PURIFY_FAST_TIMEOUT in seconds, 1800 if it is not set.

    Raises:
        ValueError: the variable holds no number above 0.
    """
    text = os.environ.get("PURIFY_FAST_TIMEOUT") or "1800"
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e9:
        raise ValueError(f"PURIFY_FAST_TIMEOUT must be a number of seconds above 0, got {text!r}")
    return timedelta(seconds=seconds)


def launched() -> int:
    """The number of processes that torchrun started, this one among them; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE") or 1)


@contextlib.contextmanager
def torchrun_group() -> Iterator[None]:
    """Within the block, the process group that torchrun's environment describes; without torchrun, nothing.

    All processes but the first print nothing in it. An exception that is raised in the first one too is that one's to
    report: the others end without a word. They leave the block together.

    Raises:
        ValueError: WORLD_SIZE is set without the rest of torchrun's environment.
    """
    global _store
    if launched() == 1:
        yield
        return
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ValueError(f"WORLD_SIZE is {launched()}, but {', '.join(missing)} not set: start this by torchrun")
    whole, rank, world = next(rendezvous("env://"))
    _store = _of_this_start(whole, rank, world)
    try:
        _join(_store, rank, world)
        with contextlib.ExitStack() as silence:
            if rank > 0:
                nowhere = silence.enter_context(open(os.devnull, "w"))
                silence.enter_context(contextlib.redirect_stdout(nowhere))
                silence.enter_context(contextlib.redirect_stderr(nowhere))
            yield
        _after_first("done", rank)
    except BaseException as error:
        if rank == 0:
            _store.set("failed", "yes")
        elif _first_failed():
            raise error if isinstance(error, SystemExit) else SystemExit(1) from None
        raise  # with the group as it is: to take it down, all would have to be here
    dist.destroy_process_group()
    _store = None


def _of_this_start(store: Store, rank: int, world: int) -> Store:
    """The part of a store that belongs to the processes that started together.

    torchrun keeps one store over all of its restarts. What processes wrote that are gone, such as their addresses,
    would be read by those that come after them, which then wait for the dead. Nothing that torchrun tells is the same
    in all processes of one start and in no other. So the first process names the start, the others answer with a word
    of their own, and the name holds once the first has told each its word.

    Raises:
        ProcessLost: another process did not start.
    """
    own, key, until = os.urandom(8).hex(), "purify_fast start", time.monotonic() + patience().total_seconds()
    try:
        if rank == 0:
            store.set(key, own)
            words = [own, *(_told(store, f"{key} {own} {other}", until) for other in range(1, world))]
            store.set(f"{key} {own}", " ".join(words))
            return PrefixStore(own, store)
        while time.monotonic() < until:
            name = _told(store, key, until)
            store.set(f"{key} {name} {rank}", own)
            if store.check([f"{key} {name}"]):
                words = store.get(f"{key} {name}").decode().split()
                # one of an earlier start holds another word
                if len(words) == world and words[rank] == own:
                    return PrefixStore(name, store)
            time.sleep(0.01)
    except dist.DistError as error:
        raise _apart(rank, world, str(error)) from error
    raise _apart(rank, world, "the first process did not answer")


def _told(store: Store, key: str, until: float) -> str:
    """What a store holds under a name, at the latest ``until``, on the clock of ``time.monotonic``; else DistError."""
    # of a wait of 0 seconds some stores make one without an end
    store.wait([key], timedelta(seconds=max(until - time.monotonic(), 0.001)))
    return store.get(key).decode()


def _join(store: Store, rank: int, world: int) -> None:
    """Make the process group; ProcessLost if another process cannot be reached."""
    cuda = torch.cuda.is_available() and dist.is_nccl_available()
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    try:
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=patience())
    except RuntimeError as error:
        if not is_lost(error):
            raise
        raise _apart(rank, world, str(error)) from error


def _apart(rank: int, world: int, why: str) -> ProcessLost:
    """The message where the processes do not find each other."""
    return ProcessLost(
        f"process {rank} of {world} did not find the others ({why.splitlines()[0] if why else 'no reason given'}): "
        "see what they say, and start the same again to go on from the last checkpoint"
    )


def _after_first(event: str, rank: int) -> None:
    assert _store is not None
    if rank == 0:
        _store.set(event, "yes")
    else:
        _store.wait([event], timedelta(days=7))


def _first_failed() -> bool:
    assert _store is not None
    try:
        _store.wait(["failed"], PATIENCE)
    except Exception:  # it is at work, or has ended and taken the store along
        return False
    time.sleep(2)  # for it to speak and end before torchrun sees this process end
    return True


def own_device(device: str) -> str:
    """The device this process trains on: of several processes on a machine, each has the GPU of its number.

    Raises:
        ValueError: several processes and neither ``cuda`` nor ``cpu``, or more processes than GPUs.
    """
    if processes()[1] == 1 or device == "cpu":
        return device
    if device != "cuda":
        raise ValueError(f"device must be cuda or cpu for several processes, which share the GPUs out, got {device!r}")
    local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if local >= gpus:
        raise ValueError(f"device cuda: process {local} of this machine has no GPU, there are {gpus}: start fewer")
    torch.cuda.set_device(local)
    return f"cuda:{local}"


def in_turn(load: Callable[[], T]) -> T:
    """``load()``, on each machine by one process first: it may download what the others then find.

    Once within `torchrun_group`; without it, simply ``load()``.
    """
    if _store is None:
        return load()
    local, event = int(os.environ["LOCAL_RANK"]), f"loaded {os.environ.get('GROUP_RANK', '0')}"
    if local > 0:
        _after_first(event, local)
    loaded = load()
    if local == 0:
        _after_first(event, local)
    return loaded
