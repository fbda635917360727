"""What makes AToP robust, on digits: one setting changed at a time, over seeds, against the classifier it defends.

The row "pipeline" is a purifier fine-tuned through the whole defence, on an adversarially trained classifier. It is of
the residual form and begins with no correction. Every other row changes what its name says.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from purify_fast import data, load_defence
from purify_fast.attacks import PGD
from purify_fast.evaluation import AttackSpec
from purify_fast.methods.atop import Atop, AtopConfig, SmallGenerator
from purify_fast.training import load_classifier

from . import Job
from .atop_mnist import THROUGH_PIPELINE, attacked_config, options, train_stage
from .digits import BASE_EPOCHS, EPS, OBJECTIVE, Layout, attacked, count, effort, select, train_base, zero_attacks

BASE, STANDARD, PAINTER = "base", "standard", "pre-trained"
STANDARD_EPOCHS = 30
ABLATION_SEEDS = 1
EOT, FIRST_STEPS = 4, 20  # draws per step; steps of a PGD with one draw before that

# What a row is made of. A stage's names are `AtopConfig`'s, but for epochs and batch_size.
PRETRAINING = {
    "epochs": 30, "batch_size": 64, "learning_rate": 2e-3, "schedule": "one_cycle", "discriminator_width": 16,
}  # fmt: skip
FINETUNING = {
    "epochs": 40, "batch_size": 64, "learning_rate": 3e-3, "schedule": "one_cycle", "cls_weight": 0.1,
    "reconstruction_target": "clean", "cls_delay": 2, "cls_delay_unit": "epochs",
}  # fmt: skip
PIPELINE = {
    "epochs": 20, "batch_size": 128, "learning_rate": 4e-3, "schedule": "one_cycle", "cls_weight": 1.0,
    "reconstruction_weight": 0.1, "cls_delay": 0, "steps": 7, **THROUGH_PIPELINE,
}  # fmt: skip
MAIN = {
    "generator": {"residual": True}, "defence": {"sigma": 0.1, "mask_ratio": 0.0}, "stage": PIPELINE, "base": BASE,
    "start": None,
}  # fmt: skip
#: The paper's transform, and a generator that paints a whole image, pre-trained for it.
PAINTING = {**MAIN, "generator": {"residual": False}, "defence": {"sigma": 0.25, "mask_ratio": 0.25}, "start": PAINTER}
STANDARD_PIPELINE = {**PIPELINE, "epochs": 30, "batch_size": 64, "learning_rate": 3e-3}
#: Rows with all seeds.
ROWS: dict[str, dict] = {
    PAINTER: {**PAINTING, "stage": PRETRAINING, "start": None},
    OBJECTIVE: {**PAINTING, "stage": FINETUNING},
    "pipeline": MAIN,
    "pipeline, sigma 0.0": {**MAIN, "defence": {"sigma": 0.0, "mask_ratio": 0.0}},
}
#: Rows with the seeds of ablations.
MORE: dict[str, dict] = {
    f"{OBJECTIVE}, on standard": {**PAINTING, "stage": FINETUNING, "base": STANDARD},
    "pipeline, on standard": {**PAINTING, "stage": STANDARD_PIPELINE, "base": STANDARD},
    "pipeline, painting": PAINTING,
}
#: Changes of MAIN, part by part.
ABLATIONS: dict[str, dict] = {
    "sigma 0.25": {"defence": {"sigma": 0.25}},
    "missing 0.25": {"defence": {"mask_ratio": 0.25}},
    "PGD-2 in training": {"stage": {"steps": 2}},
    "twice the epochs": {"stage": {"epochs": 2 * PIPELINE["epochs"]}},
    "no L1": {"stage": {"reconstruction_weight": 0.0}},
}
SAMPLES = 4  # draws when it predicts, of one more row

LAYOUT = Layout(
    {"clean": "clean", "pgd": "PGD"},
    {"clean": "clean, to base", "pgd": "PGD, to base"},
    {"clean_zero": "no randomness, clean", "pgd_zero": "no randomness, PGD", "autoattack": "+ AutoAttack"},
    {"minutes": ("minutes", 1), "parameters": ("parameters", 0)},
)


def _effort(quick: bool) -> tuple[int, int]:
    """Steps of the first PGD, draws per step of the others."""
    return (2, 2) if quick else (FIRST_STEPS, EOT)


def notes(quick: bool) -> list[str]:
    """What the table's columns are."""
    n, steps, auto_steps, queries, _ = effort(quick)
    first, eot = _effort(quick)
    warning = "QUICK RUN: hardly trained, hardly attacked; these numbers mean nothing. " if quick else ""
    return [
        f"{warning}Digits, the first {n} held-out images, L-inf eps {EPS}; %, mean ± standard error over seeds. "
        "Settings were chosen in runs on the same 1,797 images: differences of a point or two are not to be trusted.",
        "",
        f"clean, PGD: the model as it is, with its draws; attacked through the whole of it by PGD-{first} with "
        f"cross-entropy and one draw, then by PGD-{steps} with EOT {eot}, with cross-entropy and with DLR, each on "
        "what those before it left; an image counts if three predictions are right. To base: differences to the base "
        f"of the same seed. No randomness: without noise and with one mask, attacked as such by PGD-{steps} with "
        f"cross-entropy, then with DLR; + AutoAttack: standard, on what is left of that ({auto_steps} steps, "
        f"{queries:,} queries for Square, not 5,000). Minutes: training and attacks, on one thread.",
    ]


