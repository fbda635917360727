"""Probes are short attacks on a few images, and tests of the model's predictions. The alarms judge their results.

The short attacks run before those of the report, and skip images that fell to an earlier short attack. The tests of the
predictions ask whether they are consistent: later, in other batches, and while gradients are recorded. After a small
step of the images, the logits should also change as the model's gradients predict.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from ...attacks.attacked_model import gradient_to
from ...attacks.base import ThreatModel, TimeIsOver
from ...attacks.objective import margin, usable_loss
from ...ops import attack_loss
from ...protocols import Classifier
from ...speed.agreement import BFLOAT16, apart, differ
from ..request.deadline import Subject
from ..request.fingerprint import state_digest
from ..searches.apgd import APGD
from ..searches.engine import JudgeContext

#: The reasons why a model's gradients cannot be compared with the measured changes of its output.
Missing = Literal["not finite", "no gradient", "zero gradient"]

#: The largest number of images for the probes; a probe is a short test of the model.
PROBED = 64
#: The number of times that a probe repeats the predictions on the same images.
AGAIN = 8
#: The number of images that are also predicted in batches of size 1.
ONE_BY_ONE = 16
#: Lengths of the small steps with which gradients are tested, in image units. The shorter step does not change the
#: output of a model that rounds its input to 256 levels, so the longer step has the length of two levels.
SMALL = (1e-3, 8e-3)
#: The number of random directions for each length of step.
DIRECTIONS = 2
#: Numbers of steps. STEPS: of the targeted short attacks. SWEEP: of the short attacks that compare numbers of draws.
STEPS, SWEEP = 20, 10
#: The numbers of steps that the first short attacks compare.
ITERATIONS = (1, 3, 10, 30)
#: The numbers of draws per step that the short attacks on a random model compare.
DRAWS = (1, 4, 16)
#: The draws that judge an image of a random model after a short attack: one unlucky draw must not decide.
JUDGES = 9
#: The number of target classes of each targeted short attack.
TARGETS = 2
#: On a random model: the number of images that are probed together, of images that order the surrogates, and of
#: surrogates that then attack the images of a group.
GROUP, RANKED, MOST_COPIES = 16, 8, 2
#: A larger margin counts as this one when surrogates are ordered.
LARGEST = 1e3

Curve = list[tuple[float, float]]


@dataclass(frozen=True)
class Probes:
    """The measurements of the probes, as plain values. A curve is a list of pairs of a setting and an accuracy.

    Fields up to ``points`` are measured before the attacks of the report, fields from ``left`` on after them.

    Args:
        n: number of images.
        steps: curve over the steps of the attack; an image that fell with fewer steps counts as fallen. It is empty for
            a random model, whose curve is ``eot``.
        cosine: cosine between the predicted and the measured changes of the margin, or the reason why there is none;
            None if it cannot be measured.
        without_gradient: share of images with a zero, non-finite or missing gradient, at the clean images or near them.
        compared: number of images whose gradients were compared; 0 stands for ``n``.
        eot: curve over the number of draws averaged per step; empty for a deterministic model.
        fell: for each image, 1 if it fell to the short attacks with the model's own gradients, otherwise 0.
        copies: by name of the surrogate, in the order of the attacks: for each image, 1 if it first fell to this
            surrogate, otherwise 0.
        absent: by name of a missing surrogate: the reason why it is missing.
        order: names of the surrogates; those whose gradients lowered the margins of a few images most come first.
        points: for a random model, the last point to which each image fell, or the clean image, ``[n, C, H, W]``.
        left: for each image, whether it withstood every attack of the report (a random model: in all choosing draws).
        batch_changes: share of the predictions that depend on the batch; None if it cannot be measured.
        varying: share of the correctly classified images whose class changes from draw to draw.
        watched_changes: share of the images whose logits change while gradients are recorded; None if not measured.
        later_changes: share of the predictions on clean images that have changed since before the attacks.
        state_changed: whether weights or buffers have changed since before the attacks.
        sets_seed: whether the model sets the seed of torch's generator.
        whole: whether all could be measured before the time was over.
    """

    n: int
    steps: Curve
    cosine: float | Missing | None
    without_gradient: float = 0.0
    compared: int = 0
    eot: Curve = field(default_factory=list)
    fell: list[int] = field(default_factory=list)
    copies: dict[str, list[int]] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)
    points: Tensor | None = None
    left: list[bool] = field(default_factory=list)
    batch_changes: float | None = 0.0
    varying: float = 0.0
    watched_changes: float | None = 0.0
    later_changes: float = 0.0
    state_changed: bool = False
    sets_seed: bool = False
    whole: bool = True

    @property
    def is_blind(self) -> bool:
        """Return True if the model's own gradients cannot be used at all."""
        return isinstance(self.cosine, str)

    def fallen(self, *masks: Sequence[int]) -> list[int]:
        """The indices of the images that withstood every attack of the report, but fell to a probe in the same ball.

        Args:
            *masks: the results of some probes, each a list like ``fell``; none means all probes.
        """
        masks = masks or (self.fell, *self.copies.values())
        return [image for image, stands in enumerate(self.left) if stands and any(mask[image] for mask in masks)]

    def found(self) -> list[int]:
        """The indices of all images that fell to a probe, whether they withstood the attacks of the report or not."""
        return [image for image, fell in enumerate(zip(self.fell, *self.copies.values(), strict=True)) if any(fell)]

    def curves(self) -> dict[str, list[list[float]]]:
        """Return the curves that are not empty, by the name of the setting that varies along the curve."""
        named = {"steps": self.steps, "EOT draws": self.eot}
        return {name: [list(point) for point in curve] for name, curve in named.items() if curve}


