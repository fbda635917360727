"""Tests whether a model's predictions are consistent: later, in other batches, and while gradients are recorded.

After a small step of the images, the logits should also change as the model's gradients predict.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from ...attacks.attacked_model import differ, gradient_to
from ...attacks.losses import margin
from ...model_state import state_hash
from ...protocols import Classifier, FixedNoise, supports
from ..request.subject import Subject, Variant

#: The reasons why a model's gradients cannot be compared with the measured changes of its output.
Missing = Literal["not finite", "no gradient", "zero gradient"]

#: The largest number of images for the probes; a probe is a short test of the model.
PROBED = 64
#: The number of times that a probe repeats the predictions on the same images.
AGAIN = 8
#: The number of images that are also predicted in batches of size 1.
ALONE = 16
#: Lengths of the small steps with which gradients are tested, in image units. The shorter step does not change the
#: output of a model that rounds its input to 256 levels, so the longer step has the length of two levels.
SMALL = (1e-3, 8e-3)
#: The number of random directions for each length of step.
DIRECTIONS = 2
#: An image's logits in two predictions are taken as equal if they differ by at most this share of their spread (largest
#: minus smallest logit). Rounding in bfloat16 causes smaller differences.
SAME_LOGITS = 0.05


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
        self.mark = self._state()

    def predictions(self) -> Tensor:
        """The predicted classes of the clean images, with the same noise every time if the model allows it."""
        torch.manual_seed(self.subject.seed)
        with self.subject.variant(quiet(self.subject)):
            return self.model(self.x).argmax(1)

    def model(self, x: Tensor) -> Tensor:
        """The logits of images, in parts that fit into memory."""
        return in_parts(self.subject.model, self.subject.batch_size)(x)

    def later_changes(self) -> float:
        """Predict the clean images several times again, and return the largest share of changed predictions."""
        return max(share(self.predicted, self.predictions()) for _ in range(AGAIN)) if self.repeatable else 0.0

    def _state(self) -> str | None:
        """A hash of the model's state; None for a function, and for a model that cannot be compared."""
        try:
            return state_hash(self.subject.model) if isinstance(self.subject.base_model, nn.Module) else None
        # A user's module may raise any error while its state is read.
        except Exception:
            return None

    def state_changed(self) -> bool:
        """Tell whether weights, buffers or attributes have changed since this object was made."""
        # A model's last input may be a part of its state.
        self.predictions()
        return self.mark != self._state()


def quiet(subject: Subject) -> Variant:
    """Return the variant in which a model always predicts the same, or "random" if there is no such variant."""
    if not (subject.is_random and supports(subject.base_model, FixedNoise)):
        return "random"
    fault = subject.fault("fixed")
    return "fixed" if fault is None or fault.repeats else "random"


def is_repeatable(subject: Subject) -> bool:
    """Tell whether a model, or its variant with fixed noise, always predicts the same."""
    return not subject.is_random or quiet(subject) == "fixed"


def share(a: Tensor, b: Tensor) -> float:
    """Return the share of the entries in which a and b differ."""
    return float((a != b).float().mean())


def batch_changes(subject: Subject, x: Tensor) -> float | None:
    """Measure the share of predictions that change if the images are in reverse order, in a larger batch, or alone."""
    model, x = subject.model, x[: subject.batch_size]
    if not is_repeatable(subject):
        return None
    with subject.variant(quiet(subject)):
        together = model(x).argmax(1)
        reverse = model(x.flip(0)).argmax(1).flip(0)
        alone = torch.cat([model(image[None]).argmax(1) for image in x[:ALONE]])
        # A batch of the size that attacks use is also predicted, because some faults appear only in large batches.
        larger = model(subject.x[: subject.batch_size].to(subject.device)).argmax(1)[: len(x)]
    return max(share(together, reverse), share(together, larger), share(together[:ALONE], alone))


def watched_changes(subject: Subject, model: Classifier, *points: Tensor) -> float | None:
    """The share of the images whose logits change while gradients are recorded."""
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
    """The share of images that some of 8 draws misclassify, among those that most draws classify correctly."""
    right = torch.stack([model(x).argmax(1) == y for _ in range(AGAIN)]).float().mean(0)
    mostly = right > 0.5
    return float(((right < 1) & mostly).sum() / mostly.sum().clamp(min=1))


def sets_seed(model: Classifier, x: Tensor) -> bool:
    """Tell whether a model sets the seed of torch's generator, so that its noise is always the same."""

    def after(seed: int) -> Tensor:
        torch.manual_seed(seed)
        model(x)
        return torch.get_rng_state()

    return torch.equal(after(1), after(2))


def differences(subject: Subject, y: Tensor, *points: Tensor) -> tuple[float | Missing | None, float]:
    """Compare the changes of a model's margin with the changes that its gradients predict."""
    with subject.variant(quiet(subject)):
        if differ(_seeded(subject, points[0]), _seeded(subject, points[0])):
            return None, 0.0
    measured = [_differences(subject, point, y) for point in points]
    missing = [cosine for cosine, _ in measured if isinstance(cosine, str)]
    cosine = missing[0] if missing else min(cosine for cosine, _ in measured if not isinstance(cosine, str))
    return cosine, max(without for _, without in measured)


def has_no_gradient(subject: Subject) -> bool:
    """Tell whether a model's output has no gradient with respect to the images, not even zeros."""
    with torch.enable_grad():
        leaf = subject.sample_images().clone().requires_grad_()
        return gradient_to(leaf, subject.model(leaf).float().sum()) is None


def _differences(subject: Subject, x: Tensor, y: Tensor) -> tuple[float | Missing, float]:
    with subject.variant(quiet(subject)):
        with torch.enable_grad():
            leaf = x.clone().requires_grad_()
            gradient = gradient_to(leaf, margin(_seeded(subject, leaf), y).sum())
        reason: Missing = "zero gradient" if gradient is not None else "no gradient"
        gradient = torch.zeros_like(x) if gradient is None else gradient
        flat = gradient.flatten(1)
        without = float((~(flat.isfinite().all(1) & flat.any(1))).float().mean())
        cosines: list[float] = []
        for length in SMALL:
            steps = [length * _signs(x, seed) for seed in range(DIRECTIONS)]
            # The model may not accept images outside of [0, 1].
            ends = [((x + step).clamp(0, 1), (x - step).clamp(0, 1)) for step in steps]
            promised = [(gradient * (right - left)).flatten(1).sum(1) for right, left in ends]
            measured = [margin(_seeded(subject, a), y) - margin(_seeded(subject, b), y) for a, b in ends]
            a, b = torch.cat(promised).double(), torch.cat(measured).double()
            if not bool(a.isfinite().all() and b.isfinite().all()):
                return "not finite", without
            if float(a.norm()) == 0:
                return reason, without
            cosines.append(float(a @ b / (a.norm() * b.norm()).clamp(min=1e-30)))
    return max(cosines), without


def _signs(x: Tensor, seed: int) -> Tensor:
    """Random signs for each image, shape of x."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, x.shape, generator=generator, device="cpu").to(x) * 2 - 1


def _seeded(subject: Subject, x: Tensor) -> Tensor:
    # With the seed, a model that draws from torch's global generator has the same noise in every call.
    torch.manual_seed(subject.seed)
    return subject.model(x).float()
