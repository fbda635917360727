"""Train a method on the images of a DataLoader, by a paper's recipe, as a user's own script does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from purify_fast.methods.arrest import ArrestTask
from purify_fast.methods.atop import AtopTask, DeepFillGenerator
from purify_fast.methods.carso import CarsoTask
from purify_fast.methods.recipes import recipe
from purify_fast.training import FitConfig, fit, load_classifier, save_classifier
from purify_fast.training.task import Task

BATCH = 8

#: For each method with a recipe of a training, the name of the recipe, and settings that a short training needs.
RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "carso": ("carso/cifar10", {"kl_delay": 0.0}),
    "atop": ("atop/cifar_rt2", {"cls_delay": 0}),
    "arrest": ("arrest/resnet18", {}),
}


def task_of(method: str, classifier: nn.Module, shape: tuple[int, int, int], classes: int) -> tuple[Task, FitConfig]:
    """Return the training of a method and the settings of its loop."""
    name, changes = RECIPES[method]
    made = recipe(name).for_data(shape, classes).for_batch(BATCH)
    config = made.config()
    if method != "atop":
        # AToP's attack has a single step.
        config = replace(config, attack=replace(config.attack, steps=1, alpha=None))
    config = replace(config, **changes)
    task: Task
    if method == "carso":
        layers = ["stages.2", "stages.3"]
        task = CarsoTask(made.defence(classifier, layers=layers, cond_dim=8, latent_dim=4, samples=2), config)
    elif method == "atop":
        task = AtopTask(made.defence(classifier, DeepFillGenerator(shape[0] + 2, 4)), config)
    else:
        task = ArrestTask(classifier, config, shape)
    return task, made.loop()


def train(method: str, data: Path, classifier: Path, out: Path, side: int = 64) -> None:
    """Train a method for three epochs of two steps, and save it. A killed training continues."""
    torch.manual_seed(0)
    crop = transforms.Compose([transforms.RandomResizedCrop(side, (0.5, 1)), transforms.ToTensor()])
    images = ImageFolder(str(data / "train"), crop)
    batches = DataLoader(images, BATCH, shuffle=True, drop_last=True)
    model, shape = load_classifier(classifier), (3, side, side)
    task, loop = task_of(method, model, shape, len(images.classes))
    fit(task, batches, None, replace(loop, epochs=3, steps_per_epoch=2), out)
    if method == "arrest":
        save_classifier(task.result, out)
    else:
        task.result.save(out)
        save_classifier(model, out / "classifier")
