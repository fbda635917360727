"""Probes of a model besides the attacks: short attacks on a few images, and tests whether it answers the same again.

The short attacks run before the attacks of the report, and decide how far the attacks of the report search. They use
the same copy of the model for gradients as the attacks do, and skip images that have fallen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ...attacks import AttackContext, apgd
from ...attacks.base import ThreatModel
from ...attacks.losses import usable_loss
from ...protocols import Classifier
from ..subject import Subject
from . import answers
from .answers import Before, in_parts

#: Numbers of steps: STEPS for the targeted short attacks, SWEEP for the short attacks that compare numbers of draws.
STEPS, SWEEP = 20, 10
#: The numbers of steps that the first short attacks compare.
ITERATIONS = (1, 3, 10, 30)
#: The numbers of draws per step that the short attacks on a random model compare.
DRAWS = (1, 4, 16)
#: How many draws judge each image of a random model after a short attack. The majority counts, so that no image falls
#: by a single unlucky draw.
JUDGES = 9
#: The usual number of surrogates of a model with gates or thresholds. The progress bar estimates the time of the probes
#: by it.
USUAL_SURROGATES = 3
#: How many wrong classes each targeted short attack tries. Each step on a random model takes several draws, so there
#: only the nearest class is tried.
TARGETS, TARGETS_OF_RANDOM = 2, 1

Curve = list[tuple[float, float]]


@dataclass(frozen=True)
class Probes:
    """Measurements of the probes, in plain values; curves are pairs of a setting and the accuracy that is left.

    The measurements after ``absent`` are made after the attacks of the report.

    Args:
        n: number of images.
        steps: curve over the steps of the attack; images that fell to fewer steps count as fallen.
        cosine: cosine between promised and measured changes, or the reason why there is none, in words.
        without_gradient: the largest share of the images, clean or near them, whose gradient is zero, not finite or
            missing.
        eot: curve over the draws averaged per step; empty for a model that predicts the same every time.
        fell: mask of the images that fell to the short attacks along the model's own gradients, as 0 and 1.
        copies: for each surrogate's name, in the order tried, a mask of the other images that fell to its gradients,
            as 0 and 1.
        absent: for each missing surrogate's name, the reason why it is missing.
        left: mask of the images that withstood every attack of the report.
        batch_changes: share of the predictions that depend on the batch; None: cannot be measured.
        varying: share of the correctly classified images whose class changes from draw to draw.
        watched_changes: share of the images whose logits change when gradients are recorded; None: cannot be measured.
        later_changes: share of the predictions on clean images that differ from those before the attacks.
        state_changed: whether weights, buffers or attributes differ from those before the attacks.
        sets_seed: whether the model sets the seed of torch's generator itself.
    """

    n: int
    steps: Curve
    cosine: float | answers.Missing
    without_gradient: float = 0.0
    eot: Curve = field(default_factory=list)
    fell: list[int] = field(default_factory=list)
    copies: dict[str, list[int]] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    left: list[bool] = field(default_factory=list)
    batch_changes: float | None = 0.0
    varying: float = 0.0
    watched_changes: float | None = 0.0
    later_changes: float = 0.0
    state_changed: bool = False
    sets_seed: bool = False

    def fallen(self, *masks: Sequence[int]) -> list[int]:
        """Numbers of the images that withstood every attack of the report, and fell to a probe within its ball.

        Args:
            *masks: masks of the images that fell to some probes; without any: to all probes.
        """
        found = masks or (self.fell, *self.copies.values())
        return [image for image, stands in enumerate(self.left) if stands and any(mask[image] for mask in found)]

    def curves(self) -> dict[str, list[list[float]]]:
        """The curves, by the name of their setting, without empty curves."""
        named = {"steps": self.steps, "EOT draws": self.eot}
        return {name: [list(point) for point in curve] for name, curve in named.items() if curve}


class Probe(NamedTuple):
    """A measurement by short attacks, which can be made without the others.

    Args:
        kind: "sweep": measures the accuracy over the steps, and which images fall along the model's own and along other
            gradients. "draws": measures the accuracy after attacks whose gradients average some draws.
        value: number of draws.
        run: makes the measurement, with the attacks' context.
    """

    kind: Literal["sweep", "draws"]
    value: int
    run: Callable[[AttackContext], Any]


def cost(subject: Subject, context: AttackContext) -> int:
    """An upper estimate of the images that the probes give to the model, each pass of an image counted."""
    draws, judges, targets = _effort(subject, context)
    passes = sum(ITERATIONS) * draws + len(ITERATIONS) * judges
    passes += (1 + USUAL_SURROGATES) * (targets * STEPS * draws + judges)
    if subject.is_random:
        passes += SWEEP * sum(DRAWS) + len(DRAWS) * judges
    return passes * min(answers.PROBED, len(subject.x))


def _effort(subject: Subject, context: AttackContext) -> tuple[int, int, int]:
    """The draws of each step of a short attack, the draws that judge it, and the classes that it is led to."""
    if subject.is_random:
        return min(4, context.predictions(context.eot_iter)), JUDGES, TARGETS_OF_RANDOM
    return 1, 1, TARGETS


def probes_before(before: Before, model: Classifier) -> list[Probe]:
    """The probes that come before the attacks of the report; the longest is first.

    Args:
        before: the model's answers before the attacks.
        model: the attacked model, which is the subject's own with a counter.
    """
    draws = DRAWS if before.subject.is_random else ()
    return [
        Probe("sweep", 1, partial(_sweep, before, model)),
        *(Probe("draws", n, partial(_over_draws, before, model, n)) for n in draws),
    ]


def asked_before(before: Before, context: AttackContext, measured: Sequence[tuple[Probe, Any]]) -> Probes:
    """Collect the measurements made before the attacks.

    Args:
        before: the model's answers before them.
        context: context of the attacks.
        measured: the probes of `probes_before`, each with its measurement.
    """
    subject, x, y = before.subject, before.x, before.y
    some = slice(subject.batch_size)
    ((steps, fell, copies, absent),) = [found for probe, found in measured if probe.kind == "sweep"]
    eot = [(float(probe.value), found) for probe, found in measured if probe.kind == "draws"]
    cosine, without = answers.differences(subject, y[some], x[some], _near(context, x)[some])
    return Probes(len(x), steps, cosine, without, eot=eot, fell=fell, copies=copies, absent=absent)


def probe(before: Before, context: AttackContext, asked: Probes, left: Sequence[bool]) -> Probes:
    """Ask the model again; to be called after the attacks.

    Args:
        before: its answers before them.
        context: context of the attacks.
        asked: measurements made before the attacks.
        left: mask of the first images that withstood every attack of the report.
    """
    subject, x, y = before.subject, before.x, before.y
    # Set the seed, because the attacks drew random numbers only if they were run now and not read from an earlier run.
    torch.manual_seed(context.seed)
    return replace(
        asked,
        left=[*left],
        batch_changes=answers.batch_changes(subject, x),
        varying=answers.varying(before.model, x, y) if subject.is_random else 0.0,
        # Compare the answers only now, after all attacks: a model that changes after some number of calls has changed
        # by then.
        later_changes=before.later_changes(),
        state_changed=before.state_changed(),
        watched_changes=answers.watched_changes(subject, before.model, x, _near(context, x)),
        sets_seed=answers.sets_seed(subject.model, subject.sample_images()),
    )


def _sweep(
    before: Before, model: Classifier, context: AttackContext
) -> tuple[Curve, list[int], dict[str, list[int]], dict[str, str]]:
    """The curve over the steps, and the images that fall to own and to other gradients: see `Probes`.

    Images that fell to fewer steps are not attacked again.
    """
    short = _Short(before, model, context)
    right = standing = short.right(short.x, short.y)
    steps: Curve = []
    for count in ITERATIONS:
        standing = short.robust(standing, steps=count)
        steps.append((float(count), _share(standing)))
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
    return steps, own.int().tolist(), copies, absent


def _over_draws(before: Before, model: Classifier, draws: int, context: AttackContext) -> float:
    """The share of images that are right after gradients over these draws."""
    everything = torch.ones(len(before.x), dtype=torch.bool, device=before.x.device)
    return _share(_Short(before, model, context).robust(everything, eot_iter=draws))


def _share(which: Tensor) -> float:
    return float(which.float().mean())


class _Short:
    """Short attacks on the same few images."""

    def __init__(self, before: Before, model: Classifier, context: AttackContext):
        self.x, self.y, self.model, self.context = before.x, before.y, model, context
        self.draws, self.judges, self.targets = _effort(before.subject, context)

    def right(self, x: Tensor, y: Tensor) -> Tensor:
        """Mask of the images that are right in most draws, bool ``[n]``."""
        logits = (in_parts(self.model, self.context.resources.batch_size or len(x))(x) for _ in range(self.judges))
        right = [(each.argmax(1) == y) & each.isfinite().any(1) for each in logits]
        return torch.stack(right).float().mean(0) > 0.5

    def robust(self, among: Tensor, **options: Any) -> Tensor:
        """Mask of the images that are right after Auto-PGD on the margin, bool ``[n]``; others count as wrong.

        Args:
            among: mask of the images that are attacked, bool ``[n]``.
            **options: further options of `apgd`.
        """
        context, robust, at = self.context, among.clone(), among.nonzero()[:, 0]
        torch.manual_seed(context.seed)
        if len(at) == 0:
            return robust
        settings: dict[str, Any] = {"steps": SWEEP, "eot_iter": self.draws, "loss": "margin"} | options
        attacked = apgd(
            self.model,
            self.x[at],
            self.y[at],
            eps=context.eps,
            norm=context.norm,
            judge_draws=self.judges,
            sample_ids=at,
            precision="auto",
            copies=context.resources.copies,
            max_forward_batch=context.resources.max_forward_batch or context.resources.batch_size,
            **settings,
        )
        robust[at] = self.right(attacked, self.y[at])
        return robust


def _near(context: AttackContext, x: Tensor) -> Tensor:
    """The images with noise of half the radius at most, where a model may behave differently than on clean images.

    Clean images have few different values, so a defence can tell them from attacked images.
    """
    size = x[0].numel()
    each = {"linf": 1.0, "l2": 1 / math.sqrt(size), "l1": 1 / size}[context.norm] * context.eps
    generator = torch.Generator().manual_seed(context.seed)
    noise = torch.rand(x.shape, generator=generator).to(x) - 0.5
    return (x + each * noise).clamp(0, 1)
