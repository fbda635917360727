"""What a model is asked besides the attacks: short sweeps on a few images, and whether it answers the same again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...attacks import AttackContext, margin, pgd
from ...protocols import Classifier, FixedNoise, supports
from ..fingerprint import fingerprint
from ..subject import Subject

#: Images that are asked, at most.
PROBED = 64
#: Steps of every short attack.
STEPS = 20
#: Shares of the report's radius that the sweep tries, before the radius at which every image is within reach.
RADII = (0.25, 0.5, 1.0, 2.0, 4.0)
ITERATIONS = (1, 3, 10, 30, 100)
DRAWS = (1, 4, 16)
STARTS = 5
#: Draws of a random model that judge a probe: the class of most of them counts, so that no image falls by one draw.
JUDGES = 9
#: Lengths of the small steps, in image units: a model that rounds its input needs the larger one.
SMALL = (1e-3, 8e-3)
DIRECTIONS = 4

Curve = list[tuple[float, float]]


@dataclass
class Probes:
    """What the probes measured; curves are pairs of a setting and the accuracy that is left.

    Args:
        n: images.
        chance: one over the number of classes.
        eps: over the radius in image units, the last one huge.
        steps: over the steps of the attack.
        eot: over the draws averaged per step; empty for a model that predicts the same every time.
        samples: over the samples K of a defence that has them.
        one_start: accuracy left by one random start, on average.
        all_starts: accuracy left by all of them.
        cosine: between promised and measured changes; None where something was not finite, or there was no gradient.
        batch_changes: share of the predictions that depend on the batch; None: cannot be told.
        varying: share of the correctly classified images whose class changes from draw to draw.
        watched_changes: share of the predictions that change when gradients are recorded.
        later_changes: share of the predictions on clean images that differ from those before the attacks.
        state_changed: whether weights, buffers or attributes differ from those before the attacks.
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
    watched_changes: float = 0.0
    later_changes: float = 0.0
    state_changed: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def in_parts(model: Classifier, most: int) -> Classifier:
    """A model that is given so many images at a time: the probes are bounded as the attacks are.

    Args:
        model: images to logits.
        most: images in one prediction.
    """
    return lambda x: torch.cat([model(part) for part in x.split(most)])


class Before:
    """The answers of a model before the attacks, to be compared with those after them.

    Args:
        subject: the model with its images.
    """

    def __init__(self, subject: Subject):
        self.subject = subject
        self.x, self.y = subject.x[:PROBED].to(subject.device), subject.y[:PROBED].to(subject.device)
        self.model = in_parts(subject.model, subject.batch_size)
        self.predicted = self.predictions()
        # not so for a random model that neither has fixed noise nor draws from the global generator
        self.repeatable = bool((self.predicted == self.predictions()).all()) or not subject.is_random
        self.mark = fingerprint(subject.model)

    def predictions(self) -> Tensor:
        """Classes of the clean images, under the same draws every time where the model allows that."""
        torch.manual_seed(self.subject.seed)
        model = self.subject.model
        if self.subject.is_random and supports(model, FixedNoise):
            with model.fixed_noise(self.subject.seed):  # type: ignore[attr-defined]
                return self.model(self.x).argmax(1)
        return self.model(self.x).argmax(1)


