"""Surrogates of a model for a careful attacker: its parts alone, softened copies, fewer samples, no noise.

A sharp gate, a threshold, a rounding, a detached part or a head that saturates leaves a gradient finite, not zero, and
useless. Images found on a copy without it are then tried on the model itself. A surrogate needs no cooperation: such
functions are replaced while the model's own code runs (`purify_fast.evaluation.softening`).
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..attacks import BpdaModel, frozen
from ..attacks.ball import ball_around, normal_in_ball
from ..attacks.base import ThreatModel
from ..model_state import attributes
from ..protocols import Classifier, DeterministicMode, FixedNoise, OwnSurrogates, has_classifier, is_purifier, supports
from .identity_backward import REVISION as PASSED_REVISION
from .identity_backward import PassedThrough, blocking
from .softening import REVISION, Softening

#: The temperatures of the softened copies, by which the slopes of gates are divided: a larger temperature makes a copy
#: softer. One more copy keeps all values and changes only the gradients.
TEMPERATURES = (10.0, 100.0)
#: At most this many parts of a model are attacked alone. Modules are tried from the outside in.
MOST_PARTS = 4
#: Parts are looked for down to this depth of nested modules.
DEPTH = 2
#: Two gradients are the same if, for each image, their values differ by at most this share of the largest value.
ROUNDING = 1e-4
#: The reason why a surrogate is missing is cut off after this many characters.
REASON = 160
#: Gradients are also compared at corners of the ball: points this many radii away from the images, projected onto the
#: ball.
FAR = 100.0


class _Around(nn.Module):
    """A module around any callable."""

    def __init__(self, model: Classifier):
        super().__init__()
        self.model = model
        self.eval()


class Softened(_Around):
    """A model through whose thresholds, masks, rounding and detached parts gradients pass.

    Args:
        model: any callable.
        temperature: divisor of the arguments of sigmoid, softmax and the like, and of the slope of comparisons; None:
            the logits stay exact, and only their gradient changes.
    """

    def __init__(self, model: Classifier, temperature: float | None):
        super().__init__(model)
        # A fingerprint covers the attributes of this object, but not this package's code. The revision tells kept rows
        # of older code apart.
        self.temperature, self.revision = temperature, REVISION

    def forward(self, x: Tensor) -> Tensor:
        wanted = torch.is_grad_enabled()
        if self.temperature is None and not wanted:
            return self.model(x)
        # Softening recognizes tensors that depend on the images by requires_grad, so the images need it even if no
        # gradient is wanted.
        leaf = x if x.requires_grad else x.detach().requires_grad_()
        # Enable gradients for the whole call, since the model may compute gradients itself and Softening ignores its
        # own switches.
        with torch.enable_grad(), Softening(self.temperature) as mode:
            logits = self.model(leaf)
        mode.let_through([logits])
        return logits if wanted else logits.detach()


class IdentityBackward(_Around):
    """A model some of whose modules are the identity in the backward pass.

    Args:
        model: any callable.
        modules: these modules inside the model.
    """

    def __init__(self, model: Classifier, modules: Sequence[nn.Module]):
        super().__init__(model)
        self.passed, self.revision = nn.ModuleList(modules), PASSED_REVISION

    def forward(self, x: Tensor) -> Tensor:
        """Images ``[B, ...]`` to logits ``[B, classes]``."""
        with PassedThrough([*self.passed]) if torch.is_grad_enabled() else contextlib.nullcontext():
            return self.model(x)


class _WithSameAnswer(_Around):
    """A random model in a mode in which it gives the same answer every time."""

    def draw_logits(self, x: Tensor, draws: int) -> Tensor:
        """Logits of ``draws`` calls, ``[draws, B, classes]``, from one call.

        Args:
            x: images ``[B, C, H, W]``.
            draws: number of calls.
        """
        return self(x).expand(draws, -1, -1)


class WithoutNoise(_WithSameAnswer):
    """A random model in its deterministic mode.

    Args:
        model: with ``deterministic()``.
    """

    def forward(self, x: Tensor) -> Tensor:
        with self.model.deterministic():  # type: ignore[attr-defined]
            return self.model(x)


class WithFixedNoise(_WithSameAnswer):
    """A random model with one draw of its noise, the same in every call.

    Args:
        model: with ``fixed_noise(seed)``.
    """

    def forward(self, x: Tensor) -> Tensor:
        with self.model.fixed_noise(0):  # type: ignore[attr-defined]
            return self.model(x)


class FewerSamples(_Around):
    """A defence that predicts from fewer samples.

    Args:
        model: with an attribute ``samples``.
        samples: number of samples here.
    """

    def __init__(self, model: nn.Module, samples: int):
        super().__init__(model)
        self.samples = samples

    def forward(self, x: Tensor) -> Tensor:
        model: Any = self.model
        before, model.samples = model.samples, self.samples
        try:
            return model(x)
        finally:
            model.samples = before


class Together(nn.Module):
    """All parts at once: an image that fools each part fools any choice between them.

    Args:
        parts: models of the same classes.
    """

    def __init__(self, parts: Sequence[Classifier]):
        super().__init__()
        self.parts = list(parts)
        # Register the parts as modules too, so that PyTorch finds their weights.
        self.modules_inside = nn.ModuleList(part for part in parts if isinstance(part, nn.Module))
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([part(x).float().log_softmax(1) for part in self.parts]).mean(0)


def surrogates(
    model: Classifier, x: Tensor, num_classes: int, ball: ThreatModel, absent: dict[str, str] | None = None
) -> list[tuple[str, Classifier]]:
    """The surrogates of a model, by name; those that fail, or give logits that are not finite, are left out.

    Args:
        model: images to logits; any callable.
        x: a few images ``[B, C, H, W]`` on its device.
        num_classes: number of classes of its logits.
        ball: norm and radius of the attacks.
        absent: dictionary to which reasons for missing copies are written, by name.
    """
    absent = {} if absent is None else absent
    with _tried(model, x):
        parts = _parts(model, x, num_classes)
        parts = [(name, part) for name, part in parts if isinstance(_gradient(part, x, num_classes), Tensor)]
        blocked = blocking(model, [("", model)] if isinstance(model, nn.Module) else [*_inside(model)], x)
    candidates: list[tuple[str, Classifier]] = [(f"{name} alone", part) for name, part in parts]
    if len(parts) > 1:
        candidates.append(("all parts together", Together([part for _, part in parts])))
    candidates.append(("a straight-through copy", Softened(model, None)))
    candidates += [(f"a copy softened {t:g} times", Softened(model, t)) for t in TEMPERATURES]
    for group in blocked:
        named = f"a copy whose {' and '.join(group)} {'is' if len(group) == 1 else 'are'} the identity backward"
        candidates.append((named, IdentityBackward(model, [*group.values()])))
    if supports(model, DeterministicMode):
        candidates.append(("a copy without noise", WithoutNoise(model)))
    if supports(model, FixedNoise):
        candidates.append(("a copy with fixed noise", WithFixedNoise(model)))
    if is_purifier(model):
        candidates.append(("a copy whose purifier is the identity backward", BpdaModel.of(model)))
    if supports(model, OwnSurrogates):
        candidates += cast(OwnSurrogates, model).attack_surrogates()
    samples = getattr(model, "samples", None)
    if isinstance(model, nn.Module) and isinstance(samples, int) and samples > 1:
        candidates.append(("a copy of fewer samples", FewerSamples(model, max(1, samples // 4))))
    # Compare gradients far from the images too, since a model may hide its gradients only there.
    x = torch.cat([x, normal_in_ball(x, ball_around(x, ball.eps, ball.norm), FAR * ball.eps)])
    with _tried(model, x):
        seen, usable = [_gradient(model, x, num_classes)], []
        for name, candidate in candidates:
            gradient = _gradient(candidate, x, num_classes)
            # Leave out a copy that has the same gradients as the model or as another copy, since it would find nothing
            # new.
            copies = isinstance(candidate, (Softened, IdentityBackward))
            if isinstance(gradient, str):
                absent[name] = gradient
            elif not (copies and any(_same(gradient, other) for other in seen)):
                usable.append((name, candidate))
                seen.append(gradient)
    return usable


@contextlib.contextmanager
def _tried(model: Classifier, x: Tensor) -> Iterator[None]:
    """Within the block, a model is tried; its random draws do not change later draws."""
    with frozen(model), torch.random.fork_rng([x.device] if x.device.type == "cuda" else []):
        yield


def _gradient(model: Classifier, x: Tensor, num_classes: int) -> Tensor | str:
    """The gradient of a model's logits to the images, or the reason why there is none or it is not finite."""
    # A user's model may raise anything on inputs that it was not written for.
    try:
        with torch.enable_grad():
            # Use a fixed seed, so that a random model and its copies draw the same noise.
            torch.manual_seed(0)
            leaf = x.detach().clone().requires_grad_()
            logits = model(leaf)
            with torch.no_grad():
                # Attacks also predict without gradients, so try that too.
                model(x)
            if not isinstance(logits, Tensor) or logits.shape != (len(x), num_classes):
                return f"it gives no logits of {num_classes} classes"
            if not bool(logits.isfinite().all()):
                return "its logits are not finite"
            gradient = None
            if logits.requires_grad:
                gradient = torch.autograd.grad(logits.float().square().sum(), leaf, allow_unused=True)[0]
    except Exception as error:
        return f"{type(error).__name__}: {error}".partition("\n")[0][:REASON]
    if gradient is None:
        return "its logits have no gradient to the images"
    return gradient if bool(gradient.isfinite().all()) else "its gradient is not finite"


