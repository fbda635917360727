"""A user's own classifier behind CARSO: the ResNet-18 of pyautoattack's examples, on CIFAR-10.

The classifier is wrapped as it is, its layers named by module path; a short purifier training, to rebuild clean images
and then through the pipeline, in bfloat16; then the same attacks on all. The paper's objective leaves its KL term out
for the first eighth of the epochs, which is all of one epoch: its reconstruction is trained alone. At the usual eps of
8/255 nothing is left of this classifier, nor of a purifier trained so shortly: eps is 2/255, where a difference can be
seen.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from purify_fast import data, load_defence
from purify_fast._files import write_text
from purify_fast._tensors import weights_fingerprint
from purify_fast.attacks import APGD, PGD
from purify_fast.evaluation import AttackSpec, evaluate, merge
from purify_fast.methods.carso import Carso, CarsoConfig, CarsoTask
from purify_fast.speed.folding.inference_copy import InferenceCopy
from purify_fast.training import FitConfig, fit
from purify_fast.training.config import TrainingAttack

from . import Job
from .job_folders import joined, save_report

EPS = 2 / 255
LAYERS = ("layer1.1.conv2", "layer2.1.conv2", "layer3.1.conv2", "layer4.1.conv2")
CLASSIFIER, RECONSTRUCTION, PIPELINE = "ResNet-18", "CARSO, reconstruction alone", "CARSO pipeline"
MODELS = (CLASSIFIER, RECONSTRUCTION, PIPELINE)
GROUPS = ("PGD", "APGD")


@dataclass(frozen=True)
class Budget:
    """How much of everything; images to train on, each once."""

    reconstruction_images: int = 50000
    pipeline_images: int = 10000
    images: int = 200
    steps: int = 20
    eot: int = 2
    apgd_images: int = 100
    apgd_steps: int = 100


DEFAULT = Budget()
FULL = Budget(reconstruction_images=50000, pipeline_images=50000, images=10000, steps=200, eot=20, apgd_images=1000)
QUICK = Budget(reconstruction_images=64, pipeline_images=32, images=4, steps=2, eot=2, apgd_images=2, apgd_steps=2)


def classifier() -> nn.Module:
    """The example checkpoint: 10 classes, images in [0, 1], no normalization; in evaluation mode.

    Raises:
        ModuleNotFoundError: without pyautoattack.
    """
    spec = importlib.util.find_spec("pyautoattack")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("the ResNet-18 comes with pyautoattack: pip install 'purify-fast[eval]'")
    folder = Path(spec.submodule_search_locations[0]) / "examples"
    found = importlib.util.spec_from_file_location("pyautoattack_example_resnet", folder / "resnet.py")
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    model = module.ResNet18()
    model.load_state_dict(torch.load(folder / "model_test.pt", weights_only=True, map_location="cpu"))
    return model.eval()


def _defence(job: Job, root: Path, name: str) -> nn.Module:
    return load_defence(job.folder(root, name), classifier()).accelerate()


def train(job: Job, folder: Path, root: Path) -> dict:
    """The purifier without its KL term, or fine-tuned from there through the pipeline."""
    budget: Budget = job.settings["budget"]
    cifar = data.load_dataset("cifar10", job.settings["data"])
    torch.manual_seed(job.seed)
    if job.name == RECONSTRUCTION:
        # the statistics are CIFAR-10's
        defence = Carso(
            classifier(), LAYERS, cifar.image_shape, cond_dim=256, latent_dim=64, samples=8,
            mean=(0.4914, 0.4822, 0.4465), std=(0.2471, 0.2435, 0.2616),
        )  # fmt: skip
        config = CarsoConfig(attack=TrainingAttack(eps=EPS, steps=5), beta=0.0, precision="bfloat16")
        task, n, batch = CarsoTask(defence, config), budget.reconstruction_images, 64
    else:
        defence = load_defence(job.folder(root, RECONSTRUCTION), classifier())
        origin = weights_fingerprint(defence)
        config = CarsoConfig(
            attack_target="pipeline",
            attack=TrainingAttack(eps=EPS, steps=5),
            reconstruction_weight=1e-3,
            precision="bfloat16",
            learning_rate=1e-3,
        )
        task, n, batch = CarsoTask(defence, config, origin), budget.pipeline_images, 32
    last = fit(task, cifar.x_train[:n], cifar.y_train[:n], FitConfig(1, min(batch, n), job.seed), folder)
    defence.save(folder)
    return last


def _attacks(name: str, budget: Budget) -> dict[str, list[AttackSpec]]:
    zero = "random" if name == CLASSIFIER else "deterministic"
    n, steps = budget.apgd_images, budget.apgd_steps
    pgd = [
        AttackSpec(PGD(loss="ce"), label=f"PGD-{budget.steps} ce, EOT {budget.eot}"),
        AttackSpec(PGD(loss="dlr"), survivors_only=True, label=f"PGD-{budget.steps} ce + dlr, EOT {budget.eot}"),
    ]
    labels = (f"APGD ce, z = 0, first {n}", f"APGD ce + APGD-T, z = 0, first {n}")
    apgd = [
        AttackSpec(APGD(loss=loss, steps=steps), variant=zero, max_images=n, survivors_only=loss != "ce", label=label)
        for loss, label in zip(("ce", "dlr_targeted"), labels, strict=True)
    ]
    return {"PGD": pgd, "APGD": apgd}


def attack(job: Job, folder: Path, root: Path) -> dict:
    """One model under one group of attacks."""
    name, budget = job.settings["model"], job.settings["budget"]
    cifar = data.load_dataset("cifar10", job.settings["data"])
    # one precision for all: what is attacked and what predicts is the same function
    bare = InferenceCopy(classifier(), cifar.image_shape) if name == CLASSIFIER else None
    report = evaluate(
        _defence(job, root, name) if bare is None else bare, cifar.x_test[: budget.images],
        cifar.y_test[: budget.images], eps=EPS, attacks=_attacks(name, budget)[job.settings["group"]],
        steps=budget.steps, eot_iter=budget.eot, batch_size=100, max_forward_batch=32, seed=job.seed,
        out=folder, name=name,
    )  # fmt: skip
    return save_report(report, folder)


def jobs(path: str, seed: int = 0, budget: Budget = DEFAULT) -> list[Job]:
    """Two trainings and three evaluations, one after the other with all threads."""
    common = {"data": path, "budget": budget}
    needs: dict[str, tuple[str, ...]] = {CLASSIFIER: (), RECONSTRUCTION: (RECONSTRUCTION,), PIPELINE: (PIPELINE,)}
    made = [
        Job(RECONSTRUCTION, seed, train, (), common, threads=0),
        Job(PIPELINE, seed, train, (RECONSTRUCTION,), common, threads=0),
    ]
    for name in MODELS:
        for group in GROUPS:
            settings = {**common, "model": name, "group": group}
            made.append(Job(f"{name} {group}", seed, attack, needs[name], settings, threads=0))
    return made


def write(root: Path, folder: Path, seed: int = 0, budget: Budget = DEFAULT) -> Path:
    """``carso_resnet18.md``, its JSON and picture in ``folder``."""
    job = Job("report", seed, attack)
    report = merge(joined(job.folder(root, f"{name} {group}") for group in GROUPS) for name in MODELS)
    report.save(folder / "carso_resnet18")
    lines = [
        f"CIFAR-10, the first {budget.images} test images, L-inf eps 2/255, seed {seed}; accuracy ± standard error, %. "
        f"ResNet-18 of pyautoattack's examples, as it is; layers {', '.join(LAYERS)}; purifier trained on "
        f"{budget.reconstruction_images:,} images once to rebuild clean images, without the KL term of the "
        f"paper's objective, then on {budget.pipeline_images:,} once "
        "through the pipeline; K = 8, all bfloat16 inside. Under attack an image counts if each of five predictions is "
        "right (z = 0: the one); `ce + dlr` and `APGD ce + APGD-T` count what both leave.",
        "",
        *report.comparison(),
    ]
    write_text(folder / "carso_resnet18.md", "\n".join(lines) + "\n")
    return folder / "carso_resnet18.md"
