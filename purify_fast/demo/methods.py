"""The models of the demonstration: how each is trained and attacked, and the sentences that follow from its numbers.

CARSO stands on the adversarially trained base. AToP stands on the standard classifier: a purifier that was only
pre-trained, one with the paper's objective, and one fine-tuned through the whole pipeline. ARREST finetunes the
standard classifier, with its two parts and without them, and has a CARSO on the result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from .._tensors import weights_fingerprint
from ..attacks import PGD
from ..attacks.losses import Loss
from ..evaluation import AttackSpec, Report, Tradeoff
from ..methods.arrest import ArrestConfig, ArrestTask
from ..methods.atop import Atop, AtopConfig, AtopTask
from ..methods.atop.generators import SmallGenerator
from ..methods.carso import Carso, CarsoConfig, CarsoTask, WithAggregation
from ..methods.loading import load_defence
from ..training import Task, TrainingAttack, is_classifier, load_classifier, save_classifier
from .setting import BASE_TRAINING, EPS, LAYERS, SIZES, ce_then_dlr, digits
from .workspace import AUTOATTACK, BASE, CLASSIFIERS, STANDARD, Budget, Workspace, autoattack

CARSO_OBJECTIVE, CARSO_PIPELINE = "CARSO, paper's objective", "CARSO pipeline"
BEFORE_ATOP, ATOP_OBJECTIVE, ATOP_PIPELINE = "purifier before AToP", "AToP, paper's objective", "AToP pipeline"
FINETUNED, ARREST, CARSO_ON_ARREST = "AFT", "ARREST", "CARSO on ARREST"
FOLDERS = {
    **CLASSIFIERS,
    CARSO_OBJECTIVE: "carso_objective",
    CARSO_PIPELINE: "carso_pipeline",
    BEFORE_ATOP: "atop_before",
    ATOP_OBJECTIVE: "atop_objective",
    ATOP_PIPELINE: "atop_pipeline",
    FINETUNED: "arrest_aft",
    ARREST: "arrest",
    CARSO_ON_ARREST: "arrest_carso",
}
CARSO_MODELS = (STANDARD, BASE, CARSO_OBJECTIVE, CARSO_PIPELINE)
ATOP_MODELS = (BEFORE_ATOP, ATOP_OBJECTIVE, ATOP_PIPELINE)
ARREST_MODELS = (FINETUNED, ARREST, CARSO_ON_ARREST)
#: The rows of attacks that the sentences name.
PEEL = "through PeeL, as its authors attack it"
ALONE, ADAPTIVE = "PGD ce on the classifier alone (not adaptive)", "PGD ce + dlr, through everything"
_LOSSES: tuple[Loss, ...] = ("ce", "dlr")

THROUGH_CARSO = CarsoConfig(attack_target="pipeline", attack=TrainingAttack(eps=EPS, steps=7), learning_rate=4e-3)
# the paper's objective, with a clean target; weight, rate and schedule were chosen here
ATOP_CONFIG = AtopConfig(
    attack=TrainingAttack(eps=EPS, steps=10),
    reconstruction_target="clean",
    cls_weight=0.1,
    cls_delay_unit="epochs",
    learning_rate=3e-3,
    schedule="one_cycle",
)
THROUGH_ATOP = replace(
    ATOP_CONFIG,
    attack_method="pgd",
    attack_target="pipeline",
    attack=TrainingAttack(eps=EPS, steps=7),
    cls_weight=1.0,
    reconstruction_weight=0.1,
    reconstruction_target="adversarial",
    cls_delay=0,
)
# the base's attack and optimizer; lambda for digits, since the default of 50 is a CIFAR port's
ARREST_CONFIG = ArrestConfig(
    attack=replace(BASE_TRAINING.attack, relative_alpha=2.5, alpha=BASE_TRAINING.attack.step_size(EPS)),
    distillation_weight=5.0,
    optimizer="adamw",
    schedule="one_cycle",
    learning_rate=BASE_TRAINING.learning_rate,
    weight_decay=BASE_TRAINING.weight_decay,
)


def train(workspace: Workspace, name: str) -> None:
    """Train one of `FOLDERS` other than the two classifiers; what it starts from is trained already."""
    task, epochs, batch_size = _task(workspace, name)
    workspace.train(task, epochs, batch_size, FOLDERS[name])
    folder, trained = workspace.out / FOLDERS[name], task.result
    if isinstance(trained, (Carso, Atop)):
        trained.save(folder)
        save_classifier(trained.classifier, folder / "classifier")
    else:
        save_classifier(trained, folder)


def _task(workspace: Workspace, name: str) -> tuple[Task, int, int]:
    """How a model is trained, for how many epochs, and in batches of how many images."""
    budget, shape = workspace.budget, digits().image_shape
    if name in (FINETUNED, ARREST):
        torch.manual_seed(workspace.seed)
        arrest = ARREST_CONFIG if name == ARREST else replace(ARREST_CONFIG, distillation_weight=0.0, replay=False)
        return ArrestTask(workspace.classifier(STANDARD), arrest, shape), budget.arrest_epochs, 64
    if name == CARSO_ON_ARREST:
        torch.manual_seed(workspace.seed)
        defence = Carso(model(workspace, ARREST), LAYERS, shape, **SIZES)
        return CarsoTask(defence, THROUGH_CARSO), budget.arrest_carso_epochs, 128
    classifier = workspace.classifier(STANDARD if name in ATOP_MODELS else BASE)
    torch.manual_seed(workspace.seed)
    if name == BEFORE_ATOP:
        atop = Atop(classifier, SmallGenerator(1), shape)
        # narrower than the official discriminator, which is for images of 256 pixels
        config = AtopConfig.pretraining(learning_rate=2e-3, schedule="one_cycle", discriminator_width=16)
        return AtopTask(atop, config), budget.generator_epochs, 64
    if name in ATOP_MODELS:
        atop = model(workspace, BEFORE_ATOP)
        published = replace(ATOP_CONFIG, cls_delay=budget.atop_cls_delay)
        epochs = budget.atop_objective_epochs if name == ATOP_OBJECTIVE else budget.atop_pipeline_epochs
        config = published if name == ATOP_OBJECTIVE else THROUGH_ATOP
        return AtopTask(atop, config, weights_fingerprint(atop.purifier)), epochs, 64
    defence = Carso(classifier, LAYERS, shape, **SIZES)
    if name == CARSO_OBJECTIVE:
        return CarsoTask(defence, CarsoConfig(attack=TrainingAttack(eps=EPS, steps=20))), budget.objective_epochs, 64
    start = model(workspace, CARSO_OBJECTIVE)
    defence.load_state_dict(start.state_dict())
    return CarsoTask(defence, THROUGH_CARSO, weights_fingerprint(start)), budget.pipeline_epochs, 128


def model(workspace: Workspace, name: str) -> Any:
    """One of the trained `FOLDERS`."""
    folder = workspace.out / FOLDERS[name]
    return load_classifier(folder) if is_classifier(folder) else load_defence(folder)


def attack(workspace: Workspace, name: str, constant_step: bool = True) -> Report:
    """One of `FOLDERS` under its attacks; finished rows are reused.

    AToP is attacked as in its paper's ablations, and by attacks that see the whole defence. ``constant_step`` adds to
    the base attacks whose step does not shrink.
    """
    budget, attacked = workspace.budget, model(workspace, name)
    (ce, dlr), auto = ce_then_dlr(), autoattack(budget)
    if name in ATOP_MODELS:
        n = budget.atop_images
        alone = AttackSpec(PGD(), target="classifier", label=ALONE, max_images=n)
        attacks = [alone, replace(ce, max_images=n), replace(dlr, label=ADAPTIVE, max_images=n)]
        return workspace.attacked(attacked, name, FOLDERS[name], attacks, steps=budget.atop_steps)
    if isinstance(attacked, Carso):
        attacks = [
            *ce_then_dlr("deterministic"),
            # cheap, and what falls to it needs no attack through K samples
            AttackSpec(
                PGD(),
                target=WithAggregation(attacked, deterministic=True),
                label=f"PGD-{budget.steps} ce made at z = 0",
            ),
            # on ARREST three draws take a minute longer than one, which averages K samples already
            AttackSpec(PGD(eot_iter=1) if name == CARSO_ON_ARREST else PGD(), survivors_only=True),
            *([dlr] if name == CARSO_PIPELINE else []),
            auto,
        ]
        if name != CARSO_ON_ARREST:
            attacks.append(AttackSpec(PGD(), target=workspace.classifier(BASE), label="transfer from the base"))
        if name == CARSO_OBJECTIVE:
            peel = PGD(steps=budget.peel_steps)
            attacks.append(AttackSpec(peel, aggregation="peel_reference", max_images=budget.peel_images, label=PEEL))
    else:
        attacks = [ce, dlr]
        if name == BASE and constant_step:
            steady = {loss: f"PGD-{budget.steps} {loss}, constant step" for loss in _LOSSES}
            attacks += [AttackSpec(PGD(loss=loss, alpha=EPS / 10), label=label) for loss, label in steady.items()]
        if name != STANDARD:
            attacks.append(auto)
    return workspace.attacked(attacked, name, FOLDERS[name], attacks)


def percent(report: Report, row: str) -> str:
    """A row's accuracy, as the sentences say it."""
    return f"{100 * report.row(row).accuracy:.1f} ± {100 * report.row(row).standard_error:.1f} %"


