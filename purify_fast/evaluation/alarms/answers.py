"""Whether a model gives the same answer again: later, in another batch, watched by gradients, with another seed."""

from __future__ import annotations

import torch
from torch import Tensor

from ...protocols import Classifier, FixedNoise, supports
from ..fingerprint import fingerprint
from ..subject import Subject, Variant

#: Images that are asked, at most.
PROBED = 64
#: How often the same images are asked again, one time after the other.
AGAIN = 8
#: Images that are asked one by one.
ALONE = 16
#: By how much of their spread logits may differ through rounding, in bfloat16 too.
SAME_LOGITS = 0.05


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
        with self.subject.variant(quiet(self.subject)):
            return self.model(self.x).argmax(1)

    def later_changes(self) -> float:
        """The largest share of the predictions that differ from those before, in several predictions one by one."""
        return max(share(self.predicted, self.predictions()) for _ in range(AGAIN)) if self.repeatable else 0.0

    def state_changed(self) -> bool:
        """Whether weights, buffers or attributes differ from those before."""
        # a model may keep what it saw last, which was the same before
        self.predictions()
        return self.mark != fingerprint(self.subject.model)


def quiet(subject: Subject) -> Variant:
    """The variant in which a model gives the same answer every time, where it has one.

    Args:
        subject: the model with its images.
    """
    if not (subject.is_random and supports(subject.model, FixedNoise)):
        return "random"
    fault = subject.fault("fixed")
    return "fixed" if fault is None or fault.repeats else "random"


def is_repeatable(subject: Subject) -> bool:
    """Whether a model gives the same answer every time, by itself or in a variant of it.

    Args:
        subject: the model with its images.
    """
    return not subject.is_random or quiet(subject) == "fixed"


def share(a: Tensor, b: Tensor) -> float:
    """The share of the entries that differ.

    Args:
        a: any tensor.
        b: of its shape.
    """
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
