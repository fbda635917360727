"""What a careful attacker attacks in a model's place: its parts alone, softened copies of it, fewer samples, no noise.

A sharp gate, a rounding, a detached part or a head that saturates leaves a gradient finite, not zero, and useless. What
is found on a copy without it is then tried on the model itself. A surrogate needs no cooperation: the functions that
harden a model are replaced while its own code runs, whatever it is written in.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..attacks import frozen
from ..contents import attributes
from ..protocols import Classifier, DeterministicMode, has_classifier, supports

#: How much softer the softened copies are: a gate's slope is divided by these.
TEMPERATURES = (10.0, 100.0)
#: Parts that are attacked alone, at most; a model's modules are asked from the outside in.
MOST_PARTS = 4
#: How deep in a model parts are looked for.
DEPTH = 2

#: Functions whose first argument is divided by the temperature: they saturate.
_SATURATING = {
    "sigmoid", "sigmoid_", "expit", "special_expit", "logsigmoid", "hardsigmoid", "tanh", "tanh_", "hardtanh",
    "softmax", "log_softmax",
}  # fmt: skip
#: Functions with a gradient of zero everywhere; the identity's gradient takes its place.
_FLAT = {"round", "round_", "floor", "floor_", "ceil", "ceil_", "trunc", "trunc_", "sign", "sign_", "fake_quantize"}


class _Softening(TorchFunctionMode):
    """Within the block, saturating functions are softer, and what stops gradients lets them pass."""

    def __init__(self, temperature: float):
        super().__init__()
        self.temperature = temperature

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if name == "_set_grad_enabled":
            # a block without gradients inside the model; whether there are any at all is decided outside of it
            return None
        first = args[0] if args else None
        if not isinstance(first, Tensor):
            return func(*args, **kwargs)
        if name == "detach":
            return first
        if first.is_floating_point():
            if name in _SATURATING:
                # an operation in place changes its argument, which the model goes on with
                softer = first.div_(self.temperature) if name.endswith("_") else first / self.temperature
                return func(softer, *args[1:], **kwargs)
            if name in _FLAT and name.endswith("_"):
                before = first.detach().clone()
                return first.add_(func(before.clone(), *args[1:], **kwargs) - before)
            if name in _FLAT:
                flat = func(first.detach().clone(), *args[1:], **kwargs)
                return first + (flat - first).detach()
        return func(*args, **kwargs)


class _Around(nn.Module):
    """A module around any callable."""

    def __init__(self, model: Classifier):
        super().__init__()
        self.model = model
        self.eval()


class Softened(_Around):
    """A model whose gates and heads are softer, and whose rounding and detaching stop no gradient.

    Args:
        model: any callable.
        temperature: what the arguments of sigmoid, softmax and the like are divided by.
    """

    def __init__(self, model: Classifier, temperature: float):
        super().__init__(model)
        self.temperature = temperature

    def forward(self, x: Tensor) -> Tensor:
        recording = torch.is_grad_enabled()
        # the model may take gradients itself: what it switches on or off inside is not followed, so they are on
        with torch.enable_grad(), _Softening(self.temperature):
            logits = self.model(x)
        return logits if recording else logits.detach()


class WithoutNoise(_Around):
    """A random model in its deterministic mode.

    Args:
        model: with ``deterministic()``.
    """

    def forward(self, x: Tensor) -> Tensor:
        with self.model.deterministic():  # type: ignore[attr-defined]
            return self.model(x)


class FewerSamples(_Around):
    """A defence that predicts from fewer samples.

    Args:
        model: with an attribute ``samples``.
        samples: how many it takes here.
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
    """All parts at once: an image that fools each of them fools whatever chooses between them.

    Args:
        parts: models of the same classes.
    """

    def __init__(self, parts: Sequence[Classifier]):
        super().__init__()
        self.parts = list(parts)
        # registered, so that their weights are found
        self.modules_inside = nn.ModuleList(part for part in parts if isinstance(part, nn.Module))
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([part(x).float().log_softmax(1) for part in self.parts]).mean(0)


def surrogates(model: Classifier, x: Tensor, num_classes: int) -> list[tuple[str, Classifier]]:
    """The surrogates that a model has, by name; what does not run, or gives no finite logits, is left out.

    Args:
        model: images to logits; any callable.
        x: a few images ``[B, C, H, W]`` on its device.
        num_classes: of its logits.
    """
    with frozen(model):
        parts = [(name, part) for name, part in _parts(model, x, num_classes) if _usable(part, x, num_classes)]
    candidates: list[tuple[str, Classifier]] = [(f"{name} alone", part) for name, part in parts]
    if len(parts) > 1:
        candidates.append(("all parts together", Together([part for _, part in parts])))
    candidates += [(f"a copy softened {t:g} times", Softened(model, t)) for t in TEMPERATURES]
    if supports(model, DeterministicMode):
        candidates.append(("a copy without noise", WithoutNoise(model)))
    samples = getattr(model, "samples", None)
    if isinstance(model, nn.Module) and isinstance(samples, int) and samples > 1:
        candidates.append(("a copy of fewer samples", FewerSamples(model, max(1, samples // 4))))
    with frozen(model):
        return [(name, candidate) for name, candidate in candidates if _usable(candidate, x, num_classes)]


def _usable(model: Classifier, x: Tensor, num_classes: int) -> bool:
    """Whether a model gives finite logits of all classes, and a gradient to the images that is finite."""
    # whatever code a user's model has may refuse what it was not written for
    with contextlib.suppress(Exception), torch.enable_grad():
        leaf = x.detach().clone().requires_grad_()
        logits = model(leaf)
        with torch.no_grad():
            # attacks judge points without gradients
            model(x)
        if isinstance(logits, Tensor) and logits.shape == (len(x), num_classes) and bool(logits.isfinite().all()):
            gradient = torch.autograd.grad(logits.float().sum(), leaf, allow_unused=True)[0]
            return gradient is not None and bool(gradient.isfinite().all())
    return False


def _parts(model: Classifier, x: Tensor, num_classes: int) -> list[tuple[str, Classifier]]:
    """The parts of a model that are classifiers themselves, with their names, from the outside in."""
    whole = _logits(model, x)
    parts: list[tuple[str, Classifier]] = []
    if has_classifier(model):
        # a defence's own classifier: a part by contract, whatever else is in the defence
        parts.append(("classifier", model.classifier))
    for name, part in _inside(model, DEPTH):
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


def _inside(model: Classifier, depth: int) -> Iterator[tuple[str, Classifier]]:
    """Callables inside a model: submodules, attributes of an object, variables around a function."""
    named: Iterable[tuple[str, Any]] = attributes(model)
    if isinstance(model, nn.Module):
        named = ((name, module) for name, module in model.named_modules() if name and name.count(".") < depth)
    elif inspect.isfunction(model):
        named = inspect.getclosurevars(model).nonlocals.items()
    yield from ((name, value) for name, value in named if isinstance(value, nn.Module))


def _logits(model: Classifier, x: Tensor) -> Tensor | None:
    """What a part makes of images; None where it does not take them."""
    # whatever code a user's model has may refuse what it was not written for
    with contextlib.suppress(Exception), torch.no_grad(), frozen(model):
        logits = model(x)
        if isinstance(logits, Tensor) and logits.dim() == 2:
            return logits
    return None
