"""The studies of CARSO: on MNIST, on digits, and with a classifier of another package on CIFAR-10.

**On MNIST** the radius is eps = 0.3. The table has four columns:

1. an adversarially trained classifier;
2. CARSO with the paper's objective, attacked through PeeL, which is the output that CARSO's authors attack;
3. the same CARSO, attacked with exact gradients;
4. CARSO that was fine-tuned through the whole pipeline.

**On digits** the study makes a single change at a time, over three seeds. Every model is attacked without its
randomness (z = 0, no noise), by PGD-100 with cross-entropy, then by PGD-100 with DLR, and then by AutoAttack. Each
attack runs only on the images that the earlier attacks did not break. The main models are also attacked with their
randomness, by PGD that averages over draws.

**On CIFAR-10** the classifier is the ResNet-18 of pyautoattack's examples. It is used unchanged, and CARSO reads layers
that are named by their module paths. A purifier is trained for a short time in bfloat16. First the purifier is trained
with the paper's objective for a single epoch. The KL term has no part in this epoch, because in the paper's objective
it has no part in the first eighth of the epochs. So the purifier only learns to rebuild clean images. Then the purifier
is trained through the pipeline. All models face the same attacks. The radius is eps = 2/255, where differences between
the models are visible. At the usual radius of 8/255 the attacks would break both the classifier and this purifier.
"""

from __future__ import annotations

import importlib
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
from purify_fast.training import BankConfig, FitConfig, fit, load_classifier
from purify_fast.training.config import TrainingAttack

from . import Job, Work
from .digits import DigitsStudy, attacked, ball_of, count, effort, train_base, with_samples, zero_attacks
from .report_study import MakeJob, ReportStudy, images_of, train_classifier

CLASSIFIER, EXACT, PIPELINE = "classifier", "CARSO, paper's objective", "CARSO pipeline"
#: The column of the model `EXACT` under attacks through PeeL, the output that CARSO's authors attack.
PEEL = f"{EXACT}, through PeeL"


#: The radius on CIFAR-10, and the layers of the ResNet-18 that CARSO reads.
RESNET_EPS = 2 / 255
RESNET_LAYERS = ("layer1.1.conv2", "layer2.1.conv2", "layer3.1.conv2", "layer4.1.conv2")
RESNET, RECONSTRUCTION = "ResNet-18", "CARSO, reconstruction alone"
#: The label of an attack in the study on digits.
DRAWS = "PGD ce, EOT 4, K draws"


def train_stage(job: Job, folder: Path, defence: Carso, images: data.DataSet, stage: dict, start: bool) -> dict:
    """Train and save a defence, and return the metrics of the last epoch.

    Args:
        job: job with the seed.
        folder: folder of the saved defence.
        defence: defence whose purifier is trained.
        images: data set with the training images.
        stage: settings of the training: ``epochs``, ``batch_size``, ``eps``, ``norm`` and ``steps`` of the attack, and
            options of `CarsoConfig`. ``images`` is the number of the first images that are used; the default is all.
            ``bank`` has the options of a bank of adversarial images; the default is no bank.
        start: True if the weights of the purifier are new.
    """
    options = dict(stage)
    fitting = FitConfig(options.pop("epochs"), options.pop("batch_size"), job.seed)
    n = options.pop("images", len(images.x_train))
    bank = BankConfig(folder=folder, **options.pop("bank")) if "bank" in options else None
    attack = TrainingAttack(eps=options.pop("eps"), norm=options.pop("norm", "linf"), steps=options.pop("steps"))
    origin = "scratch" if start else weights_fingerprint(defence)
    task = CarsoTask(defence, CarsoConfig(attack=attack, **options), origin)
    last = fit(task, images.x_train[:n], images.y_train[:n], fitting, folder, bank=bank)
    defence.save(folder)
    return last


class CarsoReports(ReportStudy):
    """A study of CARSO whose purifier is trained in two stages. The second stage trains through the pipeline.

    Attributes:
        first: name of the first stage's training.
        layers: layers of the classifier that CARSO reads.
    """

    first: str
    layers: tuple[str, ...]

    def classifier(self, job: Job, root: Path) -> nn.Module:
        """Return the classifier that CARSO protects."""
        return load_classifier(job.folder(root, CLASSIFIER))

    def train(self, job: Job, folder: Path, root: Path) -> dict:
        """Train the purifier. The setting ``stage`` is the name of the stage in settings.yaml."""
        budget, images, start = job.settings["budget"], images_of(job), job.name == self.first
        torch.manual_seed(job.seed)
        classifier = self.classifier(job, root)
        if start:
            defence = Carso(classifier, self.layers, images.image_shape, **budget.defence)
        else:
            defence = load_defence(job.folder(root, self.first), classifier)
        stage = getattr(budget, job.settings["stage"]) | {"eps": self.eps}
        return train_stage(job, folder, defence, images, stage, start)