def _same(one: Tensor, other: Tensor | str) -> bool:
    """Tell whether two gradients differ by no more than rounding, separately for each image."""
    if isinstance(other, str):
        return False
    apart, size = ((each.flatten(1).abs().amax(1)) for each in (one - other, other))
    return bool((apart <= ROUNDING * size).all())


def _parts(model: Classifier, x: Tensor, num_classes: int) -> list[tuple[str, Classifier]]:
    """The parts of a model that are classifiers themselves, with their names, from the outside in."""
    whole = _logits(model, x)
    parts: list[tuple[str, Classifier]] = []
    if has_classifier(model):
        # A defence's own classifier is a part by contract, whatever else is in the defence.
        parts.append(("classifier", model.classifier))
    for name, part in _inside(model):
        if len(parts) == MOST_PARTS:
            break
        inside = (module for _, other in parts if isinstance(other, nn.Module) for module in other.modules())
        if any(part is module for module in inside):
            continue
        logits = _logits(part, x)
        same = whole is not None and logits is not None and torch.equal(whole, logits)
        if logits is not None and logits.shape == (len(x), num_classes) and not same:
            parts.append((name, part))
    return parts


def _inside(model: Classifier) -> Iterator[tuple[str, nn.Module]]:
    """Modules inside a model: submodules, attributes of an object, variables around a function."""
    named: Iterable[tuple[str, Any]] = attributes(model)
    if isinstance(model, nn.Module):
        named = ((name, module) for name, module in model.named_modules() if name and name.count(".") < DEPTH)
    elif inspect.isfunction(model):
        named = inspect.getclosurevars(model).nonlocals.items()
    yield from ((name, value) for name, value in named if isinstance(value, nn.Module))


def _logits(model: Classifier, x: Tensor) -> Tensor | None:
    """The logits of a part for images; None if it does not accept them."""
    # A user's model may raise anything on inputs that it was not written for.
    with contextlib.suppress(Exception), torch.no_grad(), frozen(model):
        logits = model(x)
        if isinstance(logits, Tensor) and logits.dim() == 2:
            return logits
    return None
