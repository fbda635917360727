"""CARSO's part: on an adversarially trained base, as published, and fine-tuned through the whole pipeline (ours)."""

from __future__ import annotations

import torch
from torch import nn

from .._fingerprint import weights_fingerprint
from ..attacks import PGD
from ..attacks.losses import Loss
from ..evaluation import AttackSpec, Report
from ..methods.carso import Carso, CarsoConfig, CarsoTask, WithAggregation, load_carso
from ..training import TrainingAttack, save_classifier
from .common import AUTOATTACK, BASE, CLASSIFIERS, EPS, STANDARD, Budget, Place, against, autoattack, digits, percent

LAYERS = ("conv2", "conv4", "hidden")
PUBLISHED, PIPELINE = "CARSO published", "CARSO pipeline"
MODELS = (STANDARD, BASE, PUBLISHED, PIPELINE)
_FOLDERS = {**CLASSIFIERS, PUBLISHED: "carso_published", PIPELINE: "carso_pipeline"}
LOSSES: tuple[Loss, ...] = ("ce", "dlr")
PEEL = "through PeeL, as published"
TRANSFER = "transfer from the base"


def train(place: Place, name: str) -> None:
    """Train `PUBLISHED`, or `PIPELINE` from it."""
    base, budget = place.classifier(BASE), place.budget
    torch.manual_seed(place.seed)
    defence = Carso(base, LAYERS, digits().image_shape, cond_dim=64, latent_dim=8, samples=8, decoder_width=8)
    if name == PUBLISHED:
        place.train(
            CarsoTask(defence, CarsoConfig(attack=TrainingAttack(eps=EPS, steps=20))),
            budget.published_epochs,
            64,
            _FOLDERS[name],
        )
    else:
        published = load_carso(place.out / _FOLDERS[PUBLISHED], base)
        defence.load_state_dict(published.state_dict())
        fine = CarsoConfig(attack_target="pipeline", attack=TrainingAttack(eps=EPS, steps=7), learning_rate=4e-3)
        task = CarsoTask(defence, fine, weights_fingerprint(published))
        place.train(task, budget.pipeline_epochs, 128, _FOLDERS[name])
    defence.save(place.out / _FOLDERS[name])
    save_classifier(base, place.out / _FOLDERS[name] / "classifier")


def model(place: Place, name: str) -> nn.Module:
    """One of the trained `MODELS`."""
    if name in CLASSIFIERS:
        return place.classifier(name)
    return load_carso(place.out / _FOLDERS[name], place.classifier(BASE))


def attack(place: Place, name: str) -> Report:
    """One of `MODELS` under its attacks."""
    budget, defence = place.budget, model(place, name)
    ce, dlr = AttackSpec(PGD()), AttackSpec(PGD(loss="dlr"), survivors_only=True)
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
            AttackSpec(PGD(), variant="deterministic"),
            AttackSpec(PGD(loss="dlr"), variant="deterministic", survivors_only=True),
            # cheap, and what falls to it needs no attack through K samples
            AttackSpec(PGD(), target=zero, label=f"PGD-{budget.steps} ce made at z = 0"),
            AttackSpec(PGD(), survivors_only=True),
            auto,
            AttackSpec(PGD(), target=place.classifier(BASE), label=TRANSFER),
        ]
        if name == PUBLISHED:
            steps, limit = budget.peel_steps, budget.peel_images
            through = AttackSpec(PGD(steps=steps), aggregation="peel_reference", max_images=limit, label=PEEL)
            attacks.append(through)
        else:
            attacks.insert(4, dlr)
    return place.attacked(defence, name, _FOLDERS[name], attacks)


def conclusion(reports: dict[str, Report], budget: Budget) -> list[str]:
    """What the numbers say, in sentences made from them."""
    base, published, pipeline = reports[BASE], reports[PUBLISHED], reports[PIPELINE]
    peel = published.row(PEEL)
    trust = "believable" if peel.reliable else "unreliable: the output has no usable gradients"
    return [
        f"The base classifies {percent(base, 'clean')} of the clean images and withstands {percent(base, 'worst')} "
        f"under PGD, {percent(base, AUTOATTACK)} under AutoAttack.",
        f"CARSO as published seems to withstand {percent(published, PEEL)} when it is attacked through its own PeeL "
        f"output ({peel.n} images); that number is {trust}. Through exact gradients it withstands "
        f"{percent(published, 'worst')} under PGD, {percent(published, AUTOATTACK)} under AutoAttack.",
        f"CARSO fine-tuned through the pipeline classifies {percent(pipeline, 'clean')} of the clean images. It "
        f"withstands {percent(pipeline, 'worst')} under PGD ({against(pipeline, base, 'worst', 'its base')}) and "
        f"{percent(pipeline, AUTOATTACK)} under AutoAttack ({against(pipeline, base, AUTOATTACK, 'its base')}).",
        f"AutoAttack has {budget.autoattack_queries:,} queries for Square, not 5,000.",
    ]