def measure_before_attacks(
    before: Before, context: JudgeContext, model: Any, settled: Callable[[Probes], object]
) -> Probes:
    """Make the measurements before the attacks of the report.

    A random model is probed in groups of images, until surrogates found no image of a group, or until the measurements
    are ``settled``: they contain a sign of masked gradients.
    """
    subject, x, is_random = before.subject, before.x, before.subject.is_random
    some = slice(subject.batch_size)
    cosine, without = differences(subject, before.y[some], x[some], near(context, x)[some])
    measured = Probes(0, [], cosine, without, len(x[some]))
    # On a random model every search costs several draws. If its gradients are useless, no search follows them.
    blind = is_random and measured.is_blind
    most = subject.batch_limit.limit(context.max_forward_batch)
    short = replace(context, batch_size=subject.batch_size, max_forward_batch=most)
    for part in torch.arange(len(x), device=x.device).split(GROUP if is_random else context.batch_size or len(x)):
        try:
            measured = _joined(measured, _sweep(before, _Short(before, model, part, short), measured, blind))
        except TimeIsOver:
            if measured.n == 0:
                raise
            return replace(measured, whole=False)
        if is_random and (not any(map(sum, measured.copies.values())) or settled(measured)):
            break
    return measured


def _joined(measured: Probes, more: Probes) -> Probes:
    if measured.n == 0:
        return more
    parts, n = (measured, more), measured.n + more.n

    def means(first: Curve, second: Curve) -> Curve:
        return [(at, (a * measured.n + b * more.n) / n) for (at, a), (_, b) in zip(first, second, strict=True)]

    steps, eot, fell = means(measured.steps, more.steps), means(measured.eot, more.eot), measured.fell + more.fell
    # A part whose images all fell to the model's own gradients has no result for the surrogates.
    names = dict.fromkeys([*measured.copies, *more.copies])
    copies = {name: [fell for part in parts for fell in part.copies.get(name, [0] * part.n)] for name in names}
    points = None if measured.points is None or more.points is None else torch.cat([measured.points, more.points])
    return replace(measured, n=n, steps=steps, eot=eot, fell=fell, copies=copies, points=points)


