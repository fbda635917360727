"""The models that the study of the papers' questions trains on digits.

A training that was finished before is read from its checkpoint, and an interrupted training goes on.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from examples.demo.methods import ARREST_CONFIG, ATOP_CONFIG, PRETRAINING, THROUGH_CARSO
from examples.demo.setting import BASE_TRAINING, EPS, LAYERS, SIZES, digits
from purify_fast import zoo
from purify_fast.methods.arrest import ArrestConfig, ArrestTask
from purify_fast.methods.atop import Atop, AtopConfig, AtopTask
from purify_fast.methods.atop.generators import SmallGenerator
from purify_fast.methods.carso import Carso, CarsoConfig, CarsoTask
from purify_fast.models.classifiers import PreActResNet18, SmallCNN
from purify_fast.training import ClassifierConfig, ClassifierTask, FitConfig, Task, TrainingAttack, fit

STANDARD, BASE = "digits-standard", "digits-pgd-at"
OBJECTIVE = CarsoConfig(attack=TrainingAttack(eps=EPS, steps=10))
WITHOUT_GAN = AtopConfig.pretraining(learning_rate=2e-3, schedule="one_cycle", gan_grad=False, gan_fake="refined")
#: The settings of ARREST's finetuning without its two parts: adversarial finetuning (AFT).
AFT = {"distillation_weight": 0.0, "replay": False}


@dataclass(frozen=True)
class Setting:
    """The amounts of the study.

    Args:
        runs: folder of the trainings.
        data: folder of MNIST and CIFAR-10.
        images: number of attacked images of the classifiers that are trained here.
        few: number of attacked images of other models. On CIFAR-10, a fifth.
        steps: number of steps of attacks that are not a protocol.
        queries: number of queries of the attacks without gradients.
        brief: whether every training has three epochs.
    """

    runs: Path
    data: Path | None = None
    images: int = 200
    few: int = 100
    steps: int = 50
    queries: int = 1000
    brief: bool = False

    def fit(self, task: Task, name: str, epochs: int, batch_size: int, seed: int) -> Any:
        """Train a task on digits, and return the trained model in evaluation mode."""
        loop, images = FitConfig(3 if self.brief else epochs, batch_size, seed), digits()
        fit(task, images.x_train, images.y_train, loop, self.runs / f"{name}, seed {seed}", progress=False)
        return task.result.eval()


def classifier(setting: Setting, seed: int, model: str = "SmallCNN", eps: float = EPS, epochs: int = 60) -> nn.Module:
    """Train a classifier from fresh weights by PGD within a radius, or on clean images if ``eps`` is 0."""
    torch.manual_seed(seed)
    attack = replace(BASE_TRAINING.attack, eps=eps)
    config = replace(BASE_TRAINING, attack=attack) if eps else ClassifierConfig()
    made = SmallCNN() if model == "SmallCNN" else PreActResNet18(in_channels=1, width=8)
    return setting.fit(ClassifierTask(made, config), f"{model}, eps {eps}", epochs, 64, seed)


class NoCondition(nn.Module):
    """In place of CARSO's encoder of the representation: a condition of zeros."""

    def forward(self, representation: list[Tensor]) -> Tensor:
        return representation[0].new_zeros((len(representation[0]), SIZES["cond_dim"]))


class PlainPurifier(nn.Module):
    """The autoencoder of a CARSO without a condition. Its latents are K draws from the posterior of the image.

    Latents from the prior, as CARSO has them, would say nothing about the image.
    """

    def __init__(self, carso: Carso):
        super().__init__()
        self.carso = carso

    def forward(self, x: Tensor) -> Tensor:
        condition = self.carso.condition(x)
        mean, log_variance = (part[:, None] for part in self.carso.posterior(x, condition))
        noise = torch.randn(len(x), self.carso.samples, self.carso.latent_dim)
        return self.carso.aggregate(self.carso.sample_logits(x, mean + noise * (log_variance / 2).exp()))


def carso(setting: Setting, seed: int, layers: tuple[str, ...] = LAYERS, pipeline: bool = False) -> nn.Module:
    """Train CARSO in front of the zoo's classifier with the paper's objective, and perhaps through the pipeline.

    Without layers, the condition is zero.
    """
    torch.manual_seed(seed)
    defence = Carso(zoo.load(BASE), layers or LAYERS, digits().image_shape, **SIZES)
    if not layers:
        defence.condition_encoder = NoCondition()
    name = f"CARSO, {'+'.join(layers) or 'no condition'}"
    setting.fit(CarsoTask(defence, OBJECTIVE), name, 12, 64, seed)
    if pipeline:
        setting.fit(CarsoTask(defence, THROUGH_CARSO, origin=name), f"{name}, pipeline", 15, 128, seed)
    return defence if layers else PlainPurifier(defence)


def atop(setting: Setting, seed: int, transform: Any = "rt2", gan: bool = True, finetuned: bool = True) -> nn.Module:
    """Train AToP in front of the zoo's standard classifier: the pre-training, and perhaps the paper's objective.

    Without the GAN loss, the pre-training is that of an autoencoder.
    """
    torch.manual_seed(seed)
    defence = Atop(zoo.load(STANDARD), SmallGenerator(1), digits().image_shape, transform=transform)
    before = PRETRAINING if gan else WITHOUT_GAN
    name = f"AToP, {transform}{'' if gan else ', no GAN'}"
    setting.fit(AtopTask(defence, before), name, 12, 64, seed)
    if finetuned:
        config = replace(ATOP_CONFIG, cls_delay=2)
        setting.fit(AtopTask(defence, config, origin=name), f"{name}, finetuned", 12, 64, seed)
    return defence


def arrest_task(start: nn.Module, eps: float = EPS, **changes: Any) -> ArrestTask:
    """Make a finetuning of a classifier, by ARREST with changed settings."""
    alpha = BASE_TRAINING.attack.step_size(eps)
    config: ArrestConfig = replace(ARREST_CONFIG, attack=replace(ARREST_CONFIG.attack, eps=eps, alpha=alpha), **changes)
    return ArrestTask(start, config, digits().image_shape)


def arrest(setting: Setting, seed: int, **changes: Any) -> nn.Module:
    """Finetune the zoo's standard classifier by ARREST with changed settings."""
    torch.manual_seed(seed)
    name = ", ".join(["ARREST", *(f"{key} {value}" for key, value in changes.items())])
    return setting.fit(arrest_task(zoo.load(STANDARD), **changes), name, 20, 64, seed)
