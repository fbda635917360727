"""What makes CARSO robust, on digits: one setting changed at a time, three seeds, against the controls that decide.

Every model is attacked in the same way: PGD-100 with cross-entropy and with DLR, then AutoAttack on what is left, on
the deterministic model (z = 0, no noise); the main ones also with their randomness, by PGD with expectation over draws.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from purify_fast import data
from purify_fast.carso import Carso, CarsoConfig, CarsoTask, Head, load, rank_layers
from purify_fast.evaluation import Attack, evaluate
from purify_fast.nn import NoisyCopies, SmallCNN
from purify_fast.training import ClassifierConfig, ClassifierTask, FitConfig, fit, load_classifier, save_classifier
from purify_fast.training.checkpoint import fingerprint

from . import Job

EPS, EPS_L2 = 0.2, 1.0
LAYERS = ("conv2", "conv4", "hidden")
ALL_LAYERS = ("conv1", "conv2", "conv3", "conv4", "hidden")
SIZES = {"cond_dim": 64, "latent_dim": 8, "samples": 8, "decoder_width": 8}
BASE_EPOCHS, PUBLISHED_EPOCHS, PIPELINE_EPOCHS = 120, 15, 40
ABLATION_SEEDS = 1
WIDE = 21  # a classifier of 143 k parameters, as many as the base and its purifier have when they predict
JOINT = {"joint": True, "learning_rate": 2e-3, "weight_decay": 2e-2}
AUTO, DRAWS = "AutoAttack", "PGD ce, EOT 4, K draws"


def _effort(quick: bool) -> tuple[int, int, int, int, int]:
    """Images, steps of PGD, steps and Square's queries of AutoAttack, steps of PGD on K draws."""
    return (40, 4, 4, 20, 2) if quick else (500, 100, 100, 1000, 40)


def notes(quick: bool) -> list[str]:
    """What the table's columns are."""
    n, steps, auto_steps, queries, draw_steps = _effort(quick)
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


def _attacked(model: nn.Module, seed: int, eps: float, norm: str, draws: bool, quick: bool) -> dict:
    digits = data.load("digits")
    n, steps, auto_steps, queries, draw_steps = _effort(quick)
    randomised = hasattr(model, "deterministic")
    variant = "deterministic" if randomised else "random"
    attacks = [
        Attack(loss="ce", variant=variant),
        Attack(loss="dlr", variant=variant, survivors=True),
        Attack("autoattack", variant=variant, survivors=True, steps=auto_steps, queries=queries, label=AUTO),
    ]
    if draws and randomised:
        zero = Head(model, deterministic=True)
        attacks += [
            Attack(loss="ce", target=zero, label="made at z = 0"),
            Attack(loss="ce", survivors=True, steps=draw_steps, eot=4, label=DRAWS),
        ]
    report = evaluate(
        model, digits.x_test[:n], digits.y_test[:n], eps=eps, norm=norm, attacks=attacks, steps=steps, n_eval=3,
        batch_size=250, chunk=500, seed=seed, progress=False,
    )  # fmt: skip
    rows = {
        "clean": "clean, deterministic" if randomised else "clean",
        "pgd": f"PGD-{steps} dlr" + (", deterministic" if randomised else ""),  # of the survivors of ce
        "autoattack": AUTO,
    }
    if draws and randomised:
        rows |= {"clean_draws": "clean", "pgd_draws": DRAWS}
    healthy = all(r.reliable for r in report.rows if r.kind != "autoattack")
    return {key: report.row(row).accuracy for key, row in rows.items()} | {"gradients": "healthy" if healthy else "BAD"}


def train_base(job: Job, folder: Path, root: Path) -> dict:
    """An adversarially trained classifier: {width, epochs, norm}."""
    s = job.settings
    norm, eps = s.get("norm", "linf"), EPS if s.get("norm", "linf") == "linf" else EPS_L2
    digits = data.load("digits")
    torch.manual_seed(job.seed)
    model = SmallCNN(width=s.get("width", 16))
    config = ClassifierConfig(eps=eps, norm=norm, steps=7, learning_rate=1e-2, weight_decay=2e-2)
    epochs = 2 if s["quick"] else s.get("epochs", BASE_EPOCHS)
    fit(ClassifierTask(model, config), digits.x_train, digits.y_train, FitConfig(epochs, 64, job.seed), folder)
    save_classifier(model, folder)
    result = _attacked(model, job.seed, eps, norm, False, s["quick"])
    if s.get("rank"):
        images = digits.x_test.float() / 255
        ranking = rank_layers(model, ALL_LAYERS, images, digits.y_test, eps=eps, norm=norm)
        result["layers"] = [vars(score) for score in ranking]
    return result | {"parameters": _count(model)}


