"""Train and load the models of the study on CIFAR-10.

All models are trained with crops and flips. Adversarially trained classifiers, including AFT and ARREST, keep a moving
average of their weights.

The trainings with the paper's objective attack the same part of the defence as in the paper, and have the same loss.
Networks, optimizers and budgets are those of this study, so these trainings do not follow a recipe of
`purify_fast.methods.recipes`. Two trainings use float32: the pre-training of AToP's generator, and AToP with the
paper's objective. All other trainings use bfloat16.

ARREST's lambda and phi were chosen by short trial trainings, on training images that these trials left out. Nothing was
chosen on test images.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from purify_fast import data, load_defence
from purify_fast._hashes import weights_fingerprint
from purify_fast.methods.arrest import ArrestConfig, ArrestTask
from purify_fast.methods.atop import Atop, AtopConfig, AtopTask, SmallGenerator
from purify_fast.methods.carso import Carso, CarsoConfig, CarsoTask
from purify_fast.models import build_classifier
from purify_fast.speed.layout import convert_to_channels_last
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

from ....speed.flops import flop_of
from .. import Job, settings_of
from . import study

#: The weight of the divergence in TRADES. The paper has the same weight for CIFAR-10.
BETA = 6.0


class TradesTask(ArrestTask):
    """TRADES (Zhang et al., ICML 2019), the training of a single network with which the defences are compared.

        L = CE(f(x), y) + beta KL(f(x) || f(x')),   x' = PGD on the cross-entropy within the ball

    In the paper, the inner attack maximizes the divergence. Here it maximizes the cross-entropy, because this package's
    PGD has the cross-entropy as a loss, but not the divergence. Gowal et al. ("Uncovering the limits of adversarial
    training", arXiv 2010.03593) compared the two attacks. The attack, the optimizer, the schedule, the precision and
    the moving average are those of `ArrestTask`. The config must have no distillation, no replay and no weight
    perturbation.
    """

    def training_step(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        attacked, _ = self.inputs(batch, [])
        # Use a single pass, so that BatchNorm computes its statistics over clean and attacked images together.
        logits = self.forward(torch.cat([batch.x, attacked]))[0].float()
        clean, moved = logits.chunk(2)
        cross_entropy = F.cross_entropy(clean, batch.y)
        divergence = F.kl_div(moved.log_softmax(1), clean.log_softmax(1), reduction="batchmean", log_target=True)
        metrics = {
            "cross_entropy": cross_entropy.detach(),
            "divergence": divergence.detach(),
            "accuracy": (moved.detach().argmax(1) == batch.y).float().mean(),
        }
        return cross_entropy + BETA * divergence, metrics

    def describe(self) -> dict[str, object]:
        return super().describe() | {"task": "trades", "beta": BETA}


def images_of(job: Job) -> data.DataSet:
    """Return the training images that the budget allows, and all test images, on the device of the job."""
    whole, n = data.load_dataset("cifar10", job.settings["data"]), job.settings["budget"].train_images
    return replace(whole, x_train=whole.x_train[:n], y_train=whole.y_train[:n]).to(job.settings["device"])


def fresh(job: Job, images: data.DataSet, width: int) -> nn.Module:
    """Return a classifier with random weights from the job's seed, on the device of the job."""
    torch.manual_seed(job.seed)
    mean, std = data.statistics(images.x_train)
    model = build_classifier("preact_resnet18", images.image_shape, images.num_classes, width=width, mean=mean, std=std)
    return model.to(job.settings["device"])


def trained_classifier(job: Job, root: Path, name: str) -> nn.Module:
    """Load the trained classifier of another row with the same seed, on the device of the job."""
    return load_classifier(job.folder(root, name)).to(job.settings["device"])


def attack_of(budget: SimpleNamespace, share: float = 1.0) -> TrainingAttack:
    """Return the PGD attack of all trainings. The length of a step is 2.5 eps divided by the number of steps."""
    eps = share * study.EPS
    return TrainingAttack(eps=eps, steps=budget.steps, relative_alpha=2.5)


def adversarial(budget: SimpleNamespace, share: float = 1.0) -> ArrestConfig:
    """Return the settings of adversarial training with PGD."""
    rate = {"learning_rate": 0.1, "schedule": "one_cycle"}
    return replace(finetuning(budget, 0.0, None), attack=attack_of(budget, share), **rate)


def finetuning(budget: SimpleNamespace, weight: float, angle: float | None) -> ArrestConfig:
    """Return the settings of a finetuning by ARREST.

    Args:
        budget: amounts of the training.
        weight: weight lambda of the distillation. With 0 there is no distillation.
        angle: threshold phi of the noisy replay, in degrees. If it is None, there is no replay. Without distillation
            and replay, ARREST is AFT, which is plain adversarial finetuning.
    """
    return ArrestConfig(
        attack=attack_of(budget),
        distillation_weight=weight,
        replay=angle is not None,
        angle=angle or 0.0,
        ema_decay=budget.ema_decay,
        precision="bfloat16",
    )


def loop(job: Job, epochs: int, **more: object) -> FitConfig:
    """Return the settings of the training loop, with crops and flips."""
    batch_size = job.settings["budget"].batch_size
    return FitConfig(epochs, batch_size, job.seed, padding=4, flip=True, checkpoint_seconds=120, **more)


def training_flops(task: Task, images: data.DataSet, count: int = 16) -> float:
    """Run a training step on a few images, and return its FLOP per image. This changes the weights' gradients."""
    x = data.to_float(images.x_train[:count])
    # Count a late step, in which all terms of the loss take part.
    late = {"epoch": 3, "epochs": 4, "step": 10**9, "images_before": 10**9}
    batch = Batch(x, images.y_train[:count], torch.arange(count, device=x.device), seed=0, **late)

    def step() -> None:
        for update in task.updates(batch):
            update.loss.backward()

    return flop_of(step) / count


@torch.no_grad()
def costs(model: nn.Module, images: data.DataSet, training_flop: float) -> dict[str, float]:
    """Return a model's number of parameters, and its GFLOP for a prediction and for an image in a training step."""
    model.eval()
    inference_flop = flop_of(lambda: model(data.to_float(images.x_test[:2]))) / 2
    flop = {"inference_gflop": inference_flop / 1e9, "training_gflop": training_flop / 1e9}
    return {"parameters": sum(p.numel() for p in model.parameters()), **flop}


def save_whole(defence: Carso | Atop, folder: Path) -> None:
    """Save a defence in a folder, and its classifier in the subfolder ``classifier``."""
    defence.save(folder)
    save_classifier(defence.classifier, folder / "classifier")


def _fitted(job: Job, folder: Path, task: Task, model: nn.Module, epochs: int, images: data.DataSet) -> dict:
    """Train a model. Return the metrics of the last epoch, and the costs of the model."""
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
    """Train a classifier adversarially."""
    images, budget, how = images_of(job), job.settings["budget"], job.settings["how"]
    if how.get("long"):
        # Continue the training of the base with a second cycle of the learning rate.
        model, epochs = trained_classifier(job, root, study.BASE), budget.long_epochs - budget.base_epochs
    elif how.get("large"):
        model, epochs = fresh(job, images, budget.large_width), budget.large_epochs
    else:
        model, epochs = fresh(job, images, budget.width), budget.base_epochs
    kind = TradesTask if how.get("trades") else ArrestTask
    config = adversarial(budget, how.get("share", 1.0))
    task = kind(model, config, images.image_shape)
    facts = _fitted(job, folder, task, task.result, epochs, images)
    save_classifier(task.result, folder)
    if task.result is not task.classifier:
        # Save the weights without the moving average too. These weights have their own row of the table.
        save_classifier(task.classifier, folder / study.LIVE)
    return facts


def finetune(job: Job, folder: Path, root: Path) -> dict:
    """Finetune the standard classifier by ARREST, or by AFT (see `finetuning`)."""
    images, budget = images_of(job), job.settings["budget"]
    weight, angle = (budget.weight, budget.angle) if job.name == study.ARREST_EMA else (0.0, None)
    model = trained_classifier(job, root, study.STANDARD)
    task = ArrestTask(model, finetuning(budget, weight, angle), images.image_shape)
    facts = _fitted(job, folder, task, task.result, budget.arrest_epochs, images)
    save_classifier(task.result, folder)
    save_classifier(task.classifier, folder / study.LIVE)
    return facts


def _fresh_carso(job: Job, root: Path, images: data.DataSet) -> Carso:
    """Return CARSO with random weights of the purifier from the job's seed, on the device of the job."""
    base = load_classifier(job.folder(root, study.BEHIND[job.name]))
    torch.manual_seed(job.seed)
    mean, std = data.statistics(images.x_train)
    sizes = {"cond_dim": 128, "latent_dim": 64, "samples": job.settings["budget"].samples}
    defence = Carso(base, study.LAYERS, images.image_shape, **sizes, mean=mean, std=std)
    return defence.to(job.settings["device"])


def _from_objective(job: Job, root: Path, defence: Carso) -> str:
    """Copy the purifier's weights by the paper's objective, and return the fingerprint of the defence with them."""
    before = load_defence(job.folder(root, study.CARSO), load_classifier(job.folder(root, study.BASE)))
    own = {key: value for key, value in before.state_dict().items() if not key.startswith("classifier.")}
    defence.load_state_dict(own, strict=False)
    return weights_fingerprint(before)


def train_carso(job: Job, folder: Path, root: Path) -> dict:
    """Train CARSO with the paper's objective, or continue its training through the pipeline."""
    images, budget = images_of(job), job.settings["budget"]
    defence = _fresh_carso(job, root, images)
    if job.name == study.CARSO:
        config = CarsoConfig(attack=TrainingAttack(eps=study.EPS, steps=budget.carso_steps), precision="bfloat16")
        task, epochs = CarsoTask(defence, config), budget.objective_epochs
    else:
        config = CarsoConfig(
            attack_target="pipeline", attack=attack_of(budget), learning_rate=1e-3, precision="bfloat16"
        )
        if job.name == study.CARSO_DISTILLED:
            # The purifier learns the probabilities that the base gives to the clean image, as in ARD (Goldblum et al.,
            # AAAI 2020, arXiv 1905.09747).
            config = replace(config, targets="classifier", reconstruction_weight=0.0)
        task, epochs = CarsoTask(defence, config, _from_objective(job, root, defence)), budget.pipeline_epochs
    facts = _fitted(job, folder, task, defence, epochs, images)
    save_whole(defence, folder)
    return facts


def train_atop(job: Job, folder: Path, root: Path) -> dict:
    """Train AToP with a generator that corrects images."""
    images, budget = images_of(job), job.settings["budget"]
    base = load_classifier(job.folder(root, study.BEHIND[job.name]))
    torch.manual_seed(job.seed)
    sigma = 0.0 if job.name == study.ATOP_ZERO else 0.25
    defence = Atop(base, SmallGenerator(3, residual=True), images.image_shape, transform="rt2", sigma=sigma)
    defence.to(job.settings["device"])
    if job.name == study.GENERATOR:
        config = AtopConfig.pretraining(**settings_of("cifar10_atop")["pretraining"])
        task, epochs = AtopTask(defence, config), budget.generator_epochs
    else:
        before = load_defence(
            job.folder(root, study.GENERATOR), load_classifier(job.folder(root, study.BEHIND[study.GENERATOR]))
        )
        defence.purifier.load_state_dict(before.purifier.state_dict())
        if job.name in (study.ATOP, study.ATOP_STANDARD):
            config = AtopConfig(cls_delay=budget.atop_delay_images)
        else:
            config = AtopConfig(attack=attack_of(budget), **settings_of("cifar10_atop")["pipeline"])
        task, epochs = AtopTask(defence, config, weights_fingerprint(before.purifier)), budget.pipeline_epochs
    facts = _fitted(job, folder, task, defence, epochs, images)
    save_whole(defence, folder)
    return facts


def model_of(job: Job, root: Path, name: str) -> nn.Module:
    """Load the trained model of a row, on the device of the job."""
    folder = job.folder(root, study.TRAINED_AS.get(name, name))
    if name in (study.NO_EMA, study.ARREST):
        model = load_classifier(folder / study.LIVE)
    elif name in study.BEHIND:
        model = load_defence(folder, load_classifier(folder / "classifier"))
    else:
        model = load_classifier(folder)
    return model.to(job.settings["device"])
