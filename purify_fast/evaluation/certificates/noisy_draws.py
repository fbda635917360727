"""Predictions on noisy copies of images. Each draw depends only on the seed, the image's index and the draw's index.

A certificate is about a function of one image. A model in which the batch, the place in it, the call or the time
decides is no such function. So each batch has *sentinels*, at random places: rows whose logits are known, because they
were predicted before, each alone. A batch counts only if they come out again.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..._tensors import dtype_of
from ...attacks.attacked_model import check_classes, logits_of
from ...defences.stochastic import StochasticDefence, undecided
from ...ops.philox import Stream, philox, philox_key
from ...protocols import Classifier, CopiesItself, PassesOn, draws_for_each_image, supports
from ...speed.agreement import BFLOAT16, FLOAT32, apart
from ...speed.followed import is_frozen_copy
from ...speed.frozen_copy import copy_or_model
from ...speed.memory import BatchLimit
from ..request.subject import precision_name

#: The sentinels of a run. A batch has all of them; a batch with fewer than four times as many rows has fewer.
SENTINELS = 16
#: The names of a random model's draws begin at this multiple of the image's index (Knuth's multiplicative hash).
SPREAD = 2654435761


class DependentDrawsError(ValueError):
    """The model is no function of one image, so nothing can be proved."""


class _Dtypes(TorchDispatchMode):
    """Collects the dtypes of the floating-point tensors that PyTorch computes within a block."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = set[torch.dtype]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.seen |= {one.dtype for one in tree_leaves(made) if isinstance(one, Tensor) and one.is_floating_point()}
        return made


def copy_of(model: Classifier, x: Tensor) -> Classifier:
    """The model's frozen copy in float32; the model itself if it is a function, or has no copy of its own class."""
    if supports(model, PassesOn):
        return cast(PassesOn, model).around(lambda inner: copy_of(inner, x))
    alone = isinstance(model, StochasticDefence) and not supports(model, CopiesItself)
    if not isinstance(model, nn.Module) or is_frozen_copy(model) or alone:
        return model
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made = copy_or_model(model, x, torch.float32)
    for one in caught:
        # Nothing is attacked here.
        warnings.warn(str(one.message).replace("is attacked itself", "predicts itself"), one.category, stacklevel=3)
    return made


