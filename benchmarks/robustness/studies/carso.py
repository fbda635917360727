"""The studies of CARSO: on MNIST, on digits, and with a classifier of another package on CIFAR-10.

**On MNIST** the radius is eps = 0.3. The table has four columns. The first is an adversarially trained classifier. The
second and the third are CARSO with the paper's objective, attacked through PeeL, which is the output that its authors
attack, and through exact gradients. The fourth is CARSO that was fine-tuned through the whole pipeline.

**On digits** the study makes one change at a time, over three seeds. Every model is attacked in the same way. The
deterministic model (z = 0, no noise) is attacked by PGD-100 with cross-entropy, then with DLR, and by AutoAttack on the
images that remain. The main models are also attacked with their randomness, by PGD with expectation over draws.

**On CIFAR-10** the classifier is the ResNet-18 of pyautoattack's examples. It is used unchanged, and CARSO names its
layers by their module paths. A purifier is trained for a short time in bfloat16: first to rebuild clean images, and
then through the pipeline. All models face the same attacks. The paper's objective leaves out its KL term for the first
eighth of the epochs. Here there is only one epoch, so only the reconstruction is trained. The radius is eps = 2/255,
where differences are visible. At the usual radius of 8/255 both the classifier and the purifier, which is trained for
such a short time, would be broken.
"""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import torch
from torch import nn

from purify_fast import data, load_defence
from purify_fast._tensors import weights_fingerprint
from purify_fast.attacks import APGD, PGD, AutoAttack
from purify_fast.defences import NoisyEnsemble, WithAggregation
from purify_fast.demo import setting
from purify_fast.evaluation import AttackSpec
from purify_fast.methods.carso import Carso, CarsoConfig, CarsoTask
from purify_fast.speed.folding.inference_copy import InferenceCopy
from purify_fast.training import FitConfig, fit, load_classifier
from purify_fast.training.config import TrainingAttack

from . import Job, Work
from .digits import DigitsStudy, attacked, ball_of, count, effort, train_base, with_samples, zero_attacks
from .report_study import EPS, MakeJob, ReportStudy, images_of, train_classifier

#: The sizes of CARSO. The number of samples, K = 4, is that of the paper's first version on MNIST.
SIZES = {"cond_dim": 64, "latent_dim": 16, "samples": 4, "decoder_width": 8}
CLASSIFIER, EXACT, PIPELINE = "classifier", "CARSO, paper's objective", "CARSO pipeline"
#: The column of the model `EXACT` under attacks through PeeL, the output that CARSO's authors attack.
PEEL = f"{EXACT}, through PeeL"


#: The radius on CIFAR-10, and the layers of the ResNet-18 that CARSO reads.
RESNET_EPS = 2 / 255
RESNET_LAYERS = ("layer1.1.conv2", "layer2.1.conv2", "layer3.1.conv2", "layer4.1.conv2")
RESNET, RECONSTRUCTION = "ResNet-18", "CARSO, reconstruction alone"
#: An attack of the study on digits.
DRAWS = "PGD ce, EOT 4, K draws"


def fitted(
    folder: Path, defence: Carso, config: CarsoConfig, images: data.DataSet, fitting: FitConfig, start: bool = True
) -> dict:
    """Train and save a defence, and return the metrics of the last epoch.

    Args:
        folder: folder of the saved defence.
        defence: defence with new weights or, if ``start`` is False, with the weights of an earlier training.
        config: settings of the training.
        images: data set with the training images.
        fitting: settings of the training loop.
        start: True if the weights of the purifier are new.
    """
    task = CarsoTask(defence, config, "scratch" if start else weights_fingerprint(defence))
    last = fit(task, images.x_train, images.y_train, fitting, folder)
    defence.save(folder)
    return last


def apgd_without_noise(name: str, steps: int, classifier: str, where: str = "", **options: object) -> list[AttackSpec]:
    """Return two attacks: APGD with cross-entropy, and then targeted APGD.

    They attack CARSO with the latent z = 0, in place of a random latent. A classifier without CARSO has no latent.
    """
    variant = "random" if name == classifier else "deterministic"
    return [
        AttackSpec(
            APGD(loss=loss, steps=steps),
            variant=variant,
            survivors_only=loss != "ce",
            label=f"{label}, z = 0{where}",
            **options,
        )
        for loss, label in (("ce", "APGD ce"), ("dlr_targeted", "APGD ce + APGD-T"))
    ]