def _sweep(before: Before, short: _Short, measured: Probes, blind: bool) -> Probes:
    """Attack some images shortly by the gradients of the model itself, and of its surrogates."""
    context, is_random = short.context, before.subject.is_random
    ball = ThreatModel(context.norm, float(context.eps))
    surrogates, absent = before.subject.surrogates(ball)
    loss = usable_loss("dlr_targeted", context.num_classes)
    targeted: dict[str, Any] = {"steps": STEPS, "loss": loss, "n_target_classes": TARGETS, "seed": context.seed + 1}
    right, standing, steps, eot = short.right, short.right, Curve(), Curve()
    if not is_random:
        for count in ITERATIONS:
            standing = short.robust(standing, steps=count)
            steps.append((float(count), _share(standing)))
        standing = short.robust(standing, **targeted)
    elif not blind:
        standing = short.robust(standing, steps=STEPS)
        for draws in DRAWS:
            left = short.robust(torch.ones_like(right), eot_iter=draws)
            eot.append((float(draws), _share(left)))
    fell, copies, order = (right & ~standing).int().tolist(), dict[str, list[int]](), measured.order
    if bool(standing.any()):
        if is_random and not order:
            order = short.order(standing, surrogates)
        most = 0 if blind else MOST_COPIES if is_random else len(surrogates)
        for name, surrogate in before.subject.surrogates(ball, order)[0][:most]:
            options = {"steps": STEPS} if is_random else targeted
            left = short.robust(standing, gradients_from=surrogate, **options)
            standing, copies[name] = left, (standing & ~left).int().tolist()
    measured = replace(measured, n=len(right), steps=steps, eot=eot, fell=fell, copies=copies, absent=absent)
    order = order or sorted(copies, key=lambda name: -sum(copies[name]))
    return replace(measured, order=order, points=short.points.cpu() if is_random else None)


def probe(before: Before, context: JudgeContext, measured: Probes) -> Probes:
    """Make the measurements after the attacks.

    Args:
        before: the model's predictions before the attacks.
        context: the settings of the attacks.
        measured: the measurements before the attacks, with `Probes.left`.
    """
    subject, x, y = before.subject, before.x, before.y
    # The seed is set, because the state of the generator depends on whether the attacks were run or read from a cache.
    torch.manual_seed(context.seed)
    return replace(
        measured,
        whole=True,
        batch_changes=batch_changes(subject, x),
        varying=varying(before.model, x, y) if subject.is_random else 0.0,
        # The predictions are compared after all attacks, because a model may change after some number of calls.
        later_changes=before.later_changes(),
        state_changed=before.state_changed(),
        watched_changes=watched_changes(subject, before.model, x, near(context, x)),
        sets_seed=sets_seed(subject.asked, subject.sample_images()),
    )


class _Short:
    """Short attacks on some of the first images, whose indices are ``part``."""

    def __init__(self, before: Before, model: Any, part: Tensor, context: JudgeContext):
        self.x, self.y, self.part, self.model, self.context = before.x[part], before.y[part], part, model, context
        self.judges, self.draws = (JUDGES, min(4, context.eot_iter)) if before.subject.is_random else (1, 1)
        #: For each image the last point that fell, or the clean image.
        self.points = self.x.clone()
        # The result does not depend on the probes that ran before.
        torch.manual_seed(context.seed)
        self.right = self.rightly(self.x, self.y)

    def rightly(self, x: Tensor, y: Tensor) -> Tensor:
        """Tell for which images more than half of the draws are correct, bool ``[n]``."""
        draws = (in_parts(self.model, self.context.batch_size or len(x))(x) for _ in range(self.judges))
        right = [(logits.argmax(1) == y) & logits.isfinite().any(1) for logits in draws]
        return torch.stack(right).float().mean(0) > 0.5

    def robust(self, among: Tensor, gradients_from: Classifier | None = None, **options: Any) -> Tensor:
        """Attack images by Auto-PGD, and tell which of them are still classified correctly, bool ``[n]``."""
        at, robust = among.nonzero()[:, 0], among.clone()
        if len(at):
            attacked = self.attacked(at, gradients_from, **options)
            robust[at] = self.rightly(attacked, self.y[at])
            fell = ~robust[at]
            self.points[at[fell]] = attacked[fell]
        return robust

    def attacked(self, at: Tensor, gradients_from: Classifier | None, seed: int = 0, **options: Any) -> Tensor:
        """The points of a short attack on the images ``at``, by Auto-PGD with these options."""
        context, usual = self.context, dict[str, Any](steps=SWEEP, eot_iter=self.draws, loss="margin")
        torch.manual_seed(context.seed)
        # The attacked model counts its images, and so does a wrapper like it around the surrogate.
        source = None if gradients_from is None else self.model.around(lambda _: gradients_from)
        most = context.max_forward_batch or context.batch_size
        direct = JudgeContext(eps=context.eps, norm=context.norm, seed=seed, sample_ids=self.part[at])
        direct = replace(direct, judge_draws=self.judges, copies=context.copies, max_forward_batch=most)
        attack, direct = APGD(**usual | options), replace(direct, gradients_from=source)
        return attack.run(self.model, self.x[at], self.y[at], direct).images

    def order(self, among: Tensor, surrogates: Sequence[tuple[str, Classifier]]) -> list[str]:
        """The names of surrogates; first come those whose gradients lower the margins of a few images most."""
        at = among.nonzero()[:RANKED, 0]

        def leads(x: Tensor) -> list[float]:
            """The margins by which the model itself is right; less than 0 counts as 0."""
            draws = [-attack_loss(self.model(x).float(), self.y[at], "margin")[1] for _ in range(self.judges)]
            return torch.stack(draws).mean(0).nan_to_num(0.0, posinf=LARGEST).clamp(0, LARGEST).tolist()

        reached = {name: sum(leads(self.attacked(at, surrogate, eot_iter=1))) for name, surrogate in surrogates}
        return sorted(reached, key=lambda name: reached[name])


