"""What a model is asked besides the attacks: short sweeps on a few images, and whether it answers the same again."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...attacks import AttackContext, apgd, pgd
from ...attacks.base import ThreatModel
from ...attacks.losses import usable_loss
from ...protocols import Classifier
from ..subject import Subject
from . import answers
from .answers import Before, in_parts

#: Steps of every short attack.
STEPS = 20
#: Shares of the report's radius that the sweep tries, before the radius at which every image is within reach.
RADII = (0.25, 0.5, 1.0, 2.0, 4.0)
ITERATIONS = (1, 3, 10, 30, 100)
DRAWS = (1, 4, 16)
STARTS = 5
#: Draws of a random model that judge a probe: the class of most of them counts, so that no image falls by one draw.
JUDGES = 9
#: Surrogates that a model with gates or thresholds has; the time of a probe is estimated by it.
USUAL_SURROGATES = 3
#: Wrong classes that are tried by the gradients of each. Of a random model, each of whose steps takes several draws,
#: only the nearest one is tried.
TARGETS, TARGETS_OF_RANDOM = 3, 1

Curve = list[tuple[float, float]]


@dataclass
class Probes:
    """What the probes measured; curves are pairs of a setting and the accuracy that is left.

    Args:
        n: images.
        chance: one over the number of classes.
        eps: over the radius in image units, the last one huge.
        steps: over the steps of the attack; what fell to fewer steps counts as fallen.
        eot: over the draws averaged per step; empty for a model that predicts the same every time.
        samples: over the samples K of a defence that has them.
        one_start: accuracy left by one random start, on average.
        all_starts: accuracy left by all of them.
        cosine: between promised and measured changes; None where something was not finite, or there was no gradient.
        batch_changes: share of the predictions that depend on the batch; None: cannot be told.
        varying: share of the correctly classified images whose class changes from draw to draw.
        watched_changes: share of the images whose logits change when gradients are recorded; None: cannot be told.
        later_changes: share of the predictions on clean images that differ from those before the attacks.
        state_changed: whether weights, buffers or attributes differ from those before the attacks.
        sets_seed: whether the model sets the seed of torch's generator itself.
        further: how many images that withstood every attack of the report fell to a short one; None where none was
            left.
        missed: how many of those that this left fell to the gradients of each surrogate, by its name, in the order in
            which they were tried.
    """

    n: int
    chance: float
    eps: Curve
    steps: Curve
    one_start: float
    all_starts: float
    cosine: float | None
    batch_changes: float | None
    eot: Curve = field(default_factory=list)
    samples: Curve = field(default_factory=list)
    varying: float = 0.0
    watched_changes: float | None = 0.0
    later_changes: float = 0.0
    state_changed: bool = False
    sets_seed: bool = False
    further: int | None = None
    missed: dict[str, int] = field(default_factory=dict)

    def curves(self) -> dict[str, list[list[float]]]:
        """The curves by what they are over; empty ones are left out."""
        named = {"eps": self.eps, "steps": self.steps, "samples K": self.samples, "EOT draws": self.eot}
        return {name: [list(point) for point in curve] for name, curve in named.items() if curve}


def cost(subject: Subject, context: AttackContext) -> int:
    """About how many images the probes give to the model, each pass of an image counted."""
    draws, judges = _draws(subject, context)
    attacks = [*[STEPS // 2] * STARTS, *[STEPS] * len(_radii(context, subject.x)), *ITERATIONS]
    passes = sum(attacks) * draws + len(attacks) * judges
    passes += (1 + USUAL_SURROGATES) * (_targets(subject) * STEPS * draws + judges)
    if subject.is_random:
        passes += STEPS * sum(DRAWS) + len(DRAWS) * judges
    return passes * min(answers.PROBED, len(subject.x))


def _draws(subject: Subject, context: AttackContext) -> tuple[int, int]:
    """Draws of each step of a short attack, and draws that judge it."""
    return (min(4, context.predictions(context.eot_iter)), JUDGES) if subject.is_random else (1, 1)


def _targets(subject: Subject) -> int:
    return TARGETS_OF_RANDOM if subject.is_random else TARGETS


def parts(before: Before, context: AttackContext, left: Tensor, model: Classifier) -> dict[str, Callable[[], Any]]:
    """The short attacks, each of which can be made without the others; the longest ones first.

    Args:
        before: the model's answers before the attacks.
        context: what the evaluation tells attacks.
        left: which of the first images withstood every attack of the report, bool ``[n]``.
        model: what is attacked, the subject's own with a counter.
    """
    subject, x, y = before.subject, before.x, before.y
    draws, judges = _draws(subject, context)
    short = _Short(model, x, y, context, draws=draws, judges=judges, targets=_targets(subject))
    made: dict[str, Callable[[], Any]] = {
        "missed": lambda: _missed(short, subject, left.to(x.device)),
        "steps": lambda: _over_steps(short),
    }
    if subject.is_random:
        made |= {f"draws {n}": partial(short.accuracy, eot_iter=n) for n in DRAWS if n != draws}
    made |= {f"eps {eps}": partial(short.accuracy, eps=eps) for eps in _radii(context, x) if eps != context.eps}
    # the point that the sweeps over the radius and over the draws have in common
    made["plain"] = short.accuracy
    samples = getattr(subject.single, "samples", None)
    if isinstance(samples, int) and samples > 1:
        made["samples"] = lambda: _over_samples(subject.single, samples, short)

    def start(seed: int) -> Tensor:
        return short.robust(seed=seed, random_start=True, steps=STEPS // 2).cpu()

    return made | {f"start {seed}": partial(start, seed) for seed in range(STARTS)}


def probe(before: Before, context: AttackContext, measured: Mapping[str, Any]) -> Probes:
    """Ask the model; to be called after the attacks.

    Args:
        before: its answers before them.
        context: what the evaluation tells attacks.
        measured: what `parts` gave.
    """
    subject, x, y = before.subject, before.x, before.y
    together = torch.stack([measured[f"start {seed}"] for seed in range(STARTS)])
    some, near, plain = slice(subject.batch_size), _near(context, x), measured["plain"]
    further, missed = measured["missed"]
    probes = Probes(
        n=len(x),
        chance=1 / subject.num_classes,
        eps=[(eps, measured.get(f"eps {eps}", plain)) for eps in _radii(context, x)],
        steps=measured["steps"],
        samples=measured.get("samples", []),
        one_start=float(together.float().mean()),
        all_starts=float(together.all(0).float().mean()),
        cosine=answers.cosine(subject, y[some], x[some], near[some]),
        batch_changes=answers.batch_changes(subject, x),
        further=further,
        missed=missed,
    )
    if subject.is_random:
        probes.eot = [(float(n), measured.get(f"draws {n}", plain)) for n in DRAWS]
        probes.varying = answers.varying(before.model, x, y)
    # last: a model that counts has counted the short attacks too
    probes.later_changes = before.later_changes()
    probes.state_changed = before.state_changed()
    probes.watched_changes = answers.watched_changes(subject, before.model, x, near)
    probes.sets_seed = answers.sets_seed(subject.model, subject.some())
    return probes


def _missed(short: _Short, subject: Subject, left: Tensor) -> tuple[int | None, dict[str, int]]:
    """How many of the images fall by the model's own gradients, and by those of its parts and softened copies."""
    if not bool(left.any()):
        return None, {}
    fell = short.fallen(left, None)
    further, missed = int(fell.sum()), {}
    for name, surrogate in subject.surrogates(ThreatModel(short.context.norm, float(short.context.eps))):
        left = left & ~fell
        fell = short.fallen(left, surrogate)
        missed[name] = int(fell.sum())
    return further, missed


