"""Probes are short attacks on a few images, and tests of the model's predictions. The alarms judge their results.

The short attacks run before those of the report, and skip images that fell to an earlier short attack.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...attacks import AttackContext, apgd
from ...attacks.base import ThreatModel
from ...attacks.losses import usable_loss
from ...protocols import Classifier
from ..request.subject import Subject
from . import answers
from .answers import Before, in_parts

#: Numbers of steps. STEPS: of the targeted short attacks. SWEEP: of the short attacks that compare numbers of draws.
STEPS, SWEEP = 20, 10
#: The numbers of steps that the first short attacks compare.
ITERATIONS = (1, 3, 10, 30)
#: The numbers of draws per step that the short attacks on a random model compare.
DRAWS = (1, 4, 16)
#: The draws that judge an image of a random model after a short attack: one unlucky draw must not decide.
JUDGES = 9
#: The number of target classes of each targeted short attack. On a random model, where each step takes several draws,
#: only the nearest class is tried.
TARGETS, TARGETS_OF_RANDOM = 2, 1

Curve = list[tuple[float, float]]
#: A function that measures something by short attacks. It does not depend on the other measurements.
Probe = Callable[[AttackContext], Any]


@dataclass(frozen=True)
class Probes:
    """The measurements of the probes, as plain values. A curve is a list of pairs of a setting and an accuracy.

    Fields up to ``absent`` are measured before the attacks of the report, fields from ``left`` on after them.

    Args:
        n: number of images.
        steps: curve over the steps of the attack; an image that fell with fewer steps counts as fallen.
        cosine: cosine between the predicted and the measured changes of the margin, or the reason why there is none;
            None if it cannot be measured.
        without_gradient: share of images with a zero, non-finite or missing gradient, at the clean images or near them.
        eot: curve over the number of draws averaged per step; empty for a deterministic model.
        fell: for each image, 1 if it fell to the short attacks with the model's own gradients, otherwise 0.
        copies: by name of the surrogate, in the order of the attacks: for each image, 1 if it first fell to this
            surrogate, otherwise 0.
        absent: by name of a missing surrogate: the reason why it is missing.
        points: for a random model, the last point to which each image fell, or the clean image, ``[n, C, H, W]``.
        left: for each image, whether it withstood every attack of the report (a random model: in all choosing draws).
        batch_changes: share of the predictions that depend on the batch; None if it cannot be measured.
        varying: share of the correctly classified images whose class changes from draw to draw.
        watched_changes: share of the images whose logits change while gradients are recorded; None if not measured.
        later_changes: share of the predictions on clean images that have changed since before the attacks.
        state_changed: whether weights, buffers or attributes have changed since before the attacks.
        sets_seed: whether the model sets the seed of torch's generator.
    """

    n: int
    steps: Curve
    cosine: float | answers.Missing | None
    without_gradient: float = 0.0
    eot: Curve = field(default_factory=list)
    fell: list[int] = field(default_factory=list)
    copies: dict[str, list[int]] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    points: Tensor | None = None
    left: list[bool] = field(default_factory=list)
    batch_changes: float | None = 0.0
    varying: float = 0.0
    watched_changes: float | None = 0.0
    later_changes: float = 0.0
    state_changed: bool = False
    sets_seed: bool = False

    def fallen(self, *masks: Sequence[int]) -> list[int]:
        """The indices of the images that withstood every attack of the report, but fell to a probe in the same ball.

        Args:
            *masks: the results of some probes, each a list like ``fell``; none means all probes.
        """
        found = masks or (self.fell, *self.copies.values())
        return [image for image, stands in enumerate(self.left) if stands and any(mask[image] for mask in found)]

    def found(self) -> list[int]:
        """The indices of all images that fell to a probe, whether they withstood the attacks of the report or not."""
        return [image for image, fell in enumerate(zip(self.fell, *self.copies.values(), strict=True)) if any(fell)]

    def curves(self) -> dict[str, list[list[float]]]:
        """Return the curves that are not empty, by the name of the setting that varies along the curve."""
        named = {"steps": self.steps, "EOT draws": self.eot}
        return {name: [list(point) for point in curve] for name, curve in named.items() if curve}


def _effort(subject: Subject, context: AttackContext) -> tuple[int, int, int]:
    """Return the numbers of a short attack: draws per step, draws that judge an image, and target classes."""
    if subject.is_random:
        return min(4, context.predictions(context.eot_iter)), JUDGES, TARGETS_OF_RANDOM
    return 1, 1, TARGETS


def probes_before(before: Before, context: AttackContext, model: Classifier) -> list[Probe]:
    """Return the probes that run before the attacks of the report. Each has at most as many images as a batch."""
    draws = DRAWS if before.subject.is_random else ()
    parts = torch.arange(len(before.x), device=before.x.device).split(context.resources.batch_size or len(before.x))
    kinds: list[Callable[..., Any]] = [_sweep, *(partial(_over_draws, n) for n in draws)]
    return [partial(kind, before, model, part) for kind in kinds for part in parts]


def asked_before(before: Before, context: AttackContext, measured: Sequence[Any]) -> Probes:
    """Collect the measurements before the attacks."""
    subject, x, y = before.subject, before.x, before.y
    some = slice(subject.batch_size)
    kinds = 1 + (len(DRAWS) if subject.is_random else 0)
    count = len(measured) // kinds
    sweeps, *by_draws = [measured[first : first + count] for first in range(0, len(measured), count)]
    curves, own, copied, missing, reached = zip(*sweeps, strict=True)
    steps = [(float(n), _share(torch.cat(each))) for n, each in zip(ITERATIONS, zip(*curves, strict=True), strict=True)]
    eot = [(float(n), _share(torch.cat([*each]))) for n, each in zip(DRAWS, by_draws, strict=False)]
    cosine, without = answers.differences(subject, y[some], x[some], near(context, x)[some])
    # A part whose images all fell to the model's own gradients has no result for the surrogates.
    names = dict.fromkeys(name for each in copied for name in each)
    copies = {
        name: [fell for each, mask in zip(copied, own, strict=True) for fell in each.get(name, [0] * len(mask))]
        for name in names
    }
    return Probes(
        len(x),
        steps,
        cosine,
        without,
        eot=eot,
        fell=[each for mask in own for each in mask],
        copies=copies,
        absent={name: reason for each in missing for name, reason in each.items()},
        points=torch.cat(reached) if subject.is_random else None,
    )


def probe(before: Before, context: AttackContext, asked: Probes, left: Sequence[bool]) -> Probes:
    """Make the measurements after the attacks.

    Args:
        before: the model's predictions before the attacks.
        context: the settings of the attacks.
        asked: the measurements before the attacks.
        left: for each of the first images, whether it withstood every attack of the report.
    """
    subject, x, y = before.subject, before.x, before.y
    # The seed is set, because the state of the generator depends on whether the attacks were run or read from a cache.
    torch.manual_seed(context.seed)
    return replace(
        asked,
        left=[*left],
        batch_changes=answers.batch_changes(subject, x),
        varying=answers.varying(before.model, x, y) if subject.is_random else 0.0,
        # The predictions are compared after all attacks, because a model may change after some number of calls.
        later_changes=before.later_changes(),
        state_changed=before.state_changed(),
        watched_changes=answers.watched_changes(subject, before.model, x, near(context, x)),
        sets_seed=answers.sets_seed(subject.model, subject.sample_images()),
    )


def _sweep(
    before: Before, model: Classifier, part: Tensor, context: AttackContext
) -> tuple[list[Tensor], list[int], dict[str, list[int]], dict[str, str], Tensor | None]:
    """Measure the fields ``steps``, ``fell``, ``copies``, ``absent`` and ``points`` of `Probes` for some images."""
    short = _Short(before, model, part, context)
    right = standing = short.right(short.x, short.y)
    steps = list[Tensor]()
    for count in ITERATIONS:
        standing = short.robust(standing, steps=count)
        steps.append(standing.cpu())
    targeted: dict[str, Any] = {
        "steps": STEPS,
        "loss": usable_loss("dlr_targeted", context.num_classes),
        "n_target_classes": short.targets,
        "seed": context.seed + 1,
    }
    standing = short.robust(standing, **targeted)
    own, copies, absent = right & ~standing, dict[str, list[int]](), dict[str, str]()
    if bool(standing.any()):
        ball = ThreatModel(context.norm, float(context.eps))
        for name, surrogate in before.subject.surrogates(ball, absent):
            left = short.robust(standing, gradients_from=surrogate, **targeted)
            standing, copies[name] = left, (standing & ~left).int().tolist()
    points = short.points.cpu() if before.subject.is_random else None
    return steps, own.int().tolist(), copies, absent, points


def _over_draws(draws: int, before: Before, model: Classifier, part: Tensor, context: AttackContext) -> Tensor:
    """Tell which of some images withstand a short attack that averages ``draws`` draws per step, bool ``[n]``."""
    return _Short(before, model, part, context).robust(torch.ones_like(part, dtype=torch.bool), eot_iter=draws).cpu()


def _share(which: Tensor) -> float:
    return float(which.float().mean())


class _Short:
    """Short attacks on some of the first images, whose indices are ``part``."""

    def __init__(self, before: Before, model: Classifier, part: Tensor, context: AttackContext):
        self.x, self.y, self.part, self.model, self.context = before.x[part], before.y[part], part, model, context
        self.draws, self.judges, self.targets = _effort(before.subject, context)
        #: For each image the last point that fell, or the clean image.
        self.points = self.x.clone()
        # The result does not depend on the process, nor on the probes that it has run before.
        torch.manual_seed(context.seed)

    def right(self, x: Tensor, y: Tensor) -> Tensor:
        """Tell for which images more than half of the draws are correct, bool ``[n]``."""
        logits = (in_parts(self.model, self.context.resources.batch_size or len(x))(x) for _ in range(self.judges))
        right = [(each.argmax(1) == y) & each.isfinite().any(1) for each in logits]
        return torch.stack(right).float().mean(0) > 0.5

    def robust(self, among: Tensor, **options: Any) -> Tensor:
        """Attack images by Auto-PGD, and tell which of them are still classified correctly, bool ``[n]``."""
        context, robust, at = self.context, among.clone(), among.nonzero()[:, 0]
        torch.manual_seed(context.seed)
        if len(at) == 0:
            return robust
        settings: dict[str, Any] = {"seed": 0, "steps": SWEEP, "eot_iter": self.draws, "loss": "margin"} | options
        attacked = apgd(
            self.model,
            self.x[at],
            self.y[at],
            eps=context.eps,
            norm=context.norm,
            judge_draws=self.judges,
            sample_ids=self.part[at],
            precision="auto",
            copies=context.resources.copies,
            max_forward_batch=context.resources.max_forward_batch or context.resources.batch_size,
            **settings,
        )
        robust[at] = self.right(attacked, self.y[at])
        fell = ~robust[at]
        self.points[at[fell]] = attacked[fell]
        return robust


def near(context: AttackContext, x: Tensor) -> Tensor:
    """Add noise of at most half the radius to the images."""
    size = x[0].numel()
    each = {"linf": 1.0, "l2": 1 / math.sqrt(size), "l1": 1 / size}[context.norm] * context.eps
    generator = torch.Generator().manual_seed(context.seed)
    noise = torch.rand(x.shape, generator=generator, device="cpu").to(x) - 0.5
    return (x + each * noise).clamp(0, 1)
