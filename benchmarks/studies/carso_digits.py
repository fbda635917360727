"""What makes CARSO robust, on digits: one setting changed at a time, three seeds, against the controls that decide.

Every model is attacked in the same way: PGD-100 with cross-entropy and with DLR, then AutoAttack on what is left, on
the deterministic model (z = 0, no noise); the main ones also with their randomness, by PGD with expectation over draws.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path

import torch
from torch import nn

from purify_fast import data, load_defence
from purify_fast._tensors import weights_fingerprint
from purify_fast.attacks import PGD
from purify_fast.defences import NoisyEnsemble, WithAggregation
from purify_fast.demo.setting import LAYERS, SIZES
from purify_fast.evaluation import AttackSpec
from purify_fast.methods.carso import Carso, CarsoConfig, CarsoTask
from purify_fast.training import FitConfig, fit, load_classifier
from purify_fast.training.config import TrainingAttack

from . import Job
from .digits import (
    ALL_LAYERS,
    BASE_EPOCHS,
    EPS,
    EPS_L2,
    OBJECTIVE,
    Layout,
    attacked,
    count,
    effort,
    select,
    train_base,
    zero_attacks,
)

OBJECTIVE_EPOCHS, PIPELINE_EPOCHS = 15, 40
ABLATION_SEEDS = 1
WIDE = 21  # a classifier of 143 k parameters, as many as the base and its purifier have when they predict
_ATTACK = {field.name for field in fields(TrainingAttack)}
JOINT = {"joint": True, "learning_rate": 2e-3, "weight_decay": 2e-2}
DRAWS = "PGD ce, EOT 4, K draws"
LAYOUT = Layout(
    {"clean": "clean", "pgd": "PGD", "autoattack": "+ AutoAttack"},
    {"autoattack": "difference to base"},
    {"clean_draws": "K draws, clean", "pgd_draws": "K draws, attacked"},
    {"kl": ("KL, nats", 2), "parameters": ("parameters", 0)},
)


def notes(quick: bool) -> list[str]:
    """What the table's columns are."""
    n, steps, auto_steps, queries, draw_steps = effort(quick)
    warning = "QUICK RUN: hardly trained, hardly attacked; these numbers mean nothing. " if quick else ""
    return [
        f"{warning}Digits, the first {n} held-out images, L-inf eps {EPS} (rows L2: L2 eps {EPS_L2}); %, mean ± "
        "standard error over seeds. Learning rates and decays were chosen in runs on the same 1,797 images, the layers "
        "are ranked on the held-out ones: differences of a point or two are not to be trusted.",
        "",
        f"clean, PGD, + AutoAttack: the deterministic model (z = 0, no noise), attacked as such; PGD-{steps} with "
        f"cross-entropy, then with DLR on what is left; AutoAttack standard ({auto_steps} steps, {queries:,} queries "
        "for Square, not 5,000) on what is left of that. Every image counts in every column. There noisy copies are "
        f"the base itself, and K does not matter. K draws: the model as it is; attacked by what PGD-{steps} made at "
        f"z = 0, then by PGD-{draw_steps} with cross-entropy and EOT 4 on what is left; an image counts if three "
        "predictions are right. Difference: in + AutoAttack, to the base of the same seed.",
    ]


def _attacked(model: nn.Module, job: Job, eps: float, norm: str, *, draws: bool) -> dict:
    quick = job.settings["quick"]
    attacks, rows = zero_attacks(True, quick)
    if draws:
        zero = WithAggregation(model, deterministic=True)
        attacks += [
            AttackSpec(PGD(loss="ce"), target=zero, label="made at z = 0"),
            AttackSpec(PGD(loss="ce", steps=effort(quick)[-1], eot_iter=4), survivors_only=True, label=DRAWS),
        ]
        rows |= {"clean_draws": "clean", "pgd_draws": DRAWS}
    return attacked(model, job.seed, attacks, rows, quick, eps=eps, norm=norm)


def _changed(config: CarsoConfig, changes: dict) -> CarsoConfig:
    """The config with other settings, its own or its attack's."""
    inside = {name: value for name, value in changes.items() if name in _ATTACK}
    own = {name: value for name, value in changes.items() if name not in _ATTACK}
    return replace(config, attack=replace(config.attack, **inside), **own)


def train_objective(job: Job, folder: Path, root: Path) -> dict:
    """The purifier on a base, with the paper's objective: {base, layers, config}."""
    s = job.settings
    digits = data.load_dataset("digits")
    base = load_classifier(job.folder(root, s.get("base", "base")))
    torch.manual_seed(job.seed)
    defence = Carso(base, s.get("layers", LAYERS), digits.image_shape, **SIZES)
    config = _changed(CarsoConfig(attack=TrainingAttack(eps=EPS, steps=20)), s.get("config", {}))
    # fewer would leave no epoch with the KL term
    epochs = 3 if s["quick"] else OBJECTIVE_EPOCHS
    last = fit(CarsoTask(defence, config), digits.x_train, digits.y_train, FitConfig(epochs, 64, job.seed), folder)
    defence.save(folder)
    result = _attacked(defence, job, config.attack.eps, config.attack.norm, draws=s.get("draws", False))
    return result | {"kl": last["kl"], "parameters": count(defence)}


