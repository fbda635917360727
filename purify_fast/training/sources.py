"""Sources of a training's images: tensors, a file that is streamed, a DataLoader, or any iterable of batches."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sized
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from .._process import processes
from .._tensors import digest
from ..data import StreamedImages, batches, read_ahead
from .bank import BankedImages
from .config import FitConfig
from .task import Task

#: Batches of (images, labels) or (images, labels, indices), the same number of them in every epoch.
Batches: TypeAlias = Iterable[Any]
#: A source's batch for a step: images uint8 or float ``[B, C, H, W]``, labels int64 ``[B]``, indices int64 ``[B]``.
RawBatch: TypeAlias = tuple[Tensor, Tensor, Tensor]
#: The images of `fit`: images to be laid out in batches, or batches, or a function of the epoch that gives its batches.
Images: TypeAlias = "Tensor | StreamedImages | Batches | Callable[[int], Batches]"
#: The held-out images of `fit`: images and labels, or batches as above.
HeldOut: TypeAlias = "tuple[Tensor | StreamedImages, Tensor] | Images"

#: Images of one batch when a run is validated with images.
VALIDATION_BATCH = 250


def step_seed(seed: int, step: int) -> int:
    """The seed of a step's randomness; torch's CPU generator reads 32 bits, so both numbers are mixed into them."""
    return int(np.random.SeedSequence([seed, step]).generate_state(1)[0])


class InMemory:
    """Tensors or streamed images, in an order that is a function of the seed and the epoch.

    Attributes:
        description: text that must be equal for a run to be resumed.
        device: where the images are put.
        steps: batches of an epoch.
        batch_size: images in a batch of all processes together.
        images: images of an epoch.
        reproducible: whether an epoch's batches are a function of the epoch, so that an epoch can begin in its middle.

    Args:
        x: uint8 ``[N, C, H, W]``.
        y: int64 ``[N]``, on the same device.
        config: batch size, seed, and which batches an epoch has.
        rank: this process.
        world: the number of processes.
        ids: the images to take, int64; None for all.

    Raises:
        ValueError: images or labels of another type or number, fewer images than a batch, more steps in an epoch than a
            pass over the images has, or a last batch that the processes cannot share evenly.
    """

    reproducible: bool = True

    def __init__(
        self, x: Tensor | StreamedImages, y: Tensor, config: FitConfig, rank: int, world: int, ids: Tensor | None = None
    ):
        _check_images(x, y)
        self.x, self.y, self.config, self.rank, self.world, self.device = x, y, config, rank, world, x.device
        self.ids = torch.arange(len(x), device=x.device) if ids is None else ids.to(x.device)
        n, self.batch_size = len(self.ids), config.batch_size
        rest = n % config.batch_size
        if not config.drop_last and rest % world:
            raise ValueError(
                f"drop_last False leaves a last batch of {rest} images, which {world} processes cannot share evenly: "
                "leave it out (drop_last), or take another batch_size"
            )
        self.steps = _cut_off(len(self._order(0)), config)
        self.images = min(n, self.steps * config.batch_size)
        self.description = f"{len(x)} images, {digest(x, y)}"

    def _order(self, epoch: int) -> list[Tensor]:
        """The epoch's batches, as indices."""
        config, shares = self.config, {"rank": self.rank, "world": self.world}
        return batches(
            len(self.ids), config.batch_size, config.seed, epoch, config.drop_last, device=self.device, **shares
        )

    def epoch(self, epoch: int, first: int) -> Generator[RawBatch]:
        """The epoch's batches from number ``first`` on, each this process's share."""
        for ids, images in read_ahead(self.x, [self.ids[rows] for rows in self._order(epoch)[first : self.steps]]):
            yield images, self.y[ids], ids

    def banked_images(self) -> BankedImages:
        """The images as a bank takes them; ValueError if they differ from epoch to epoch."""
        if self.config.padding:
            raise ValueError(
                f"bank needs images that are the same in every epoch, and these are cropped at random (padding "
                f"{self.config.padding}): train without padding or without a bank"
            )
        # the digest includes the labels, because the attacks raise the loss of the labels
        views = 2 if self.config.flip else 1
        return BankedImages(len(self.x), tuple(self.x.shape[1:]), self.description, views)


