"""Sources of a training's images: tensors, a DataLoader, or any iterable of batches."""

from __future__ import annotations

import logging
import random
from collections.abc import Generator, Iterable, Iterator, Sized
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from .._process import processes
from .._settings import digest
from ..data import batches
from ..speed.draws import same_draws
from ..speed.memory import free_memory
from .batches import check_channels, check_range, read_batch, seed_generators
from .config import FitConfig
from .task import Task

logger = logging.getLogger("purify_fast")

#: An iterable of batches, where a batch is (images, labels) or (images, labels, indices). Every epoch must have the
#: same number of batches.
Batches: TypeAlias = Iterable[Any]
#: A batch as a source returns it: images, uint8 or float ``[B, C, H, W]``; labels, int64 ``[B]``; and the indices of
#: the images, int64 ``[B]``.
RawBatch: TypeAlias = tuple[Tensor, Tensor, Tensor]
#: The forms in which `fit` accepts images: a tensor of all images, which `fit` divides into batches; or an iterable of
#: batches.
Images: TypeAlias = "Tensor | Batches"
#: Images of at most so many bytes, and at most this share of a GPU's free memory, are moved to the GPU before a run.
MOST_BYTES, MOST_SHARE = 2**30, 0.1
#: The types of devices to which images are moved, and which compute while the host goes on.
GPUS = ("cuda",)


def placed(x: Tensor, device: torch.device) -> Tensor:
    """Return images on a GPU, if they are on the CPU and small, or else the images themselves."""
    moves = device.type in GPUS and x.device.type == "cpu"
    if not moves or x.nbytes > min(MOST_BYTES, MOST_SHARE * free_memory(device)):
        return x
    logger.info("the %d images are moved to %s, %.0f MiB", len(x), device, x.nbytes / 2**20)
    return x.to(device)


def sent(part: Tensor, device: torch.device) -> Tensor:
    """Return a part of a batch on the device. The host does not wait, so it prepares a batch during the step before."""
    if device.type in GPUS and part.device.type == "cpu":
        # Only from pinned memory can the device copy by itself.
        return part.pin_memory().to(device, non_blocking=True)
    return part.to(device)


def step_seed(seed: int, step: int) -> int:
    """Return a seed for a step: ``seed`` and ``step``, mixed into the 32 bits that torch's CPU generator reads."""
    return int(np.random.SeedSequence([seed, step]).generate_state(1)[0])


def seed_draws(seed: int, own: Iterable[Any] = ()) -> None:
    """Seed the global generators of PyTorch, NumPy and Python, and each of a model's own."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
    for number, source in enumerate(own, seed + 1):
        if isinstance(source, torch.Generator):
            source.manual_seed(number)
        elif isinstance(source, np.random.Generator):
            source.bit_generator.state = type(source.bit_generator)(number).state
        else:
            source.seed(number % 2**32)


class InMemory:
    """Returns batches of tensors on a device, in an order that depends only on the seed and the epoch.

    ``description`` must be equal for a run to be resumed, within an epoch only if ``reproducible``. ``first_batch`` is
    a hash of the run's first batch, if only the batches show which images a source has.
    """

    reproducible: bool = True
    first_batch: str | None = None

    def __init__(
        self, x: Tensor, y: Tensor, config: FitConfig, device: torch.device, ids: Tensor | None = None, world: int = 1
    ):
        self.x, self.y, self.config, self.device, self.world = x, y.to(device), config, device, world
        self.ids = torch.arange(len(x), device=x.device) if ids is None else ids.to(x.device)
        n, self.batch_size = len(self.ids), config.batch_size
        rest = n % config.batch_size
        if not config.drop_last and rest % world:
            raise ValueError(f"drop_last must be True: {world} processes cannot share a last batch of {rest} images")
        self.steps = _cut_off(len(self._order(0)), config)
        self.images = min(n, self.steps * config.batch_size)
        self.description = f"{len(x)} images, {digest(x, y)}"

    def _order(self, epoch: int) -> list[Tensor]:
        """Return the indices of the images in each of the epoch's batches."""
        n, size, seed, drop_last = len(self.ids), self.batch_size, self.config.seed, self.config.drop_last
        rank = processes()[0] if self.world > 1 else 0
        return batches(n, size, seed, epoch, drop_last, rank=rank, world=self.world, device=self.x.device)

    def epoch(self, epoch: int, first: int, every: int = 1) -> Generator[RawBatch]:
        """Yield this process's share of each ``every``-th batch of the epoch, beginning with number ``first``."""
        for rows in self._order(epoch)[first : self.steps : every]:
            # On a CPU, index_select is faster than x[rows].
            images = self.x.index_select(0, rows := self.ids[rows])
            ids = sent(rows, self.device)
            yield sent(images, self.device), self.y[ids], ids