def near(context: JudgeContext, x: Tensor) -> Tensor:
    """Add noise of at most half the radius to the images."""
    size = x[0].numel()
    largest = {"linf": 1.0, "l2": 1 / math.sqrt(size), "l1": 1 / size}[context.norm] * context.eps
    generator = torch.Generator().manual_seed(context.seed)
    noise = torch.rand(x.shape, generator=generator, device="cpu").to(x) - 0.5
    return (x + largest * noise).clamp(0, 1)


# -- tests of the predictions -----------------------------------------------------------------------------------------


def in_parts(model: Classifier, most: int) -> Classifier:
    """A model that splits its batches into parts of at most ``most`` images, like the batches of the attacks."""
    return lambda x: torch.cat([model(part) for part in x.split(most)])


class Before:
    """Stores a model's predictions and state before the attacks, to compare them with those after the attacks."""

    def __init__(self, subject: Subject):
        self.subject = subject
        self.x, self.y = subject.x[:PROBED].to(subject.device), subject.y[:PROBED].to(subject.device)
        self.predicted = self.predictions()
        # A random model that draws from another generator than PyTorch's differs even with the same seed.
        self.repeatable = bool((self.predicted == self.predictions()).all()) or not subject.is_random
        self.state = state_digest(subject.model)

    def predictions(self) -> Tensor:
        """The predicted classes of the clean images, with the same noise every time if the model allows it."""
        torch.manual_seed(self.subject.seed)
        with self.subject.repeating():
            return self.model(self.x).argmax(1)

    def model(self, x: Tensor) -> Tensor:
        """The logits of images, in parts that fit into memory."""
        return in_parts(self.subject.asked, self.subject.batch_size)(x)

    def later_changes(self) -> float:
        """Predict the clean images several times again, and return the largest share of changed predictions."""
        return max(_share(self.predicted != self.predictions()) for _ in range(AGAIN)) if self.repeatable else 0.0

    def state_changed(self) -> bool:
        """Return True if weights or buffers have changed since this object was made."""
        # A model's last input may be a part of its state.
        self.predictions()
        return self.state != state_digest(self.subject.model)


def _share(which: Tensor) -> float:
    return float(which.float().mean())


def batch_changes(subject: Subject, x: Tensor) -> float | None:
    """Measure the share of predictions that change if the images are in reverse order, in a larger batch, or alone."""
    model, x = subject.asked, x[: subject.batch_size]
    if not subject.can_repeat:
        return None
    with subject.repeating():
        together = model(x).argmax(1)
        reverse = model(x.flip(0)).argmax(1).flip(0)
        alone = torch.cat([model(image[None]).argmax(1) for image in x[:ONE_BY_ONE]])
        # A batch of the size that attacks use is also predicted, because some faults appear only in large batches.
        larger = model(subject.x[: subject.batch_size].to(subject.device)).argmax(1)[: len(x)]
    return max(_share(together != reverse), _share(together != larger), _share(together[:ONE_BY_ONE] != alone))


