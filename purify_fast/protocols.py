"""Protocols for methods that a user's model may have. The package uses those that the model has, without inheritance.

A classifier is any callable from images ``[B, C, H, W]`` in [0, 1] to logits ``[B, classes]``. `supports` looks at an
object's type. So methods of a model inside a wrapper, such as a compiled module, do not count as the wrapper's.

A method that models of this package have has no protocol, and `supports` looks for its name:

    frozen_classifier       the frozen copy of a defence's classifier, which attacks on the classifier alone use
    draw_sample_logits      the results of several independent calls of ``sample_logits``, ``[draws, B, K, classes]``
    one_shot                the deterministic model that denoises and classifies images with noise of a given sigma
    make_frozen_copy        the model's own copy, for `purify_fast.frozen_copy`
    around                  the same wrapper around another model, in which an attack may replace the model inside
    compiled_steps          the `CompiledSteps` of a copy on which whole steps of attacks may be compiled
    with_drawn_seed         a block in which a call takes a seed that was drawn before, outside of a compiled step
    prepare_replay          renews values that were computed from the weights, and which replays read from memory
    known_identity          an object that is another one if the parts of a module are, or None if it is not known
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, TypeGuard, runtime_checkable

from torch import Tensor, nn

#: Maps images ``[B, C, H, W]`` in [0, 1] to logits ``[B, classes]``.
Classifier: TypeAlias = Callable[[Tensor], Tensor]


@runtime_checkable
class SharesDraws(Protocol):
    """Computes several independent predictions, distributed like those of ``forward``, together in less time."""

    def draw_logits(self, x: Tensor, draws: int) -> Tensor:
        """The logits of ``draws`` independent calls, ``[draws, B, classes]``."""


def supports(model: object, methods: type | str) -> bool:
    """Return True if the type of ``model`` has the method of this name, or the methods of a protocol."""
    own = type(model)
    return callable(getattr(own, methods, None)) if isinstance(methods, str) else issubclass(own, methods)


# -- protocols ---------------------------------------------------------------------------------------------------------


class Purifier(Protocol):
    """Repairs images, before its attribute ``classifier`` classifies them."""

    classifier: nn.Module

    def purify(self, x: Tensor) -> Tensor:
        """Purified images ``[B, C, H, W]``, or K draws for each image, ``[B, K, C, H, W]``."""


@runtime_checkable
class Aggregates(Protocol):
    """Combines several predictions of an image into a single prediction."""

    def aggregate(self, logits: Tensor) -> Tensor:
        """Combine the logits of K draws, ``[B, K, classes]``, into the logits of the prediction, ``[B, classes]``."""


@runtime_checkable
class SampleLogits(Protocol):
    """Makes K predictions per image, which are then aggregated."""

    def sample_logits(self, x: Tensor) -> Tensor:
        """The logits of the K predictions, ``[B, K, classes]``."""


@runtime_checkable
class FixedNoise(Protocol):
    """Has a mode in which its random draws are decided by a seed."""

    def fixed_noise(self, seed: int) -> contextlib.AbstractContextManager[Any]:
        """Within the block, every image gets the same draws in every call. The draws depend only on ``seed``."""


@runtime_checkable
class DeterministicMode(Protocol):
    """Has a mode without randomness."""

    def deterministic(self) -> contextlib.AbstractContextManager[Any]:
        """Switch all random draws off within the block."""


@runtime_checkable
class OwnSurrogates(Protocol):
    """Has surrogates: models whose gradients may find adversarial images that the defence's own gradients miss."""

    def attack_surrogates(self) -> Sequence[tuple[str, Classifier]]:
        """Pairs (description, surrogate with the same classes). The description completes "the gradients of ..."."""


@runtime_checkable
class OwnAttacks(Protocol):
    """Has attacks that were written for this defence."""

    def strong_attacks(self, norm: str, eps: float) -> Sequence[Any]:
        """The attacks that the protocol "strong" adds in the given ball, as `evaluate` takes them."""


@dataclass(frozen=True)
class Passes:
    """Counts of images: in forward passes, and among them in those that recorded gradients to the images."""

    forwards: int = 0
    gradients: int = 0

    def __add__(self, other: Passes) -> Passes:
        return Passes(self.forwards + other.forwards, self.gradients + other.gradients)

    def __mul__(self, times: int) -> Passes:
        return Passes(times * self.forwards, times * self.gradients)

    def __sub__(self, other: Passes) -> Passes:
        return self + other * -1


@runtime_checkable
class CountsImages(Protocol):
    """Counts the images of its passes. A replay of a captured step does not run the Python code that counts."""

    def counted(self) -> Passes:
        """The counts so far."""

    def count(self, images: Passes) -> None:
        """Add to the counts; negative numbers take back trial calls."""


def draws_for_each_image(model: object) -> bool:
    """Return True if the class of ``model`` has itself the attribute ``draws_for_each_image = True``.

    It promises that random draws differ from image to image, and attacks do not test this. Subclasses do not inherit
    it.
    """
    return bool(vars(type(model)).get("draws_for_each_image", False))


def is_purifier(model: object) -> TypeGuard[Purifier]:
    """Return True if ``model`` satisfies `Purifier`."""
    # Since Python 3.12, isinstance(model, Purifier) does not find submodules, because they are not plain attributes.
    return supports(model, "purify") and has_classifier(model)


def has_classifier(model: object) -> bool:
    """Return True if ``model`` has an attribute ``classifier`` that can be called."""
    return callable(getattr(model, "classifier", None))