def _cut_off(steps: int, config: FitConfig) -> int:
    """The steps of an epoch, by ``steps_per_epoch``; ValueError if a pass over the data has fewer."""
    wanted = steps if config.steps_per_epoch is None else config.steps_per_epoch
    if wanted > steps:
        raise ValueError(f"steps_per_epoch must be at most {steps}, the steps of a pass over the images, got {wanted}")
    return wanted


class Loader:
    """A DataLoader, another iterable, or a function of the epoch, on the model's device.

    torch's global generator is seeded before an epoch and before each of its batches, and a DataLoader's own before an
    epoch. So what a DataLoader draws from them, its order and its workers' seeds among others, is a function of the
    seed and the epoch.

    Args:
        x: the batches. Each process has its own share.
        config: the seed.
        device: where the images go.

    Raises:
        TypeError: ``x`` is neither, or has no length.
        ValueError: ``x`` has no batches.
    """

    # the size is known only when the batches arrive
    batch_size, images = 0, 0

    def __init__(self, x: Batches | Callable[[int], Batches], config: FitConfig, device: torch.device):
        self.reproducible = callable(x)
        self.x, self.seed, self.device = x, config.seed, device
        first: Any = x(0) if callable(x) else x
        if not (isinstance(first, Iterable) and isinstance(first, Sized)):
            # learning rates depend on how long the run is, and an iterator is used up after one epoch
            raise TypeError(
                "x must be images, batches with a length, such as a DataLoader or a list, or a function of the epoch "
                f"that returns such batches, got {type(first).__name__}"
            )
        if len(first) == 0:
            raise ValueError("x gives no batch")
        self.steps = _cut_off(len(first), config)
        self.description = f"batches, {self.steps} an epoch"

    def epoch(self, epoch: int, first: int) -> Generator[RawBatch]:
        torch.manual_seed(step_seed(self.seed, epoch * self.steps))
        if isinstance(self.x, DataLoader) and self.x.generator is not None:
            self.x.generator.manual_seed(step_seed(self.seed, epoch * self.steps))
        given, seen = iter(self.x(epoch) if callable(self.x) else self.x), 0
        for k in range(self.steps):
            torch.manual_seed(step_seed(self.seed, epoch * self.steps + k))
            try:
                batch = next(given)
            except StopIteration:
                raise ValueError(f"x gave {k} batches in epoch {epoch}, its length says {self.steps}") from None
            images, labels, *rest = batch
            ids = rest[0] if rest else torch.arange(seen, seen + len(images))
            seen += len(images)
            if k >= first:
                _check_batch(images, labels, ids)
                if k == first and images.is_floating_point():
                    # check once in an epoch, because it waits for the images' device
                    _check_range(images)
                yield tuple(part.to(self.device, non_blocking=True) for part in (images, labels, ids))  # type: ignore[misc]

    def banked_images(self) -> BankedImages:
        raise ValueError("bank needs images in a tensor: a loader's images are not known before they arrive")


Source: TypeAlias = InMemory | Loader


def training_source(task: Task, x: Images, y: Tensor | None, config: FitConfig) -> Source:
    """The source of a run's training images, checked before any work."""
    if not isinstance(x, (Tensor, StreamedImages)):
        if y is not None:
            raise ValueError("y must be None if x gives batches, which contain their labels")
        if config.validation_share > 0:
            raise ValueError("validation_share needs images in a tensor; with a loader give validation=...")
        return Loader(x, config, next(task.model.parameters()).device)
    ids = held_out(len(x), config.validation_share, config.seed)[0] if config.validation_share > 0 else None
    source = InMemory(x, y, config, *processes(), ids)  # type: ignore[arg-type]  # None is refused there
    task.check(tuple(x.shape[1:]), int(source.y.max()) + 1)
    return source