def train_pipeline(job: Job, folder: Path, root: Path) -> dict:
    """A purifier of the paper's objective, fine-tuned through the pipeline: {base, start, config, epochs}."""
    s = job.settings
    digits = data.load_dataset("digits")
    base = load_classifier(job.folder(root, s.get("base", "base")))
    defence = load_defence(job.folder(root, s.get("start", OBJECTIVE)), base)
    config = _changed(
        CarsoConfig(attack_target="pipeline", attack=TrainingAttack(eps=EPS, steps=7), learning_rate=4e-3),
        s.get("config", {}),
    )
    epochs = 1 if s["quick"] else s.get("epochs", PIPELINE_EPOCHS)
    task = CarsoTask(defence, config, weights_fingerprint(defence))
    fit(task, digits.x_train, digits.y_train, FitConfig(epochs, 128, job.seed), folder)
    defence.save(folder)
    result = _attacked(defence, job, config.attack.eps, config.attack.norm, draws=s.get("draws", False))
    return result | {"parameters": count(defence)}


def attack_copies(job: Job, folder: Path, root: Path) -> dict:
    """Noisy copies of the image on the base, under its randomness: {sigma}."""
    s = job.settings
    defence = NoisyEnsemble(load_classifier(job.folder(root, "base")), s["sigma"], 8)
    result = _attacked(defence, job, EPS, "linf", draws=True)
    return result | {"parameters": count(defence)}


def attack_samples(job: Job, folder: Path, root: Path) -> dict:
    """The pipeline's model with another K when it predicts: {samples}."""
    s = job.settings
    defence = load_defence(job.folder(root, "pipeline"), load_classifier(job.folder(root, "base")))
    defence.samples = s["samples"]
    return _attacked(defence, job, EPS, "linf", draws=True)


def jobs(seeds: int, quick: bool, rows: Sequence[str] | None = None) -> list[Job]:
    """All rows, or some and what they need; the controls and the main ones first.

    Ablations change one setting of the row "pipeline"; asked for by name they have all seeds, else ABLATION_SEEDS.
    """
    made: list[Job] = []
    # part of each job, so that a folder of other numbers is refused
    fixed = {
        "quick": quick,
        "radii": [EPS, EPS_L2],
        "default_layers": LAYERS,
        "sizes": SIZES,
        "default_epochs": [BASE_EPOCHS, OBJECTIVE_EPOCHS, PIPELINE_EPOCHS],
    }

    def add(seed: int, name: str, work: Callable, *needs: str, **settings) -> None:
        made.append(Job(name, seed, work, needs, settings | fixed))

    for seed in range(seeds):
        add(seed, "base", train_base, rank=True)
        add(seed, "base, twice the epochs", train_base, epochs=2 * BASE_EPOCHS)
        add(seed, "base, as many parameters", train_base, width=WIDE)
        add(seed, "noisy copies, sigma 0.1", attack_copies, "base", sigma=0.1)
        add(seed, OBJECTIVE, train_objective, "base", draws=True)
        add(seed, "pipeline", train_pipeline, "base", OBJECTIVE, draws=True)
        add(seed, "pipeline, joint", train_pipeline, "base", OBJECTIVE, draws=True, config=JOINT)
    for seed in range(min(seeds, ABLATION_SEEDS) if rows is None else seeds):
        for samples in (1, 32):
            add(seed, f"pipeline, K = {samples} when it predicts", attack_samples, "base", "pipeline", samples=samples)
        add(seed, "pipeline, K = 4 in training", train_pipeline, "base", OBJECTIVE, config={"train_samples": 4})
        for steps in (3, 15):
            add(seed, f"pipeline, PGD-{steps} in training", train_pipeline, "base", OBJECTIVE, config={"steps": steps})
        changes: dict[str, dict] = {
            "beta 0.1": {"config": {"beta": 0.1}},
            "4 free nats": {"config": {"free_bits": 4.0}},
        }
        changes |= {f"{layer} alone": {"layers": (layer,)} for layer in LAYERS}
        changes["all layers"] = {"layers": ALL_LAYERS}
        for change, settings in changes.items():
            start = f"{OBJECTIVE}, {change}"
            add(seed, start, train_objective, "base", **settings)
            add(seed, f"pipeline, {change}", train_pipeline, "base", start, start=start)
        l2 = {"base": "base, L2", "config": {"eps": EPS_L2, "norm": "l2"}}
        add(seed, "base, L2", train_base, norm="l2")
        add(seed, f"{OBJECTIVE}, L2", train_objective, "base, L2", **l2)
        add(seed, "pipeline, L2", train_pipeline, "base, L2", f"{OBJECTIVE}, L2", start=f"{OBJECTIVE}, L2", **l2)
    return select(made, rows)