def pgd_with_draws(budget: SimpleNamespace, **options: object) -> list[AttackSpec]:
    """Return PGD with cross-entropy, and PGD with DLR on the survivors. Each step averages over random predictions."""
    return [
        AttackSpec(
            PGD(loss=loss), survivors_only=loss != "ce", label=f"PGD-{budget.steps} {what}, EOT {budget.eot}", **options
        )
        for loss, what in (("ce", "ce"), ("dlr", "ce + dlr"))
    ]


def train_on_mnist(job: Job, folder: Path, root: Path) -> dict:
    """Train CARSO with the paper's objective, or continue this training through the pipeline."""
    budget, images, start = job.settings["budget"], images_of(job), job.name == EXACT
    place = job.folder(root, CLASSIFIER)
    if start:
        torch.manual_seed(job.seed)
        defence = Carso(load_classifier(place), setting.LAYERS, images.image_shape, **SIZES)
        config, epochs = CarsoConfig(attack=TrainingAttack(eps=EPS, steps=40)), budget.objective_epochs
    else:
        defence = load_defence(job.folder(root, EXACT), load_classifier(place))
        config = CarsoConfig(attack_target="pipeline", attack=TrainingAttack(eps=EPS, steps=7))
        epochs = budget.pipeline_epochs
    return fitted(folder, defence, config, images, FitConfig(epochs, 128, job.seed), start)


class CarsoMnist(ReportStudy):
    """The study of CARSO on MNIST, attacked as its authors do and with exact gradients."""

    name = "carso_mnist"
    samples = SIZES["samples"]
    models: ClassVar[dict[str, str | None]] = {CLASSIFIER: CLASSIFIER, PEEL: EXACT, EXACT: EXACT, PIPELINE: PIPELINE}
    bases: ClassVar[dict[str, str]] = dict.fromkeys(models, CLASSIFIER)

    def trainings(self, job: MakeJob, budget: SimpleNamespace) -> list[Job]:
        return [
            job(CLASSIFIER, train_classifier, epochs=budget.base_epochs),
            job(EXACT, train_on_mnist, CLASSIFIER),
            job(PIPELINE, train_on_mnist, CLASSIFIER, EXACT),
        ]

    def attacks(self, name: str, budget: SimpleNamespace) -> dict[str, list[AttackSpec]]:
        b, head = budget, {"aggregation": "peel_reference" if name == PEEL else None}
        # AutoAttack's version "rand" is only for random models. The classifier is deterministic.
        version = "standard" if name == CLASSIFIER else "rand"
        auto = AutoAttack(version=version, steps=b.apgd_steps, eot_iter=b.autoattack_eot, n_queries=b.queries)
        label = f"AutoAttack rand (classifier: standard), first {b.autoattack}"
        return {
            "PGD": pgd_with_draws(b, **head),
            "APGD": apgd_without_noise(name, b.apgd_steps, CLASSIFIER, **head),
            "AutoAttack": [AttackSpec(auto, max_images=b.autoattack, label=label, **head)],
        }


def _attacked(model: nn.Module, job: Job) -> dict:
    """Attack a model of the study on digits."""
    s = job.settings
    attacks, rows = zero_attacks(True, s["quick"])
    if s.get("draws"):
        zero = WithAggregation(model, deterministic=True)
        attacks += [
            AttackSpec(PGD(loss="ce"), target=zero, label="made at z = 0"),
            AttackSpec(
                PGD(loss="ce", steps=effort(s["quick"]).draw_steps, eot_iter=4), survivors_only=True, label=DRAWS
            ),
        ]
        rows |= {"clean_draws": "clean", "pgd_draws": DRAWS}
    return attacked(model, job, attacks, rows)


def train_on_digits(job: Job, folder: Path, root: Path) -> dict:
    """Train a purifier with the paper's objective, or train the purifier of another row through the pipeline.

    The job's settings are ``base`` and ``epochs`` and, optionally, ``start``, ``layers``, ``config``, ``attack``,
    ``eps`` and ``norm``.
    """
    s, images, start = job.settings, setting.digits(), "start" not in job.settings
    base = load_classifier(job.folder(root, s["base"]))
    ball = ball_of(job)
    if not start:
        defence, batch_size, quick_epochs = load_defence(job.folder(root, s["start"]), base), 128, 1
        attack = TrainingAttack(**{"steps": 7, **ball, **s.get("attack", {})})
        options = {"attack_target": "pipeline", "learning_rate": 4e-3, **s.get("config", {})}
    else:
        torch.manual_seed(job.seed)
        defence, batch_size = Carso(base, s.get("layers", setting.LAYERS), images.image_shape, **setting.SIZES), 64
        # A quick run has three epochs, because with fewer epochs the KL term would never take part.
        quick_epochs = 3
        attack, options = TrainingAttack(steps=20, **ball), s.get("config", {})
    fitting = FitConfig(quick_epochs if s["quick"] else s["epochs"], batch_size, job.seed)
    last = fitted(folder, defence, CarsoConfig(attack=attack, **options), images, fitting, start)
    result = _attacked(defence, job) | {"parameters": count(defence)}
    return result | {"kl": last["kl"]} if start else result


