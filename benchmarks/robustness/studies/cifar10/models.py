"""The models of the study on CIFAR-10, and their training.

Every model is trained with crops and flips. Adversarially trained classifiers, AFT and ARREST among them, keep a moving
average of their weights; for the base and ARREST the weights without the average are judged too. The rows of the
paper's objective have the target and the loss of the paper, and this study's networks, optimizers and budgets: none
follows a recipe of `purify_fast.methods.recipes`. AToP's generator, AToP with the paper's objective and the candidate
whose classifier is trained too are trained in float32, all others in bfloat16. The defences are compared with single
networks that were trained adversarially: the base, a larger and a longer one, one with AWP, one at half of eps, and
TRADES. ARREST's lambda and phi are chosen on training images that the search leaves out; nothing is chosen on test
images.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from purify_fast import data, load_defence, zoo
from purify_fast._tensors import weights_fingerprint
from purify_fast.methods.arrest import ArrestConfig, ArrestTask
from purify_fast.methods.atop import Atop, AtopConfig, AtopTask, SmallGenerator
from purify_fast.methods.carso import Carso, CarsoConfig, CarsoTask
from purify_fast.models import build_classifier
from purify_fast.speed.counting import Flops
from purify_fast.speed.folding.inference_copy import convert_to_channels_last
from purify_fast.training import (
    Batch,
    ClassifierConfig,
    ClassifierTask,
    FitConfig,
    Task,
    fit,
    load_classifier,
    save_classifier,
)
from purify_fast.training.config import TrainingAttack

from .. import Job
from . import study
from .candidates import Candidate, CandidateTask, Mixed, TradesTask
from .study import Training


def images_of(job: Job) -> data.DataSet:
    """The training images that the budget allows, and all test images, on the job's device."""
    whole, n = data.load_dataset("cifar10", job.settings["data"]), job.settings["budget"].train_images
    images = data.DataSet(
        whole.x_train[:n], whole.y_train[:n], whole.x_test, whole.y_test, name="cifar10", num_classes=whole.num_classes
    )
    return images.to(job.settings["device"])


