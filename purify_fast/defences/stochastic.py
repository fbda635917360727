"""What every randomized defence shares: K sets of logits per image, aggregated, and control over the noise."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .._tensors import repeat_batch
from ..ops.aggregate import aggregate


class StochasticDefence(nn.Module):
    """A defence that draws noise for each of ``samples`` predictions; subclasses give `sample_logits`.

    Several threads may call one at once while its noise is fresh. A thread that decides over the noise has the defence
    for itself: the calls of others are refused meanwhile.

    Every call draws a fresh seed from PyTorch's global generator. Within `fixed_noise` the seed is the caller's; within
    `deterministic` nothing is drawn.
    """

    _noise_seed: Tensor
    samples: int
    #: What predictions do not depend on (`purify_fast.contents`): memory for ids, not the ids in use; and
    #: which thread decides over the noise.
    not_dependencies = frozenset({"_kept_ids", "_noise_owner"})

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("_noise_seed", torch.zeros(1, dtype=torch.int64), persistent=False)
        self._noise = "fresh"
        # the thread that decides over the draws, where one does
        self._noise_owner: int | None = None
        self._noise_ids: Tensor | None = None
        self._kept_ids: dict[tuple[int, torch.device], Tensor] = {}

    def __init_subclass__(cls, **options: Any) -> None:
        """A subclass with a ``forward`` of its own is attacked through that: `draw_logits` must agree with it."""
        super().__init_subclass__(**options)
        if "forward" in vars(cls) and "draw_logits" not in vars(cls):
            cls.draw_logits = _repeated_forward  # type: ignore[assignment, method-assign]

    # -- control over the noise ---------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def fixed_noise(self, seed: int) -> Iterator[StochasticDefence]:
        """Within the block, every image gets the same K draws, made from ``seed``.

        `forward` is then a function of one image: no batch split or order changes its logits.

        Args:
            seed: in [0, 2^63).

        Raises:
            ValueError: another seed.
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
    def deterministic(self) -> Iterator[StochasticDefence]:
        """Within the block, no noise and one prediction per image: no randomness at all."""
        with self._switch("off"):
            yield self

    @contextlib.contextmanager
    def _switch(self, noise: str) -> Iterator[None]:
        with self._by_this_thread():
            before, self._noise = self._noise, noise
            try:
                yield
            finally:
                self._noise = before

    @contextlib.contextmanager
    def _by_this_thread(self) -> Iterator[None]:
        """Within the block, the calls of other threads are refused: they would draw what this thread chose."""
        self._refuse_other_threads()
        before, self._noise_owner = self._noise_owner, threading.get_ident()
        try:
            yield
        finally:
            self._noise_owner = before

    def _refuse_other_threads(self) -> None:
        if torch.compiler.is_compiling():
            return
        owner = self._noise_owner
        if owner is not None and owner != threading.get_ident():
            raise RuntimeError(
                "another thread has this defence in fixed_noise(), deterministic() or noise_ids(), which would decide "
                "over this thread's draws too: give each thread a copy.deepcopy of the defence"
            )

    @contextlib.contextmanager
    def noise_ids(self, ids: Tensor) -> Iterator[StochasticDefence]:
        """Within the block, image i of a batch draws fresh noise as image ``ids[i]`` of one would.

        For the parts of a batch that are computed apart, as by several processes.

        Args:
            ids: int64 ``[B]``.
        """
        with self._by_this_thread():
            yield from self._with_ids(ids)

    def _with_ids(self, ids: Tensor) -> Iterator[StochasticDefence]:
        before = self._noise_ids
        # A captured step reads the ids where they lay when it was captured: they are written there again.
        kept = self._kept_ids.setdefault((len(ids), ids.device), ids.clone()) if before is None else ids.clone()
        self._noise_ids = kept.copy_(ids)
        try:
            yield self
        finally:
            self._noise_ids = before

    def noise(self, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """What the draws of this call are made from.

        Args:
            batch: number of images.
            device: of the results.

        Returns:
            The seed, int64 ``[1]``, and the sample ids, int64 ``[batch]`` or ``[1]``.

        Raises:
            ValueError: `noise_ids` was given ids for another number of images.
        """
        self._refuse_other_threads()
        if self._noise == "fixed":
            # The seed is copied, because a backward pass after the block still needs it. Every image has sample id 0.
            return self._noise_seed.clone(), torch.zeros(1, dtype=torch.int64, device=device)
        seed = torch.randint(2**62, (1,), device=device)
        if self._noise_ids is None:
            return seed, torch.arange(batch, device=device)
        if len(self._noise_ids) != batch:
            raise ValueError(f"noise_ids are of {len(self._noise_ids)} images, the batch has {batch}")
        # copied as the fixed seed is
        return seed, self._noise_ids.clone()

    @property
    def noise_is_off(self) -> bool:
        """Whether no noise is drawn now."""
        self._refuse_other_threads()
        return self._noise == "off"

    @property
    def noise_is_fresh(self) -> bool:
        """Whether every call draws anew."""
        self._refuse_other_threads()
        return self._noise == "fresh"

    # -- predictions --------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[B, classes]``, float32: those of the K draws, aggregated.

        Args:
            x: images ``[B, C, H, W]`` in [0, 1].
        """
        return self.aggregate(self.sample_logits(x))

    def sample_logits(self, x: Tensor) -> Tensor:
        """Logits of the K draws, ``[B, K, classes]``.

        Args:
            x: images ``[B, C, H, W]`` in [0, 1].
        """
        raise NotImplementedError

    def aggregate(self, logits: Tensor) -> Tensor:
        """``[B, classes]``, float32: logsumexp over the samples, which makes the same decisions as the paper's PeeL.

        Args:
            logits: ``[B, K, classes]``.
        """
        return aggregate(logits, "lse")

    def draw_sample_logits(self, x: Tensor, draws: int) -> Tensor:
        """`sample_logits` of ``draws`` independent calls, ``[draws, B, K, classes]``.

        Args:
            x: images ``[B, C, H, W]`` in [0, 1].
            draws: number of calls.
        """
        return self.sample_logits(repeat_batch(x, draws)).unflatten(0, (draws, -1))

    def draw_logits(self, x: Tensor, draws: int) -> Tensor:
        """`forward` of ``draws`` independent calls at once, ``[draws, B, classes]``; attacks with EOT use it.

        Args:
            x: images ``[B, C, H, W]`` in [0, 1].
            draws: number of calls.
        """
        return self.aggregate(self.draw_sample_logits(x, draws).flatten(0, 1)).unflatten(0, (draws, -1))

    def predict_proba(self, x: Tensor) -> Tensor:
        """softmax of `forward`, ``[B, classes]``.

        Args:
            x: images ``[B, C, H, W]`` in [0, 1].
        """
        return torch.softmax(self.forward(x), 1)

    def peel(self, x: Tensor) -> Tensor:
        """The paper's aggregated log-probabilities, ``[B, classes]``, computed stably: finite where its code is not.

        Args:
            x: images ``[B, C, H, W]`` in [0, 1].
        """
        return aggregate(self.sample_logits(x), "peel")

    def peel_reference(self, x: Tensor) -> Tensor:
        """The output as the official code returns it, ``[B, classes]``: +-inf, with NaN gradients. For study only.

        Args:
            x: images ``[B, C, H, W]`` in [0, 1].
        """
        return aggregate(self.sample_logits(x), "peel_reference")


def _repeated_forward(defence: nn.Module, x: Tensor, draws: int) -> Tensor:
    """Logits of ``draws`` independent calls of ``forward``, ``[draws, B, classes]``, in one batch."""
    return defence(repeat_batch(x, draws)).unflatten(0, (draws, -1))
