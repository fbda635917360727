"""What the studies of AToP share: one stage of a purifier's training."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from purify_fast._tensors import weights_fingerprint
from purify_fast.data import DataSet
from purify_fast.methods.atop import Atop, AtopConfig, AtopTask
from purify_fast.training import FitConfig, TrainingAttack, fit

from . import Job

PIPELINE = {"attack_method": "pgd", "attack_target": "pipeline"}
_OPTIONS = {field.name for field in fields(AtopConfig)}


def options(settings: dict) -> dict:
    """Those of the settings that are `AtopConfig`'s; its attack's are left to `attacked`."""
    return {name: value for name, value in settings.items() if name in _OPTIONS}


def attacked(settings: dict, eps: float) -> AtopConfig:
    """The config of a stage that trains on attacked images, with as many steps as the settings say."""
    return AtopConfig(attack=TrainingAttack(eps=eps, steps=settings.get("steps", 10)), **options(settings))


def train(job: Job, folder: Path, defence: Atop, config: AtopConfig, images: DataSet, stage: dict) -> dict:
    """Train and save the defence's purifier; the last epoch's metrics.

    ``stage`` has ``epochs``, ``batch_size`` and, unless all are used, ``images``: so many of the first. The other
    names in it are the config's.
    """
    n = stage.get("images", len(images.x_train))
    fitting = FitConfig(stage["epochs"], stage["batch_size"], job.seed)
    task = AtopTask(defence, config, weights_fingerprint(defence))
    last = fit(task, images.x_train[:n], images.y_train[:n], fitting, folder)
    defence.save(folder)
    return last
