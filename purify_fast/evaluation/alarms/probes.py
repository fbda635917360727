"""Probes of a model besides the attacks: short sweeps on a few images, and whether it answers the same again.

The short attacks come before the attacks of the report and decide how far those search. They run on the gradient copy
that attacks use, and skip images that have fallen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...attacks import AttackContext, apgd
from ...attacks.base import ThreatModel
from ...attacks.losses import usable_loss
from ...protocols import Classifier
from ..subject import Subject
from . import answers
from .answers import Before, in_parts

#: Steps of the short attacks on remaining images, and of those of the sweeps.
STEPS, SWEEP = 20, 10
#: The numbers of steps in the sweep over steps.
ITERATIONS = (1, 3, 10, 30)
DRAWS = (1, 4, 16)
#: Draws of a random model that judge a probe: the class of most of them counts, so that no image falls by one draw.
JUDGES = 9
#: Number of surrogates of a model with gates or thresholds, by which a probe's time is estimated.
USUAL_SURROGATES = 3
#: Number of wrong classes that are tried along each surrogate's gradients. For a random model, whose steps take
#: several draws each, only the nearest class is tried.
TARGETS, TARGETS_OF_RANDOM = 2, 1

Curve = list[tuple[float, float]]
#: For each surrogate's name, a mask of the images that fell to its gradients, as 0 and 1.
Fallen = dict[str, list[int]]


@dataclass
class Probes:
    """Measurements of the probes; curves are pairs of a setting and the accuracy that is left.

    Args:
        n: number of images.
        steps: curve over the steps of the attack; images that fell to fewer steps count as fallen.
        eot: curve over the draws averaged per step; empty for a model that predicts the same every time.
        samples: curve over the number of samples K of a defence that has samples.
        cosine: cosine between promised and measured changes, or the reason why there is none, in words.
        batch_changes: share of the predictions that depend on the batch; None: cannot be measured.
        varying: share of the correctly classified images whose class changes from draw to draw.
        watched_changes: share of the images whose logits change when gradients are recorded; None: cannot be measured.
        later_changes: share of the predictions on clean images that differ from those before the attacks.
        state_changed: whether weights, buffers or attributes differ from those before the attacks.
        sets_seed: whether the model sets the seed of torch's generator itself.
        further: number of images that withstood every attack of the report and had fallen to a short attack before;
            None if none was left.
        missed: number of the other remaining images that had fallen to the gradients of each surrogate, by its name,
            in the order in which they were tried.
        absent: for each missing surrogate's name, the reason why it is missing.
        fallen: numbers of the images that withstood every attack of the report and fell to a probe within its ball.
    """

    n: int
    steps: Curve
    cosine: float | answers.Missing
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
    absent: dict[str, str] = field(default_factory=dict)
    fallen: list[int] = field(default_factory=list)

    def curves(self) -> dict[str, list[list[float]]]:
        """The curves, by the name of their setting, without empty curves."""
        named = {"steps": self.steps, "samples K": self.samples, "EOT draws": self.eot}
        return {name: [list(point) for point in curve] for name, curve in named.items() if curve}


@dataclass
class AskedBefore:
    """Measurements made before the attacks of the report, in plain values.

    Args:
        sweeps: the curve over the steps, and those over draws and samples if there are any, by their names in `Probes`.
        cosine: see `Probes`.
        without_gradient: the largest share of the images, clean or near them, whose gradient is zero, not finite or
            missing.
        fell: mask of the images that fell to the short attacks along the model's own gradients, as 0 and 1.
        copies: for each surrogate's name, in the order tried, a mask of the other images that fell to its gradients,
            as 0 and 1.
        absent: see `Probes`.
    """

    sweeps: dict[str, Curve]
    cosine: float | answers.Missing
    without_gradient: float
    fell: list[int]
    copies: Fallen
    absent: dict[str, str]


def cost(subject: Subject, context: AttackContext) -> int:
    """An upper estimate of the images that the probes give to the model, each pass of an image counted."""
    draws, judges = _draws(subject, context)
    passes = sum(ITERATIONS) * draws + len(ITERATIONS) * judges
    passes += (1 + USUAL_SURROGATES) * (_targets(subject) * STEPS * draws + judges)
    if subject.is_random:
        passes += SWEEP * sum(DRAWS) + len(DRAWS) * judges
    return passes * min(answers.PROBED, len(subject.x))


def _draws(subject: Subject, context: AttackContext) -> tuple[int, int]:
    """Draws of each step of a short attack, and draws that judge it."""
    return (min(4, context.predictions(context.eot_iter)), JUDGES) if subject.is_random else (1, 1)


def _targets(subject: Subject) -> int:
    return TARGETS_OF_RANDOM if subject.is_random else TARGETS


def parts(before: Before, context: AttackContext, model: Classifier) -> dict[str, Callable[[], Any]]:
    """The short attacks, each of which can be made without the others; the longest one first.

    Args:
        before: the model's answers before the attacks.
        context: context of the attacks.
        model: the attacked model, which is the subject's own with a counter.
    """
    subject, x, y = before.subject, before.x, before.y
    draws, judges = _draws(subject, context)
    short = _Short(model, x, y, context, draws=draws, judges=judges, targets=_targets(subject))
    made: dict[str, Callable[[], Any]] = {"sweeps": lambda: _sweeps(short, subject)}
    if subject.is_random:
        made |= {f"draws {n}": partial(short.accuracy, eot_iter=n) for n in DRAWS}
    samples = getattr(subject.base_model, "samples", None)
    if isinstance(samples, int) and samples > 1:
        made["samples"] = lambda: _over_samples(subject.base_model, samples, short)
    return made


def asked_before(before: Before, context: AttackContext, measured: Mapping[str, Any]) -> AskedBefore:
    """Collect the measurements made before the attacks.

    Args:
        before: the model's answers before them.
        context: context of the attacks.
        measured: results of `parts`.
    """
    subject, x, y = before.subject, before.x, before.y
    some = slice(subject.batch_size)
    steps, fell, copies, absent = measured["sweeps"]
    sweeps: dict[str, Curve] = {"steps": steps, "samples": measured.get("samples", [])}
    if subject.is_random:
        sweeps["eot"] = [(float(n), measured[f"draws {n}"]) for n in DRAWS]
    cosine, without = answers.differences(subject, y[some], x[some], _near(context, x)[some])
    return AskedBefore(
        sweeps=sweeps,
        cosine=cosine,
        without_gradient=without,
        fell=fell,
        copies=copies,
        absent=absent,
    )


def probe(before: Before, context: AttackContext, asked: AskedBefore, left: Sequence[bool]) -> Probes:
    """Ask the model again; to be called after the attacks.

    Args:
        before: its answers before them.
        context: context of the attacks.
        asked: what was measured before them.
        left: mask of the first images that withstood every attack of the report.
    """
    subject, x, y = before.subject, before.x, before.y

    # The attacks before were either read from an earlier run, or have drawn random numbers now.
    torch.manual_seed(context.seed)

    def among(fell: Sequence[int]) -> int:
        return sum(1 for one, stands in zip(fell, left, strict=False) if one and stands)

    probes = Probes(
        n=len(x),
        cosine=asked.cosine,
        batch_changes=answers.batch_changes(subject, x),
        steps=asked.sweeps["steps"],
        eot=asked.sweeps.get("eot", []),
        samples=asked.sweeps["samples"],
    )
    if any(left):
        probes.further, probes.absent = among(asked.fell), asked.absent
        probes.missed = {name: among(fell) for name, fell in asked.copies.items()}
        found = [asked.fell, *asked.copies.values()]
        probes.fallen = [image for image, stands in enumerate(left) if stands and any(fell[image] for fell in found)]
    if subject.is_random:
        probes.varying = answers.varying(before.model, x, y)
    # This comes last: a model that counts its calls has counted the short attacks too.
    probes.later_changes = before.later_changes()
    probes.state_changed = before.state_changed()
    probes.watched_changes = answers.watched_changes(subject, before.model, x, _near(context, x))
    probes.sets_seed = answers.sets_seed(subject.model, subject.sample_images())
    return probes


def _sweeps(short: _Short, subject: Subject) -> tuple[Curve, list[int], Fallen, dict[str, str]]:
    """The curve over the steps, the images that fall to own gradients, and those that fall to surrogates', by name.

    Images that fell to fewer steps are not attacked again.
    """
    right = standing = short.right()
    steps: Curve = []
    for count in ITERATIONS:
        standing = short.robust(standing, steps=count)
        steps.append((float(count), _share(standing)))
    standing = standing & ~short.fallen(standing, None)
    own, copies, absent = right & ~standing, dict[str, list[int]](), dict[str, str]()
    if bool(standing.any()):
        for name, surrogate in subject.surrogates(ThreatModel(short.context.norm, float(short.context.eps)), absent):
            fell = short.fallen(standing, surrogate)
            standing, copies[name] = standing & ~fell, fell.int().tolist()
    return steps, own.int().tolist(), copies, absent


def _share(which: Tensor) -> float:
    return float(which.float().mean())


class _Short:
    """Short attacks on the same few images."""

    def __init__(
        self, model: Classifier, x: Tensor, y: Tensor, context: AttackContext, *, draws: int, judges: int, targets: int
    ):
        self.model, self.x, self.y, self.context = model, x, y, context
        self.draws, self.judges, self.targets = draws, judges, targets

    def right(self) -> Tensor:
        """Mask of the images that are right without an attack, bool ``[n]``."""
        return self._mostly_right(self.x, self.y)

    def robust(self, among: Tensor | None = None, **options: Any) -> Tensor:
        """Mask of the images that are right after Auto-PGD on the margin, bool ``[n]``; others count as wrong.

        Args:
            among: mask of the images that are attacked, bool ``[n]``; None for all.
            **options: further options of `apgd`.
        """
        torch.manual_seed(self.context.seed)
        right = torch.ones(len(self.x), dtype=torch.bool, device=self.x.device) if among is None else among.clone()
        if not bool(right.any()):
            return right
        at = right.nonzero()[:, 0]
        settings: dict[str, Any] = {"steps": SWEEP, "eot_iter": self.draws, "loss": "margin"} | options
        right[at] = self._mostly_right(self._attacked(at, **settings), self.y[at])
        return right

    def _attacked(self, at: Tensor, **options: Any) -> Tensor:
        """The images at these places, int64, after Auto-PGD."""
        context = self.context
        return apgd(
            self.model,
            self.x[at],
            self.y[at],
            eps=context.eps,
            norm=context.norm,
            judge_draws=self.judges,
            sample_ids=at,
            precision="auto",
            copies=context.copies,
            max_forward_batch=context.max_forward_batch or context.batch_size,
            **options,
        )

    def _mostly_right(self, x: Tensor, y: Tensor) -> Tensor:
        logits = (in_parts(self.model, self.context.batch_size or len(x))(x) for _ in range(self.judges))
        right = [(each.argmax(1) == y) & each.isfinite().any(1) for each in logits]
        return torch.stack(right).float().mean(0) > 0.5

    def fallen(self, left: Tensor, gradients_from: Classifier | None) -> Tensor:
        """Mask of the remaining images that fall to APGD along the model's own or another model's gradients."""
        torch.manual_seed(self.context.seed)
        at = left.nonzero()[:, 0]
        fell = torch.zeros_like(left)
        if len(at) == 0:
            return fell
        attacked = self._attacked(
            at,
            steps=STEPS,
            loss=usable_loss("dlr_targeted", self.context.num_classes),
            eot_iter=self.draws,
            n_target_classes=self.targets,
            gradients_from=gradients_from,
            seed=self.context.seed + 1,
        )
        fell[at] = ~self._mostly_right(attacked, self.y[at])
        return fell

    def accuracy(self, **options: Any) -> float:
        """The share of right images."""
        return _share(self.robust(**options))


def _near(context: AttackContext, x: Tensor) -> Tensor:
    """The images with noise of half the radius at most, where a model may behave differently than on clean images.

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
    # A defence may not allow another number of samples.
    except (RuntimeError, ValueError, TypeError, AttributeError):
        return []
    finally:
        model.samples = samples
    return curve
