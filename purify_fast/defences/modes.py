"""Random models without their randomness: with the same noise in every call, or with their noise off."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from .._tensors import repeat_batch
from ..ops.aggregate import aggregate
from ..ops.philox import Stream, philox
from ..protocols import Classifier, SharesDraws, supports
from .stochastic import StochasticDefence, majority


class _WithSameAnswer(nn.Module):
    """The base of models that always predict the same, although the model inside is random."""

    #: The name of a method of the model inside, which makes the context of a call.
    mode: str

    def __init__(self, model: Classifier, *arguments: int):
        super().__init__()
        if not supports(model, self.mode):
            raise TypeError(f"model must have a method {self.mode}(), got {type(model).__name__}")
        self.model, self.arguments = model, arguments
        # The mode of a module inside is not changed.
        self.training = isinstance(model, nn.Module) and model.training

    def forward(self, x: Tensor) -> Tensor:
        """Compute logits ``[B, classes]`` of images ``[B, C, H, W]`` in [0, 1]."""
        with getattr(self.model, self.mode)(*self.arguments):
            return self.model(x)

    def draw_logits(self, x: Tensor, draws: int) -> Tensor:
        """Compute the logits of ``draws`` draws, ``[draws, B, classes]``, by a single call."""
        return self(x).expand(draws, -1, -1)


class WithoutNoise(_WithSameAnswer):
    """Predicts with a random model whose noise is off.

    `purify_fast.evaluation.evaluate` attacks and judges it like any other model. It is not the model as it is deployed.

    Args:
        model: a model with a method ``deterministic()``, see `purify_fast.protocols.DeterministicMode`.

    Raises:
        TypeError: a model without this method.
    """

    mode = "deterministic"

    def __init__(self, model: Classifier):
        super().__init__(model)


class WithFixedNoise(_WithSameAnswer):
    """Predicts with a random model that has the same noise in every call.

    `purify_fast.evaluation.evaluate` attacks and judges it like any other model, so the attack knows the noise.

    Args:
        model: a model with a method ``fixed_noise(seed)``, see `purify_fast.protocols.FixedNoise`.
        seed: the seed of the noise.

    Raises:
        TypeError: a model without this method.
    """

    mode = "fixed_noise"

    def __init__(self, model: Classifier, seed: int = 0):
        super().__init__(model, seed)


# -- modules around a random model: with another aggregation, and with a majority vote ---------------------------------

M = TypeVar("M", bound=nn.Module)


def _with_part(module: M, name: str, part: Any) -> M:
    """Copy a module, which may have hooks and may be of a subclass, with another attribute."""
    other = copy.copy(module)
    other._modules = dict(module._modules)
    setattr(other, name, part)
    return other


class WithAggregation(nn.Module):
    """Calls a defence with another aggregation, with or without noise, for attacks and comparisons.

    Args:
        defence: module with a method ``sample_logits(x) -> [B, K, classes]``, such as a `StochasticDefence`. If
            deterministic is True, it also needs a method ``deterministic()``. Its method ``draw_sample_logits``, if
            any, is used.
        aggregation: a method of `purify_fast.ops.aggregate`.
        deterministic: whether to run the defence without noise.
    """

    defence: Any

    def __init__(self, defence: nn.Module, aggregation: str = "lse", deterministic: bool = False):
        super().__init__()
        self.defence, self.aggregation, self.without_noise = defence, aggregation, deterministic

    def forward(self, x: Tensor) -> Tensor:
        """Compute logits ``[B, classes]`` of images ``[B, C, H, W]``."""
        with self._mode():
            return self.aggregate(self.defence.sample_logits(x))

    def aggregate(self, logits: Tensor) -> Tensor:
        """Aggregate logits ``[B, K, classes]``: ``[B, classes]``."""
        return aggregate(logits, self.aggregation)

    def draw_logits(self, x: Tensor, draws: int) -> Tensor:
        """Compute the logits of ``draws`` independent calls together, ``[draws, B, classes]``, for attacks with EOT."""
        if not supports(self.defence, "draw_sample_logits"):
            return self(repeat_batch(x, draws)).unflatten(0, (draws, -1))
        with self._mode():
            logits = self.defence.draw_sample_logits(x, draws)
            return self.aggregate(logits.flatten(0, 1)).unflatten(0, (draws, -1))

    def around(self, replace: Callable[[Classifier], Classifier]) -> WithAggregation:
        """Make a copy of this object that calls ``replace(defence)``."""
        return _with_part(self, "defence", replace(self.defence))

    def _mode(self) -> contextlib.AbstractContextManager[Any]:
        return self.defence.deterministic() if self.without_noise else contextlib.nullcontext()


class MajorityVote(nn.Module):
    """Predicts with the `majority` of several draws of a random model.

    Args:
        model: function or module from images ``[B, C, H, W]`` to logits ``[B, classes]``. If the model has a method
            ``draw_logits``, this method is used.
        draws: number of draws, at least 1.
    """

    def __init__(self, model: Classifier, draws: int):
        super().__init__()
        if draws < 1:
            raise ValueError(f"draws must be at least 1, got {draws}")
        self.model, self.draws = model, draws

    def forward(self, x: Tensor) -> Tensor:
        """Compute logits ``[B, classes]``, in float32, or in float64 if the model computes in float64."""
        if supports(self.model, SharesDraws):
            logits = cast(SharesDraws, self.model).draw_logits(x, self.draws)
        else:
            # Call the model separately for each draw, because it may use the same draw for all images of a call.
            logits = torch.stack([self.model(x) for _ in range(self.draws)])
        return majority(logits)

    def around(self, replace: Callable[[Classifier], Classifier]) -> MajorityVote:
        """Make a copy of this object that calls ``replace(model)``."""
        return _with_part(self, "model", replace(self.model))


# -- classifies noisy copies of an image: a baseline for purifiers, and the model of randomized smoothing --------------


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
