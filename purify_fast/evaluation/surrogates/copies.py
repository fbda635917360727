"""The copies of a model from which adaptive attacks take gradients, such as softened copies."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...protocols import Classifier
from .identity_backward import PassedThrough
from .softening import Softening


class _Around(nn.Module):
    """The base of the copies: a module that wraps any callable."""

    def __init__(self, model: Classifier):
        super().__init__()
        self.model = model
        self.eval()


class Softened(_Around):
    """A copy of a model with useful gradients through thresholds, masks, rounding and detached parts (`Softening`)."""

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
    """A copy of a model in which some modules are the identity in the backward pass."""

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
    """A random model in the context ``deterministic()``."""

    def forward(self, x: Tensor) -> Tensor:
        with self.model.deterministic():  # type: ignore[attr-defined]
            return self.model(x)


class WithFixedNoise(_WithSameAnswer):
    """A random model with the same noise in every call."""

    def forward(self, x: Tensor) -> Tensor:
        with self.model.fixed_noise(0):  # type: ignore[attr-defined]
            return self.model(x)


class FewerSamples(_Around):
    """A defence that predicts from fewer samples."""

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
    """A model whose logits are the mean log-probabilities of several parts of the attacked model."""

    def __init__(self, parts: Sequence[Classifier]):
        super().__init__()
        self.parts = list(parts)
        # The parts are also registered as modules, so that PyTorch finds their weights.
        self.modules_inside = nn.ModuleList(part for part in parts if isinstance(part, nn.Module))
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([part(x).float().log_softmax(1) for part in self.parts]).mean(0)
