"""``python -m benchmarks ideas``: the gain and cost of each idea of a search by itself.

Choices are made here, on images that no contest has. Attacks before an idea run once for all ideas, and their images
are kept. A result names its state of the sources: an idea without use is no longer in them, and its numbers stay in the
table. Every result is kept at once.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from purify_fast import zoo
from purify_fast._files import write_text
from purify_fast._tensors import per_image
from purify_fast.attacks import APGD, FABT, Attack, AttackContext, AttackResult, Square, frozen
from purify_fast.attacks.apgd import AutoPgd
from purify_fast.attacks.ball import sample_in_ball
from purify_fast.attacks.engine.rows import ActiveSet
from purify_fast.attacks.losses import TARGETED, margin
from purify_fast.attacks.objective import Objective
from purify_fast.attacks.sequence import AttackSequence
from purify_fast.data import load_dataset, to_float
from purify_fast.evaluation.show.tables import markdown_table

from . import RESULTS, measure, options
from .counting import CountedModel
from .running import Budget

FILE = "ideas.json"
BATCH = 250
#: The most ideas in the table: an idea that does not fit was of no use.
MOST = 12


class Turn(AttackSequence):
    """Attacks in turn, with the least margin of each image.

    Attributes:
        reached: the least margin seen for each image, ``[N]``.
        index: images that are attacked next, int64; None: all that stand.
    """

    def __init__(self, *given: Any, **options: Any):
        super().__init__(*given, **options)
        with torch.no_grad():
            self.reached = torch.cat([margin(self.model(part), y) for part, y in self._pairs()])
        self.index: Tensor | None = None

    def _pairs(self) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self.x.split(BATCH), self.y.split(BATCH), strict=True))

    def standing(self) -> Tensor:
        """The images that have not fallen, nearest to falling first, int64."""
        return self.reached.masked_fill(self.fallen, torch.inf).argsort()[: int((~self.fallen).sum())]

    def run(self, attack: Attack) -> None:
        """Run an attack on the images that stand, and record the margins that it reached."""
        with frozen(self.model):
            index = (~self.fallen).nonzero()[:, 0] if self.index is None else self.index
            for part in index.split(BATCH) if len(index) else ():
                told = replace(self.context, sample_ids=part)
                points = attack.search(self.model, self.x[part], self.y[part], told).images
                share = self._shares(points, part)
                better = share > self.share[part]
                self.images[part[better]], self.share[part[better]] = points[better], share[better]
                with torch.no_grad():
                    self.reached[part] = self.reached[part].minimum(margin(self.model(points), self.y[part]))


#: An idea: a function that attacks the images that stand.
Idea = Callable[[Turn], None]


def ran(*attacks: Attack, seed: int = 0) -> Idea:
    """Run attacks, each on the images that stand, with random starts from a seed."""

    def idea(turn: Turn) -> None:
        turn.context = replace(turn.context, seed=seed)
        for attack in attacks:
            turn.run(replace(attack, precision="float32"))

    return idea


# -- ideas whose code is only here -------------------------------------------------------------------------------------


def probability_margin(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """The lead of a target's probability over the label's (PMA: Xie et al., arXiv 2411.15210)."""
    probabilities = logits.softmax(1)
    of_target, of_label = (probabilities.gather(1, each[:, None])[:, 0] for each in (target, y))
    return of_target - of_label


@dataclass(frozen=True, kw_only=True)
class ByProbabilities(APGD):
    """Auto-PGD on the margin of the probabilities."""

    def search(self, *given: Any) -> AttackResult:
        with patch.dict(TARGETED, {self.loss: probability_margin}):
            return super().search(*given)


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


@dataclass(frozen=True, kw_only=True)
class Conjugate(APGD):
    """Auto-PGD by `ConjugatePgd`."""

    def explore(self, *given: Any) -> None:
        with patch("purify_fast.attacks.apgd.AutoPgd", ConjugatePgd):
            super().explore(*given)


@dataclass(frozen=True, kw_only=True)
class Learned(APGD):
    """Auto-PGD whose runs begin where fallen images went in the space of the logits.

    The starts of A3 (Liu et al., CVPR 2022, arXiv 2203.05154, "adaptive direction initialization"), learned separately
    for each target class: the mean change of the logits, scaled to length 1, of the images that fell to this class, or
    if none did, of all fallen images. Two steps along the gradient of this direction lead there from a random point.

    Args:
        fallen: pairs of images before and after they fell, ``[2, F, C, H, W]``.
    """

    fallen: Any = None

    def explore(self, active: ActiveSet, objective: Objective, context: AttackContext) -> None:
        for number, goal in enumerate(self._goals(active, objective)):
            left = active.left()
            if len(left) == 0:
                return
            # Images that fell to earlier goals are used too.
            now = torch.stack([active.x, active.best])[:, active.fallen & active.correct]
            directions = _directions(objective, torch.cat([self.fallen, now], 1))
            told, begin = replace(context, seed=context.seed + number), active.x.clone()
            begin[left] = _along(objective, active, left, goal[left], directions, seed=told.seed)
            for rows in self.waves(active, (goal,), replace(told, begin=begin)):
                steps = self.decided(context).steps
                AutoPgd(objective, active, rows, steps, rho=self.rho, give_up=True).run()


@torch.no_grad()
def _directions(objective: Objective, fallen: Tensor) -> Tensor:
    """For each class the mean change of the logits of images that fell to it, ``[classes, classes]``."""
    before, after = (torch.cat([objective.model(part) for part in each.split(BATCH)]) for each in fallen)
    change = (after - before) / (after - before).norm(dim=1, keepdim=True).clamp_min(1e-12)
    of_class = after.argmax(1)
    every = [change[of_class == one] for one in range(change.shape[1])]
    return torch.stack([(one if len(one) else change).mean(0) for one in every]).nan_to_num()


def _along(
    objective: Objective, active: ActiveSet, left: Tensor, goal: Tensor, directions: Tensor, *, seed: int
) -> Tensor:
    """The points to which two steps along weighted logits lead from random points of the ball."""
    x, y, rows = active.x[left], active.y[left], torch.arange(len(left))
    weights, ball = directions[goal].clone(), active.ball.take(left)
    # As in A3, always go away from the label and towards the class.
    weights[rows, y], weights[rows, goal] = -0.8, 0.8
    point, eps = sample_in_ball(x, ball, seed=seed, sample_ids=active.ids[left]), per_image(ball.eps, x)
    for _ in range(2):
        leaf = point.detach().requires_grad_()
        with torch.enable_grad():
            gradient = torch.autograd.grad((weights * objective.model(leaf)).sum(), leaf)[0]
        point = (x + (point + eps * gradient.sign() - x).clamp(-eps, eps)).clamp(0, 1)
    return point.detach()


def learned_starts(turn: Turn) -> None:
    """`Learned` from images that fell to earlier attacks."""
    fell = turn.fallen & (turn.images != turn.x).flatten(1).any(1)
    turn.run(Learned(**FOUR, precision="float32", fallen=torch.stack([turn.x[fell], turn.images[fell]])))


def rounds(turn: Turn) -> None:
    """Target one class for all images, two for the nearest half, four for a quarter, eight for an eighth.

    These are A3's rounds on hard images ("online statistics-based discarding"): as many steps as four classes for all.
    """
    whole = len(turn.standing())
    for halvings in range(4):
        turn.index = turn.standing()[: whole // 2**halvings]
        if len(turn.index) == 0:
            break
        towards = {"n_target_classes": 2**halvings}
        turn.context = replace(turn.context, seed=turn.context.seed + 1)
        turn.run(APGD(**FOUR | towards, precision="float32"))
    turn.index = None


# -- the measurements --------------------------------------------------------------------------------------------------

FIRST, NINE = APGD(loss="margin", steps=10), APGD(loss="dlr_targeted", give_up=True)
FOUR: dict[str, Any] = {"loss": "dlr_targeted", "steps": 50, "n_target_classes": 4, "give_up": True}
#: For each part, the attacks before its ideas, and the ideas by name.
IDEAS: dict[str, tuple[list[Attack], dict[str, Idea]]] = {
    "after 10 steps on the margin": (
        [FIRST],
        {
            "four targets, 50 steps": ran(APGD(**FOUR)),
            "the same, starts learned from what fell": learned_starts,
            "as many steps, in rounds on hard images": rounds,
            "the same, margin of the probabilities": ran(ByProbabilities(**FOUR)),
            "the same, conjugate directions": ran(Conjugate(**FOUR)),
            "the same, two random starts": ran(APGD(**FOUR, restarts=2)),
            "nine targets, 100 steps": ran(NINE),
        },
    ),
    "after nine targets": (
        [FIRST, NINE],
        {
            "nine targets, other random starts": ran(NINE, seed=1),
            "FAB-T": ran(FABT(give_up=True)),
            "Square, 5,000 queries": ran(Square(give_up=True)),
        },
    ),
}


def _of_zoo(name: str, images: slice, data: Path | None, held_out: bool = True) -> tuple[Any, Tensor, Tensor, float]:
    card = zoo.card(name)
    known = load_dataset(card.data, data)
    x, y = (known.x_test, known.y_test) if held_out else (known.x_train, known.y_train)
    return zoo.load(name), to_float(x[images]), y[images], card.eps


#: Functions, by name, that make a model, images, labels and a radius from the data's folder. The contests use all test
#: images of the digits, the first 1,000 of MNIST and the first 2,000 of CIFAR-10.
SUBJECTS: dict[str, Callable[[Path | None], tuple[Any, Tensor, Tensor, float]]] = {
    "digits-pgd-at, training images 1 to 500": partial(_of_zoo, "digits-pgd-at", slice(0, 500), held_out=False),
    "mnist-pgd-at, 5001 to 5250": lambda data: _of_zoo("mnist-pgd-at", slice(5000, 5250), data),
    "cifar10-pgd-at-w16, 8001 to 8250": lambda data: _of_zoo("cifar10-pgd-at-w16", slice(8000, 8250), data),
    "cifar10-arrest-w16, 8251 to 8500": lambda data: _of_zoo("cifar10-arrest-w16", slice(8250, 8500), data),
}
#: Every idea that is measured, in the order of the table.
NAMES = [(part, idea) for part, (_, ideas) in IDEAS.items() for idea in ideas]


class Bench:
    """The ideas on a subject; attacks before a part's ideas run once.

    Args:
        subject: the subject's model, images, labels and radius.
    """

    def __init__(self, subject: tuple[Any, Tensor, Tensor, float]):
        model, self.x, y, eps = subject
        self.door = CountedModel(model)
        context = AttackContext(num_classes=10, eps=eps, draws_differ=False, batch_size=BATCH)
        self.turns = {"": Turn(self.door, self.x, y, context)}

    def before(self, part: str) -> Turn:
        """The images before the ideas of a part, from where costs are counted."""
        if part not in self.turns:
            turn = copy.copy(self.turns[""])
            turn.images, turn.share, turn.reached = (each.clone() for each in (turn.images, turn.share, turn.reached))
            ran(*IDEAS[part][0])(turn)
            self.turns[part] = turn
        turn = copy.copy(self.turns[part])
        turn.images, turn.share, turn.reached = (each.clone() for each in (turn.images, turn.share, turn.reached))
        return turn

    def measured(self, part: str, idea: str) -> dict[str, Any]:
        """The numbers of images before and after an idea, its forward passes and gradients per image, and seconds."""
        turn, n = self.before(part), len(self.x)
        before, counts, begin = int((~turn.fallen).sum()), self.door.counts, time.process_time()
        forwards, gradients = counts.forwards, counts.gradients
        IDEAS[part][1][idea](turn)
        return {
            "before": before, "left": int((~turn.fallen).sum()), "of": n,
            "forwards": round((counts.forwards - forwards) / n, 1),
            "gradients": round((counts.gradients - gradients) / n, 1),
            "cpu_seconds": round(time.process_time() - begin, 1),
        }  # fmt: skip


def markdown(results: list[dict[str, Any]]) -> list[str]:
    """A table for each part: images left, and forward passes and gradients per image, for each subject.

    Args:
        results: results of this state of the sources and of earlier states.
    """
    subjects = list(dict.fromkeys(one["subject"] for one in results))
    at = {(one["subject"], one["part"], one["idea"]): one for one in results}
    rows = list(dict.fromkeys((one["part"], one["idea"]) for one in results))
    lines = []
    for part in dict.fromkeys(part for part, _ in rows):
        body, starts = [], {one["subject"]: one["before"] for one in results if one["part"] == part}
        for idea in (idea for where, idea in rows if where == part):
            cells = [at.get((subject, part, idea)) for subject in subjects]
            texts = (f"{one['left']} ({one['forwards']:.0f}/{one['gradients']:.0f})" if one else "-" for one in cells)
            kept = "" if (part, idea) in NAMES else f" (code: {at[subjects[0], part, idea]['commit']})"
            body.append([idea + kept, *texts])
        heads = (f"{name}: {starts[name]} stand" for name in subjects)
        lines += ["", *markdown_table([part, *heads], body)]
    return lines[1:]


def read(out: Path) -> list[dict[str, Any]]:
    """The results of a folder; none without a results file."""
    return json.loads((out / FILE).read_text()) if (out / FILE).exists() else []


def table(results: Path) -> list[str]:
    """The tables, from the folder ``benchmarks/results``."""
    if not (results / "cpu" / FILE).exists():
        raise FileNotFoundError(results / "cpu" / FILE)
    return markdown(read(results / "cpu"))


def arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m benchmarks ideas``."""
    parser.add_argument("--only", nargs="+", choices=SUBJECTS, metavar="SUBJECT", help=f"of {'; '.join(SUBJECTS)}")
    parser.add_argument("--data", type=Path, help="folder with cifar10.npz and mnist.npz, or the official files")
    parser.add_argument("--images", type=options.at_least_one, help="at most so many of each subject")
    parser.add_argument("--out", type=Path, default=RESULTS / "cpu", help="folder for the results")


def main(chosen: argparse.Namespace) -> str:
    """Measure the missing results, and return the tables."""
    kept = {(one["subject"], one["part"], one["idea"]) for one in read(chosen.out)}
    torch.set_num_threads(1)
    found = subprocess.run(["git", "rev-parse", "--short=8", "HEAD"], capture_output=True, text=True, cwd=RESULTS)
    benches: dict[str, Bench] = {}

    def run(subject: str, part: str, idea: str) -> None:
        if subject not in benches:
            model, x, y, eps = SUBJECTS[subject](chosen.data)
            benches[subject] = Bench((model, x[: chosen.images], y[: chosen.images], eps))
        at = {"subject": subject, "part": part, "idea": idea, "commit": found.stdout.strip()}
        result = at | benches[subject].measured(part, idea) | measure.environment(torch.device("cpu"))
        write_text(chosen.out / FILE, json.dumps([*read(chosen.out), result], indent=1) + "\n")

    asked = [(subject, part, idea) for subject in chosen.only or SUBJECTS for part, idea in NAMES]
    Budget().go([(", ".join(at), partial(run, *at)) for at in asked if at not in kept], "idea")
    return "\n".join(markdown(read(chosen.out)))
