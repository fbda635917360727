"""Training classifiers: standard, and adversarial training on PGD examples (Madry et al., ICLR 2018)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._compat import flat_arguments
from ..attacks import pgd
from ..models.classifiers import CLASSIFIERS
from .attack import TrainingAttack, settings
from .checkpoint import read_model, save_model, structure
from .loop import Batch
from .schedules import one_cycle


@flat_arguments(renamed={}, attack={"warm_up": "eps_warmup"})
@dataclass(frozen=True)
class ClassifierConfig:
    """How a classifier is trained; every number is this package's own choice.

    Args:
        attack: PGD that makes the training examples; eps 0 trains on clean images.
        learning_rate: the highest rate of a one-cycle schedule.
        weight_decay: of AdamW.

    Raises:
        ValueError: a setting out of range; the message names it.
    """

    attack: TrainingAttack = TrainingAttack(eps=0.0, steps=7, relative_alpha=2.0, eps_warmup=0.2)
    learning_rate: float = 3e-3
    weight_decay: float = 5e-4

    def __post_init__(self) -> None:
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be above 0, got {self.learning_rate}")


class ClassifierTask:
    """Cross-entropy training of ``model`` (images in [0, 1] to logits), on clean or adversarial images."""

    def __init__(self, model: nn.Module, config: ClassifierConfig):
        self.model, self.config = model, config
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, foreach=True
        )

    def training_step(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, metrics) of one batch; the attack runs on the frozen model."""
        x = batch.x
        if self.config.attack.eps > 0:
            attack = self.config.attack.at_epoch(batch.epoch, batch.epochs)
            x = pgd(
                self.model,
                x,
                batch.y,
                eps=attack.eps,
                alpha=attack.step_size(attack.eps),
                steps=attack.steps,
                norm=attack.norm,
                random_start=attack.random_start,
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
        return {"task": "classifier", **settings(self.config), "structure": structure(self.model)}


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
