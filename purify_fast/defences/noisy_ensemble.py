"""What a purifier has to beat: the same classifier and the same aggregation, with nothing purified."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from ..ops.philox import Stream, philox
from .stochastic import StochasticDefence


class NoisyEnsemble(StochasticDefence):
    """A classifier on K noisy copies of the image, aggregated as CARSO aggregates its K reconstructions.

        x_k = clamp(x + sigma n_k, 0, 1),  n_k ~ N(0, I);   logits_i = logsumexp_k classifier(x_k)_i

    Args:
        classifier: any module, images ``[B, C, H, W]`` in [0, 1] to logits; it is copied and frozen.
        sigma: standard deviation in image units, at least 0.
        samples: K, at least 1.

    The noise comes from the Philox stream TRANSFORM_NOISE, draw index k. `deterministic` classifies the image itself.
    """

    def __init__(self, classifier: nn.Module, sigma: float, samples: int = 8):
        super().__init__()
        if not sigma >= 0 or samples < 1:
            raise ValueError(f"need sigma >= 0 and samples >= 1, got {sigma} and {samples}")
        self.classifier = copy.deepcopy(classifier).requires_grad_(False).eval()
        self.sigma, self.samples = float(sigma), samples

    def train(self, mode: bool = True) -> NoisyEnsemble:
        """Set the mode; the classifier always stays in evaluation mode.

        Args:
            mode: True for training.
        """
        super().train(mode)
        self.classifier.eval()
        return self

    def sample_logits(self, x: Tensor) -> Tensor:
        """Logits ``[B, K, classes]``; K = 1, of the image itself, without noise.

        Args:
            x: images ``[B, C, H, W]`` in [0, 1].
        """
        copies = x[:, None]
        if not self.noise_is_off:
            noise = philox(
                *self.noise(len(x), x.device),
                x[0].numel(),
                stream=Stream.TRANSFORM_NOISE,
                distribution="normal",
                draws=self.samples,
            )
            copies = torch.clamp(copies + self.sigma * noise.view(-1, self.samples, *x.shape[1:]), 0, 1)
        return self.classifier(copies.flatten(0, 1)).float().unflatten(0, (len(x), -1))
