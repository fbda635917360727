"""A study of CARSO in front of a classifier of another package: the ResNet-18 of pyautoattack's examples, on CIFAR-10.

The classifier is used unchanged, and CARSO names its layers by their module paths. A purifier is trained for a short
time in bfloat16: first to rebuild clean images, and then through the pipeline. All models face the same attacks. The
paper's objective leaves out its KL term for the first eighth of the epochs. Here there is only one epoch, so only the
reconstruction is trained. The radius is eps = 2/255, where differences are visible. At the usual radius of 8/255 both
the classifier and the purifier, which is trained for such a short time, would be broken.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import torch
from torch import nn

from purify_fast import load_defence
from purify_fast._tensors import weights_fingerprint
from purify_fast.evaluation import AttackSpec
from purify_fast.methods.carso import Carso, CarsoConfig, CarsoTask
from purify_fast.speed.folding.inference_copy import InferenceCopy
from purify_fast.training import FitConfig, fit
from purify_fast.training.config import TrainingAttack

from . import Job
from .carso_mnist import apgd_without_noise, pgd_with_draws
from .report_study import MakeJob, ReportStudy, images_of

EPS = 2 / 255
LAYERS = ("layer1.1.conv2", "layer2.1.conv2", "layer3.1.conv2", "layer4.1.conv2")
CLASSIFIER, RECONSTRUCTION, PIPELINE = "ResNet-18", "CARSO, reconstruction alone", "CARSO pipeline"


def classifier() -> nn.Module:
    """Load the ResNet-18 of pyautoattack's examples in evaluation mode. It takes images in [0, 1], and has 10 classes.

    Raises:
        ModuleNotFoundError: pyautoattack is not installed.
    """
    spec = importlib.util.find_spec("pyautoattack")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            "the ResNet-18 is part of the package pyautoattack, which is missing: pip install 'purify-fast[eval]'"
        )
    folder = Path(spec.submodule_search_locations[0]) / "examples"
    source = importlib.util.spec_from_file_location("pyautoattack_example_resnet", folder / "resnet.py")
    assert source is not None and source.loader is not None
    module = importlib.util.module_from_spec(source)
    source.loader.exec_module(module)
    model = module.ResNet18()
    model.load_state_dict(torch.load(folder / "model_test.pt", weights_only=True, map_location="cpu"))
    return model.eval()


def train(job: Job, folder: Path, root: Path) -> dict:
    """Train the purifier without the KL term, or fine-tune the trained purifier through the pipeline."""
    budget, images = job.settings["budget"], images_of(job)
    attack = TrainingAttack(eps=EPS, steps=5)
    torch.manual_seed(job.seed)
    if job.name == RECONSTRUCTION:
        # `mean` and `std` are those of CIFAR-10.
        defence = Carso(
            classifier(),
            LAYERS,
            images.image_shape,
            cond_dim=256,
            latent_dim=64,
            samples=8,
            mean=(0.4914, 0.4822, 0.4465),
            std=(0.2471, 0.2435, 0.2616),
        )
        task = CarsoTask(defence, CarsoConfig(attack=attack, beta=0.0, precision="bfloat16"))
        n, batch = budget.train_images, 64
    else:
        defence = load_defence(job.folder(root, RECONSTRUCTION), classifier())
        config = CarsoConfig(
            attack_target="pipeline",
            attack=attack,
            reconstruction_weight=1e-3,
            precision="bfloat16",
            learning_rate=1e-3,
        )
        task, n, batch = CarsoTask(defence, config, weights_fingerprint(defence)), budget.pipeline_images, 32
    last = fit(task, images.x_train[:n], images.y_train[:n], FitConfig(1, min(batch, n), job.seed), folder)
    defence.save(folder)
    return last


class CarsoResnet18(ReportStudy):
    """The study of CARSO with the ResNet-18 of another package, on CIFAR-10."""

    name, dataset = "carso_resnet18", "cifar10"
    models: ClassVar[dict[str, str | None]] = {CLASSIFIER: None, RECONSTRUCTION: RECONSTRUCTION, PIPELINE: PIPELINE}
    eps, layers = EPS, LAYERS
    #: The network is large enough to use all cores, so its jobs run one after the other.
    workers, threads = 1, 0
    sizes: ClassVar[dict[str, int]] = {"batch_size": 100, "max_forward_batch": 32}

    def trainings(self, job: MakeJob, budget: SimpleNamespace) -> list[Job]:
        return [job(RECONSTRUCTION, train), job(PIPELINE, train, RECONSTRUCTION)]

    def model(self, job: Job, root: Path, name: str) -> nn.Module:
        if name == CLASSIFIER:
            # Compute in bfloat16, as the accelerated defences do. So all models have the same precision.
            return InferenceCopy(classifier(), (3, 32, 32))
        return load_defence(job.folder(root, name), classifier()).accelerate()

    def attacks(self, name: str, budget: SimpleNamespace) -> dict[str, list[AttackSpec]]:
        n = budget.apgd_images
        apgd = apgd_without_noise(name, budget.apgd_steps, CLASSIFIER, f", first {n}", max_images=n)
        return {"PGD": pgd_with_draws(budget), "APGD": apgd}