def _attacked(model: nn.Module, job: Job) -> dict:
    """With the model's randomness and without, apart: a model that has none, of one variant therefore, would lose in
    the second what the first took.
    """
    quick, auto = job.settings["quick"], job.settings["autoattack"]
    _, steps, *_ = effort(quick)
    first, eot = _effort(quick)
    labels = [f"PGD-{first} ce, one draw", f"PGD-{steps} ce, EOT {eot}", f"PGD-{steps} dlr, EOT {eot}"]
    attacks = [
        AttackSpec(PGD(loss="ce", steps=first, eot_iter=1), label=labels[0]),
        AttackSpec(PGD(loss="ce", eot_iter=eot), survivors_only=True, label=labels[1]),
        AttackSpec(PGD(loss="dlr", eot_iter=eot), survivors_only=True, label=labels[2]),
    ]
    zero, rows = zero_attacks(model.sigma > 0 or model.missing > 0, quick, auto)
    keys = {key if key == "autoattack" else f"{key}_zero": label for key, label in rows.items()}
    parts = [
        attacked(model, job.seed, attacks, {"clean": "clean", "pgd": labels[2]}, quick),
        attacked(model, job.seed, zero, keys, quick),
    ]
    healthy = all(part["gradients"] == "healthy" for part in parts)
    return parts[0] | parts[1] | {"gradients": "healthy" if healthy else "BAD"}


def train(job: Job, folder: Path, root: Path) -> dict:
    """A row's purifier, new or from another row's."""
    s = job.settings
    digits, stage = data.load_dataset("digits"), s["stage"] | ({"epochs": 1, "images": 128} if s["quick"] else {})
    base = load_classifier(job.folder(root, s["base"]))
    torch.manual_seed(job.seed)
    if s["start"] is None:
        purifier: nn.Module = SmallGenerator(1, **s["generator"])
    else:  # made beside another classifier, of which it saw nothing
        purifier = load_defence(job.folder(root, s["start"]), base, check=False).purifier.module
    defence = Atop(base, purifier, digits.image_shape, **s["defence"])
    pretrained = job.name == PAINTER
    config = AtopConfig.pretraining(**options(stage)) if pretrained else attacked_config(stage, EPS)
    train_stage(job, folder, defence, config, digits, stage=stage)
    return _attacked(defence, job) | {"parameters": count(defence)}


def attack_samples(job: Job, folder: Path, root: Path) -> dict:
    """The pipeline's model with other draws when it predicts."""
    defence = load_defence(job.folder(root, "pipeline"), load_classifier(job.folder(root, BASE)))
    defence.samples = job.settings["samples"]
    return _attacked(defence, job)


def _changed(changes: dict) -> dict:
    """MAIN with a row's changes: dictionaries are merged, other values replaced."""
    return {
        key: {**old, **changes.get(key, {})} if isinstance(old, dict) else changes.get(key, old)
        for key, old in MAIN.items()
    }


def jobs(seeds: int, quick: bool, rows: Sequence[str] | None = None) -> list[Job]:
    """All rows, or some and what they need; the main ones first.

    The row "standard" and what stands on it, and ablations, which change one setting of the row "pipeline", have all
    seeds if asked for by name, else ABLATION_SEEDS.
    """
    made: list[Job] = []
    # part of each job, so that a folder of other numbers is refused
    fixed = {"quick": quick, "eps": EPS, "eot": [EOT, FIRST_STEPS], "base_epochs": BASE_EPOCHS}

    def add(seed: int, name: str, work, *needs: str, **settings) -> None:
        made.append(Job(name, seed, work, needs, fixed | settings))

    def add_row(seed: int, name: str, settings: dict, auto: bool) -> None:
        before = {} if settings["start"] is None else {"before": ROWS[settings["start"]]}
        needs = [name for name in (settings["base"], settings["start"]) if name is not None]
        add(seed, name, train, *needs, **settings, **before, autoattack=auto)

    for seed in range(seeds):
        add(seed, BASE, train_base)
        for name, settings in ROWS.items():
            add_row(seed, name, settings, True)
    for seed in range(min(seeds, ABLATION_SEEDS) if rows is None else seeds):
        add(seed, STANDARD, train_base, standard=True, epochs=STANDARD_EPOCHS)
        for name, settings in MORE.items():
            add_row(seed, name, settings, True)
        for change, parts in ABLATIONS.items():
            add_row(seed, f"pipeline, {change}", _changed(parts), False)
        name = f"pipeline, S = {SAMPLES} when it predicts"
        add(seed, name, attack_samples, BASE, "pipeline", **MAIN, samples=SAMPLES, autoattack=False)
    return select(made, rows)
