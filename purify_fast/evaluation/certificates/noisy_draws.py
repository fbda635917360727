"""Predictions on noisy copies of images. Each draw depends only on the seed, the image and the draw's index."""

from __future__ import annotations

from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ...attacks.attacked_model import check_classes, logits_of
from ...defences.stochastic import StochasticDefence, undecided
from ...ops.philox import Stream, philox, philox_key
from ...protocols import Classifier, CopiesItself, PassesOn, draws_for_each_image, supports
from ...speed.agreement import BFLOAT16, apart
from ...speed.followed import is_frozen_copy
from ...speed.frozen_copy import copy_or_model
from ...speed.memory import BatchLimit

#: The number of images whose draws are made together. A random model has a seed for each group.
GROUP = 32
#: The largest number of draws of an image: a random model's noise has 32 bits for the image in its group and the draw.
MOST = 2**32 // GROUP
#: The number of noisy images, and of calls, by which a model is tested.
TRIED = 8
#: A model is refused if more than this share of the rows differ, because rounding may move a few across a jump.
FEW = 0.25


def copy_of(model: Classifier, x: Tensor) -> Classifier:
    """The model's frozen copy in float32; the model itself if it is a function, or has no copy of its own class."""
    if supports(model, PassesOn):
        return cast(PassesOn, model).around(lambda inner: copy_of(inner, x))
    alone = isinstance(model, StochasticDefence) and not supports(model, CopiesItself)
    if not isinstance(model, nn.Module) or is_frozen_copy(model) or alone:
        return model
    return copy_or_model(model, x, torch.float32)


class Draws:
    """Counts how often a model gives the noisy copies of an image the image's label.

    Args:
        model: images ``[B, C, H, W]`` to logits; deterministic, or a random defence with draws for each image.
        x: images ``[N, C, H, W]``, float32 on the CPU.
        y: labels, int64 ``[N]`` on the CPU.
        sigma: standard deviation of the noise, in image units.
        device: device of the model.
        batch_size: largest number of noisy images in a pass.
        seed: seed of the noise.

    Raises:
        ValueError: the model is random without draws for each image, or its logits depend on the rest of the batch or
            on the call: then draws are not independent, and nothing would be proved.
    """

    def __init__(
        self, model: Classifier, x: Tensor, y: Tensor, *, sigma: float, device: torch.device, batch_size: int, seed: int
    ):
        self.model, self.x, self.y, self.sigma, self.seed, self.device = model, x, y, sigma, seed, device
        self.limit, self.batch_size = BatchLimit(batch_size, device), batch_size
        self.key = philox_key(seed, device)
        #: Whether the model draws itself: then its draws are named by image and draw, as the noise is.
        self.is_random = isinstance(model, StochasticDefence) and not model.noise_is_off
        self.tried = torch.arange(TRIED, device="cpu") % len(x)
        self.first = self.limit.within(self._check)
        self.classes = self.first.shape[1]

    @property
    def most(self) -> int:
        """The largest number of rows in a pass."""
        return self.limit.at_most(self.batch_size)

    def _check(self) -> Tensor:
        """Refuse a model whose draws are not independent. Return its logits for the trial rows."""
        name, rows = type(self.model).__name__, [(self.tried[k : k + 1], k // len(self.x), 1) for k in range(TRIED)]
        if self.is_random and not draws_for_each_image(self.model):
            raise ValueError(f"model must draw for each image (draws_for_each_image), but {name} does not promise it")
        alone = torch.cat([self._logits(*row) for row in rows])
        noisy, ids = (torch.cat([make(*row) for row in rows]) for make in (self._noisy, self._ids))
        # The last call has as many rows as a pass of the certificates may have.
        sizes = [min(TRIED, self.most)] * TRIED + [self.most]
        for call, size in enumerate(sizes):
            if self.is_random:
                with self.model.noise_ids(ids):  # type: ignore[attr-defined]
                    again = self._predict(noisy, int(self.tried[0]) // GROUP)
            else:
                torch.manual_seed(call)
                whole = noisy.repeat(-(-size // TRIED), 1, 1, 1)
                again = torch.cat([logits_of(self.model, part) for part in whole.split(size)])[:TRIED]
            if int(apart(again, alone, BFLOAT16).sum()) > FEW * TRIED:
                raise ValueError(
                    "model must predict each image for itself and alike in every call, apart from draws that a defence "
                    f"of this package names by noise_ids, but the logits of this {name} depend on the batch or the call"
                )
        return alone

    def check_unchanged(self) -> None:
        """Raise a ValueError if the model predicts the trial rows otherwise than in the beginning."""
        if int(apart(self.limit.within(self._check), self.first, BFLOAT16).sum()) > FEW * TRIED:
            raise ValueError("model must not change while it is certified, but its logits have changed")

    def right(self, index: Tensor, first: int, last: int) -> NDArray[np.int64]:
        """For images of one group: the number of right predictions among the draws first to last - 1, ``[n]``."""
        return self.limit.within(lambda: self._right(index, first, last))

    def _right(self, index: Tensor, first: int, last: int) -> NDArray[np.int64]:
        counts = []
        for part in index.split(self.most):
            each, total = max(1, self.most // len(part)), torch.zeros(len(part), dtype=torch.int64, device=self.device)
            for start in range(first, last, each):
                count = min(each, last - start)
                logits = self._logits(part, start, count)
                label = self.y[part].to(logits.device).repeat_interleave(count)
                right = (check_classes(logits, self.classes).argmax(1) == label) & ~undecided(logits)
                total += right.view(len(part), count).sum(1)
            counts.append(total.cpu().numpy())
        return np.concatenate(counts)

    def _noisy(self, index: Tensor, first: int, count: int) -> Tensor:
        """The draws of images, ``[n * count, C, H, W]``."""
        x, ids = self.x[index].to(self.device), index.to(self.device)
        noise = philox(
            self.key, ids, x[0].numel(), stream=Stream.SMOOTHING, distribution="normal", draws=count, first_draw=first
        )
        return noise.mul_(self.sigma).view(len(x), count, *x.shape[1:]).add_(x[:, None]).flatten(0, 1)

    def _ids(self, index: Tensor, first: int, count: int) -> Tensor:
        """The names of a random model's own draws, int64 ``[n * count]``."""
        draws = torch.arange(first, first + count, device=self.device)
        return ((index.to(self.device) % GROUP)[:, None] * MOST + draws).flatten()

    def _logits(self, index: Tensor, first: int, count: int) -> Tensor:
        """Logits of the draws of images in one group, ``[n * count, classes]``."""
        noisy = self._noisy(index, first, count)
        if not self.is_random:
            return logits_of(self.model, noisy)
        with self.model.noise_ids(self._ids(index, first, count)):  # type: ignore[attr-defined]
            return self._predict(noisy, int(index[0]) // GROUP)

    def _predict(self, images: Tensor, group: int) -> Tensor:
        # A defence of this package takes the seed of a call from this generator.
        torch.manual_seed((self.seed * 1_000_003 + group) % 2**63)
        return logits_of(self.model, images)
