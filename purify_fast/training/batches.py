"""Reads the batches of loaders, for trainings and for evaluations, and seeds the random generators inside loaders."""

from __future__ import annotations

import functools
import inspect
import random
from collections.abc import Iterator, Mapping
from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data.dataloader import _BaseDataLoaderIter

from ..attacks.arguments import INTO_RANGE, ROUNDING
from ..model_state import is_installed

#: A list with more entries, such as that of a data set's files, is not searched for generators.
SEARCHED = 100


def read_batch(batch: Any, name: str) -> tuple[Tensor, Tensor, Any]:
    """Return the images and the labels of a batch, and its third part or None, or raise TypeError."""
    if isinstance(batch, Mapping):
        keys = list(batch)
        labels = next((key for key in keys if "label" in str(key) or key in ("y", "target", "targets")), "labels")
        images = next((key for key in keys if key != labels and getattr(batch[key], "ndim", 0) == 4), None)
        images = next((key for key in keys if key != labels), "images") if images is None else images
        raise TypeError(
            f"{name} must be (images, labels), got a dictionary with the keys {', '.join(map(repr, keys))}: give "
            f"(batch[{images!r}], batch[{labels!r}]). If a row is such a dictionary of tensors: DataLoader(..., "
            f"collate_fn=lambda rows: (torch.stack([row[{images!r}] for row in rows]), "
            f"torch.tensor([row[{labels!r}] for row in rows])))"
        )
    if not isinstance(batch, (tuple, list)) or len(batch) < 2:
        raise TypeError(f"{name} must be (images, labels) or (images, labels, indices), got {type(batch)}")
    images, labels = (as_tensor(f"the {part} of {name}", batch[i]) for i, part in enumerate(("images", "labels")))
    return images, labels, batch[2] if len(batch) > 2 else None


def as_tensor(name: str, value: Any) -> Tensor:
    """Return a tensor or a NumPy array of numbers as a tensor; TypeError for anything else."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "iuf":
        # PyTorch refuses negative strides and foreign byte orders, and warns about read-only arrays.
        value = torch.from_numpy(np.require(value, value.dtype.newbyteorder("="), ["C", "W"]))
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor or a NumPy array of numbers, got {type(value).__name__}")
    return value


def check_range(name: str, low: float, high: float, undo: str = "") -> None:
    """Raise ValueError for images with values outside [0, 1], except by rounding; ``undo`` is advice."""
    # The condition is negated so that NaN is refused too.
    if not (low >= -ROUNDING and high <= 1 + ROUNDING):
        advice = f"if they are normalized, {undo}" if undo and low < 0 else INTO_RANGE
        raise ValueError(f"{name} must be in [0, 1] and free of NaN, got values from {low:.5g} to {high:.5g}: {advice}")


def seed_generators(loader: Any, seed: int, epoch: int) -> None:
    """Seed the generators that a loader, its sampler or its data set own, and give the epoch to ``set_epoch``."""
    for part in _parts(loader):
        if isinstance(part, torch.Generator):
            part.manual_seed(seed)
        elif isinstance(part, (random.Random, np.random.RandomState)):
            part.seed(seed)
        elif isinstance(part, np.random.Generator):
            part.bit_generator.state = type(part.bit_generator)(seed).state
        else:
            if callable(getattr(type(part), "set_epoch", None)):
                part.set_epoch(epoch)
            continue
        seed = (seed + 1) % 2**32


def _parts(value: Any) -> Iterator[Any]:
    """Yield an object and the objects in its attributes and in the variables of its functions, the nearest first."""
    waiting, seen = [value], set[int]()
    for part in waiting:
        if id(part) in seen or isinstance(part, (Tensor, np.ndarray, str, type, ModuleType, _BaseDataLoaderIter)):
            continue
        seen.add(id(part))
        yield part
        if isinstance(part, (list, tuple, Mapping)):
            inside = part.values() if isinstance(part, Mapping) else part
            waiting += inside if len(part) <= SEARCHED else ()
        elif isinstance(part, FunctionType):
            if not is_installed(part.__code__.co_filename):
                read = inspect.getclosurevars(part)
                waiting += [*read.nonlocals.values(), *read.globals.values()]
        elif isinstance(part, MethodType):
            waiting += [part.__self__, part.__func__]
        elif isinstance(part, functools.partial):
            waiting += [part.func, part.args, part.keywords]
        else:
            waiting += getattr(part, "__dict__", {}).values()