def _over_steps(short: _Short) -> Curve:
    """Accuracy over the steps of the attack; what fell to fewer steps is not attacked again."""
    curve: Curve = []
    robust = None
    for steps in ITERATIONS:
        robust = short.robust(robust, steps=steps)
        curve.append((float(steps), float(robust.float().mean())))
    return curve


class _Short:
    """Short attacks on the same few images."""

    def __init__(
        self, model: Classifier, x: Tensor, y: Tensor, context: AttackContext, *, draws: int, judges: int, targets: int
    ):
        self.model, self.x, self.y, self.context = model, x, y, context
        self.draws, self.judges, self.targets = draws, judges, targets

    def robust(self, among: Tensor | None = None, *, eps: float | None = None, seed: int = 0, **options: Any) -> Tensor:
        """Which images are right after PGD on the margin, bool ``[n]``; those that are not among these count as wrong.

        Args:
            among: the images that are attacked, bool ``[n]``; None for all.
            eps: the radius; None: that of the report.
            seed: of a random start.
            **options: of `pgd`.
        """
        torch.manual_seed(self.context.seed)
        right = torch.ones(len(self.x), dtype=torch.bool, device=self.x.device) if among is None else among.clone()
        if not bool(right.any()):
            return right
        x, y = self.x[right], self.y[right]
        settings: dict[str, Any] = {"steps": STEPS, "eot_iter": self.draws, "loss": "margin"} | options
        attacked = pgd(
            self.model, x, y, eps=self.context.eps if eps is None else eps, norm=self.context.norm,
            keep_best=True, seed=seed, sample_ids=right.nonzero()[:, 0],
            max_forward_batch=self.context.max_forward_batch or self.context.batch_size,
            **settings,
        )  # fmt: skip
        right[right.clone()] = self._mostly_right(attacked, y)
        return right

    def _mostly_right(self, x: Tensor, y: Tensor) -> Tensor:
        logits = (in_parts(self.model, self.context.batch_size or len(x))(x) for _ in range(self.judges))
        right = [(each.argmax(1) == y) & each.isfinite().any(1) for each in logits]
        return torch.stack(right).float().mean(0) > 0.5

    def fallen(self, left: Tensor, gradients_from: Classifier | None) -> Tensor:
        """Which of the images that are left fall to APGD along the model's own or another model's gradients."""
        torch.manual_seed(self.context.seed)
        at = left.nonzero()[:, 0]
        fell = torch.zeros_like(left)
        if len(at) == 0:
            return fell
        context = self.context
        loss = usable_loss("dlr_targeted", context.num_classes)
        attacked = apgd(
            self.model, self.x[at], self.y[at], eps=context.eps, norm=context.norm, steps=STEPS,
            loss=loss, n_target_classes=self.targets, eot_iter=self.draws, judge_draws=self.judges,
            gradients_from=gradients_from, seed=context.seed + 1, sample_ids=at,
            max_forward_batch=context.max_forward_batch or context.batch_size,
        )  # fmt: skip
        fell[at] = ~self._mostly_right(attacked, self.y[at])
        return fell

    def accuracy(self, **options: Any) -> float:
        """The share of them."""
        return float(self.robust(**options).float().mean())