def train_published(job: Job, folder: Path, root: Path) -> dict:
    """The purifier on a base as published: {base, layers, config}."""
    s = job.settings
    digits = data.load("digits")
    base = load_classifier(job.folder(root, s.get("base", "base")))
    torch.manual_seed(job.seed)
    defence = Carso(base, s.get("layers", LAYERS), digits.image_shape, **SIZES)
    config = replace(CarsoConfig(eps=EPS, steps=20), **s.get("config", {}))
    epochs = 1 if s["quick"] else PUBLISHED_EPOCHS
    last = fit(CarsoTask(defence, config), digits.x_train, digits.y_train, FitConfig(epochs, 64, job.seed), folder)
    defence.save(folder)
    result = _attacked(defence, job.seed, config.eps, config.norm, s.get("draws", False), s["quick"])
    return result | {"kl": last["kl"], "parameters": _count(defence)}


def train_pipeline(job: Job, folder: Path, root: Path) -> dict:
    """A published purifier fine-tuned through the pipeline: {base, start, config, epochs}."""
    s = job.settings
    digits = data.load("digits")
    base = load_classifier(job.folder(root, s.get("base", "base")))
    defence = load(job.folder(root, s.get("start", "published")), base)
    config = replace(CarsoConfig(attack_target="pipeline", eps=EPS, steps=7, learning_rate=4e-3), **s.get("config", {}))
    epochs = 1 if s["quick"] else s.get("epochs", PIPELINE_EPOCHS)
    task = CarsoTask(defence, config, fingerprint(defence))
    fit(task, digits.x_train, digits.y_train, FitConfig(epochs, 128, job.seed), folder)
    defence.save(folder)
    result = _attacked(defence, job.seed, config.eps, config.norm, s.get("draws", False), s["quick"])
    return result | {"parameters": _count(defence)}


def attack_copies(job: Job, folder: Path, root: Path) -> dict:
    """Noisy copies of the image on the base, under its randomness: {sigma}."""
    s = job.settings
    defence = NoisyCopies(load_classifier(job.folder(root, "base")), s["sigma"], 8)
    result = _attacked(defence, job.seed, EPS, "linf", True, s["quick"])
    return result | {"parameters": _count(defence)}


def attack_samples(job: Job, folder: Path, root: Path) -> dict:
    """The pipeline's model with another K when it predicts: {samples}."""
    s = job.settings
    defence = load(job.folder(root, "pipeline"), load_classifier(job.folder(root, "base")))
    defence.samples = s["samples"]
    return _attacked(defence, job.seed, EPS, "linf", True, s["quick"])


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


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
        "default_epochs": [BASE_EPOCHS, PUBLISHED_EPOCHS, PIPELINE_EPOCHS],
    }

    def add(seed: int, name: str, work: Callable, *needs: str, **settings) -> None:
        made.append(Job(name, seed, work, needs, settings | fixed))

    for seed in range(seeds):
        add(seed, "base", train_base, rank=True)
        add(seed, "base, twice the epochs", train_base, epochs=2 * BASE_EPOCHS)
        add(seed, "base, as many parameters", train_base, width=WIDE)
        add(seed, "noisy copies, sigma 0.1", attack_copies, "base", sigma=0.1)
        add(seed, "published", train_published, "base", draws=True)
        add(seed, "pipeline", train_pipeline, "base", "published", draws=True)
        add(seed, "pipeline, joint", train_pipeline, "base", "published", draws=True, config=JOINT)
    for seed in range(min(seeds, ABLATION_SEEDS) if rows is None else seeds):
        for samples in (1, 32):
            add(seed, f"pipeline, K = {samples} when it predicts", attack_samples, "base", "pipeline", samples=samples)
        add(seed, "pipeline, K = 4 in training", train_pipeline, "base", "published", config={"train_samples": 4})
        for steps in (3, 15):
            add(
                seed, f"pipeline, PGD-{steps} in training", train_pipeline, "base", "published", config={"steps": steps}
            )
        changes: dict[str, dict] = {
            "beta 0.1": {"config": {"beta": 0.1}},
            "4 free nats": {"config": {"free_bits": 4.0}},
        }
        changes |= {f"{layer} alone": {"layers": (layer,)} for layer in LAYERS}
        changes["all layers"] = {"layers": ALL_LAYERS}
        for change, settings in changes.items():
            start = f"published, {change}"
            add(seed, start, train_published, "base", **settings)
            add(seed, f"pipeline, {change}", train_pipeline, "base", start, start=start)
        l2 = {"base": "base, L2", "config": {"eps": EPS_L2, "norm": "l2"}}
        add(seed, "base, L2", train_base, norm="l2")
        add(seed, "published, L2", train_published, "base, L2", **l2)
        add(seed, "pipeline, L2", train_pipeline, "base, L2", "published, L2", start="published, L2", **l2)
    names = {job.name for job in made}
    if rows is None:
        return made
    unknown = set(rows) - names
    if unknown:
        raise ValueError(f"no such rows: {', '.join(sorted(unknown))}; there are {', '.join(sorted(names))}")
    wanted: set[str] = set()
    more = set(rows)
    while more:
        wanted |= more
        more = {need for job in made if job.name in wanted for need in job.needs} - wanted
    return [job for job in made if job.name in wanted]
