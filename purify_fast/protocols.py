"""The methods that this package uses of the user's objects, as protocols; a class need not inherit one.

A classifier is any callable from images ``[B, C, H, W]`` in [0, 1] to logits ``[B, classes]``. `supports` tells what a
defence can do beyond that. It looks at the object's type: a wrapper that merely passes attribute names on, such as a
compiled module, does not count, because a call of the inner object's method would bypass the wrapper.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeGuard, runtime_checkable

import torch
from torch import Tensor, nn


class Classifier(Protocol):
    """Maps images to logits."""

    def __call__(self, x: Tensor, /) -> Tensor:
        """Logits ``[B, classes]`` of images ``[B, C, H, W]`` in [0, 1]."""


@runtime_checkable
class NamesRepresentation(Protocol):
    """A classifier that names the modules which make a good representation."""

    def representation_layers(self) -> list[str]:
        """Module paths, as in ``named_modules()``."""


@runtime_checkable
class Purifies(Protocol):
    """Repairs images before they are classified."""

    def purify(self, x: Tensor) -> Tensor:
        """Purified images ``[B, C, H, W]``, or K draws of each ``[B, K, C, H, W]``."""


class HasClassifier(Protocol):
    """Has a classifier, which is an attribute of the object."""

    classifier: nn.Module


@runtime_checkable
class Purifier(Purifies, Protocol):
    """A purifier in front of a classifier; the classifier is an attribute of the object."""

    classifier: nn.Module


@runtime_checkable
class Reconstructs(Protocol):
    """Repairs images by a method with CARSO's name for it."""

    def reconstruct(self, x: Tensor) -> Tensor:
        """Purified images ``[B, C, H, W]``, or K draws of each ``[B, K, C, H, W]``."""


@runtime_checkable
class ShowsTransform(Protocol):
    """Transforms images before it repairs them, and shows the transformed ones."""

    def transformed(self, x: Tensor) -> Tensor:
        """The transformed images, which are not repaired yet: ``[B, C, H, W]``, or K draws ``[B, K, C, H, W]``."""


@runtime_checkable
class FrozenClassifier(Protocol):
    """A defence whose images are classified, and whose classifier is attacked alone, through a copy of it."""

    @property
    def frozen_classifier(self) -> nn.Module:
        """The frozen copy, or the classifier itself."""


@runtime_checkable
class Aggregates(Protocol):
    """Makes one prediction of several."""

    def aggregate(self, logits: Tensor) -> Tensor:
        """Logits of K draws ``[B, K, classes]`` to those of the prediction, ``[B, classes]``."""


@runtime_checkable
class HasOriginalLoss(Protocol):
    """A generator with the loss that it was made with."""

    def original_loss(self, images: Sequence[Tensor], target: Tensor) -> Tensor:
        """The loss of each image, ``[N]``, from the images ``[N, C, H, W]`` of every stage and the target images."""


@runtime_checkable
class SampleLogits(Protocol):
    """Makes several predictions per image, which are then aggregated."""

    def sample_logits(self, x: Tensor) -> Tensor:
        """Logits of the K draws, ``[B, K, classes]``."""


@runtime_checkable
class DrawsSampleLogits(Protocol):
    """Makes the sample logits of several independent calls at once."""

    def draw_sample_logits(self, x: Tensor, draws: int) -> Tensor:
        """`SampleLogits.sample_logits` of ``draws`` independent calls, ``[draws, B, K, classes]``."""


@runtime_checkable
class SharesDraws(Protocol):
    """Makes several independent predictions at once, cheaper than as many calls.

    A type with this method promises that it speaks for the type's own ``forward``.
    """

    def draw_logits(self, x: Tensor, draws: int) -> Tensor:
        """Logits of ``draws`` independent calls, ``[draws, B, classes]``."""


@runtime_checkable
class FixedNoise(Protocol):
    """Can make its randomness a function of a seed."""

    def fixed_noise(self, seed: int) -> contextlib.AbstractContextManager[Any]:
        """Within the block, every image gets the same draws in every call, made from ``seed`` alone."""


@runtime_checkable
class DeterministicMode(Protocol):
    """Can be run without any randomness."""

    def deterministic(self) -> contextlib.AbstractContextManager[Any]:
        """A block in which nothing is drawn."""


@runtime_checkable
class AuthorsEvaluation(Protocol):
    """Knows how the people who published it evaluate it."""

    def authors_attacks(self, eps: float) -> Sequence[Any]:
        """Their attacks at the radius ``eps``: `purify_fast.evaluation.AttackSpec`, each with a ``judge``."""


@runtime_checkable
class OwnSurrogates(Protocol):
    """Knows models whose gradients may find adversarial images that its own gradients do not find."""

    def attack_surrogates(self) -> Sequence[tuple[str, Classifier]]:
        """Surrogate models of the same images and classes, each with a description, as in "the gradients of ..."."""


@runtime_checkable
class OwnAttacks(Protocol):
    """Knows attacks that a careful attacker would add for it."""

    def strong_attacks(self, norm: str, eps: float) -> Sequence[Any]:
        """Attacks that the protocol "strong" adds in that ball: `purify_fast.evaluation.AttackSpec`."""


@runtime_checkable
class Accelerates(Protocol):
    """Computes through fast copies of its parts from then on."""

    def accelerate(self, dtype: torch.dtype | None = ..., /) -> Any:
        """The object itself, accelerated."""


@runtime_checkable
class PassesOn(Protocol):
    """A wrapper, such as one that counts images. An attack may put another model with the same methods into it."""

    def around(self, replace: Callable[[Classifier], Classifier]) -> Classifier:
        """The same wrapper around the result of ``replace`` for the model inside."""


@runtime_checkable
class PreparesReplay(Protocol):
    """Keeps values that it computes from its weights; replays of a captured step read them from their memory."""

    def prepare_replay(self) -> None:
        """Update the kept values, in place."""


@runtime_checkable
class CountsImages(Protocol):
    """Counts the images of its forward passes; a replay of a captured step runs none of its Python."""

    def counted(self) -> int:
        """The number of images that it has counted."""

    def count(self, images: int) -> None:
        """Add to the count; a negative number lowers it."""


def supports(model: object, protocol: type) -> bool:
    """Tell whether the type of ``model`` has the methods of ``protocol``, a protocol of methods in this module."""
    return issubclass(type(model), protocol)


def draws_for_each_image(model: object) -> bool:
    """Tell whether the class of ``model`` promises by ``draws_for_each_image = True`` that every image gets own draws.

    Attacks do not test the draws of such a model. A subclass has to promise it again, because it may draw in its own
    way.
    """
    return bool(vars(type(model)).get("draws_for_each_image", False))


def is_purifier(model: object) -> TypeGuard[Purifier]:
    """Tell whether ``model`` satisfies `Purifier`."""
    # Since Python 3.12 isinstance(model, Purifier) does not find submodules, which are not plain attributes of the
    # object.
    return supports(model, Purifies) and has_classifier(model)


def has_classifier(model: object) -> TypeGuard[HasClassifier]:
    """Tell whether ``model`` satisfies `HasClassifier`."""
    return callable(getattr(model, "classifier", None))
