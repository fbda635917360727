"""Defines what the trainings of purifiers share."""

from __future__ import annotations

import contextlib
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from .._process import processes
from .._settings import weights_fingerprint
from ..defences.base import Defence
from ..speed.watch import FEWEST_WEIGHTS, matrix_weights
from ..training.task import Batch, MethodTask, check_classifier

D = TypeVar("D", bound=Defence)


class PurifierTask(MethodTask, Generic[D]):
    """Trains the purifier of a defence. The classifier is frozen."""

    def __init__(self, defence: D, config: Any, origin: str):
        if defence.compute_dtype is not None:
            raise ValueError("defence must not be a frozen copy, whose weights do not change: give the defence itself")
        super().__init__(config, defence)
        self.defence, self.origin = defence, origin
        self.classifier = weights_fingerprint(defence.classifier)
        defence.classifier.requires_grad_(False)
        #: The defence that a step computes with.
        self.trained = self.computing()

    def computing(self) -> D:
        """Return what a step computes with: a copy with the same purifier, or the defence itself if no copy is faster.

        A compiled training always has a copy.
        """
        of_float32 = self.defence.purifier_dtype == torch.float32
        folds = of_float32 and (self.compiles or matrix_weights(self.defence.classifier) >= FEWEST_WEIGHTS)
        if not folds and self.dtype != torch.bfloat16:
            return self.defence
        defence = self.defence.computing_in(self.dtype)
        if self.compiles:
            copied: Any = defence.classifier
            copied.compile_steps(at_once=True)
        return defence

    @property
    def result(self) -> D:
        return self.defence

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "defence": self.defence.arguments, "classifier": self.classifier}

    def begin(self) -> None:
        # A resumed run has loaded the classifier.
        self.trained = self.computing()

    def train(self) -> None:
        self.trained.train()
        super().train()

    def answer(self, images: Tensor) -> Tensor:
        with self.defence.deterministic():
            return self.defence(images)

    def check(self, shape: tuple[int, ...], classes: int) -> None:
        if tuple(shape) != self.defence.image_shape:
            raise ValueError(f"x must have images {list(self.defence.image_shape)}, got {list(shape)}")
        check_classifier(self.defence.classifier, shape, classes, self.config.precision, trained=False)


def noise_of(defence: Defence, batch: Batch) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which a defence draws each image's noise by its position in the batch of all processes."""
    rank, world = (0, 1) if batch.whole else processes()
    places = torch.arange(batch.first, batch.first + len(batch.x), device=batch.x.device)
    return defence.noise_ids(rank + world * places)