def watched_changes(subject: Subject, model: Classifier, *points: Tensor) -> float | None:
    """The share of the images whose logits change while gradients are recorded."""
    if not subject.can_repeat:
        return None
    shares = list[float]()
    with subject.repeating():
        for x in points:
            torch.manual_seed(subject.seed)
            plain = model(x).float()
            torch.manual_seed(subject.seed)
            with torch.enable_grad():
                recorded = model(x.clone().requires_grad_()).detach().float()
            shares.append(_share(apart(plain, recorded, BFLOAT16) | (plain.argmax(1) != recorded.argmax(1))))
    return max(shares)


def varying(model: Classifier, x: Tensor, y: Tensor) -> float:
    """The share of images that some of 8 draws misclassify, among those that most draws classify correctly."""
    right = torch.stack([model(x).argmax(1) == y for _ in range(AGAIN)]).float().mean(0)
    return float(((right < 1) & (right > 0.5)).sum() / (right > 0.5).sum().clamp(min=1))


def sets_seed(model: Classifier, x: Tensor) -> bool:
    """Return True if a model sets the seed of torch's generator, so that its noise is always the same."""

    def after(seed: int) -> Tensor:
        torch.manual_seed(seed)
        model(x)
        return torch.get_rng_state()

    return torch.equal(after(1), after(2))


def differences(subject: Subject, y: Tensor, *points: Tensor) -> tuple[float | Missing | None, float]:
    """Compare the changes of a model's margin with those that its gradients predict.

    Returns:
        `Probes.cosine` and `Probes.without_gradient`.
    """
    with subject.repeating():
        if differ(_seeded(subject, points[0]), _seeded(subject, points[0])):
            return None, 0.0
    cosines, without = zip(*(_differences(subject, point, y) for point in points), strict=True)
    missing: list[Any] = [cosine for cosine in cosines if isinstance(cosine, str)]
    return missing[0] if missing else min(cosines), max(without)


def compared_gradients(subject: Subject, context: JudgeContext) -> float | Missing | None:
    """Compare the changes that the model's gradients predict with the measured ones, on and near clean images."""
    some = slice(min(ONE_BY_ONE, subject.batch_size))
    x, y = subject.x[some].to(subject.device), subject.y[some].to(subject.device)
    return differences(subject, y, x, near(context, x))[0]


def _differences(subject: Subject, x: Tensor, y: Tensor) -> tuple[float | Missing, float]:
    with subject.repeating():
        with torch.enable_grad():
            leaf = x.clone().requires_grad_()
            gradient = gradient_to(leaf, margin(_seeded(subject, leaf), y).sum())
        reason: Missing = "zero gradient" if gradient is not None else "no gradient"
        gradient = torch.zeros_like(x) if gradient is None else gradient
        flat = gradient.flatten(1)
        without = _share(~(flat.isfinite().all(1) & flat.any(1)))
        cosines = list[float]()
        for length in SMALL:
            promised, measured = list[Tensor](), list[Tensor]()
            for seed in range(DIRECTIONS):
                generator = torch.Generator().manual_seed(seed)
                signs = torch.randint(0, 2, x.shape, generator=generator, device="cpu").to(x) * 2 - 1
                # The model may not accept images outside of [0, 1].
                right, left = (x + length * signs).clamp(0, 1), (x - length * signs).clamp(0, 1)
                promised.append((gradient * (right - left)).flatten(1).sum(1))
                measured.append(margin(_seeded(subject, right), y) - margin(_seeded(subject, left), y))
            a, b = torch.cat(promised).double(), torch.cat(measured).double()
            if not bool(a.isfinite().all() and b.isfinite().all()):
                return "not finite", without
            if float(a.norm()) == 0:
                return reason, without
            cosines.append(float(a @ b / (a.norm() * b.norm()).clamp(min=1e-30)))
    return max(cosines), without


def _seeded(subject: Subject, x: Tensor) -> Tensor:
    # With the seed, a model that draws from torch's global generator has the same noise in every call.
    torch.manual_seed(subject.seed)
    return subject.asked(x).float()
