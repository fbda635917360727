"""Makes surrogates for adaptive attacks: a model's parts, softened copies, copies with less noise or fewer samples.

A gradient may be finite and not zero, but useless. The attacked model itself judges images found with a surrogate.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...attacks import BpdaModel, frozen
from ...attacks.ball import ball_around, normal_in_ball
from ...attacks.base import ThreatModel
from ...model_state import attributes
from ...protocols import Classifier, DeterministicMode, FixedNoise, OwnSurrogates, has_classifier, is_purifier, supports
from .copies import FewerSamples, IdentityBackward, Softened, Together, WithFixedNoise, WithoutNoise
from .identity_backward import blocking

#: The temperatures of the softened copies, by which the arguments of gates are divided. A larger temperature makes a
#: copy softer. Another copy has exact values, and changes only the gradients.
TEMPERATURES = (10.0, 100.0)
#: The largest number of parts of a model that are attacked alone; outer modules are tried first.
MOST_PARTS = 4
#: A model is searched for parts down to this depth of nested modules.
DEPTH = 2
#: Two gradients are the same if, for each image, their values differ by at most this share of the largest value.
ROUNDING = 1e-4
#: The largest number of characters of the reason why a surrogate is missing.
REASON = 160
#: The standard deviation of random points, as a multiple of the radius. The points are projected onto the ball, so most
#: of them lie at its border. Gradients are compared at these points too.
FAR = 100.0


def surrogates(
    model: Classifier, x: Tensor, num_classes: int, ball: ThreatModel, absent: dict[str, str] | None = None
) -> list[tuple[str, Classifier]]:
    """Make the surrogates of a model, by name; a surrogate with an error or without finite logits is left out."""
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
    # Gradients are also compared far from the images, because a model may have useless gradients only there.
    x = torch.cat([x, normal_in_ball(x, ball_around(x, ball.eps, ball.norm), FAR * ball.eps)])
    with _tried(model, x):
        seen, usable = [_gradient(model, x, num_classes)], []
        for name, candidate in candidates:
            gradient = _gradient(candidate, x, num_classes)
            # A copy with the gradients of the model or of an earlier candidate would find nothing new.
            copies = isinstance(candidate, (Softened, IdentityBackward))
            if isinstance(gradient, str):
                absent[name] = gradient
            elif not (copies and any(_same(gradient, other) for other in seen)):
                usable.append((name, candidate))
                seen.append(gradient)
    return usable


@contextlib.contextmanager
def _tried(model: Classifier, x: Tensor) -> Iterator[None]:
    """A context in which a model is frozen, and at whose end the random generators are restored."""
    with frozen(model), torch.random.fork_rng([x.device] if x.device.type == "cuda" else []):
        yield


def _gradient(model: Classifier, x: Tensor, num_classes: int) -> Tensor | str:
    """The gradient of a model's logits with respect to the images, or the reason why there is no finite gradient."""
    # A user's model may raise any error on inputs for which it was not written.
    try:
        with torch.enable_grad():
            # With a fixed seed, a random model and its copies draw the same noise.
            torch.manual_seed(0)
            leaf = x.detach().clone().requires_grad_()
            logits = model(leaf)
            with torch.no_grad():
                # Attacks also predict without gradients, so this is tested too.
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
    """Tell whether two gradients are equal up to rounding for every image."""
    if isinstance(other, str):
        return False
    apart, size = ((each.flatten(1).abs().amax(1)) for each in (one - other, other))
    return bool((apart <= ROUNDING * size).all())


def _parts(model: Classifier, x: Tensor, num_classes: int) -> list[tuple[str, Classifier]]:
    """The parts of a model that are classifiers themselves, with their names; outer modules come first."""
    whole = _logits(model, x)
    parts: list[tuple[str, Classifier]] = []
    if has_classifier(model):
        # The attribute `classifier` of a defence is always a part.
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
    """The modules inside a model, with their names: submodules, attributes, or captured variables of a function."""
    named: Iterable[tuple[str, Any]] = attributes(model)
    if isinstance(model, nn.Module):
        named = ((name, module) for name, module in model.named_modules() if name and name.count(".") < DEPTH)
    elif inspect.isfunction(model):
        named = inspect.getclosurevars(model).nonlocals.items()
    yield from ((name, value) for name, value in named if isinstance(value, nn.Module))


def _logits(model: Classifier, x: Tensor) -> Tensor | None:
    """The logits of a part for images; None if the part does not accept the images."""
    # A user's model may raise any error on inputs for which it was not written.
    with contextlib.suppress(Exception), torch.no_grad(), frozen(model):
        logits = model(x)
        if isinstance(logits, Tensor) and logits.dim() == 2:
            return logits
    return None
