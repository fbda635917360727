"""Attacks of torchattacks, Foolbox and ART, which `evaluate` runs unchanged. A package is imported when they run."""

from __future__ import annotations

import abc
import contextlib
import copy
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ..._tensors import per_image
from ..._validation import read_norm
from ...attacks.base import ThreatModel
from ...attacks.outputs import LogitsOf
from ...defences import MajorityVote
from ...protocols import CountsImages, PassesOn, supports

#: The share by which an attack's own radius may exceed the radius of the evaluation, because of rounding.
ROUNDED = 1e-5
#: The protocols by which the evaluation's counter of images, a wrapper around the judged model, is recognized.
COUNTER = (CountsImages, PassesOn)


class OtherAttack(abc.ABC):
    """An attack of another package.

    Args:
        attack: the attack object.

    Raises:
        ValueError: the attack cannot attack a model of images in [0, 1].
    """

    #: The package's name in reports.
    package: ClassVar[str]
    #: The base class of the package's attacks: the first part of its module's name, and the name of the class.
    base: ClassVar[tuple[str, str]]
    #: A template of the code that makes such an attack. The name of the attack's class and the radius are filled in.
    code: ClassVar[str]

    def __init__(self, attack: Any):
        self.attack = attack
        self.kind = type(attack).__name__
        self.name = f"{self.package} {self.kind}"
        self.check()

    @classmethod
    def descends(cls, kind: type) -> bool:
        """Tell whether a class is an attack of the package."""
        return any((one.__module__.partition(".")[0], one.__name__) == cls.base for one in kind.__mro__)

    def line(self, eps: float = 8 / 255) -> str:
        """Return the code that makes such an attack with this radius."""
        return self.code.format(name=self.kind, eps=eps)

    @abc.abstractmethod
    def check(self) -> None:
        """Raise ValueError if the attack's options do not allow an attack on the judged model with the true labels."""

    @abc.abstractmethod
    def ball(self) -> tuple[str | None, float | None]:
        """Return the attack's own norm and radius; a value that the attack does not have is None."""

    def check_ball(self, threat: ThreatModel) -> None:
        """Raise ValueError if the attack would search another ball than that of the evaluation."""
        norm, eps = self.ball()
        if norm is not None and norm != threat.norm:
            right = f'take an attack for {threat.norm}, or call evaluate(..., norm="{norm}")'
            raise ValueError(f"{self.name} searches a ball in {norm}, but the report's norm is {threat.norm}: {right}")
        if eps is not None and eps > threat.eps * (1 + ROUNDED):
            right = f"write {self.line(threat.eps)}"
            raise ValueError(f"{self.name} has eps = {eps:.6g}, but the report's eps is {threat.eps:.6g}: {right}")

    def run(self, model: Any, x: Tensor, y: Tensor, threat: ThreatModel, warnings: list[str]) -> Any:
        """Attack images.

        Args:
            model: a module from images to logits.
            x: images ``[B, C, H, W]`` in [0, 1].
            y: labels, int64 ``[B]``.
            threat: the ball.
            warnings: a list to which warnings for the reader of the report are added.
        """
        given, judged = self.wrapped(), model
        while isinstance(judged, (LogitsOf, MajorityVote)) or all(supports(judged, each) for each in COUNTER):
            judged = judged.model
        if any(one is not judged for one in given):
            other = type(given[0]).__name__
            warnings.append(f"{self.name} was made for another model, {other}, and ran on the judged model")
        images = self.found(model, x, y, threat.eps)
        if self.ball()[1] is not None or not isinstance(images, Tensor) or images.shape != x.shape:
            return images
        # An attack without a radius finds the nearest adversarial image. Outside the ball, the clean image is returned.
        order = {"linf": torch.inf, "l2": 2.0, "l1": 1.0}[threat.norm]
        lengths = torch.linalg.vector_norm((images - x).flatten(1).double(), ord=order, dim=1)
        inside = lengths <= threat.eps * (1 + ROUNDED)
        return torch.where(per_image(inside, x), images.to(x.dtype), x)

    def wrapped(self) -> list[Any]:
        """Return the models that the user gave to the attack; none if the attack gets its model when it runs."""
        return []

    @abc.abstractmethod
    def found(self, model: Any, x: Tensor, y: Tensor, eps: float) -> Any:
        """Attack the images, and return the attacked images."""


class OfTorchattacks(OtherAttack):
    """An attack of torchattacks; a copy of it runs on the judged model."""

    package, base = "torchattacks", ("torchattacks", "Attack")
    code = "torchattacks.{name}(model, eps={eps:.6g})"

    def check(self) -> None:
        if self.attack.normalization_used is not None:
            raise ValueError(
                f"{self.name} normalizes images itself (set_normalization_used), but the judged model takes images in "
                f"[0, 1]: put the normalization into the model, and write {self.line()}"
            )
        if self.attack.targeted and "label" in self.attack.attack_mode:
            raise ValueError(
                f"{self.name} takes labels as targets ({self.attack.attack_mode}), but evaluate gives it the true "
                "classes: call set_mode_default() or set_mode_targeted_random()"
            )

    def ball(self) -> tuple[str | None, float | None]:
        eps, norm = getattr(self.attack, "eps", None), getattr(self.attack, "norm", None)
        if not isinstance(eps, (int, float)):
            return None, None
        if isinstance(norm, str):
            return read_norm(norm), float(eps)
        return ("l2" if self.kind.endswith("L2") else "linf"), float(eps)

    def _all(self) -> list[Any]:
        return [self.attack, *self.attack._attacks.values()]

    def wrapped(self) -> list[Any]:
        return [each.model for each in self._all()]

    def found(self, model: Any, x: Tensor, y: Tensor, eps: float) -> Any:
        # In the copy of the attack, the judged model replaces every model that the user gave to the attack.
        mine = copy.deepcopy(self.attack, {id(each): model for each in self.wrapped()})
        mine.set_device(x.device)
        return mine(x, y)


