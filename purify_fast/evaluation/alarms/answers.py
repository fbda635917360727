"""A model's answers: the same later, in another batch, under gradients, with another seed? And as gradients say?"""

from __future__ import annotations

import torch
from torch import Tensor

from ...attacks.losses import margin
from ...protocols import Classifier, FixedNoise, supports
from ..fingerprint import fingerprint
from ..subject import Subject, Variant

#: Images that are asked, at most.
PROBED = 64
#: How often the same images are asked again, one time after the other.
AGAIN = 8
#: Images that are asked one by one.
ALONE = 16
#: Lengths of small steps, in image units: a model that rounds its input needs the larger one.
SMALL = (1e-3, 8e-3)
#: Random directions of small steps.
DIRECTIONS = 4
#: By how much of their spread logits may differ through rounding, in bfloat16 too.
SAME_LOGITS = 0.05


def in_parts(model: Classifier, most: int) -> Classifier:
    """A model that is given so many images at a time: the probes are bounded as the attacks are."""
    return lambda x: torch.cat([model(part) for part in x.split(most)])


class Before:
    """The answers of a model before the attacks, to be compared with those after them."""

    def __init__(self, subject: Subject):
        self.subject = subject
        self.x, self.y = subject.x[:PROBED].to(subject.device), subject.y[:PROBED].to(subject.device)
        self.predicted = self.predictions()
        # not so for a random model that neither has fixed noise nor draws from the global generator
        self.repeatable = bool((self.predicted == self.predictions()).all()) or not subject.is_random
        self.mark = fingerprint(subject.model)

    def predictions(self) -> Tensor:
        """Classes of the clean images, under the same draws every time where the model allows that."""
        torch.manual_seed(self.subject.seed)
        with self.subject.variant(quiet(self.subject)):
            return self.model(self.x).argmax(1)

    def model(self, x: Tensor) -> Tensor:
        """The model's answers, to as many images at a time as there is room for."""
        return in_parts(self.subject.model, self.subject.batch_size)(x)

    def later_changes(self) -> float:
        """The largest share of the predictions that differ from those before, in several predictions one by one."""
        return max(share(self.predicted, self.predictions()) for _ in range(AGAIN)) if self.repeatable else 0.0

    def state_changed(self) -> bool:
        """Whether weights, buffers or attributes differ from those before."""
        # a model may keep what it saw last, which was the same before
        self.predictions()
        return self.mark != fingerprint(self.subject.model)


def quiet(subject: Subject) -> Variant:
    """The variant in which a model gives the same answer every time, where it has one."""
    if not (subject.is_random and supports(subject.single, FixedNoise)):
        return "random"
    fault = subject.fault("fixed")
    return "fixed" if fault is None or fault.repeats else "random"


def is_repeatable(subject: Subject) -> bool:
    """Whether a model gives the same answer every time, by itself or in a variant of it."""
    return not subject.is_random or quiet(subject) == "fixed"


def share(a: Tensor, b: Tensor) -> float:
    """The share of the entries that differ."""
    return float((a != b).float().mean())


def batch_changes(subject: Subject, x: Tensor) -> float | None:
    """The share of the predictions that differ between a batch, its reverse, a larger batch and single images.

    Args:
        subject: the model with its images.
        x: the images that are asked, the first of the subject's.

    Returns:
        The largest of the shares; None for a random model whose noise cannot be fixed, of which it cannot be told.
    """
    model, x = subject.model, x[: subject.batch_size]
    if not is_repeatable(subject):
        return None
    with subject.variant(quiet(subject)):
        together = model(x).argmax(1)
        reverse = model(x.flip(0)).argmax(1).flip(0)
        alone = torch.cat([model(image[None]).argmax(1) for image in x[:ALONE]])
        # as many as the attacks are given
        larger = model(subject.x[: subject.batch_size].to(subject.device)).argmax(1)[: len(x)]
    return max(share(together, reverse), share(together, larger), share(together[:ALONE], alone))


def watched_changes(subject: Subject, model: Classifier, *points: Tensor) -> float | None:
    """The share of the images whose logits are others while gradients are recorded.

    Args:
        subject: the model with its images.
        model: the same model, in parts.
        points: images ``[B, C, H, W]``.

    Returns:
        The largest share over the points; None for a random model whose noise cannot be fixed, of which it cannot be
        told.
    """
    if not is_repeatable(subject):
        return None
    with subject.variant(quiet(subject)):
        return max(_watched(model, point, subject.seed) for point in points)


def _watched(model: Classifier, x: Tensor, seed: int) -> float:
    torch.manual_seed(seed)
    plain = model(x).float()
    torch.manual_seed(seed)
    with torch.enable_grad():
        recorded = model(x.clone().requires_grad_()).detach().float()
    spread = plain.amax(1) - plain.amin(1)
    other = (plain - recorded).abs().amax(1) > SAME_LOGITS * spread
    return float((other | (plain.argmax(1) != recorded.argmax(1))).float().mean())


def varying(model: Classifier, x: Tensor, y: Tensor) -> float:
    """The share of the images, right in most of 8 draws, that are not right in all of them.

    Args:
        model: images to logits.
        x: images ``[B, C, H, W]``.
        y: labels, int64 ``[B]``.
    """
    right = torch.stack([model(x).argmax(1) == y for _ in range(AGAIN)]).float().mean(0)
    mostly = right > 0.5
    return float(((right < 1) & mostly).sum() / mostly.sum().clamp(min=1))


def sets_seed(model: Classifier, x: Tensor) -> bool:
    """Whether a model puts torch's generator into a state of its own choice: its noise is then always the same.

    Args:
        model: images to logits.
        x: a few images ``[B, C, H, W]``.
    """

    def after(seed: int) -> Tensor:
        torch.manual_seed(seed)
        model(x)
        return torch.get_rng_state()

    return torch.equal(after(1), after(2))


def cosine(subject: Subject, y: Tensor, *points: Tensor) -> float | None:
    """Cosine between the changes of the margin that gradients promise and those that are measured.

    Args:
        subject: the model with its images.
        y: labels, int64 ``[B]``.
        points: images ``[B, C, H, W]``: the clean ones, and others near them.

    Returns:
        The smallest over the points; None where something was not finite, or there was no gradient.
    """
    cosines = [_cosine(subject, point, y) for point in points]
    known = [value for value in cosines if value is not None]
    return min(known) if len(known) == len(cosines) else None


def _cosine(subject: Subject, x: Tensor, y: Tensor) -> float | None:
    cosines: list[float] = []
    for length in SMALL:
        promised, measured = zip(*(_changes(subject, x, y, length, seed) for seed in range(DIRECTIONS)), strict=True)
        a, b = torch.cat(promised).double(), torch.cat(measured).double()
        if not bool(a.isfinite().all() and b.isfinite().all()) or float(a.norm()) == 0:
            return None
        cosines.append(float(a @ b / (a.norm() * b.norm()).clamp(min=1e-30)))
    return max(cosines)


def _changes(subject: Subject, x: Tensor, y: Tensor, length: float, seed: int) -> tuple[Tensor, Tensor]:
    """Promised and measured changes of every image's margin along one random direction of signs."""
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, x.shape, generator=generator).to(x) * 2 - 1
    direction = length * signs
    with subject.variant(quiet(subject)):
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
