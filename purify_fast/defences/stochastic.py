"""The base of randomized defences: K sets of logits per image, aggregated, and control over the noise.

`NoisyEnsemble` is the baseline of every purifier: the same classifier and the same aggregation, without a purifier.
"""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from .._tensors import repeat_batch
from ..ops.aggregate import aggregate
from ..ops.philox import Stream, philox
from ..protocols import Classifier, DrawsSampleLogits


class StochasticDefence(nn.Module):
    """A defence that draws noise for each of ``samples`` predictions; subclasses give `sample_logits`.

    Several threads may call a defence at once while its noise is fresh. While one thread is inside `fixed_noise`,
    `deterministic` or `noise_ids`, calls from other threads raise RuntimeError.

    Every call draws a fresh seed from PyTorch's global generator. Within `fixed_noise` the seed is the caller's;
    `deterministic` draws nothing.
    """

    #: True if the class promises that every image of a batch gets its own draws; see
    #: `purify_fast.protocols.draws_for_each_image`. A subclass does not inherit the promise.
    draws_for_each_image: ClassVar[bool] = False
    _noise_seed: Tensor
    samples: int
    #: Attributes that do not change predictions (`purify_fast.model_state`). ``_kept_ids`` is memory that is used
    #: again, and ``_noise_owner`` names a thread.
    not_dependencies = frozenset({"_kept_ids", "_noise_owner"})

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("_noise_seed", torch.zeros(1, dtype=torch.int64), persistent=False)
        self._noise = "fresh"
        # The id of the thread that is inside `fixed_noise`, `deterministic` or `noise_ids`; None if there is none.
        self._noise_owner: int | None = None
        self._noise_ids: Tensor | None = None
        self._kept_ids: dict[tuple[int, torch.device], Tensor] = {}

    def __init_subclass__(cls, **options: Any) -> None:
        """If a subclass defines ``forward`` but not `draw_logits`, make `draw_logits` call it on a repeated batch."""
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
        with self._control(_noise="fixed"):
            before = self._noise_seed.clone()
            self._noise_seed.fill_(seed)
            try:
                yield self
            finally:
                self._noise_seed.copy_(before)

    @contextlib.contextmanager
    def deterministic(self) -> Iterator[StochasticDefence]:
        """Within the block, no noise and one prediction per image: no randomness at all."""
        with self._control(_noise="off"):
            yield self

    @contextlib.contextmanager
    def _control(self, **state: Any) -> Iterator[None]:
        """Within the block, the attributes have these values, and the calls of other threads are refused."""
        self._refuse_other_threads()
        state["_noise_owner"] = threading.get_ident()
        before = {name: getattr(self, name) for name in state}
        for name, value in state.items():
            setattr(self, name, value)
        try:
            yield
        finally:
            for name, value in before.items():
                setattr(self, name, value)

    def _refuse_other_threads(self) -> None:
        if torch.compiler.is_compiling():
            return
        owner = self._noise_owner
        if owner is not None and owner != threading.get_ident():
            raise RuntimeError(
                "another thread is inside fixed_noise(), deterministic() or noise_ids() of this defence, which would "
                "change this thread's draws too: give each thread a copy.deepcopy of the defence"
            )

    @contextlib.contextmanager
    def noise_ids(self, ids: Tensor) -> Iterator[StochasticDefence]:
        """Within the block, image i of a batch draws the fresh noise of image ``ids[i]``.

        It is for the parts of a batch that are computed separately, for example by several processes.

        Args:
            ids: int64 ``[B]``.
        """
        self._refuse_other_threads()
        memory = ids.clone()
        if self._noise_ids is None:
            # A captured step reads the ids from the memory in which they lay at its capture, so new ids are written
            # there.
            memory = self._kept_ids.setdefault((len(ids), ids.device), memory)
        with self._control(_noise_ids=memory.copy_(ids)):
            yield self

    def noise(self, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """The inputs of this call's draws.

        Args:
            batch: number of images.
            device: device of the results.

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
            raise ValueError(f"noise_ids must have an id for each of the {batch} images, got {len(self._noise_ids)}")
        # The ids are copied, because a backward pass after the block still needs them.
        return seed, self._noise_ids.clone()

    @property
    def noise_is_off(self) -> bool:
        """Tell whether no noise is drawn now."""
        self._refuse_other_threads()
        return self._noise == "off"

    @property
    def noise_is_fresh(self) -> bool:
        """Tell whether every call draws new noise."""
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


def _repeated_forward(defence: nn.Module, x: Tensor, draws: int) -> Tensor:
    """Logits of ``draws`` independent calls of ``forward``, ``[draws, B, classes]``, in one batch."""
    return defence(repeat_batch(x, draws)).unflatten(0, (draws, -1))


class WithAggregation(nn.Module):
    """A view of a defence by one aggregation, and without noise if asked, to attack or to compare.

    Args:
        defence: a module with ``sample_logits(x) -> [B, K, classes]`` and, if ``deterministic`` is asked for,
            ``deterministic()``. Its ``draw_sample_logits`` is used if it has one (`StochasticDefence` has all three).
        aggregation: a method of `purify_fast.ops.aggregate`.
        deterministic: whether the defence is run without noise.
    """

    def __init__(self, defence: nn.Module, aggregation: str = "lse", deterministic: bool = False):
        super().__init__()
        self.defence, self.aggregation, self.without_noise = defence, aggregation, deterministic

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[B, classes]``.

        Args:
            x: images ``[B, C, H, W]``.
        """
        with self._mode():
            return aggregate(self.defence.sample_logits(x), self.aggregation)  # type: ignore[operator]

    def draw_logits(self, x: Tensor, draws: int) -> Tensor:
        """``draws`` independent calls at once, ``[draws, B, classes]``; attacks with EOT use it.

        Args:
            x: images ``[B, C, H, W]``.
            draws: number of calls.
        """
        if not isinstance(self.defence, DrawsSampleLogits):
            return self(repeat_batch(x, draws)).unflatten(0, (draws, -1))
        with self._mode():
            logits = self.defence.draw_sample_logits(x, draws)
            return aggregate(logits.flatten(0, 1), self.aggregation).unflatten(0, (draws, -1))

    def around(self, replace: Callable[[Classifier], Classifier]) -> WithAggregation:
        """The same view of another defence.

        Args:
            replace: makes that defence of the one inside.
        """
        # Copy this object instead of making a new one, because it may be of a subclass and have hooks.
        other = copy.copy(self)
        other._modules = {**self._modules, "defence": cast(nn.Module, replace(self.defence))}
        return other

    def _mode(self) -> contextlib.AbstractContextManager[Any]:
        return self.defence.deterministic() if self.without_noise else contextlib.nullcontext()  # type: ignore[operator]


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
            raise ValueError(f"sigma must be at least 0 and samples at least 1, got sigma={sigma}, samples={samples}")
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
            seed, ids = self.noise(len(x), x.device)
            stream, count = Stream.TRANSFORM_NOISE, x[0].numel()
            noise = philox(seed, ids, count, stream=stream, distribution="normal", draws=self.samples)
            copies = torch.clamp(copies + self.sigma * noise.view(-1, self.samples, *x.shape[1:]), 0, 1)
        return self.classifier(copies.flatten(0, 1)).float().unflatten(0, (len(x), -1))