def attack_copies(job: Job, folder: Path, root: Path) -> dict:
    """Attack a classifier that averages over noisy copies of the image. The setting ``sigma`` is their noise."""
    s = job.settings
    defence = NoisyEnsemble(load_classifier(job.folder(root, s["base"])), s["sigma"], 8)
    return _attacked(defence, job) | {"parameters": count(defence)}


def attack_samples(job: Job, folder: Path, root: Path) -> dict:
    """Attack a trained model with another number K of samples in a prediction, which is the setting ``samples``."""
    return _attacked(with_samples(job, root), job)


class CarsoDigits(DigitsStudy):
    """The study of CARSO's robustness on digits."""

    name = "carso_digits"
    works: ClassVar[dict[str, Work]] = {
        "classifier": train_base,
        "purifier": train_on_digits,
        "copies": attack_copies,
        "samples": attack_samples,
    }


def resnet18() -> nn.Module:
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


def train_on_cifar10(job: Job, folder: Path, root: Path) -> dict:
    """Train the purifier without the KL term, or fine-tune the trained purifier through the pipeline."""
    budget, images, start = job.settings["budget"], images_of(job), job.name == RECONSTRUCTION
    shared = {"attack": TrainingAttack(eps=RESNET_EPS, steps=5), "precision": "bfloat16"}
    torch.manual_seed(job.seed)
    if start:
        # `mean` and `std` are those of CIFAR-10.
        colors = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2471, 0.2435, 0.2616)}
        sizes = {"cond_dim": 256, "latent_dim": 64, "samples": 8}
        defence = Carso(resnet18(), RESNET_LAYERS, images.image_shape, **sizes, **colors)
        config, n, batch = CarsoConfig(beta=0.0, **shared), budget.train_images, 64
    else:
        defence = load_defence(job.folder(root, RECONSTRUCTION), resnet18())
        config = CarsoConfig(attack_target="pipeline", reconstruction_weight=1e-3, learning_rate=1e-3, **shared)
        n, batch = budget.pipeline_images, 32
    few = replace(images, x_train=images.x_train[:n], y_train=images.y_train[:n])
    return fitted(folder, defence, config, few, FitConfig(1, min(batch, n), job.seed), start)


class CarsoResnet18(ReportStudy):
    """The study of CARSO with the ResNet-18 of another package, on CIFAR-10."""

    name, dataset = "carso_resnet18", "cifar10"
    models: ClassVar[dict[str, str | None]] = {RESNET: None, RECONSTRUCTION: RECONSTRUCTION, PIPELINE: PIPELINE}
    eps, layers = RESNET_EPS, RESNET_LAYERS
    #: The network is large enough to use all cores, so its jobs run one after the other.
    workers, threads = 1, 0
    sizes: ClassVar[dict[str, int]] = {"batch_size": 100, "max_forward_batch": 32}

    def trainings(self, job: MakeJob, budget: SimpleNamespace) -> list[Job]:
        return [job(RECONSTRUCTION, train_on_cifar10), job(PIPELINE, train_on_cifar10, RECONSTRUCTION)]

    def model(self, job: Job, root: Path, name: str) -> nn.Module:
        if name == RESNET:
            # Compute in bfloat16, as the accelerated defences do. So all models have the same precision.
            return InferenceCopy(resnet18(), (3, 32, 32))
        return load_defence(job.folder(root, name), resnet18()).accelerate()

    def attacks(self, name: str, budget: SimpleNamespace) -> dict[str, list[AttackSpec]]:
        n = budget.apgd_images
        apgd = apgd_without_noise(name, budget.apgd_steps, RESNET, f", first {n}", max_images=n)
        return {"PGD": pgd_with_draws(budget), "APGD": apgd}
