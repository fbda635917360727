"""ARREST's part: the standard classifier finetuned adversarially, with and without ARREST's two parts, and a CARSO on
the result."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from ..arrest import ArrestConfig, ArrestTask
from ..carso import Carso, CarsoConfig, CarsoTask, Head
from ..carso import load as load_carso
from ..evaluation import Attack, Report, Tradeoff
from ..training import load_classifier, save_classifier
from .carso import LAYERS
from .common import BASE, EPS, STANDARD, Budget, Place, against, digits, percent

FINETUNED, ARREST, CARSO = "AFT", "ARREST", "CARSO on ARREST"
MODELS = (FINETUNED, ARREST, CARSO)
_FOLDERS = {FINETUNED: "arrest_aft", ARREST: "arrest", CARSO: "arrest_carso"}
AUTOATTACK = "AutoAttack standard (CARSO: z = 0)"  # a row of CARSO's part, on the base
CONFIG = ArrestConfig(
    eps=EPS, steps=7, alpha=None, warm_up=0.2, weight=5.0, optimizer="adamw", schedule="one_cycle", learning_rate=1e-2,
    weight_decay=2e-2,
)  # fmt: skip  # for digits; the paper's lambda of 50 is for CIFAR


def train(place: Place, name: str) -> None:
    """Train one of `MODELS`; the last on the one before."""
    folder = _FOLDERS[name]
    torch.manual_seed(place.seed)
    if name == CARSO:
        base = model(place, ARREST)
        defence = Carso(base, LAYERS, digits().image_shape, cond_dim=64, latent_dim=8, samples=8, decoder_width=8)
        through = CarsoConfig(attack_target="pipeline", eps=EPS, steps=7, learning_rate=4e-3)
        place.train(CarsoTask(defence, through), place.budget.arrest_carso_epochs, 128, folder)
        defence.save(place.out / folder)
        save_classifier(base, place.out / folder / "classifier")
        return
    config = CONFIG if name == ARREST else replace(CONFIG, weight=0.0, replay=False)
    task = ArrestTask(place.classifier(STANDARD), config, digits().image_shape)
    place.train(task, place.budget.arrest_epochs, 64, folder)
    save_classifier(task.result, place.out / folder)


def model(place: Place, name: str) -> nn.Module:
    """One of the trained `MODELS`."""
    folder = place.out / _FOLDERS[name]
    return load_carso(folder) if name == CARSO else load_classifier(folder)


def attack(place: Place, name: str) -> Report:
    """One of `MODELS`, as the base is in CARSO's part; the CARSO at z = 0."""
    budget = place.budget
    auto = Attack(
        "autoattack",
        variant="deterministic",
        steps=budget.autoattack_steps,
        queries=budget.autoattack_queries,
        limit=budget.autoattack_images,
        label=AUTOATTACK,
    )
    zero = "deterministic" if name == CARSO else "random"  # through K samples it would take longer than all the rest
    pgd = [Attack(loss=loss, variant=zero, survivors=loss != "ce") for loss in ("ce", "dlr")]
    defence = model(place, name)
    if name == CARSO:  # and what that attack leaves of it as it is
        zero_head = Head(defence, deterministic=True)
        pgd.append(Attack(loss="ce", target=zero_head, label=f"PGD-{budget.steps} ce made at z = 0"))
    return place.attacked(defence, name, _FOLDERS[name], [*pgd, auto])


def conclusion(reports: dict[str, Report], budget: Budget) -> list[str]:
    """What the numbers say, in sentences made from them; of the base and the standard classifier too."""

    def all_of(name: str) -> str:
        report = reports[name]
        both = Tradeoff(*(100 * report.row(row).accuracy for row in ("clean", AUTOATTACK)))
        return (
            f"classifies {percent(report, 'clean')} of the clean images and withstands {percent(report, 'worst')} "
            f"under PGD, {percent(report, AUTOATTACK)} under AutoAttack (sum {both.sum:.1f}, NRR {both.nrr:.1f})"
        )

    def change(name: str, other: str) -> str:
        gains = [against(reports[name], reports[other], row, f"{other}") for row in ("clean", AUTOATTACK)]
        return f"against {other}: clean {gains[0]}; AutoAttack {gains[1]}"

    return [
        f"Adversarial training from scratch {all_of(BASE)}.",
        f"The standard classifier finetuned adversarially {all_of(FINETUNED)} ({change(FINETUNED, BASE)}).",
        f"ARREST {all_of(ARREST)} ({change(ARREST, BASE)}).",
        f"CARSO through the pipeline, on ARREST, {all_of(CARSO)} ({change(CARSO, ARREST)}).",
        f"Finetuning takes {budget.arrest_epochs} epochs, training from scratch {budget.base_epochs}.",
    ]
