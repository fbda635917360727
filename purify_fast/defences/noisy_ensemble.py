"""Classifies noisy copies of an image: a baseline for purifiers, and the model of randomized smoothing."""

from __future__ import annotations

import copy

from torch import Tensor, nn

from ..ops.philox import Stream, philox
from .stochastic import StochasticDefence


class NoisyEnsemble(StochasticDefence):
    """Classifies K noisy copies of an image, and aggregates their logits as CARSO does: a baseline for purifiers.

        x_k = clamp(x + sigma n_k, 0, 1),  n_k ~ N(0, I);   logits_i = logsumexp_k classifier(x_k)_i

    With one copy and without the clamp, the majority of its predictions is the smoothed classifier of Cohen et al.
    (ICML 2019), which `purify_fast.evaluation.certify` certifies.

    Within `deterministic`, the image itself is classified.

    Args:
        classifier: any module from images ``[B, C, H, W]`` in [0, 1] to logits. It is copied and frozen.
        sigma: standard deviation of the noise in image units, at least 0.
        samples: number K of copies, at least 1.
        clamp: whether the copies are clamped to [0, 1].
    """

    def __init__(self, classifier: nn.Module, sigma: float, samples: int = 8, clamp: bool = True):
        super().__init__()
        if not sigma >= 0 or samples < 1:
            raise ValueError(f"sigma must be at least 0 and samples at least 1, got sigma={sigma}, samples={samples}")
        self.classifier = copy.deepcopy(classifier).requires_grad_(False).eval()
        self.sigma, self.samples, self.clamp = float(sigma), samples, clamp

    def train(self, mode: bool = True) -> NoisyEnsemble:
        super().train(mode)
        self.classifier.eval()
        return self

    train.sets_modes_only = True  # type: ignore[attr-defined]

    def sample_logits(self, x: Tensor) -> Tensor:
        copies = x[:, None]
        if not self.noise_is_off:
            seed, ids = self.noise(len(x), x.device)
            stream, count = Stream.TRANSFORM_NOISE, x[0].numel()
            noise = philox(seed, ids, count, stream=stream, distribution="normal", draws=self.samples)
            copies = copies + self.sigma * noise.view(-1, self.samples, *x.shape[1:])
            copies = copies.clamp(0, 1) if self.clamp else copies
        return self.classifier(copies.flatten(0, 1)).float().unflatten(0, (len(x), -1))