def held_out_source(
    task: Task, x: Images, y: Tensor | None, config: FitConfig, validation: HeldOut | None
) -> Source | None:
    """The source of a run's held-out images, all of them in every process; None if the run has none."""
    if validation is None and config.validation_share == 0:
        if config.keep_best != "off":
            raise ValueError(
                f"keep_best {config.keep_best!r} needs held-out images: give validation_share or validation"
            )
        return None
    if validation is not None and config.validation_share > 0:
        raise ValueError("give validation or validation_share, not both")
    ids = None
    if validation is None:
        # `training_source` has refused a share unless there are images with labels
        images: Any = x
        validation, ids = (images, y), held_out(len(images), config.validation_share, config.seed)[1]
    if isinstance(validation, (Tensor, StreamedImages)):
        raise ValueError("validation must have labels: give (images, labels)")
    config = replace(config, batch_size=VALIDATION_BATCH, drop_last=False, steps_per_epoch=None)
    if isinstance(validation, tuple):
        images, labels = validation
        return InMemory(images, labels, config, 0, 1, ids=ids)
    return Loader(validation, config, next(task.model.parameters()).device)


def _check_images(x: Tensor | StreamedImages, y: Tensor | None) -> None:
    """ValueError for images and labels that cannot be trained on; the message says how they must be."""
    if x.dtype != torch.uint8 or len(x.shape) != 4:
        advice = ": images in [0, 1] are (255 * x).round().to(torch.uint8)" if x.dtype.is_floating_point else ""
        raise ValueError(f"x must be uint8 [N, C, H, W], got {x.dtype} {list(x.shape)}{advice}")
    if not isinstance(y, Tensor) or y.dtype != torch.int64 or y.shape != (len(x),):
        got = f"{y.dtype} {list(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
        raise ValueError(f"y must be int64 [N] = [{len(x)}], got {got}")
    if y.device != x.device:
        raise ValueError(f"x and y must be on one device, got {x.device} and {y.device}")
    if len(y) and int(y.min()) < 0:
        raise ValueError(f"y must hold labels of at least 0, got {int(y.min())}")


def _check_batch(images: Tensor, labels: Tensor, ids: Tensor) -> None:
    """ValueError for a loader's batch that cannot be trained on; its values are not read."""
    if images.dim() != 4 or not (images.is_floating_point() or images.dtype == torch.uint8):
        got = f"{images.dtype} {list(images.shape)}"
        raise ValueError(f"x: images must be float in [0, 1] or uint8, [B, C, H, W], got {got}")
    for name, part in (("labels", labels), ("indices", ids)):
        if part.dtype != torch.int64 or part.shape != (len(images),):
            raise ValueError(f"x: {name} must be int64 [B] = [{len(images)}], got {part.dtype} {list(part.shape)}")


def _check_range(images: Tensor) -> None:
    """ValueError for floating-point images that are not in [0, 1]; the message says what is probably meant."""
    if not bool(((images >= 0) & (images <= 1)).all()):
        low, high = images.min(), images.max()
        raise ValueError(
            f"x: images must be in [0, 1] without NaN, got values in [{low:.4g}, {high:.4g}]: divide by 255 or give "
            "uint8, and leave normalization to the model"
        )


def held_out(n: int, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Split ``n`` images by the seed: rising indices to train on, and rising indices of the ``share`` to validate with.

    Raises:
        ValueError: one of the parts is empty.
    """
    k = round(share * n)
    if not 0 < k < n:
        raise ValueError(f"validation_share {share} of {n} images holds out {k}: give another share")
    # RandomState, since numpy promises never to change its stream; a word more than the seeds of `data.batches` have
    order = np.random.RandomState([seed & 0xFFFFFFFF, 0, 0, 1]).permutation(n)
    return torch.from_numpy(np.sort(order[k:])), torch.from_numpy(np.sort(order[:k]))