def against(report: Report, other: Report, row: str, what: str) -> str:
    """The paired difference between two models under one attack, and what it is worth."""
    paired = report.paired(other, row)
    if abs(paired.difference) <= 2 * paired.standard_error:
        return f"{paired}, no significant difference from {what} (within two standard errors)"
    return f"{paired}, {'better' if paired.difference > 0 else 'worse'} than {what} (by more than two standard errors)"


def conclude_carso(reports: dict[str, Report], budget: Budget) -> list[str]:
    """What the numbers of CARSO say."""
    base, objective, pipeline = reports[BASE], reports[CARSO_OBJECTIVE], reports[CARSO_PIPELINE]
    peel = objective.row(PEEL)
    trust = "believable" if peel.reliable else "unreliable: the output has no usable gradients"
    return [
        f"The base classifies {percent(base, 'clean')} of the clean images and withstands {percent(base, 'worst')} "
        f"under PGD, {percent(base, AUTOATTACK)} under AutoAttack.",
        f"CARSO with the paper's objective seems to withstand {percent(objective, PEEL)} when it is attacked through "
        f"its own PeeL output ({peel.n} images); that number is {trust}. Through exact gradients it withstands "
        f"{percent(objective, 'worst')} under PGD, {percent(objective, AUTOATTACK)} under AutoAttack.",
        f"CARSO fine-tuned through the pipeline classifies {percent(pipeline, 'clean')} of the clean images. It "
        f"withstands {percent(pipeline, 'worst')} under PGD ({against(pipeline, base, 'worst', 'its base')}) and "
        f"{percent(pipeline, AUTOATTACK)} under AutoAttack ({against(pipeline, base, AUTOATTACK, 'its base')}).",
        f"AutoAttack has {budget.autoattack_queries:,} queries for Square, not 5,000.",
    ]


