"""What every randomised defence shares: K sets of logits per image, aggregated, and control over the noise."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..ops.aggregate import aggregate


class Randomised(nn.Module):
    """A defence that draws noise for each of ``samples`` predictions; subclasses give ``sample_logits``.

    Randomness: a fresh seed per call from torch's global generator, or `fixed_noise`; `deterministic` takes none.
    """

    _noise_seed: Tensor
    samples: int

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("_noise_seed", torch.zeros(1, dtype=torch.int64), persistent=False)
        self._noise = "fresh"
        self._positions: Tensor | None = None

    @contextlib.contextmanager
    def fixed_noise(self, seed: int) -> Iterator[Randomised]:
        """Within the block, every image gets the same K draws, made from ``seed`` (0 <= seed < 2^63).

        `forward` is then a function of one image: no batch split or order changes its logits.
        """
        if not 0 <= seed < 2**63:
            raise ValueError(f"seed must be in [0, 2^63), got {seed}")
        with self._switch("fixed"):
            before = self._noise_seed.clone()
            self._noise_seed.fill_(seed)
            try:
                yield self
            finally:
                self._noise_seed.copy_(before)

    @contextlib.contextmanager
    def deterministic(self) -> Iterator[Randomised]:
        """Within the block, no noise and one prediction per image: no randomness at all."""
        with self._switch("zero"):
            yield self

    @contextlib.contextmanager
    def _switch(self, noise: str) -> Iterator[None]:
        before, self._noise = self._noise, noise
        try:
            yield
        finally:
            self._noise = before

    @contextlib.contextmanager
    def positions(self, ids: Tensor) -> Iterator[Randomised]:
        """Within the block, image i of a batch draws fresh noise as image ``ids[i]`` (int64 ``[B]``) of one would.

        For the parts of a batch that are computed apart, as by several processes.
        """
        before, self._positions = self._positions, ids
        try:
            yield self
        finally:
            self._positions = before

    def noise(self, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """(seed ``[1]``, sample ids ``[batch]`` or ``[1]``) that this call's draws are made from, int64."""
        if self._noise == "fixed":  # sample word 0 for every image
            # a copy: a backward after the block needs the block's seed
            return self._noise_seed.clone(), torch.zeros(1, dtype=torch.int64, device=device)
        seed = torch.randint(2**62, (1,), device=device)
        if self._positions is None:
            return seed, torch.arange(batch, device=device)
        if len(self._positions) != batch:
            raise ValueError(f"positions are of {len(self._positions)} images, the batch has {batch}")
        return seed, self._positions

    @property
    def silent(self) -> bool:
        """Whether no noise is drawn now."""
        return self._noise == "zero"

    def sample_logits(self, x: Tensor) -> Tensor:
        """Logits of the K draws, ``[B, K, classes]``; aggregate them with `purify_fast.ops.aggregate`."""
        raise NotImplementedError

    def draw_sample_logits(self, x: Tensor, draws: int) -> Tensor:
        """`sample_logits` of ``draws`` independent calls at once, ``[draws, B, K, classes]``."""
        return self.sample_logits(x.repeat(draws, *[1] * (x.dim() - 1))).unflatten(0, (draws, -1))

    def draw_logits(self, x: Tensor, draws: int) -> Tensor:
        """`forward` of ``draws`` independent calls at once, ``[draws, B, classes]``; attacks with EOT use it."""
        return self.combine(self.draw_sample_logits(x, draws).flatten(0, 1)).unflatten(0, (draws, -1))

    def combine(self, logits: Tensor) -> Tensor:
        """``[B, K, classes]`` -> ``[B, classes]``, float32: logsumexp over the samples, the same decision as PeeL."""
        return aggregate(logits, "lse")

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[B, classes]``, float32: those of the K draws, combined."""
        return self.combine(self.sample_logits(x))

    def predict_proba(self, x: Tensor) -> Tensor:
        """softmax of `forward`, ``[B, classes]``."""
        return torch.softmax(self.forward(x), 1)

    def peel(self, x: Tensor) -> Tensor:
        """The paper's aggregated log-probabilities, ``[B, classes]``, computed stably: finite where its code is not."""
        return aggregate(self.sample_logits(x), "peel")

    def peel_reference(self, x: Tensor) -> Tensor:
        """The head as the official code returns it, ``[B, classes]``: +-inf and NaN gradients. To study, not to use."""
        return aggregate(self.sample_logits(x), "peel_reference")
