"""ARREST's part: the standard classifier finetuned adversarially, with and without ARREST's two parts, and a CARSO on
the result."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from ..attacks import PGD
from ..evaluation import AttackSpec, Report, Tradeoff
from ..methods.arrest import ArrestConfig, ArrestTask
from ..methods.carso import Carso, CarsoConfig, CarsoTask, WithAggregation
from ..methods.loading import load_defence
from ..training import TrainingAttack, load_classifier, save_classifier
from .sentences import against, percent
from .setting import BASE_TRAINING, EPS, LAYERS, SIZES, ce_then_dlr, digits
from .workspace import AUTOATTACK, BASE, CLASSIFIERS, STANDARD, Budget, Workspace, autoattack

FINETUNED, ARREST, CARSO = "AFT", "ARREST", "CARSO on ARREST"
MODELS = (FINETUNED, ARREST, CARSO)
COMPARED = (STANDARD, BASE, *MODELS)
_FOLDERS = {**CLASSIFIERS, FINETUNED: "arrest_aft", ARREST: "arrest", CARSO: "arrest_carso"}
# the base's attack and optimizer; lambda for digits, since the default of 50 is a CIFAR port's
CONFIG = ArrestConfig(
    attack=TrainingAttack(
        eps=EPS,
        steps=BASE_TRAINING.attack.steps,
        alpha=BASE_TRAINING.attack.step_size(EPS),
        eps_warmup=BASE_TRAINING.attack.eps_warmup,
    ),
    distillation_weight=5.0,
    optimizer="adamw",
    schedule="one_cycle",
    learning_rate=BASE_TRAINING.learning_rate,
    weight_decay=BASE_TRAINING.weight_decay,
)


def train(workspace: Workspace, name: str) -> None:
    """Train one of `MODELS`; the last on the one before."""
    folder = _FOLDERS[name]
    torch.manual_seed(workspace.seed)
    if name == CARSO:
        base = model(workspace, ARREST)
        defence = Carso(base, LAYERS, digits().image_shape, **SIZES)
        through = CarsoConfig(attack_target="pipeline", attack=TrainingAttack(eps=EPS, steps=7), learning_rate=4e-3)
        workspace.train(CarsoTask(defence, through), workspace.budget.arrest_carso_epochs, 128, folder)
        defence.save(workspace.out / folder)
        save_classifier(base, workspace.out / folder / "classifier")
        return
    config = CONFIG if name == ARREST else replace(CONFIG, distillation_weight=0.0, replay=False)
    task = ArrestTask(workspace.classifier(STANDARD), config, digits().image_shape)
    workspace.train(task, workspace.budget.arrest_epochs, 64, folder)
    save_classifier(task.result, workspace.out / folder)


def model(workspace: Workspace, name: str) -> nn.Module:
    """One of the trained `COMPARED`."""
    folder = workspace.out / _FOLDERS[name]
    return load_defence(folder) if name == CARSO else load_classifier(folder)


def attack(workspace: Workspace, name: str) -> Report:
    """One of `COMPARED`, all under the same attacks; rows that CARSO's part has of the first two are reused."""
    budget = workspace.budget
    auto = autoattack(budget)
    defence = model(workspace, name)
    attacks = ce_then_dlr()
    if name == CARSO:
        # at z = 0, and as it is: there first what is cheap, as in CARSO's part
        zero = WithAggregation(defence, deterministic=True)
        attacks = [
            *ce_then_dlr("deterministic"),
            AttackSpec(PGD(), target=zero, label=f"PGD-{budget.steps} ce made at z = 0"),
            # one draw averages K samples already; three draws take a minute longer
            AttackSpec(PGD(eot_iter=1), survivors_only=True),
        ]
    return workspace.attacked(defence, name, _FOLDERS[name], attacks if name == STANDARD else [*attacks, auto])


def conclusion(reports: dict[str, Report], budget: Budget) -> list[str]:
    """What the numbers say, in sentences made from them; of the base and the standard classifier too."""

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
        gains = [against(reports[name], reports[other], row, f"{other}") for row in ("clean", AUTOATTACK)]
        return f"against {other}: clean {gains[0]}; AutoAttack {gains[1]}"

    return [
        f"Adversarial training from scratch {all_of(BASE)}.",
        f"The standard classifier finetuned adversarially {all_of(FINETUNED)} ({change(FINETUNED, BASE)}).",
        f"ARREST {all_of(ARREST)} ({change(ARREST, BASE)}).",
        f"CARSO through the pipeline, on ARREST, {all_of(CARSO)} ({change(CARSO, ARREST)}).",
        f"Finetuning takes {budget.arrest_epochs} epochs, training from scratch {budget.base_epochs}, on the same "
        "attack.",
    ]