class OfFoolbox(OtherAttack):
    """An attack of Foolbox, which gets its model and radius when it runs."""

    package, base = "Foolbox", ("foolbox", "Attack")
    code = "foolbox.attacks.{name}()"

    def check(self) -> None:
        """Do nothing, because the attack gets its model and radius when it runs."""

    def ball(self) -> tuple[str | None, float | None]:
        order: Any = None
        with contextlib.suppress(ValueError):
            # An attack whose distance is chosen when it runs raises ValueError here.
            order = getattr(self.attack.distance, "p", None)
        return {np.inf: "linf", 2: "l2", 1: "l1"}.get(order), None

    def found(self, model: Any, x: Tensor, y: Tensor, eps: float) -> Any:
        from foolbox.criteria import Misclassification
        from foolbox.models.pytorch import PyTorchModel

        wrapped = PyTorchModel(model, bounds=(0, 1), device=x.device)
        _, clipped, _ = self.attack(wrapped, x, Misclassification(y), epsilons=eps)
        return clipped


class OfArt(OtherAttack):
    """An attack of the Adversarial Robustness Toolbox; during the attack, its estimator contains the judged model."""

    package, base = "ART", ("art", "EvasionAttack")
    code = "{name}(PyTorchClassifier(model, loss, input_shape, nb_classes, clip_values=(0, 1)), eps={eps:.6g})"

    def check(self) -> None:
        if self.attack.targeted:
            raise ValueError(
                f"{self.name} has targeted=True, but evaluate gives it the true classes: set targeted=False"
            )
        estimators = self._estimators()
        if not estimators:
            raise ValueError(f"{self.name} must have a PyTorchClassifier as its estimator: write {self.line()}")
        for estimator in estimators:
            clip = estimator.clip_values
            changes = [each for each in estimator.preprocessing_operations if not _changes_nothing(each)]
            if changes or (clip is not None and (np.min(clip[0]), np.max(clip[1])) != (0, 1)):
                raise ValueError(
                    f"{self.name} has an estimator that preprocesses images, or clips them to a range other than "
                    f"[0, 1]: put the preprocessing into the model, and write {self.line()}"
                )

    def ball(self) -> tuple[str | None, float | None]:
        eps, order = getattr(self.attack, "eps", None), getattr(self.attack, "norm", None)
        norm = {np.inf: "linf", "inf": "linf", 2: "l2", "2": "l2", 1: "l1", "1": "l1"}.get(order)
        return norm, float(eps) if isinstance(eps, (int, float)) else None

    def _estimators(self) -> list[Any]:
        """The PyTorch classifiers of the attack and of its parts."""
        found: dict[int, Any] = {}
        attacks, seen = [self.attack], set[int]()
        while attacks:
            values = list(vars(attacks.pop()).values())
            values += [each for value in values if isinstance(value, (list, tuple)) for each in value]
            for value in values:
                if id(value) in seen:
                    continue
                seen.add(id(value))
                if self.descends(type(value)):
                    attacks.append(value)
                elif any(one.__name__ == "PyTorchClassifier" for one in type(value).__mro__):
                    found[id(value)] = value
        return list(found.values())

    def wrapped(self) -> list[Any]:
        return [estimator.model for estimator in self._estimators()]

    def found(self, model: Any, x: Tensor, y: Tensor, eps: float) -> Any:
        with self._on(model):
            images = self.attack.generate(x=x.cpu().numpy(), y=y.cpu().numpy())
        return torch.from_numpy(np.asarray(images, dtype=np.float32)).to(x)

    @contextlib.contextmanager
    def _on(self, model: Any) -> Iterator[None]:
        """A context in which the estimators of the attack have the model ``model``."""
        wrappers = [estimator._model for estimator in self._estimators()]
        before = [wrapper._model for wrapper in wrappers]
        try:
            for wrapper in wrappers:
                wrapper._model = model
            yield
        finally:
            for wrapper, own in zip(wrappers, before, strict=True):
                wrapper._model = own


def _changes_nothing(operation: Any) -> bool:
    mean, std = getattr(operation, "mean", None), getattr(operation, "std", None)
    return mean is not None and std is not None and bool(np.all(np.asarray(mean) == 0) and np.all(np.asarray(std) == 1))


def of_other_package(given: Any) -> OtherAttack | None:
    """Wrap an attack of torchattacks, Foolbox or ART; None for anything else.

    Args:
        given: an element of a list of attacks.

    Raises:
        TypeError: given is a class instead of an object.
        ValueError: the attack needs images in another range than [0, 1], or other labels than the true labels.
    """
    for kind in (OfTorchattacks, OfFoolbox, OfArt):
        if isinstance(given, type):
            if kind.descends(given):
                line = kind.code.format(name=given.__name__, eps=8 / 255)
                raise TypeError(
                    f"{given.__name__} is a class of {kind.package}, not an attack: give an object, such as {line}"
                )
        elif kind.descends(type(given)):
            return kind(given)
    return None
