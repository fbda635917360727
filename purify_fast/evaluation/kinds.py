"""What each kind of attack does with its options."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..attacks import LOSSES, TARGETED, GradientHealth, apgd, fgsm, input_gradient, pgd, stadv
from ..attacks.arguments import read_norm
from ..attacks.autoattack import autoattack, parts
from ..attacks.stadv import EPS as FLOW
from .specs import Attack
from .subject import Model

GRADIENT = ("pgd", "apgd", "fgsm", "bpda", "stadv")


@dataclass(frozen=True)
class Context:
    """What attacks take from the evaluation.

    Args:
        eps: radius of the ball, in image units.
        norm: of the ball.
        steps: of attacks that do not say.
        eot: draws per step of attacks that do not say.
        batch_size: images attacked together.
        chunk: images in one forward pass at most.
        seed: of everything random.
        num_classes: of the model.
    """

    eps: float
    norm: str
    steps: int
    eot: int
    batch_size: int
    chunk: int | None
    seed: int
    num_classes: int


def loss_of(attack: Attack, context: Context) -> str:
    """The loss that is raised; the margin where the model has too few classes for the one asked for."""
    asked = attack.loss or ("margin" if attack.kind == "stadv" else "ce")
    return "margin" if context.num_classes < {"dlr": 3, "dlr_targeted": 4}.get(asked, 2) else asked


def ball_of(attack: Attack, context: Context) -> tuple[str, float]:
    """Norm and radius."""
    if attack.kind == "stadv":
        return "flow", FLOW if attack.eps is None else float(attack.eps)
    return attack.norm or context.norm, context.eps if attack.eps is None else float(attack.eps)


def runs_of(attack: Attack, context: Context) -> int:
    """How often an image is attacked at most: restarts, for each target."""
    targeted = loss_of(attack, context) in TARGETED
    return attack.restarts * (min(attack.targets, context.num_classes - 1) if targeted else 1)


def total(attack: Attack, context: Context, draws: int, images: int) -> int | None:
    """Forward passes of single images, for the bar; AutoAttack's are not known before, APGD's at most so many."""
    if attack.kind == "autoattack":
        return None
    steps = 1 if attack.kind == "fgsm" else attack.steps or context.steps
    best = 0 if attack.kind == "fgsm" else draws * (2 if draws > 1 else 1)
    if attack.kind == "apgd":  # runs after the first are for those still robust
        return images * (runs_of(attack, context) * (steps * draws + best) + 1)
    picks = draws if attack.restarts > 1 else 0
    return images * attack.restarts * (steps * draws + best + picks + 1)


def settings_of(attack: Attack, context: Context) -> dict[str, Any]:
    """What was run, in plain values."""
    own = {f.name: getattr(attack, f.name) for f in dataclasses.fields(attack) if f.name not in ("target", "label")}
    auto = attack.kind == "autoattack"
    own["steps"] = attack.steps or (100 if auto else context.steps)
    own["eot"] = attack.eot or (20 if auto else context.eot)
    if auto:
        run, replaced = parts(attack.version, context.num_classes)
        own |= {"attacks": run, "replaced_by_pgd_margin": replaced}
    else:
        own["loss"] = loss_of(attack, context)
        own["targets"] = runs_of(attack, context) // attack.restarts if own["loss"] in TARGETED else None
    norm, eps = ball_of(attack, context)
    return own | {"eps": eps, "norm": norm}


def run_batch(
    attack: Attack, model: Model, x: Tensor, y: Tensor, ids: Tensor, *, context: Context, health: GradientHealth
) -> Tensor:
    """One batch under one of this package's attacks; noise is tied to the images' ids."""
    norm, eps = ball_of(attack, context)
    common: dict[str, Any] = {
        "eps": eps, "loss": loss_of(attack, context), "eot_iter": context.eot, "health": health,
        "max_forward_batch": context.chunk,
    }  # fmt: skip
    if attack.kind != "fgsm":
        common["steps"] = attack.steps or context.steps
    if attack.kind != "stadv":
        common["norm"] = norm
    if attack.kind == "fgsm":
        return fgsm(model, x, y, **common)
    if attack.kind == "apgd":
        more: dict[str, Any] = {
            "restarts": attack.restarts,
            "n_target_classes": attack.targets,
            "seed": context.seed,
            "sample_ids": ids,
        }
        return apgd(model, x, y, **more, **common)
    best, value = x, torch.full((len(x),), -torch.inf, device=x.device)
    for restart in range(attack.restarts):
        own: dict[str, Any] = {"keep_best": True, "seed": context.seed + restart, "sample_ids": ids}
        if attack.kind == "stadv":
            given = {"rate": attack.alpha, "smoothness": attack.smoothness}
            own |= {name: setting for name, setting in given.items() if setting is not None}
            found = stadv(model, x, y, random_start=restart > 0, **own, **common)
        else:
            found = pgd(model, x, y, alpha=attack.alpha, random_start=attack.start or restart > 0, **own, **common)
        if attack.restarts == 1:
            return found
        new = sum(LOSSES["margin"](model(found), y) for _ in range(context.eot)) / context.eot
        better = new > value
        best = torch.where(better.view(-1, 1, 1, 1), found, best)
        value = torch.where(better, new, value)
    return best


def run_autoattack(
    attack: Attack, model: Any, x: Tensor, y: Tensor, *, context: Context, health: GradientHealth
) -> tuple[Tensor, list[str]]:
    """All images under AutoAttack, and its warnings."""
    norm, eps = ball_of(attack, context)
    found, warnings = autoattack(
        model, x, y, eps=eps, norm=read_norm(norm), version=attack.version, num_classes=context.num_classes,
        seed=context.seed, batch_size=context.batch_size, steps=attack.steps or 100, eot_iter=context.eot,
        n_queries=attack.queries, max_forward_batch=context.chunk,
    )  # fmt: skip
    for a, b, c in zip(*(part.split(context.batch_size) for part in (x, found, y)), strict=True):
        for point in (a, b):
            health.see_gradient(input_gradient(model, point, c)[0])
    return found, warnings