def held_out(job: Job, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Training images on which no model was trained, and their labels, on the job's device.

    Args:
        job: its settings hold the budget of training.
        count: number of images.
    """
    whole, first = data.load_dataset("cifar10", job.settings["data"]), job.settings["budget"].train_images
    chosen, device = slice(first, first + count), job.settings["device"]
    return whole.x_train[chosen].to(device), whole.y_train[chosen].to(device)


def fresh(job: Job, images: data.DataSet, width: int) -> nn.Module:
    """A classifier with weights drawn by the job's seed, on the job's device."""
    torch.manual_seed(job.seed)
    mean, std = data.statistics(images.x_train)
    model = build_classifier("preact_resnet18", images.image_shape, images.num_classes, width=width, mean=mean, std=std)
    return model.to(job.settings["device"])


def trained_classifier(job: Job, root: Path, name: str) -> nn.Module:
    """The trained classifier of another row with the job's seed, on the job's device."""
    return load_classifier(job.folder(root, name)).to(job.settings["device"])


def attack_of(budget: Training, share: float = 1.0) -> TrainingAttack:
    """PGD as used by all trainings, with steps of 2.5 times eps over their number."""
    eps = share * study.EPS
    return TrainingAttack(eps=eps, steps=budget.steps, relative_alpha=2.5)


def adversarial(budget: Training, share: float = 1.0, awp: bool = False) -> ArrestConfig:
    """PGD adversarial training of a fresh classifier."""
    rate = {"learning_rate": 0.1, "schedule": "one_cycle", "awp_gamma": budget.awp_gamma if awp else 0.0}
    return replace(finetuning(budget, 0.0, None), attack=attack_of(budget, share), **rate)


def finetuning(budget: Training, weight: float, angle: float | None) -> ArrestConfig:
    """AFT (weight 0, no angle), or ARREST."""
    return ArrestConfig(
        attack=attack_of(budget),
        distillation_weight=weight,
        replay=angle is not None,
        angle=angle or 0.0,
        ema_decay=budget.ema_decay,
        precision="bfloat16",
    )


def loop(job: Job, epochs: int, **more: object) -> FitConfig:
    """The settings of the loop, with crops and flips for all."""
    batch_size = job.settings["budget"].batch_size
    return FitConfig(epochs, batch_size, job.seed, padding=4, flip=True, checkpoint_seconds=120, **more)


def training_flops(task: Task, images: data.DataSet, count: int = 16) -> float:
    """FLOP per image of a training step, counted on a few images; the gradients of the task's weights are lost."""
    x = data.to_float(images.x_train[:count])
    # Measure a late step, in which every term of the loss takes part.
    late = {"epoch": 3, "epochs": 4, "step": 10**9, "images_before": 10**9}
    batch = Batch(x, images.y_train[:count], torch.arange(count), seed=0, **late)
    with Flops() as counter:
        for update in task.updates(batch):
            update.loss.backward()
    return counter.total / count


@torch.no_grad()
def costs(model: nn.Module, images: data.DataSet, training_flop: float) -> dict[str, float]:
    """A model's parameters, and its FLOP for a prediction and for an image in a training step."""
    with Flops() as counter:
        model.eval()(data.to_float(images.x_test[:2]))
    flop = {"inference_gflop": counter.total / 2 / 1e9, "training_gflop": training_flop / 1e9}
    return {"parameters": sum(p.numel() for p in model.parameters()), **flop}


def save_whole(defence: Carso | Atop, folder: Path) -> None:
    """Write a defence, and its classifier into ``classifier`` inside."""
    defence.save(folder)
    save_classifier(defence.classifier, folder / "classifier")


def _fitted(job: Job, folder: Path, task: Task, model: nn.Module, epochs: int, images: data.DataSet) -> dict:
    """Train; return the last epoch's measurements and the cost."""
    last = fit(task, images.x_train, images.y_train, loop(job, epochs), folder, title=job.name)
    return last | costs(model, images, training_flops(task, images))


def train_standard(job: Job, folder: Path, root: Path) -> dict:
    """Train on clean images."""
    images, budget = images_of(job), job.settings["budget"]
    model = fresh(job, images, budget.width)
    convert_to_channels_last(model, images.image_shape)
    task = ClassifierTask(model, ClassifierConfig(learning_rate=3e-3, precision="bfloat16"))
    facts = _fitted(job, folder, task, model, budget.standard_epochs, images)
    save_classifier(model, folder)
    return facts


def train_base(job: Job, folder: Path, root: Path) -> dict:
    """Train adversarially from fresh weights, from a model of the zoo, or from the base, by the job's settings."""
    images, budget, how = images_of(job), job.settings["budget"], job.settings["how"]
    if how.get("long"):
        # Continue the training of the base with a second cycle of learning rates.
        model, epochs = trained_classifier(job, root, study.BASE), budget.long_epochs - budget.base_epochs
    elif how.get("large"):
        model, epochs = fresh(job, images, budget.large_width), budget.large_epochs
    elif how.get("begin"):
        model, epochs = zoo.load(how["begin"]).to(job.settings["device"]), budget.base_epochs
    else:
        model, epochs = fresh(job, images, budget.width), budget.base_epochs
    kind = TradesTask if how.get("trades") else ArrestTask
    config = adversarial(budget, how.get("share", 1.0), how.get("awp", False))
    task = kind(model, config, images.image_shape)
    facts = _fitted(job, folder, task, task.result, epochs, images)
    save_classifier(task.result, folder)
    if task.result is not task.classifier:
        # Save the weights without the moving average too, since they cost nothing more.
        save_classifier(task.classifier, folder / study.LIVE)
    return facts


def take_base(job: Job, folder: Path, root: Path) -> dict:
    """Use a given base, by its name in the zoo, in place of the study's own base."""
    model = zoo.load(job.settings["base"]).to(job.settings["device"])
    images, config = images_of(job), adversarial(job.settings["budget"])
    flop = training_flops(ArrestTask(copy.deepcopy(model), config, images.image_shape), images)
    save_classifier(model, folder)
    return costs(model, images, flop)


def take_standard(job: Job, folder: Path, root: Path) -> dict:
    """Use the standard classifier of the first seed, which purifiers of all seeds share."""
    first = replace(job, seed=0)
    save_classifier(trained_classifier(first, root, study.STANDARD), folder)
    return first.result(root, study.STANDARD)


def search_arrest(job: Job, folder: Path, root: Path) -> dict:
    """Train a pair of lambda and phi shortly, and measure it on training images that are left out."""
    images, budget = images_of(job), job.settings["budget"]
    model = trained_classifier(job, root, study.STANDARD)
    config = finetuning(budget, job.settings["weight"], job.settings["angle"])
    task = ArrestTask(model, config, images.image_shape)
    fitting = loop(job, budget.search_epochs, validation_share=0.1)
    last = fit(task, images.x_train, images.y_train, fitting, folder, title=job.name)
    return {key: value for key, value in last.items() if key.startswith("validation")}


def chosen(job: Job, root: Path) -> tuple[float, float]:
    """Lambda and phi of the highest accuracy under attack on the search's held-out images, with the first seed."""
    budget = job.settings["budget"]
    if "base" in job.settings:
        return study.CHOSEN
    pairs = [(weight, angle) for weight in budget.weights for angle in budget.angles]
    first = replace(job, seed=0)

    def accuracy(pair: tuple[float, float]) -> float:
        return first.result(root, study.search_name(*pair))["validation_accuracy"]

    return max(pairs, key=accuracy)


def finetune(job: Job, folder: Path, root: Path) -> dict:
    """Train AFT, or ARREST with the search's choice, from the standard classifier."""
    images, budget = images_of(job), job.settings["budget"]
    weight, angle = chosen(job, root) if job.name == study.ARREST_EMA else (0.0, None)
    model = trained_classifier(job, root, study.STANDARD)
    task = ArrestTask(model, finetuning(budget, weight, angle), images.image_shape)
    facts = _fitted(job, folder, task, task.result, budget.arrest_epochs, images)
    save_classifier(task.result, folder)
    save_classifier(task.classifier, folder / study.LIVE)
    return facts | {"weight": weight, "angle": angle}


def best(job: Job, root: Path) -> str:
    """The candidate of the highest accuracy under attack, then of the highest clean accuracy, on held-out images.

    A candidate whose accuracy under attack is doubtful comes last. The candidates' results with the first seed decide
    for all seeds.

    Args:
        job: a job of any seed; the candidates of the first seed must have been judged.
        root: folder of the study.
    """
    first = replace(job, seed=0)

    def merit(name: str) -> tuple[bool, float, float]:
        result = first.result(root, study.tried_name(name))
        return result["tried"]["reliable"], result["tried"]["share"], result["clean"]

    return max(study.ELIGIBLE, key=merit)


def _fresh_carso(job: Job, root: Path, images: data.DataSet, layers: Sequence[str]) -> Carso:
    """A defence whose purifier has weights drawn by the job's seed, on the job's device."""
    base = load_classifier(job.folder(root, study.BASE if job.name == study.BEST else study.BEHIND[job.name]))
    torch.manual_seed(job.seed)
    mean, std = data.statistics(images.x_train)
    samples = job.settings["budget"].samples
    defence = Carso(base, layers, images.image_shape, cond_dim=128, latent_dim=64, samples=samples, mean=mean, std=std)
    return defence.to(job.settings["device"])


def _from_objective(job: Job, root: Path, defence: Carso) -> str:
    """Start from the purifier with the paper's objective, where shapes agree; return its weights' fingerprint."""
    before = load_defence(job.folder(root, study.CARSO), load_classifier(job.folder(root, study.BASE)))
    there = defence.state_dict()
    own = {
        key: value
        for key, value in before.state_dict().items()
        if not key.startswith("classifier.") and key in there and there[key].shape == value.shape
    }
    defence.load_state_dict(own, strict=False)
    return weights_fingerprint(before)


def train_carso(job: Job, folder: Path, root: Path) -> dict:
    """Train CARSO with the paper's objective, or continue in the pipeline, as it is, as one of `CANDIDATES`, or as the
    best of these. A mixture is not trained."""
    name = best(job, root) if job.name == study.BEST else job.name
    if name == study.MIXED:
        return mix(job, folder, root) | {"model": name}
    images, budget = images_of(job), job.settings["budget"]
    how = study.CANDIDATES.get(name, Candidate("the study's own row"))
    defence = _fresh_carso(job, root, images, study.LAYERS[-1:] if how.late else study.LAYERS)
    if name == study.CARSO:
        config = CarsoConfig(attack=TrainingAttack(eps=study.EPS, steps=budget.carso_steps), precision="bfloat16")
        task, epochs = CarsoTask(defence, config), budget.objective_epochs
    else:
        config = CarsoConfig(
            attack_target="pipeline",
            attack=attack_of(budget),
            learning_rate=1e-4 if how.joint else 1e-3,
            joint=how.joint,
            # bfloat16 needs a frozen copy of the classifier, and a classifier that is trained has none.
            precision="float32" if how.joint else "bfloat16",
        )
        if how.loss == "distilled":
            config = replace(config, targets="classifier", reconstruction_weight=0.0)
        origin, epochs = _from_objective(job, root, defence), budget.pipeline_epochs
        task = CandidateTask(defence, config, origin, how.loss)
    facts = _fitted(job, folder, task, defence, epochs, images)
    save_whole(defence, folder)
    return facts | {"model": name}


def mix(job: Job, folder: Path, root: Path) -> dict:
    """The costs of the mixture, which is not trained: its training counts as that of both parts."""
    parts = [job.result(root, name) for name in (study.STANDARD, study.BASE)]
    flop = 1e9 * sum(part["training_gflop"] for part in parts)
    return costs(model_of(job, root, study.MIXED), images_of(job), flop)


def train_atop(job: Job, folder: Path, root: Path) -> dict:
    """Train a generator that corrects images: pre-training, then the paper's objective, or through the pipeline."""
    images, budget = images_of(job), job.settings["budget"]
    base = load_classifier(job.folder(root, study.BEHIND[job.name]))
    torch.manual_seed(job.seed)
    sigma = 0.0 if job.name == study.ATOP_ZERO else 0.25
    defence = Atop(base, SmallGenerator(3, residual=True), images.image_shape, transform="rt2", sigma=sigma)
    defence.to(job.settings["device"])
    if job.name == study.GENERATOR:
        config = AtopConfig.pretraining(learning_rate=1e-3, schedule="one_cycle", gan_weight=0.1)
        task, epochs = AtopTask(defence, config), budget.generator_epochs
    else:
        before = load_defence(
            job.folder(root, study.GENERATOR), load_classifier(job.folder(root, study.BEHIND[study.GENERATOR]))
        )
        defence.purifier.load_state_dict(before.purifier.state_dict())
        config = AtopConfig(cls_delay=budget.atop_delay_images)
        if job.name not in (study.ATOP, study.ATOP_STANDARD):
            config = replace(
                config,
                attack_method="pgd",
                attack_target="pipeline",
                attack=attack_of(budget),
                cls_weight=1.0,
                reconstruction_weight=0.1,
                cls_delay=0,
                learning_rate=1e-3,
                schedule="one_cycle",
                precision="bfloat16",
            )
        task, epochs = AtopTask(defence, config, weights_fingerprint(before.purifier)), budget.pipeline_epochs
    facts = _fitted(job, folder, task, defence, epochs, images)
    save_whole(defence, folder)
    return facts


def model_of(job: Job, root: Path, name: str) -> nn.Module:
    """A trained model, by its row, on the job's device."""
    trained = study.trained_as(name, job.seed)
    folder = job.folder(root, trained)
    if name == study.MIXED:
        model: nn.Module = Mixed(*(trained_classifier(job, root, part) for part in (study.STANDARD, study.BASE))).eval()
    elif name in (study.NO_EMA, study.ARREST):
        model = load_classifier(folder / study.LIVE)
    elif name in study.CARSO_ROWS or trained in study.BEHIND:
        model = load_defence(folder, load_classifier(folder / "classifier"))
    else:
        model = load_classifier(folder)
    return model.to(job.settings["device"])