def apgd_without_noise(name: str, steps: int, classifier: str, where: str = "", **options: object) -> list[AttackSpec]:
    """Return two attacks: APGD with cross-entropy, and then targeted APGD.

    Both attack CARSO with the latent z = 0 in place of a random latent. A classifier alone is attacked without changes.
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


class CarsoMnist(CarsoReports):
    """The study of CARSO on MNIST, attacked as its authors do and with exact gradients."""

    name, first, layers = "carso_mnist", EXACT, setting.LAYERS
    models: ClassVar[dict[str, str | None]] = {CLASSIFIER: CLASSIFIER, PEEL: EXACT, EXACT: EXACT, PIPELINE: PIPELINE}
    bases: ClassVar[dict[str, str]] = dict.fromkeys(models, CLASSIFIER)

    def trainings(self, job: MakeJob, budget: SimpleNamespace) -> list[Job]:
        return [
            job(CLASSIFIER, train_classifier, epochs=budget.base_epochs),
            job(EXACT, self.train, CLASSIFIER, stage="objective"),
            job(PIPELINE, self.train, CLASSIFIER, EXACT, stage="pipeline"),
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
    ``bank``, ``eps`` and ``norm``.
    """
    s, images, start = job.settings, setting.digits(), "start" not in job.settings
    base = load_classifier(job.folder(root, s["base"]))
    if start:
        torch.manual_seed(job.seed)
        defence = Carso(base, s.get("layers", setting.LAYERS), images.image_shape, **setting.SIZES)
        stage = {"batch_size": 64, "steps": 20}
    else:
        defence = load_defence(job.folder(root, s["start"]), base)
        stage = {"batch_size": 128, "steps": 7, "attack_target": "pipeline", "learning_rate": 4e-3}
    # In a quick run, the first training has three epochs, because with fewer epochs the KL term would never take part.
    epochs = (3 if start else 1) if s["quick"] else s["epochs"]
    stage |= {"epochs": epochs, **ball_of(job), **s.get("attack", {}), **s.get("config", {})}
    stage |= {"bank": s["bank"]} if "bank" in s else {}
    last = train_stage(job, folder, defence, images, stage, start)
    result = _attacked(defence, job) | {"parameters": count(defence)}
    return result | {"kl": last["kl"]} if start else result


def attack_copies(job: Job, folder: Path, root: Path) -> dict:
    """Attack a classifier that averages over noisy copies of the image, with noise of size ``sigma`` (a setting)."""
    s = job.settings
    defence = NoisyEnsemble(load_classifier(job.folder(root, s["base"])), s["sigma"], 8)
    return _attacked(defence, job) | {"parameters": count(defence)}


def attack_samples(job: Job, folder: Path, root: Path) -> dict:
    """Attack the trained defence of another row, with another number K of samples, which is the setting ``samples``."""
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
    try:
        module = importlib.import_module("pyautoattack.examples.resnet")
    except ModuleNotFoundError as error:
        if not str(error.name).startswith("pyautoattack"):
            raise
        raise ModuleNotFoundError(
            "the ResNet-18 is part of the package pyautoattack, which is missing: pip install 'purify-fast[eval]'"
        ) from error
    model = module.ResNet18()
    weights = Path(str(module.__file__)).with_name("model_test.pt")
    model.load_state_dict(torch.load(weights, weights_only=True, map_location="cpu"))
    return model.eval()


class CarsoResnet18(CarsoReports):
    """The study of CARSO with the ResNet-18 of another package, on CIFAR-10."""

    name, dataset, first = "carso_resnet18", "cifar10", RECONSTRUCTION
    models: ClassVar[dict[str, str | None]] = {RESNET: None, RECONSTRUCTION: RECONSTRUCTION, PIPELINE: PIPELINE}
    eps, layers = RESNET_EPS, RESNET_LAYERS
    #: The network is large enough to use all cores, so its jobs run one after the other.
    workers, threads = 1, 0
    sizes: ClassVar[dict[str, int]] = {"batch_size": 100, "max_forward_batch": 32}

    def classifier(self, job: Job, root: Path) -> nn.Module:
        return resnet18()

    def trainings(self, job: MakeJob, budget: SimpleNamespace) -> list[Job]:
        return [
            job(RECONSTRUCTION, self.train, stage="reconstruction"),
            job(PIPELINE, self.train, RECONSTRUCTION, stage="pipeline"),
        ]

    def model(self, job: Job, root: Path, name: str) -> nn.Module:
        if name == RESNET:
            # Compute in bfloat16, as the accelerated defences do, so that all models have the same precision.
            return InferenceCopy(resnet18(), (3, 32, 32))
        return load_defence(job.folder(root, name), resnet18()).accelerate()

    def attacks(self, name: str, budget: SimpleNamespace) -> dict[str, list[AttackSpec]]:
        n = budget.apgd_images
        apgd = apgd_without_noise(name, budget.apgd_steps, RESNET, f", first {n}", max_images=n)
        return {"PGD": pgd_with_draws(budget), "APGD": apgd}
