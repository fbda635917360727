"""Training classifiers: standard, and adversarial training on PGD examples (Madry et al., ICLR 2018)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..attacks import pgd
from ..models.classifiers import CLASSIFIERS
from .checkpoint import read_model, save_model, structure
from .loop import Batch
from .schedules import one_cycle, rising


@dataclass(frozen=True)
class ClassifierConfig:
    """Numbers of classifier training; ours.

    Args:
        eps: radius of the training attack in image units; 0 trains on clean images.
        norm: of the attack, ``linf``, ``l2`` or ``l1``.
        steps, alpha: of the attack; alpha defaults to ``2 eps / steps``.
        warm_up: share of the epochs over which eps rises linearly from 0: without it PGD training can collapse.
        learning_rate: peak of a one-cycle schedule; weight_decay: AdamW's.
    """

    eps: float = 0.0
    norm: str = "linf"
    steps: int = 7
    alpha: float | None = None
    warm_up: float = 0.2
    learning_rate: float = 3e-3
    weight_decay: float = 5e-4

    def __post_init__(self) -> None:
        if self.eps < 0 or self.steps < 1 or not 0 <= self.warm_up <= 1 or self.learning_rate <= 0:
            raise ValueError(f"need eps >= 0, steps >= 1, 0 <= warm_up <= 1, learning_rate > 0, got {self}")

    def step(self, eps: float) -> float:
        """The attack's step at a radius that may still be rising to the config's."""
        return (2 * self.eps / self.steps if self.alpha is None else self.alpha) * eps / self.eps


class ClassifierTask:
    """Cross-entropy training of ``model`` (images in [0, 1] to logits), on clean or adversarial images."""

    def __init__(self, model: nn.Module, config: ClassifierConfig):
        self.model, self.config = model, config
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, foreach=True
        )

    def training_step(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, metrics) of one batch; the attack runs on the frozen model."""
        c, x = self.config, batch.x
        if c.eps > 0:
            eps = rising(c.eps, batch.epoch, batch.epochs, c.warm_up)
            x = pgd(
                self.model,
                x,
                batch.y,
                eps=eps,
                alpha=c.step(eps),
                steps=c.steps,
                norm=c.norm,
                seed=batch.seed,
                sample_ids=batch.sample_ids,
            )
        logits = self.model(x)
        accuracy = (logits.detach().argmax(1) == batch.y).float().mean()
        return F.cross_entropy(logits, batch.y), {"accuracy": accuracy}

    def learning_rate(self, progress: float, epoch: int, epochs: int) -> float:
        """One cycle."""
        return one_cycle(progress, self.config.learning_rate)

    def describe(self) -> dict[str, Any]:
        """The config and the model's structure."""
        return {"task": "classifier", **asdict(self.config), "structure": structure(self.model)}


_KINDS = {kind.__name__: kind for kind in CLASSIFIERS.values()}


def save_classifier(model: nn.Module, folder: str | Path) -> None:
    """Write ``model.safetensors`` and ``model.json`` to ``folder``; ValueError if it is none of `CLASSIFIERS`."""
    kind = type(model).__name__
    if type(model) is not _KINDS.get(kind):
        raise ValueError(f"model must be one of {', '.join(_KINDS)}, got {kind}: save its state dict yourself")
    save_model(folder, kind, model.arguments, model.state_dict())  # type: ignore[arg-type]


def load_classifier(folder: str | Path) -> nn.Module:
    """Read a classifier that `save_classifier` wrote, in evaluation mode.

    Raises:
        FileNotFoundError: a file is missing. ValueError: broken files, or another kind of model.
    """
    facts, state = read_model(folder)
    kind = facts.get("kind")
    if kind not in _KINDS:
        raise ValueError(f"{folder} holds a {kind!r}, not a classifier: {', '.join(_KINDS)}")
    model = _KINDS[kind](**facts["arguments"])
    model.load_state_dict(state)
    return model.eval()