def probe(before: Before, context: AttackContext) -> Probes:
    """Ask the model; to be called after the attacks.

    Args:
        before: its answers before them.
        context: what the evaluation tells attacks.
    """
    subject, x, y = before.subject, before.x, before.y
    draws, judges = (min(4, context.eot_iter), JUDGES) if subject.is_random else (1, 1)
    short = _Short(subject.model, x, y, context, draws=draws, judges=judges)
    starts = [short.robust(seed=seed, random_start=True, steps=STEPS // 2) for seed in range(STARTS)]
    together = torch.stack(starts)
    found = Probes(
        n=len(x),
        chance=1 / subject.num_classes,
        eps=[(eps, short.accuracy(eps=eps)) for eps in _radii(context, x)],
        steps=[(float(steps), short.accuracy(steps=steps)) for steps in ITERATIONS],
        one_start=float(together.float().mean()),
        all_starts=float(together.all(0).float().mean()),
        cosine=_cosine(subject, x[: subject.batch_size], y[: subject.batch_size]),
        batch_changes=_batch_changes(subject, x),
    )
    if subject.is_random:
        found.eot = [(float(draws), short.accuracy(eot_iter=draws)) for draws in DRAWS]
        found.varying = _varying(before.model, x, y)
    samples = getattr(subject.model, "samples", None)
    if isinstance(samples, int) and samples > 1:
        found.samples = _over_samples(subject.model, samples, short)
    # last: a model that counts has counted the short attacks too
    again = before.predictions()
    found.state_changed = before.mark != fingerprint(subject.model)
    if before.repeatable:
        found.later_changes = _changed(before.predicted, again)
    if not subject.is_random:
        found.watched_changes = _changed(again, _watched(before.model, x))
    return found


class _Short:
    """Short attacks on the same few images."""

    def __init__(self, model: Classifier, x: Tensor, y: Tensor, context: AttackContext, *, draws: int, judges: int):
        self.model, self.x, self.y, self.context = model, x, y, context
        self.draws, self.judges = draws, judges

    def robust(self, *, eps: float | None = None, seed: int = 0, random_start: bool = False, **options: Any) -> Tensor:
        """Which images are right after PGD on the margin, bool ``[n]``."""
        torch.manual_seed(self.context.seed)
        settings: dict[str, Any] = {"steps": STEPS, "eot_iter": self.draws, "loss": "margin"} | options
        found = pgd(
            self.model, self.x, self.y, eps=self.context.eps if eps is None else eps, norm=self.context.norm,
            random_start=random_start, keep_best=True, seed=seed,
            max_forward_batch=self.context.max_forward_batch or self.context.batch_size,
            **settings,
        )  # fmt: skip
        right = torch.stack([self._right(found) for _ in range(self.judges)])
        return right.float().mean(0) > 0.5

    def _right(self, x: Tensor) -> Tensor:
        logits = in_parts(self.model, self.context.batch_size)(x)
        return (logits.argmax(1) == self.y) & logits.isfinite().any(1)

    def accuracy(self, **options: Any) -> float:
        """The share of them."""
        return float(self.robust(**options).float().mean())


def _radii(context: AttackContext, x: Tensor) -> list[float]:
    """The radii of the sweep, and one within which every image lies."""
    size = x[0].numel()
    whole = {"linf": 1.0, "l2": math.sqrt(size), "l1": float(size)}[context.norm]
    return [*(share * context.eps for share in RADII if share * context.eps < whole), whole]


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


def _changed(a: Tensor, b: Tensor) -> float:
    return float((a != b).float().mean())


def _watched(model: Classifier, x: Tensor) -> Tensor:
    with torch.enable_grad():
        return model(x.clone().requires_grad_()).detach().argmax(1)


def _varying(model: Classifier, x: Tensor, y: Tensor) -> float:
    """The share of the images, right in most of 8 draws, that are not right in all of them."""
    right = torch.stack([model(x).argmax(1) == y for _ in range(8)]).float().mean(0)
    mostly = right > 0.5
    return float(((right < 1) & mostly).sum() / mostly.sum().clamp(min=1))


def _batch_changes(subject: Subject, x: Tensor) -> float | None:
    """The share of the predictions that differ between a batch, its reverse and single images."""
    model, x = subject.model, x[: subject.batch_size]
    if subject.is_random and not supports(model, FixedNoise):
        return None
    with subject.variant("fixed" if subject.is_random else "random"):
        together = model(x).argmax(1)
        reverse = model(x.flip(0)).argmax(1).flip(0)
        alone = torch.cat([model(image[None]).argmax(1) for image in x[:16]])
    return max(_changed(together, reverse), _changed(together[:16], alone))


def _cosine(subject: Subject, x: Tensor, y: Tensor) -> float | None:
    """Cosine between the changes of the margin that gradients promise and those that are measured."""
    found: list[float] = []
    for length in SMALL:
        promised, measured = zip(*(_changes(subject, x, y, length, seed) for seed in range(DIRECTIONS)), strict=True)
        a, b = torch.cat(promised).double(), torch.cat(measured).double()
        if not bool(a.isfinite().all() and b.isfinite().all()) or float(a.norm()) == 0:
            return None
        found.append(float(a @ b / (a.norm() * b.norm()).clamp(min=1e-30)))
    return max(found)


def _changes(subject: Subject, x: Tensor, y: Tensor, length: float, seed: int) -> tuple[Tensor, Tensor]:
    """Promised and measured changes of every image's margin along one random direction of signs."""
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, x.shape, generator=generator).to(x) * 2 - 1
    direction = length * signs
    with subject.variant("fixed" if supports(subject.model, FixedNoise) else "random"):
        with torch.enable_grad():
            leaf = x.clone().requires_grad_()
            value = _margin(subject, leaf, y)
            gradient = None
            if value.requires_grad:
                gradient = torch.autograd.grad(value.sum(), leaf, allow_unused=True)[0]
        ahead, behind = _margin(subject, x + direction, y), _margin(subject, x - direction, y)
    promised = torch.zeros_like(ahead) if gradient is None else (gradient * direction).flatten(1).sum(1)
    return promised, (ahead - behind) / 2


def _margin(subject: Subject, x: Tensor, y: Tensor) -> Tensor:
    # a random model without fixed noise draws from the global generator
    torch.manual_seed(subject.seed)
    return margin(subject.model(x).float(), y)


def curves(probes: Probes) -> dict[str, Sequence[tuple[float, float]]]:
    """The curves by what they are over; empty ones are left out.

    Args:
        probes: what was measured.
    """
    named = {"eps": probes.eps, "steps": probes.steps, "samples K": probes.samples, "EOT draws": probes.eot}
    return {name: curve for name, curve in named.items() if curve}
