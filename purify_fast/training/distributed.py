"""Training with several processes: the exchanges between them, and torchrun's process group.

Every process has the whole model and its share of each batch. Gradients are averaged after the whole backward pass.
DistributedDataParallel would require that a task calls only ``forward``, and would save little time: 92 % of CARSO's
training is the attack. If a process dies, the others end at their next exchange, or after the timeout.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from .._process import patience, processes, sendable
from ..models.layers import BatchNorm1d, BatchNorm2d, Synchronized, synchronized
from ..speed.watch import copy_all

logger = logging.getLogger("purify_fast")

#: The BatchNorms that take the statistics of all processes in training mode.
OVER_ALL = (BatchNorm1d, BatchNorm2d, Synchronized, nn.SyncBatchNorm)


@torch.no_grad()
def average_(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by its mean over the processes, in place."""
    world = processes()[1]
    if world == 1:
        return
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        by_dtype.setdefault(tensor.dtype, []).append(tensor)
    for dtype in sorted(by_dtype, key=str):
        same = by_dtype[dtype]
        flat = torch.cat([tensor.flatten() for tensor in same])
        dist.all_reduce(flat)
        flat /= world
        means = flat.split([tensor.numel() for tensor in same])
        copy_all((tensor, mean.view_as(tensor)) for tensor, mean in zip(same, means, strict=True))


def from_first(make: Callable[[], Any]) -> Any:
    """Call ``make`` in the first process, and return its value or raise its exception in every process."""
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
            # The first process raises its own exception, even if the broadcast fails because the others have ended.
            with contextlib.suppress(BaseException):
                dist.broadcast_object_list(message, src=0)
            raise
    dist.broadcast_object_list(message, src=0)
    if isinstance(message[0], BaseException):
        raise message[0]
    return torch.load(io.BytesIO(message[0]), map_location="cpu", weights_only=True)


@contextlib.contextmanager
def synchronized_batchnorm(model: nn.Module) -> Iterator[None]:
    """Within the block, the BatchNorms of a model take the statistics of all processes.

    A BatchNorm only gets another class, so weights, optimizers and names stay, and afterwards it is as it was. A
    BatchNorm in training mode that remains over one process raises a ValueError.
    """
    changed = list[tuple[nn.Module, type, type]]()
    for name, part in model.named_modules() if processes()[1] > 1 else ():
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and not isinstance(part, OVER_ALL):
            kind: Any = type(part)
            # A training may put it into training mode later.
            learns = part.training or any(weight.requires_grad for weight in part.parameters())
            usual = part.affine and part.track_running_stats and part.momentum is not None
            other = synchronized(kind) if usual else None
            if other is None and part.training:
                text = f"the model's module {name} is a {kind.__name__}, a BatchNorm over one process"
                raise ValueError(f"{text}, which cannot be converted: use torch.nn.SyncBatchNorm")
            if other is not None and learns:
                changed.append((part, kind, other))
    if changed:
        logger.info("%d BatchNorms take the statistics of all processes during the training", len(changed))
    try:
        for part, _, other in changed:
            part.__class__ = other
        yield
    finally:
        for part, kind, _ in changed:
            part.__class__ = kind


def exchanges(model: nn.Module) -> bool:
    """Return True if a forward pass of a model waits for the other processes."""
    return processes()[1] > 1 and any(isinstance(part, OVER_ALL) and part.training for part in model.modules())


@contextlib.contextmanager
def torchrun_group() -> Iterator[None]:
    """Within the block, the process group of torchrun's environment exists."""
    shared, rank, world = next(rendezvous("env://"))
    cuda = torch.cuda.is_available() and dist.is_nccl_available()
    store, port = _own_store(shared, rank, world)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=patience())
    with contextlib.ExitStack() as silence:
        if rank > 0:
            nowhere = silence.enter_context(open(os.devnull, "w"))
            silence.enter_context(contextlib.redirect_stdout(nowhere))
            silence.enter_context(contextlib.redirect_stderr(nowhere))
        yield
    # This may last hours, while the first process evaluates. dist.barrier would give up after half an hour.
    if rank == 0:
        shared.set(f"purify_fast done {port}", "yes")
    else:
        shared.wait([f"purify_fast done {port}"], timedelta(days=7))
    dist.destroy_process_group()


def _own_store(shared: Store, rank: int, world: int) -> tuple[Store, int]:
    """Return a store that the first process opens for this start, and its port."""
    # torchrun's store survives restarts, with the addresses of processes that are gone. Their ports refuse connections.
    host, key, until = os.environ["MASTER_ADDR"], "purify_fast port", time.monotonic() + patience().total_seconds()
    if rank == 0:
        own = TCPStore(host, 0, world, is_master=True, wait_for_workers=False, timeout=patience())
        shared.set(key, str(own.port))
        return own, own.port
    while True:
        shared.wait([key], timedelta(seconds=max(until - time.monotonic(), 0.001)))
        port = int(shared.get(key))
        try:
            own = TCPStore(host, port, world, wait_for_workers=False, timeout=timedelta(seconds=2))
        except dist.DistError:
            if time.monotonic() > until:
                raise
        else:
            own.set_timeout(patience())
            return own, port


def own_device(device: str) -> str:
    """Return the device of this process."""
    if processes()[1] == 1 or device != "cuda":
        return device
    torch.cuda.set_device(local := int(os.environ["LOCAL_RANK"]))
    return f"cuda:{local}"