def conclude_atop(reports: dict[str, Report], budget: Budget) -> list[str]:
    """What the numbers of AToP say."""

    def all_of(name: str) -> str:
        report = reports[name]
        return (
            f"classifies {percent(report, 'clean')} of the clean images and withstands {percent(report, ALONE)} when "
            f"only its classifier is attacked, {percent(report, ADAPTIVE)} when all of it is"
        )

    def change(name: str) -> str:
        gains = [against(reports[name], reports[BEFORE_ATOP], row, "before") for row in (ALONE, ADAPTIVE)]
        return f"against before: {gains[0]}, and {gains[1]}"

    return [
        f"Before AToP, the purifier {all_of(BEFORE_ATOP)}.",
        f"AToP with the paper's objective {all_of(ATOP_OBJECTIVE)} ({change(ATOP_OBJECTIVE)}).",
        f"AToP through the pipeline {all_of(ATOP_PIPELINE)} ({change(ATOP_PIPELINE)}).",
        f"The attack is PGD-{budget.atop_steps}, with EOT {budget.eot} on all of it; {budget.atop_images} images.",
    ]


def conclude_arrest(reports: dict[str, Report], budget: Budget) -> list[str]:
    """What the numbers of ARREST say; of the base and the standard classifier too."""

    def all_of(name: str) -> str:
        report = reports[name]
        clean, auto = report.row("clean"), report.row(AUTOATTACK)
        both = Tradeoff(100 * float(clean.robust[: auto.n].mean()), 100 * auto.accuracy)
        return (
            f"classifies {percent(report, 'clean')} of the clean images and withstands {percent(report, 'worst')} "
            f"under PGD, {percent(report, AUTOATTACK)} under AutoAttack (with clean accuracy on its {auto.n} images: "
            f"sum {both.sum:.1f}, NRR {both.nrr:.1f})"
        )

    def change(name: str, other: str) -> str:
        gains = [against(reports[name], reports[other], row, other) for row in ("clean", AUTOATTACK)]
        return f"against {other}: clean {gains[0]}; AutoAttack {gains[1]}"

    return [
        f"Adversarial training from scratch {all_of(BASE)}.",
        f"The standard classifier finetuned adversarially {all_of(FINETUNED)} ({change(FINETUNED, BASE)}).",
        f"ARREST {all_of(ARREST)} ({change(ARREST, BASE)}).",
        f"CARSO through the pipeline, on ARREST, {all_of(CARSO_ON_ARREST)} ({change(CARSO_ON_ARREST, ARREST)}).",
        f"Finetuning takes {budget.arrest_epochs} epochs, training from scratch {budget.base_epochs}, on the same "
        "attack.",
    ]


@dataclass(frozen=True)
class Method:
    """What the demonstration reports of a method.

    Args:
        folder: the report's.
        models: the method's models, whose images are shown.
        conclude: what their reports say, in sentences.
        beside: models of other methods in the same tables.
    """

    folder: str
    models: tuple[str, ...]
    conclude: Callable[[dict[str, Report], Budget], list[str]]
    beside: tuple[str, ...] = ()


METHODS = {
    "CARSO": Method("report_carso", CARSO_MODELS, conclude_carso),
    "AToP": Method("report_atop", ATOP_MODELS, conclude_atop),
    "ARREST": Method("report_arrest", ARREST_MODELS, conclude_arrest, beside=(STANDARD, BASE)),
}
