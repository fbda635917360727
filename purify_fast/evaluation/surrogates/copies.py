"""The copies of a model from which adaptive attacks take gradients: softened copies, copies with less noise and others.

A softened copy can be made of any model, because PyTorch's sharp functions, such as comparisons and rounding, are
replaced while the model's code runs (`purify_fast.evaluation.surrogates.softening`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...model_state import switch_to_evaluation
from ...protocols import Classifier
from .identity_backward import PassedThrough
from .softening import Softening


class _Around(nn.Module):
    """The base of the copies: a module that wraps any callable."""

    def __init__(self, model: Classifier):
        super().__init__()
        self.model = model
        switch_to_evaluation(self)


class Softened(_Around):
    """A copy of a model with useful gradients through thresholds, masks, rounding and detached parts.

    Args:
        model: any callable.
        temperature: see `Softening`. With None, the logits are exact, and only their gradient changes.
    """

    def __init__(self, model: Classifier, temperature: float | None):
        super().__init__(model)
        self.temperature = temperature

    def forward(self, x: Tensor) -> Tensor:
        wanted = torch.is_grad_enabled()
        if self.temperature is None and not wanted:
            return self.model(x)
        # Softening recognizes tensors that depend on the images by requires_grad, also where no gradient is wanted.
        leaf = x if x.requires_grad else x.detach().requires_grad_()
        # Gradients are enabled for the whole call, because Softening ignores the model's own calls that disable them.
        with torch.enable_grad(), Softening(self.temperature) as mode:
            logits = self.model(leaf)
        mode.let_through([logits])
        return logits if wanted else logits.detach()


class IdentityBackward(_Around):
    """A copy of a model in which some modules are the identity in the backward pass.

    Args:
        model: any callable.
        modules: the modules inside the model whose gradient is that of the identity.
    """

    def __init__(self, model: Classifier, modules: Sequence[nn.Module]):
        super().__init__(model)
        self.passed = nn.ModuleList(modules)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``[B, ...]`` to logits ``[B, classes]``."""
        with PassedThrough([*self.passed]) if torch.is_grad_enabled() else contextlib.nullcontext():
            return self.model(x)


class _WithSameAnswer(_Around):
    """The base of copies of a random model that always predict the same."""

    def draw_logits(self, x: Tensor, draws: int) -> Tensor:
        """Logits of ``draws`` draws, ``[draws, B, classes]``, from a single call."""
        return self(x).expand(draws, -1, -1)


class WithoutNoise(_WithSameAnswer):
    """A random model in the context ``deterministic()``.

    Args:
        model: a model with ``deterministic()``.
    """

    def forward(self, x: Tensor) -> Tensor:
        with self.model.deterministic():  # type: ignore[attr-defined]
            return self.model(x)


class WithFixedNoise(_WithSameAnswer):
    """A random model with the same noise in every call.

    Args:
        model: a model with ``fixed_noise(seed)``.
    """

    def forward(self, x: Tensor) -> Tensor:
        with self.model.fixed_noise(0):  # type: ignore[attr-defined]
            return self.model(x)


class FewerSamples(_Around):
    """A defence that predicts from fewer samples.

    Args:
        model: a model with an attribute ``samples``.
        samples: the smaller number of samples.
    """

    def __init__(self, model: nn.Module, samples: int):
        super().__init__(model)
        self.samples = samples

    def forward(self, x: Tensor) -> Tensor:
        model: Any = self.model
        before, model.samples = model.samples, self.samples
        try:
            return model(x)
        finally:
            model.samples = before


class Together(nn.Module):
    """A model whose logits are the mean log-probabilities of several parts of the attacked model.

    Args:
        parts: models with the same classes.
    """

    def __init__(self, parts: Sequence[Classifier]):
        super().__init__()
        self.parts = list(parts)
        # The parts are also registered as modules, so that PyTorch finds their weights.
        self.modules_inside = nn.ModuleList(part for part in parts if isinstance(part, nn.Module))
        switch_to_evaluation(self)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([part(x).float().log_softmax(1) for part in self.parts]).mean(0)