def _radii(context: AttackContext, x: Tensor) -> list[float]:
    """The radii of the sweep, and one within which every image lies."""
    size = x[0].numel()
    whole = {"linf": 1.0, "l2": math.sqrt(size), "l1": float(size)}[context.norm]
    eps = float(context.eps)
    return [*(share * eps for share in RADII if share * eps < whole), whole]


def _near(context: AttackContext, x: Tensor) -> Tensor:
    """The images with noise of half the radius at most: what a model does there need not be what it does to clean ones.

    Clean images have few values: a defence can tell them from attacked ones.
    """
    size = x[0].numel()
    each = {"linf": 1.0, "l2": 1 / math.sqrt(size), "l1": 1 / size}[context.norm] * context.eps
    generator = torch.Generator().manual_seed(context.seed)
    noise = torch.rand(x.shape, generator=generator).to(x) - 0.5
    return (x + each * noise).clamp(0, 1)


def _over_samples(model: Any, samples: int, short: _Short) -> Curve:
    """Accuracy over the number of a defence's samples."""
    counts = sorted({max(1, samples // 4), max(1, samples // 2), samples})
    curve: Curve = []
    try:
        for count in counts:
            model.samples = count
            curve.append((float(count), short.accuracy()))
    # a defence may have its number of samples built in
    except (RuntimeError, ValueError, TypeError, AttributeError):
        return []
    finally:
        model.samples = samples
    return curve
