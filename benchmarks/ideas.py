"""``python -m benchmarks ideas``: what each idea of "fast" and "standard" gives by itself, and at what cost.

Choices are made here, on images that no contest has (and on a network that none has), not on those of the contests.
Ideas that gave nothing stay in the table; their code is here alone. Every result is kept as soon as it is there.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional as F

from purify_fast import zoo
from purify_fast._files import write_text
from purify_fast._tensors import per_image
from purify_fast.attacks import APGD, FABT, Attack, AttackContext, Square
from purify_fast.attacks.apgd import AutoPgd
from purify_fast.attacks.ball import sample_in_ball
from purify_fast.attacks.engine.rows import ActiveSet, Borders, likeliest_wrong
from purify_fast.attacks.in_turn import InTurn
from purify_fast.attacks.losses import LOSSES, margin
from purify_fast.attacks.objective import Objective
from purify_fast.data import load_dataset, to_float
from purify_fast.evaluation.show.tables import markdown_table
from purify_fast.training import load_classifier

from . import RESULTS, measure, options
from .counting import CountedModel
from .running import Budget

FILE = "ideas.json"
BATCH = 250


# -- ideas whose code is here alone ------------------------------------------------------------------------------------


def probability_margin(logits: Tensor, y: Tensor) -> Tensor:
    """The margin of the probabilities (PMA: Xie et al., arXiv 2411.15210)."""
    return margin(logits.softmax(1), y)


def multi_margin(logits: Tensor, y: Tensor) -> Tensor:
    """The mean over the wrong classes of by how much they are above the label, less one."""
    return F.multi_margin_loss(logits, y, reduction="none")


OTHER_LOSSES = {"probability margin": probability_margin, "multi-margin": multi_margin}


@dataclass(frozen=True, kw_only=True)
class WithLoss(APGD):
    """Auto-PGD on one of `OTHER_LOSSES`."""

    other: str = ""

    def decided(self, context: AttackContext) -> Any:
        return super().decided(context)._replace(loss=self.other)

    def search(self, *given: Any) -> Tensor:
        with patch.dict(LOSSES, OTHER_LOSSES):
            return super().search(*given)


@dataclass(frozen=True, kw_only=True)
class ByLogits(APGD):
    """Target classes in the order of their logits, as AutoAttack has them."""

    def borders(self, active: ActiveSet, objective: Objective) -> Borders:
        logits = active.judge.logits(active.x)
        return Borders(likeliest_wrong(logits, active.y, self.n_target_classes), -margin(logits, active.y))


@dataclass(frozen=True, kw_only=True)
class FromOutputs(APGD):
    """The first run begins where two steps lead along a random direction of the logits that lowers the label's.

    The start of A3 after what it learns (Liu et al., CVPR 2022, section 3.1, "adaptive direction initialization"): the
    label's weight is negative, that of the nearest class positive, the others are random.
    """

    def search(self, target: Any, x: Tensor, y: Tensor, context: AttackContext) -> Tensor:
        generator = torch.Generator().manual_seed(context.seed)
        ball = self.ball(x, y, context)
        point = sample_in_ball(x, ball, seed=context.seed, sample_ids=context.sample_ids)
        for step in range(2):
            leaf = point.detach().requires_grad_()
            with torch.enable_grad():
                logits = target(leaf)
                if step == 0:
                    weights = torch.rand(logits.shape, generator=generator) - 0.5
                    weights.scatter_(1, likeliest_wrong(logits.detach(), y, 1)[0][:, None], 0.8)
                    weights.scatter_(1, y[:, None], -0.8)
                gradient = torch.autograd.grad((weights * logits).sum(), leaf)[0]
            moved = point + per_image(ball.eps, point) * gradient.sign()
            point = x + (moved - x).clamp(-per_image(ball.eps, x), per_image(ball.eps, x))
        return super().search(target, x, y, replace(context, begin=point.clamp(0, 1).detach()))


class ConjugatePgd(AutoPgd):
    """Auto-PGD along conjugate directions (Yamamura et al., ICML 2022): beta of Hestenes and Stiefel."""

    def __init__(self, *given: Any, **options: Any):
        super().__init__(*given, **options)
        self.direction = self.older = torch.zeros_like(self.point)

    def _move(self, i: int, point: Tensor, gradient: Tensor) -> Tensor:
        change = self.older - gradient
        above, below = ((change * other).flatten(1).sum(1) for other in (-gradient, self.direction))
        beta = torch.where(below == 0, 0.0, above / below.where(below != 0, 1.0)).nan_to_num()
        self.direction, self.older = gradient + per_image(beta, gradient) * self.direction, gradient
        return super()._move(i, point, self.direction)


class EndedPgd(AutoPgd):
    """Auto-PGD that gives up a row whose point is one of the eight before it."""

    def __init__(self, *given: Any, **options: Any):
        super().__init__(*given, **options)
        self.marker = torch.rand(self.point[0].numel(), dtype=torch.float64)
        self.seen = torch.full((len(self.point), 8), -torch.inf, dtype=torch.float64)
        self.repeats = torch.zeros(len(self.point), dtype=torch.bool)

    def take(self, index: Tensor) -> None:
        marker = self.marker
        del self.marker
        super().take(index)
        self.marker = marker

    def _move(self, i: int, point: Tensor, gradient: Tensor) -> Tensor:
        moved = super()._move(i, point, gradient)
        mark = moved.flatten(1).double() @ self.marker
        self.repeats = self.repeats | (self.seen == mark[:, None]).any(1)
        self.seen = torch.cat([self.seen[:, 1:], mark[:, None]], 1)
        return moved

    def out_of_reach(self, step: int, missing: Tensor) -> Tensor | None:
        lost = super().out_of_reach(step, missing)
        lost = self.repeats if lost is None else lost | self.repeats
        return lost if bool(lost.any()) else None


@dataclass(frozen=True, kw_only=True)
class Searched(APGD):
    """Auto-PGD by another search."""

    by: type[AutoPgd] = AutoPgd

    def explore(self, *given: Any) -> None:
        with patch("purify_fast.attacks.apgd.AutoPgd", self.by):
            super().explore(*given)


# -- what is measured --------------------------------------------------------------------------------------------------

FIRST, NINE = APGD(loss="margin", steps=10), APGD(loss="dlr_targeted", give_up=True)
THREE = {"loss": "dlr_targeted", "steps": 50, "n_target_classes": 3, "give_up": True}
#: What is run before the ideas of each part, and the ideas by name.
IDEAS: dict[str, tuple[list[Attack], dict[str, Attack]]] = {
    "the first attack": (
        [],
        {
            "cross-entropy, 25 steps": APGD(steps=25),
            "DLR, 25 steps": APGD(loss="dlr", steps=25),
            "margin, 25 steps": APGD(loss="margin", steps=25),
            "margin over its spread, 25 steps": APGD(loss="scaled_margin", steps=25),
            "margin of the probabilities, 25 steps": WithLoss(steps=25, other="probability margin"),
            "multi-margin, 25 steps": WithLoss(steps=25, other="multi-margin"),
            "margin, conjugate directions, 25 steps": Searched(loss="margin", steps=25, by=ConjugatePgd),
            "margin, 10 steps": FIRST,
        },
    ),
    "after 10 steps on the margin": (
        [FIRST],
        {
            "nine targets by logits, 100 steps, to the end": ByLogits(loss="dlr_targeted"),
            "nine targets by distance, 100 steps, to the end": replace(NINE, give_up=False),
            "nine targets by distance, 100 steps": NINE,
            "three targets by logits, 50 steps": ByLogits(**THREE),
            "three targets by distance, 50 steps": APGD(**THREE),
            "the same, conjugate directions": Searched(**THREE, by=ConjugatePgd),
            "the same, starts by directions of the logits": FromOutputs(**THREE),
            "the same, repeated points end": Searched(**THREE, by=EndedPgd),
            "the same, margin instead of DLR": APGD(**THREE | {"loss": "margin_targeted"}),
            "the same, two random starts": APGD(**THREE, restarts=2),
            "the same, nearest quarter first": APGD(**THREE, nearest_first=1 / 4),
            "the same, nearest eighth first": APGD(**THREE, nearest_first=1 / 8),
            "four targets, nearest eighth first": APGD(**THREE | {"n_target_classes": 4}, nearest_first=1 / 8),
        },
    ),
    "after nine targets": (
        [FIRST, NINE],
        {
            "nothing": replace(FIRST, steps=1),
            "cross-entropy, 100 steps": APGD(give_up=True),
            "nine targets, margin": replace(NINE, loss="margin_targeted"),
            "nine targets, other random starts": replace(NINE, restarts=2),
            "nine targets, conjugate directions": Searched(loss="dlr_targeted", give_up=True, by=ConjugatePgd),
            "FAB-T": FABT(give_up=True),
            "FAB-T, nearest eighth first": FABT(give_up=True, nearest_first=1 / 8),
            "Square, 5,000 queries": Square(),
            "Square, nearest eighth first": Square(give_up=True, nearest_first=1 / 8),
        },
    ),
}


def _of_zoo(name: str, images: slice, data: Path | None) -> tuple[Any, Tensor, Tensor, float]:
    card = zoo.card(name)
    known = load_dataset(card.data, data)
    return zoo.load(name), to_float(known.x_test[images]), known.y_test[images], card.eps


def _of_training(folder: Path, images: slice, data: Path | None) -> tuple[Any, Tensor, Tensor, float]:
    known = load_dataset("cifar10", data)
    return load_classifier(folder), to_float(known.x_test[images]), known.y_test[images], 8 / 255


#: By name: makes a model, images, labels and a radius, of the folders of the data and of a network for CIFAR-10.
SUBJECTS: dict[str, Callable[[Path | None, Path | None], tuple[Any, Tensor, Tensor, float]]] = {
    "cifar10-dev-w8, 5001 to 5400": lambda data, network: _of_training(network, slice(5000, 5400), data),  # type: ignore[arg-type]
    "mnist-pgd-at, 5001 to 5500": lambda data, _: _of_zoo("mnist-pgd-at", slice(5000, 5500), data),
    "mnist-arrest, 5001 to 5500": lambda data, _: _of_zoo("mnist-arrest", slice(5000, 5500), data),
    "digits-pgd-at": lambda data, _: _of_zoo("digits-pgd-at", slice(None), None),
}


def measured(attacks: list[Attack], model: Any, x: Tensor, y: Tensor, eps: float) -> dict[str, Any]:
    """Attacks in turn on a counted model: images left, and forward passes and gradients per image."""
    door = CountedModel(model)
    context = AttackContext(num_classes=10, eps=eps, draws_differ=False, batch_size=BATCH)
    turn = InTurn(door, x, y, context)
    for attack in attacks:
        turn.run(replace(attack, precision="float32"))
    counts = door.counts
    return {
        "left": int((~turn.fallen).sum()), "of": len(x), "forwards": round(counts.forwards / len(x), 1),
        "gradients": round(counts.gradients / len(x), 1),
    }  # fmt: skip


def markdown(results: list[dict[str, Any]]) -> list[str]:
    """One table for each part: images left, and forward passes and gradients per image, for each subject."""
    subjects = list(dict.fromkeys(one["subject"] for one in results))
    at = {(one["subject"], one["part"], one["idea"]): one for one in results}
    lines = []
    for part, (_, ideas) in IDEAS.items():
        body = []
        for idea in ideas:
            cells = [at.get((subject, part, idea)) for subject in subjects]
            body.append(
                [
                    idea,
                    *(f"{one['left']} ({one['forwards']:.0f}/{one['gradients']:.0f})" if one else "-" for one in cells),
                ]
            )
        sizes = {one["subject"]: one["of"] for one in results}
        lines += ["", *markdown_table([part, *(f"{name} (of {sizes[name]})" for name in subjects)], body)]
    return lines[1:]


def read(out: Path) -> list[dict[str, Any]]:
    """The results of a folder; none where there is no results file."""
    return json.loads((out / FILE).read_text()) if (out / FILE).exists() else []


def table(results: Path) -> list[str]:
    """The tables, from the folder ``benchmarks/results``."""
    if not (results / "studies" / FILE).exists():
        raise FileNotFoundError(results / "studies" / FILE)
    return markdown(read(results / "studies"))


def arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m benchmarks ideas``."""
    parser.add_argument("--only", nargs="+", choices=SUBJECTS, metavar="SUBJECT", help=f"of {'; '.join(SUBJECTS)}")
    parser.add_argument("--data", type=Path, help="folder with cifar10.npz and mnist.npz, or the official files")
    parser.add_argument(
        "--network", type=Path, help="of cifar10-dev-w8, the folder that python -m benchmarks robust_networks returns"
    )
    parser.add_argument("--images", type=options.at_least_one, help="at most so many of each subject")
    parser.add_argument("--out", type=Path, default=RESULTS / "studies", help="folder for the results")


def main(chosen: argparse.Namespace) -> str:
    """Measure what is not measured yet; the tables."""
    kept = {(one["subject"], one["part"], one["idea"]): one for one in read(chosen.out)}
    torch.set_num_threads(1)

    def run(subject: str, part: str, idea: str) -> None:
        model, x, y, eps = SUBJECTS[subject](chosen.data, chosen.network)
        before, ideas = IDEAS[part]
        found = measured([*before, ideas[idea]], model, x[: chosen.images], y[: chosen.images], eps)
        result = {"subject": subject, "part": part, "idea": idea} | found | measure.environment(torch.device("cpu"))
        write_text(chosen.out / FILE, json.dumps([*read(chosen.out), result], indent=1) + "\n")

    subjects = [name for name in chosen.only or SUBJECTS if chosen.network or "dev" not in name]
    asked = [(subject, part, idea) for subject in subjects for part, (_, ideas) in IDEAS.items() for idea in ideas]
    Budget().go([(", ".join(at), partial(run, *at)) for at in asked if at not in kept], "idea")
    return "\n".join(markdown(read(chosen.out)))
