"""CARSO's part: on an adversarially trained base, with the paper's objective, and fine-tuned through the pipeline."""

from __future__ import annotations

import torch
from torch import nn

from .._tensors import weights_fingerprint
from ..attacks import PGD
from ..attacks.losses import Loss
from ..evaluation import AttackSpec, Report
from ..methods.carso import Carso, CarsoConfig, CarsoTask, WithAggregation
from ..methods.loading import load_defence
from ..training import TrainingAttack, save_classifier
from .sentences import against, percent
from .setting import EPS, LAYERS, SIZES, ce_then_dlr, digits
from .workspace import AUTOATTACK, BASE, CLASSIFIERS, STANDARD, Budget, Workspace, autoattack

OBJECTIVE, PIPELINE = "CARSO, paper's objective", "CARSO pipeline"
MODELS = (STANDARD, BASE, OBJECTIVE, PIPELINE)
_FOLDERS = {**CLASSIFIERS, OBJECTIVE: "carso_objective", PIPELINE: "carso_pipeline"}
LOSSES: tuple[Loss, ...] = ("ce", "dlr")
PEEL = "through PeeL, as its authors attack it"
TRANSFER = "transfer from the base"


def train(workspace: Workspace, name: str) -> None:
    """Train `OBJECTIVE`, or `PIPELINE` from it."""
    base, budget = workspace.classifier(BASE), workspace.budget
    torch.manual_seed(workspace.seed)
    defence = Carso(base, LAYERS, digits().image_shape, **SIZES)
    if name == OBJECTIVE:
        workspace.train(
            CarsoTask(defence, CarsoConfig(attack=TrainingAttack(eps=EPS, steps=20))),
            budget.objective_epochs,
            64,
            _FOLDERS[name],
        )
    else:
        start = load_defence(workspace.out / _FOLDERS[OBJECTIVE], base)
        defence.load_state_dict(start.state_dict())
        fine = CarsoConfig(attack_target="pipeline", attack=TrainingAttack(eps=EPS, steps=7), learning_rate=4e-3)
        task = CarsoTask(defence, fine, weights_fingerprint(start))
        workspace.train(task, budget.pipeline_epochs, 128, _FOLDERS[name])
    defence.save(workspace.out / _FOLDERS[name])
    save_classifier(base, workspace.out / _FOLDERS[name] / "classifier")


def model(workspace: Workspace, name: str) -> nn.Module:
    """One of the trained `MODELS`."""
    if name in CLASSIFIERS:
        return workspace.classifier(name)
    return load_defence(workspace.out / _FOLDERS[name], workspace.classifier(BASE))


def attack(workspace: Workspace, name: str) -> Report:
    """One of `MODELS` under its attacks."""
    budget, defence = workspace.budget, model(workspace, name)
    ce, dlr = ce_then_dlr()
    constant = [
        AttackSpec(PGD(loss=loss, alpha=EPS / 10), label=f"PGD-{budget.steps} {loss}, constant step") for loss in LOSSES
    ]
    auto = autoattack(budget)
    if name == STANDARD:
        attacks = [ce, dlr]
    elif name == BASE:
        attacks = [ce, dlr, *constant, auto]
    else:
        zero = WithAggregation(defence, deterministic=True)
        attacks = [
            *ce_then_dlr("deterministic"),
            # cheap, and what falls to it needs no attack through K samples
            AttackSpec(PGD(), target=zero, label=f"PGD-{budget.steps} ce made at z = 0"),
            AttackSpec(PGD(), survivors_only=True),
            auto,
            AttackSpec(PGD(), target=workspace.classifier(BASE), label=TRANSFER),
        ]
        if name == OBJECTIVE:
            steps, limit = budget.peel_steps, budget.peel_images
            through = AttackSpec(PGD(steps=steps), aggregation="peel_reference", max_images=limit, label=PEEL)
            attacks.append(through)
        else:
            attacks.insert(4, dlr)
    return workspace.attacked(defence, name, _FOLDERS[name], attacks)


def conclusion(reports: dict[str, Report], budget: Budget) -> list[str]:
    """What the numbers say, in sentences made from them."""
    base, objective, pipeline = reports[BASE], reports[OBJECTIVE], reports[PIPELINE]
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