class Draws:
    """Counts the classes that a model gives to noisy copies of images.

    Args:
        model: images ``[B, C, H, W]`` to logits; deterministic, or a random defence with draws for each image.
        x: images ``[N, C, H, W]``, float32 on the CPU.
        index: the images' indices in their data set, which name the draws, int64 ``[N]`` on the CPU.
        sigma: standard deviation of the noise, in image units.
        device: device of the model.
        batch_size: largest number of rows in a pass.
        seed: seed of the noise.

    Raises:
        DependentDrawsError: the logits depend on the rest of the batch, on the place in it, or on the call.
        ValueError: the model is random without draws for each image, or refuses float32 images.
    """

    def __init__(
        self, model: Classifier, x: Tensor, index: Tensor, *, sigma: float, device: torch.device, batch_size: int, seed: int
    ):
        self.model, self.x, self.index, self.sigma, self.seed, self.device = model, x, index, sigma, seed, device
        self.limit, self.batch_size = BatchLimit(batch_size, device), batch_size
        self.key, self.name = philox_key(seed, device), type(model).__name__
        #: Whether the model draws itself: then its draws are named by image and draw, as the noise is.
        self.is_random = isinstance(model, StochasticDefence) and not model.noise_is_off
        if self.is_random and not draws_for_each_image(model):
            text = f"draw for each image (draws_for_each_image), but {self.name} does not promise it"
            raise ValueError(f"model must {text}")
        self.chance = torch.Generator("cpu").manual_seed(seed)
        which = torch.randint(len(x), (SENTINELS,), generator=self.chance, device="cpu")
        rows = [self._rows(one, number, 1) for number, one in enumerate(which.split(1))]
        self.rows, self.names = (torch.cat(parts) for parts in zip(*rows, strict=True))
        with _Dtypes() as dtypes:
            self.known = self.limit.within(self._alone)
        self.classes = self.known.shape[1]
        #: The precisions in which the model computes, for the report.
        tf32 = {precision_name(model, device) or ""} - {"", "bfloat16"}
        self.precision = " and ".join(sorted({str(each).removeprefix("torch.") for each in dtypes.seen} | tf32))
        rough = tf32 or any(each.itemsize < 4 for each in dtypes.seen)
        #: The rounding that a batch of another shape may cause.
        self.strength = BFLOAT16 if rough else FLOAT32
        # This call finds out how many rows fit into memory.
        self.limit.within(lambda: self._checked(*(each.repeat_interleave(-(-self.room // SENTINELS), 0)[: self.room] for each in (self.rows, self.names))))

    @property
    def most(self) -> int:
        """The largest number of rows in a pass."""
        return self.limit.at_most(self.batch_size)

    @property
    def watched(self) -> int:
        """The number of sentinels in a pass."""
        return min(SENTINELS, max(1, self.most // 4))

    @property
    def room(self) -> int:
        """The number of draws in a pass. A pass of a single row has none; a sentinel is then in another pass."""
        return max(1, self.most - self.watched)

    def counts(self, at: Tensor, first: int, last: int) -> NDArray[np.int64]:
        """Count the classes of the draws first to last - 1 of the images at some places, ``[n, classes + 1]``.

        The last column counts predictions without a class.
        """
        return self.limit.within(lambda: self._counts(at, first, last))

    def _counts(self, at: Tensor, first: int, last: int) -> NDArray[np.int64]:
        counts = []
        for part in at.split(self.room):
            each, total = max(1, self.room // len(part)), torch.zeros(len(part), self.classes + 1, dtype=torch.int64, device="cpu")
            for start in range(first, last, each):
                logits = self._checked(*self._rows(part, start, min(each, last - start)))
                found = logits.argmax(1).masked_fill(undecided(logits), self.classes).view(len(part), -1).cpu()
                total.scatter_add_(1, found, torch.ones_like(found))
            counts.append(total.numpy())
        return np.concatenate(counts)

    def _rows(self, at: Tensor, first: int, count: int) -> tuple[Tensor, Tensor]:
        """The draws of images, ``[n * count, C, H, W]``, and the names of a random model's own draws, int64."""
        x, ids = self.x[at].to(self.device), self.index[at].to(self.device)
        noise = philox(
            self.key, ids, x[0].numel(), stream=Stream.SMOOTHING, distribution="normal", draws=count, first_draw=first
        )
        noisy = noise.mul_(self.sigma).view(len(x), count, *x.shape[1:]).add_(x[:, None]).flatten(0, 1)
        draws = torch.arange(first, first + count, device=self.device)
        return noisy, ((ids * SPREAD)[:, None] + draws).flatten() % 2**32

    def _checked(self, noisy: Tensor, names: Tensor) -> Tensor:
        """The logits of draws, ``[B, classes]``, from passes that also have sentinels, all at random places."""
        watched = torch.randperm(SENTINELS, generator=self.chance, device="cpu")[: self.watched]
        noisy, names = torch.cat([noisy, self.rows[watched]]), torch.cat([names, self.names[watched]])
        order = torch.randperm(len(noisy), generator=self.chance, device="cpu")
        passes = zip(noisy[order].split(self.most), names[order].split(self.most), strict=True)
        logits = torch.cat([check_classes(self._predict(*one), self.classes) for one in passes])[order.argsort()]
        got = self.known.clone()
        got[watched] = logits[-len(watched) :].to(got)
        if count := int(apart(self.known, got, self.strength, together=True).sum()):
            raise DependentDrawsError(
                "model must predict each image for itself and alike in every call, apart from draws that a defence of "
                f"this package names by noise_ids, but the logits of this {self.name} depend on the batch or the call: "
                f"{count} of {len(watched)} rows had other logits alone, before. The model must not change meanwhile"
            )
        return logits[: -len(watched)]

    def _alone(self) -> Tensor:
        try:
            return torch.cat([self._predict(*one) for one in zip(self.rows.split(1), self.names.split(1), strict=True)])
        except (RuntimeError, TypeError) as error:
            dtype = dtype_of(self.model) if isinstance(self.model, nn.Module) else torch.float32
            if dtype == torch.float32:
                raise
            cure = f"give model.float(), or lambda x: model(x.to({dtype}))"
            raise ValueError(f"model must take float32 images, but this {self.name} is in {dtype}: {cure}") from error

    def _predict(self, images: Tensor, names: Tensor) -> Tensor:
        if not self.is_random:
            return logits_of(self.model, images)
        # A defence of this package takes the seed of a call from this generator.
        torch.manual_seed(self.seed)
        with self.model.noise_ids(names):  # type: ignore[attr-defined]
            return logits_of(self.model, images)
