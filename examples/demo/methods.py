"""The models of the demonstration, and their trainings and attacks.

AToP has three purifiers: pre-trained only, trained with the paper's objective, and fine-tuned through the whole
pipeline. The standard classifier is finetuned twice: by ARREST, and without ARREST's two parts, distillation and noisy
replay (AFT). Another CARSO is trained with ARREST's result as its classifier.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from purify_fast.attacks import PGD, OriginalAutoAttack
from purify_fast.defences import Defence, WithoutNoise
from purify_fast.evaluation import AttackSpec, Report
from purify_fast.methods.arrest import ArrestConfig, ArrestTask
from purify_fast.methods.atop import Atop, AtopConfig, AtopTask
from purify_fast.methods.atop.generators import SmallGenerator
from purify_fast.methods.carso import Carso, CarsoConfig, CarsoTask, WithAggregation
from purify_fast.methods.loading import load_defence
from purify_fast.models.classifiers import SmallCNN
from purify_fast.training import (
    ClassifierConfig,
    ClassifierTask,
    FitConfig,
    Task,
    TrainingAttack,
    fit,
    is_classifier,
    load_classifier,
    save_classifier,
)

from .setting import BASE_TRAINING, EPS, LAYERS, SIZES, Workspace, attacked, ce_then_dlr, digits

STANDARD, BASE = "standard", "base (PGD-AT)"
CARSO_OBJECTIVE, CARSO_PIPELINE = "CARSO, paper's objective", "CARSO pipeline"
BEFORE_ATOP, ATOP_OBJECTIVE, ATOP_PIPELINE = "purifier before AToP", "AToP, paper's objective", "AToP pipeline"
FINETUNED, ARREST, CARSO_ON_ARREST = "AFT", "ARREST", "CARSO on ARREST"
FOLDERS = {
    STANDARD: "standard",
    BASE: "base",
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
#: For each method: its models, which its report shows in pictures, and the other models of its tables.
METHODS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "CARSO": (CARSO_MODELS, ()),
    "AToP": (ATOP_MODELS, ()),
    "ARREST": (ARREST_MODELS, (STANDARD, BASE)),
}
#: Names of attacks in the reports. The sentences about the results find their numbers by these names.
AUTOATTACK = "AutoAttack standard (CARSO: z = 0)"
PEEL = "through PeeL, as its authors attack it"
ALONE, ADAPTIVE = "PGD ce on the classifier alone (not adaptive)", "PGD ce + dlr, through everything"

THROUGH_CARSO = CarsoConfig(attack_target="pipeline", attack=TrainingAttack(eps=EPS, steps=7), learning_rate=4e-3)
# The discriminator is narrower than the official discriminator, which is for images of 256 x 256.
PRETRAINING = AtopConfig.pretraining(learning_rate=2e-3, schedule="one_cycle", discriminator_width=16)
# This config trains with the paper's objective, and with clean images as target. The weight of the classifier's loss,
# the learning rate and the schedule were chosen on digits.
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
# The attack and the optimizer are those of the base. The default weight of the distillation (lambda), 50, comes from a
# re-implementation for CIFAR, so another weight was chosen for digits.
ARREST_CONFIG = ArrestConfig(
    attack=replace(BASE_TRAINING.attack, relative_alpha=2.5, alpha=BASE_TRAINING.attack.step_size(EPS)),
    distillation_weight=5.0,
    optimizer="adamw",
    schedule="one_cycle",
    learning_rate=BASE_TRAINING.learning_rate,
    weight_decay=BASE_TRAINING.weight_decay,
)


def train(workspace: Workspace, name: str) -> None:
    """Train a model of `FOLDERS`, or continue its training. The model that it starts from must be trained already."""
    task, epochs, batch_size = _task(workspace, name)
    folder, images, loop = workspace.out / FOLDERS[name], digits(), FitConfig(epochs, batch_size, workspace.seed)
    fit(task, images.x_train, images.y_train, loop, folder, title=FOLDERS[name], progress=workspace.progress)
    save(task.result, folder)


def save(trained: Any, folder: Path) -> None:
    """Save a classifier, or a defence with its classifier, in the form that `purify-fast evaluate` reads."""
    if isinstance(trained, Defence):
        trained.save(folder)
        save_classifier(trained.classifier, folder / "classifier")
    else:
        save_classifier(trained, folder)


def _task(workspace: Workspace, name: str) -> tuple[Task, int, int]:
    """The task that trains a model, the number of epochs, and the batch size."""
    budget, shape = workspace.budget, digits().image_shape
    torch.manual_seed(workspace.seed)
    if name == STANDARD:
        return ClassifierTask(SmallCNN(), ClassifierConfig()), budget.standard_epochs, 64
    if name == BASE:
        return ClassifierTask(SmallCNN(), BASE_TRAINING), budget.base_epochs, 64
    if name in (FINETUNED, ARREST):
        arrest = ARREST_CONFIG if name == ARREST else replace(ARREST_CONFIG, distillation_weight=0.0, replay=False)
        return ArrestTask(model(workspace, STANDARD), arrest, shape), budget.arrest_epochs, 64
    if name == CARSO_ON_ARREST:
        defence = Carso(model(workspace, ARREST), LAYERS, shape, **SIZES)
        return CarsoTask(defence, THROUGH_CARSO), budget.arrest_carso_epochs, 128
    classifier = model(workspace, STANDARD if name in ATOP_MODELS else BASE)
    # Loading a model draws random numbers for initial weights, so set the seed again.
    torch.manual_seed(workspace.seed)
    if name == BEFORE_ATOP:
        return AtopTask(Atop(classifier, SmallGenerator(1), shape), PRETRAINING), budget.generator_epochs, 64
    if name in ATOP_MODELS:
        atop = model(workspace, BEFORE_ATOP)
        config, epochs = THROUGH_ATOP, budget.atop_pipeline_epochs
        if name == ATOP_OBJECTIVE:
            config, epochs = replace(ATOP_CONFIG, cls_delay=budget.atop_cls_delay), budget.atop_objective_epochs
        return AtopTask(atop, config), epochs, 64
    defence = Carso(classifier, LAYERS, shape, **SIZES)
    if name == CARSO_OBJECTIVE:
        return CarsoTask(defence, CarsoConfig(attack=TrainingAttack(eps=EPS, steps=20))), budget.objective_epochs, 64
    defence.load_state_dict(model(workspace, CARSO_OBJECTIVE).state_dict())
    return CarsoTask(defence, THROUGH_CARSO), budget.pipeline_epochs, 128


def model(workspace: Workspace, name: str) -> Any:
    """Load a trained model of `FOLDERS`."""
    return saved(workspace.out / FOLDERS[name])


def saved(folder: Path) -> Any:
    """Load a model that `save` has written."""
    return load_classifier(folder) if is_classifier(folder) else load_defence(folder)


def attack(workspace: Workspace, name: str, constant_step: bool = True) -> list[Report]:
    """Attack a model of `FOLDERS`, and a CARSO also at z = 0. Attacks of an earlier run are not run again.

    AToP is attacked as in the ablations of its paper, and also with attacks on the whole defence. For the base,
    ``constant_step`` adds attacks with a constant step size.
    """
    budget, target, steps = workspace.budget, model(workspace, name), workspace.budget.steps
    ce, dlr = ce_then_dlr()
    standard = OriginalAutoAttack(steps=budget.autoattack_steps, n_queries=budget.autoattack_queries)
    auto = AttackSpec(standard, max_images=budget.autoattack_images, label=AUTOATTACK)
    out = workspace.out / FOLDERS[name]
    if name in ATOP_MODELS:
        n, steps = budget.atop_images, budget.atop_steps
        alone = AttackSpec(PGD(), through=target.classifier, label=ALONE, max_images=n)
        attacks = [alone, replace(ce, max_images=n), replace(dlr, label=ADAPTIVE, max_images=n)]
    elif isinstance(target, Carso):
        attacks = [
            # This attack is fast. Images for which it succeeds need no attack through K samples.
            AttackSpec(PGD(), through=WithoutNoise(target), label=f"PGD-{budget.steps} ce made at z = 0"),
            # For CARSO on ARREST, three draws would take a minute longer. A single draw already averages K samples.
            AttackSpec(PGD(eot_iter=1) if name == CARSO_ON_ARREST else PGD(), survivors_only=True),
            *([dlr] if name == CARSO_PIPELINE else []),
        ]
        if name != CARSO_ON_ARREST:
            attacks.append(AttackSpec(PGD(), through=model(workspace, BASE), label="transfer from the base"))
        if name == CARSO_OBJECTIVE:
            peel, head = PGD(steps=budget.peel_steps), WithAggregation(target, "peel_reference")
            attacks.append(AttackSpec(peel, through=head, max_images=budget.peel_images, label=PEEL))
    else:
        attacks = [ce, dlr]
        if name == BASE and constant_step:
            for pgd in (PGD(alpha=EPS / 10), PGD(loss="dlr", alpha=EPS / 10)):
                attacks.append(AttackSpec(pgd, label=f"PGD-{budget.steps} {pgd.loss}, constant step"))
        if name != STANDARD:
            attacks.append(auto)
    how: dict[str, Any] = {"progress": workspace.progress, "out": out}
    how |= {"steps": steps, "eot_iter": budget.eot, "seed": workspace.seed}
    report = attacked(target, budget.images, attacks, name=name, **how)
    if isinstance(target, Carso):
        # AutoAttack's standard version is only for deterministic models, such as CARSO without its randomness.
        return [report, attacked(WithoutNoise(target), budget.images, [ce, dlr, auto], name=f"{name}, z = 0", **how)]
    return [report]