def _cut_off(steps: int, config: FitConfig) -> int:
    """Return the steps of an epoch; raise ValueError if ``steps_per_epoch`` is above ``steps``, the steps of a pass."""
    count = steps if config.steps_per_epoch is None else config.steps_per_epoch
    if count > steps:
        raise ValueError(f"steps_per_epoch must be at most {steps}, the steps of a pass over the images, got {count}")
    return count


class Loader:
    """Returns batches of a DataLoader or of another iterable, on the model's device.

    The global generators are seeded before each epoch and batch, and a loader's own generators before each epoch. So
    all random draws depend only on the seed and the epoch.
    """

    reproducible: bool = False
    first_batch: str | None = None
    # True after the warning of a stream that is too short
    has_warned: bool = False
    # 0 means that the sizes are not known before the batches arrive
    batch_size, images = 0, 0

    def __init__(self, x: Batches, config: FitConfig, device: torch.device):
        self.x, self.seed, self.device = x, config.seed, device
        try:
            length = len(x) if isinstance(x, Sized) else None
        except TypeError:
            # A DataLoader of a stream has no length.
            length = None
        # An iterator would be exhausted after one epoch.
        if not isinstance(x, Iterable) or isinstance(x, Iterator) or length == 0:
            raise TypeError(f"x must be a tensor, or batches with a length above 0, got {type(x).__name__}")
        if length is None and config.steps_per_epoch is None:
            # The learning rates depend on the length of the run.
            raise TypeError(f"steps_per_epoch must be set for batches without a length, got x = {type(x).__name__}")
        self.steps = config.steps_per_epoch or 0 if length is None else _cut_off(length, config)
        self.description = f"batches, {self.steps} an epoch"

    def epoch(self, epoch: int, first: int = 0) -> Generator[RawBatch]:
        """Yield the batches of an epoch. A run is resumed only between epochs, so ``first`` is always 0."""
        x: Any = self.x
        reads_ahead = isinstance(x, DataLoader) and not isinstance(x.dataset, IterableDataset) and x.persistent_workers
        if reads_ahead and x._iterator is None:
            # The first iterator of persistent workers draws other numbers than the next ones.
            iter(x)
        seed_generators(x, step_seed(self.seed, epoch * self.steps), epoch)
        seed_draws(step_seed(self.seed, epoch * self.steps))
        batches, seen = iter(x), 0
        for k in range(self.steps):
            seed_draws(step_seed(self.seed, epoch * self.steps + k))
            if (batch := next(batches, None)) is None:
                if not self.has_warned:
                    text = "x gave %d batches in place of %d in epoch %d: it begins again. Set steps_per_epoch to that"
                    logger.warning(text, k, self.steps, epoch)
                self.has_warned = True
                batches = iter(x)
                if (batch := next(batches, None)) is None:
                    raise ValueError(f"x must give batches in every epoch, but gave none in epoch {epoch}")
            name = f"batch {k} of x"
            images, labels, indices = read_batch(batch, name)
            usable = isinstance(indices, (Tensor, np.ndarray)) and indices.shape == (len(images),)
            ids = torch.as_tensor(indices).long() if usable else torch.arange(seen, seen + len(images), device="cpu")
            seen += len(images)
            _check(images, labels, f"the images of {name}", f"the labels of {name}", floats=True)
            if epoch == k == 0:
                self.first_batch = digest(images, labels)
            images, labels, ids = (sent(part, self.device) for part in (images, labels, ids))
            if images.is_floating_point():
                images = images.float()
                # On a GPU, each check waits for the images.
                if images.device.type == "cpu" or k == 0:
                    low, high = map(float, images.aminmax())
                    check_range(f"the images of {name}", low, high, "undo this, and normalize in the model")
                images = images.clamp(0, 1)
            yield images, labels, ids

    def begins_with(self, first: str | None) -> bool:
        """Return False if the first batch of a run has another hash than ``first``."""
        firsts = list[str | None]()
        with same_draws():
            while first is not None and len(firsts) < 2 and first not in firsts:
                next(self.epoch(0, 0))
                firsts.append(self.first_batch)
        self.first_batch = first
        # A loader whose draws cannot be seeded never gives a batch twice, so it cannot be compared.
        return first is None or first in firsts or firsts[0] != firsts[1]


