"""Random models without their randomness: with the same noise in every call, or with their noise off."""

from __future__ import annotations

import contextlib
from typing import Any

from torch import Tensor, nn

from ..protocols import Classifier, DeterministicMode, FixedNoise, supports


class _WithSameAnswer(nn.Module):
    """The base of models that always predict the same, although the model inside is random."""

    needs: type
    method: str

    def __init__(self, model: Classifier):
        super().__init__()
        if not supports(model, self.needs):
            raise TypeError(f"model must have a method {self.method}, got {type(model).__name__}")
        self.model = model
        # The mode of a module inside is not changed.
        self.training = isinstance(model, nn.Module) and model.training

    def block(self) -> contextlib.AbstractContextManager[Any]:
        """Make the context in which the model inside is called."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Compute logits ``[B, classes]`` of images ``[B, C, H, W]`` in [0, 1]."""
        with self.block():
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

    needs, method = DeterministicMode, "deterministic()"

    def block(self) -> contextlib.AbstractContextManager[Any]:
        return self.model.deterministic()  # type: ignore[attr-defined]


class WithFixedNoise(_WithSameAnswer):
    """Predicts with a random model that has the same noise in every call.

    `purify_fast.evaluation.evaluate` attacks and judges it like any other model, so the attack knows the noise.

    Args:
        model: a model with a method ``fixed_noise(seed)``, see `purify_fast.protocols.FixedNoise`.
        seed: the seed of the noise.

    Raises:
        TypeError: a model without this method.
    """

    needs, method = FixedNoise, "fixed_noise(seed)"

    def __init__(self, model: Classifier, seed: int = 0):
        super().__init__(model)
        self.seed = seed

    def block(self) -> contextlib.AbstractContextManager[Any]:
        return self.model.fixed_noise(self.seed)  # type: ignore[attr-defined]
