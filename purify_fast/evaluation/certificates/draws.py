"""Predictions on noisy copies of images. Each draw depends only on the seed, the image and the draw's index."""

from __future__ import annotations

import logging
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ...attacks.attacked_model import check_classes, logits_of
from ...defences.stochastic import StochasticDefence, undecided
from ...ops.philox import Stream, philox, philox_key
from ...protocols import Classifier, CopiesItself, PassesOn, draws_for_each_image, supports
from ...speed.agreement import BFLOAT16, apart, differ
from ...speed.followed import is_frozen_copy
from ...speed.frozen_copy import frozen_copy
from ...speed.memory import BatchLimit

logger = logging.getLogger("purify_fast")

#: The number of images whose draws are made together. A random model has a seed for each group.
GROUP = 32
#: The largest number of draws of an image: a random model's noise has 32 bits for the image in its group and the draw.
MOST = 2**32 // GROUP
#: The number of noisy images on which a model is tested.
TRIED = 8


def copy_of(model: Classifier, x: Tensor) -> Classifier:
    """The model's frozen copy in float32; the model itself if it is a function, or has no copy of its own class."""
    if supports(model, PassesOn):
        return cast(PassesOn, model).around(lambda inner: copy_of(inner, x))
    alone = isinstance(model, StochasticDefence) and not supports(model, CopiesItself)
    if not isinstance(model, nn.Module) or is_frozen_copy(model) or alone:
        return model
    try:
        return frozen_copy(model, x[:TRIED], dtype=torch.float32)
    except TypeError as error:
        logger.warning("the model itself predicts, because it has no frozen copy: %s", error)
        return model


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
        ValueError: the model is random without draws for each image, or an image's logits depend on the other images of
            its batch: then draws are not independent, and nothing would be proved.
    """

    def __init__(
        self, model: Classifier, x: Tensor, y: Tensor, *, sigma: float, device: torch.device, batch_size: int, seed: int
    ):
        self.model, self.x, self.y, self.sigma, self.seed, self.device = model, x, y, sigma, seed, device
        self.batch_limit, self.batch_size = BatchLimit(batch_size, device), batch_size
        self.key = philox_key(seed, device)
        some = torch.arange(min(TRIED, len(x)), device="cpu")
        noisy = self._noisy(some, 0, TRIED)[:TRIED]
        first = self._predict(noisy, 0)
        self.classes = first.shape[1]
        self.is_random = differ(first, self._predict(noisy, 1))
        if self.is_random and not (draws_for_each_image(model) and isinstance(model, StochasticDefence)):
            raise ValueError(
                "model must be deterministic, or a defence of this package with draws for each image: the draws of "
                f"another random model, such as this {type(model).__name__}, may depend on each other"
            )
        alone = first if self.is_random else torch.cat([self._predict(one, 0) for one in noisy.split(1)])
        if bool(apart(alone, first, BFLOAT16).any()):
            raise ValueError("model must predict each image for itself, but its logits depend on the rest of the batch")

    def right(self, index: Tensor, first: int, last: int) -> NDArray[np.int64]:
        """For images of one group: the number of right predictions among the draws first to last - 1, ``[n]``."""
        return self.batch_limit.within(lambda: self._right(index, first, last))

    def _right(self, index: Tensor, first: int, last: int) -> NDArray[np.int64]:
        most, counts = self.batch_limit.at_most(self.batch_size), []
        for part in index.split(most):
            total, each = 0, max(1, most // len(part))
            for start in range(first, last, each):
                count = min(each, last - start)
                logits = self._logits(part, start, count)
                label = self.y[part].to(logits.device).repeat_interleave(count)
                right = (check_classes(logits, self.classes).argmax(1) == label) & ~undecided(logits)
                total = total + right.view(len(part), count).sum(1)
            counts.append(torch.as_tensor(total).cpu().numpy())
        return np.concatenate(counts)

    def _noisy(self, index: Tensor, first: int, count: int) -> Tensor:
        """The draws of images, ``[n * count, C, H, W]``."""
        x, ids = self.x[index].to(self.device), index.to(self.device)
        kind = {"stream": Stream.SMOOTHING, "distribution": "normal"}
        noise = philox(self.key, ids, x[0].numel(), **kind, draws=count, first_draw=first)
        return noise.mul_(self.sigma).view(len(x), count, *x.shape[1:]).add_(x[:, None]).flatten(0, 1)

    def _logits(self, index: Tensor, first: int, count: int) -> Tensor:
        """Logits of draws, ``[n * count, classes]``. A random model's own draws are named by image and draw too."""
        noisy, group = self._noisy(index, first, count), int(index[0]) // GROUP
        if not self.is_random:
            return self._predict(noisy, group)
        draws = torch.arange(first, first + count, device=self.device)
        ids = (index.to(self.device) % GROUP)[:, None] * MOST + draws
        with self.model.noise_ids(ids.flatten()):  # type: ignore[attr-defined]
            return self._predict(noisy, group)

    def _predict(self, images: Tensor, group: int) -> Tensor:
        # A defence of this package takes the seed of a call from this generator.
        torch.manual_seed((self.seed * 1_000_003 + group) % 2**63)
        return logits_of(self.model, images)