Source: TypeAlias = InMemory | Loader
#: The source of the training images, and that of the held-out images, with all of these in every process.
Sources: TypeAlias = tuple[Source, InMemory | None]


def make_sources(
    task: Task, x: Images, y: Tensor | None, config: FitConfig, validation: tuple[Tensor, Tensor] | None = None
) -> Sources:
    """Check a run's images, and return the source of the training images and that of the held-out images."""
    device, share, held = next(task.model.parameters()).device, config.validation_share, None
    if validation is not None and share > 0:
        raise ValueError(f"validation must be None if validation_share is above 0, got validation_share={share}")
    if validation is None and config.keep_best != "off" and share == 0:
        raise ValueError(f"keep_best {config.keep_best!r} needs held-out images: give validation_share or validation")
    world = processes()[1]
    source: Source
    if isinstance(x, Tensor):
        kept, held = held_out(len(x), share, config.seed) if share > 0 else (None, None)
        y, x = _check(x, y), placed(x, device)
        source = InMemory(x, y, config, device, ids=kept, world=world)
        task.check(tuple(x.shape[1:]), int(y.max()) + 1)
        validation = validation if held is None else (x, y)
    elif y is not None or share > 0:
        raise ValueError(f"x must be a tensor, or batches without y and validation_share, got {type(x).__name__}")
    else:
        source = Loader(x, config, device)
    if validation is None:
        return source, None
    pair = isinstance(validation, (tuple, list)) and len(validation) == 2
    if not pair or not all(isinstance(part, Tensor) for part in validation):
        raise TypeError(f"validation must be a pair of tensors (images, labels), got {type(validation).__name__}")
    images, labels = validation
    labels = _check(images, labels, "the images of validation", "the labels of validation")
    task.check(tuple(images.shape[1:]), int(labels.max()) + 1)
    # A process validates whole batches. It has the memory for its share of a training's batch.
    at_once = replace(config, batch_size=max(1, config.batch_size // world), drop_last=False, steps_per_epoch=None)
    return source, InMemory(placed(images, device), labels, at_once, device, ids=held)


def _check(x: Tensor, y: Any, of_x: str = "x", of_y: str = "y", floats: bool = False) -> Tensor:
    """Return the labels; ValueError if images or labels have a wrong shape or type, or a label is below 0."""
    if x.dim() != 4 or not len(x) or not (x.dtype == torch.uint8 or (floats and x.dtype.is_floating_point)):
        kinds = "uint8 or float in [0, 1]" if floats else "uint8"
        raise ValueError(f"{of_x} must be {kinds}, [N, C, H, W], got {x.dtype} {list(x.shape)}")
    check_channels(of_x, x)
    if not isinstance(y, Tensor) or y.dtype != torch.int64 or y.shape != (len(x),):
        got = f"{y.dtype} {list(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
        raise ValueError(f"{of_y} must be int64 [N] = [{len(x)}], got {got}")
    # A GPU would wait for the labels of each batch.
    if not (floats and y.device.type == "cuda") and int(y.min()) < 0:
        raise ValueError(f"{of_y} must be at least 0, got {int(y.min())}")
    return y


def held_out(n: int, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Split ``n`` images at random by the seed."""
    k = round(share * n)
    if not 0 < k < n:
        raise ValueError(f"validation_share must leave images for both parts, got {share}, which is {k} of {n}")
    # NumPy promises never to change the numbers of RandomState. The seed has one word more than the seeds of
    # `data.batches`, so that the two generators draw other numbers.
    order = np.random.RandomState([seed & 0xFFFFFFFF, 0, 0, 1]).permutation(n)
    return torch.from_numpy(np.sort(order[k:])), torch.from_numpy(np.sort(order[:k]))
