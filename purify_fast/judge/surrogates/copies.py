"""Makes surrogates for adaptive attacks: a model's parts, softened copies, copies with less noise or fewer samples.

A gradient may be finite and not zero, but useless. The attacked model itself judges images found with a surrogate.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...attacks import BpdaModel, frozen
from ...attacks.attacked_model import gradient_to
from ...attacks.base import ThreatModel, ball_around, normal_in_ball
from ...defences.stochastic import WithFixedNoise, WithoutNoise, with_samples
from ...model_state import attributes
from ...protocols import Classifier, DeterministicMode, FixedNoise, OwnSurrogates, has_classifier, is_purifier, supports
from ...speed.agreement import FLOAT32
from .softening import Args, HoldingMode, Rule, Softening

#: The temperatures of the softened copies, by which the arguments of gates are divided. A larger temperature makes a
#: copy softer. Another copy has exact values, and changes only the gradients.
TEMPERATURES = (10.0, 100.0)
#: The largest number of parts of a model that are attacked alone; outer modules are tried first.
MOST_PARTS = 4
#: A model is searched for parts down to this depth of nested modules.
DEPTH = 2
#: The largest number of characters of the reason why a surrogate is missing.
REASON = 160
#: The standard deviation of random points, as a multiple of the radius. The points are projected onto the ball, so most
#: of them lie at its border. Gradients are compared at these points too.
FAR = 100.0
#: A module is differentiated as the identity only if its output lies in the range of its input. The output may exceed
#: this range at each end by at most this share of the width of the range.
OUTSIDE = 0.1


#: Surrogates with their names. A name completes "the gradients of ...".
Surrogates = list[tuple[str, Classifier]]


def surrogates(
    model: Classifier, x: Tensor, num_classes: int, ball: ThreatModel, ask: Callable[[], None] = lambda: None
) -> tuple[Surrogates, dict[str, str]]:
    """Make the surrogates of a model, by name; and the reason why others are missing.

    A surrogate with an error or without finite logits is missing. Before each trial ``ask`` is called, which may end
    the work.
    """

    def gradient_of(model: Classifier) -> Tensor | str:
        ask()
        return _gradient(model, x, num_classes)

    with _tried(model, x):
        parts = [pair for pair in _parts(model, x, num_classes) if isinstance(gradient_of(pair[1]), Tensor)]
        blocked = blocking(model, [("", model)] if isinstance(model, nn.Module) else [*_inside(model)], x)
    candidates: Surrogates = [(f"{name} alone", part) for name, part in parts]
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
        candidates.append(("a copy of fewer samples", with_samples(model, max(1, samples // 4))))
    # Gradients are also compared far from the images, because a model may have useless gradients only there.
    x = torch.cat([x, normal_in_ball(x, ball_around(x, ball.eps, ball.norm), FAR * ball.eps)])
    with _tried(model, x):
        seen, usable, absent = [gradient_of(model)], [], dict[str, str]()
        for name, candidate in candidates:
            gradient = gradient_of(candidate)
            # A copy with the gradients of the model or of an earlier candidate would find nothing new.
            is_copy = isinstance(candidate, (Softened, IdentityBackward))
            if isinstance(gradient, str):
                absent[name] = gradient
            elif not (is_copy and any(_same(gradient, other) for other in seen)):
                usable.append((name, candidate))
                seen.append(gradient)
    return usable, absent


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
            gradient = gradient_to(leaf, logits.float().square().sum())
    except Exception as error:
        return f"{type(error).__name__}: {error}".partition("\n")[0][:REASON]
    if gradient is None:
        return "its logits have no gradient to the images"
    return gradient if bool(gradient.isfinite().all()) else "its gradient is not finite"


def _same(gradient: Tensor, other: Tensor | str) -> bool:
    """Return True if two gradients are equal up to rounding for every image."""
    if isinstance(other, str):
        return False
    apart, size = (tensor.flatten(1).abs().amax(1) for tensor in (gradient - other, other))
    return bool((apart <= FLOAT32 * size).all())


def _parts(model: Classifier, x: Tensor, num_classes: int) -> Surrogates:
    """The parts of a model that are classifiers themselves, with their names; outer modules come first."""
    own = _logits(model, x)
    # The attribute `classifier` of a defence is always a part.
    parts: Surrogates = [("classifier", cast(Any, model).classifier)] if has_classifier(model) else []
    for name, part in _inside(model):
        inside = {module for _, other in parts if isinstance(other, nn.Module) for module in other.modules()}
        logits = _logits(part, x) if len(parts) < MOST_PARTS and part not in inside else None
        same = own is not None and logits is not None and torch.equal(own, logits)
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
        # With a fixed seed, a random model and a module that only passes images on to it draw the same noise.
        torch.manual_seed(0)
        logits = model(x)
        return logits if isinstance(logits, Tensor) and logits.dim() == 2 else None
    return None


# -- the copies -------------------------------------------------------------------------------------------------------


class _Around(nn.Module):
    """The base of the copies: a module that wraps any callable."""

    def __init__(self, model: Classifier):
        super().__init__()
        self.model = model
        self.eval()


class Softened(_Around):
    """A copy of a model with useful gradients through thresholds, masks, rounding and detached parts (`Softening`)."""

    def __init__(self, model: Classifier, temperature: float | None):
        super().__init__(model)
        self.temperature = temperature

    def forward(self, x: Tensor) -> Tensor:
        differentiable = torch.is_grad_enabled()
        if self.temperature is None and not differentiable:
            return self.model(x)
        # Softening recognizes tensors that depend on the images by requires_grad, also where no gradient is wanted.
        leaf = x if x.requires_grad else x.detach().requires_grad_()
        # Gradients are enabled for the whole call, because Softening ignores the model's own calls that disable them.
        with torch.enable_grad(), Softening(self.temperature) as mode:
            logits = self.model(leaf)
        mode.let_through([logits])
        return logits if differentiable else logits.detach()


class IdentityBackward(_Around):
    """A copy of a model in which some modules are the identity in the backward pass."""

    approximates_gradients = True

    def __init__(self, model: Classifier, modules: Sequence[nn.Module]):
        super().__init__(model)
        self.passed = nn.ModuleList(modules)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``[B, ...]`` to logits ``[B, classes]``."""
        with PassedThrough([*self.passed]) if torch.is_grad_enabled() else contextlib.nullcontext():
            return self.model(x)


class Together(nn.Module):
    """A model whose logits are the mean log-probabilities of several parts of the attacked model."""

    def __init__(self, parts: Sequence[Classifier]):
        super().__init__()
        self.parts = list(parts)
        # The parts are also registered as modules, so that PyTorch finds their weights.
        self.modules_inside = nn.ModuleList(part for part in parts if isinstance(part, nn.Module))
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([part(x).float().log_softmax(1) for part in self.parts]).mean(0)


# -- modules with the gradient of the identity (BPDA, Athalye, Carlini & Wagner, ICML 2018, section 4) ----------------


class PassedThrough(HoldingMode):
    """A context in which modules have their usual output and the gradient of the identity.

    It is a function mode, because `purify_fast.attacks.checkpointed_steps` enters the same function modes again.
    """

    def __init__(self, modules: Sequence[nn.Module]):
        super().__init__()
        self.modules = list(modules)
        self._given: dict[nn.Module, list[Tensor]] = {}

    def __torch_function__(self, func: Rule, types: Any, args: Args = (), kwargs: dict[str, Any] | None = None) -> Any:
        return func(*args, **(kwargs or {}))

    def held(self, stack: contextlib.ExitStack) -> None:
        # Inside another ``with`` block of the same object, the hooks are already registered.
        for module in [] if self._open else self.modules:
            stack.callback(module.register_forward_pre_hook(self._before, prepend=True).remove)
            stack.callback(module.register_forward_hook(self._after).remove)

    def _before(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not _takes_images(args):
            return None
        self._given.setdefault(module, []).append(args[0])
        # The module may convert its input to NumPy, which refuses tensors that require gradients.
        return args[0].detach(), *args[1:]

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not _takes_images(args):
            return None
        x = self._given[module].pop()
        return output.detach() + (x - x.detach()).to(output) if _like(output, x) else None


def blocking(model: Classifier, inside: Sequence[tuple[str, nn.Module]], x: Tensor) -> list[dict[str, nn.Module]]:
    """Find modules without a gradient whose output has the shape and about the range of their input."""
    named = {".".join(filter(None, (outer, name))): m for outer, part in inside for name, m in part.named_modules()}
    named = {name: module for name, module in named.items() if name and module is not model}
    calls: dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if module not in calls and _takes_images(args) and _like(output, args[0]):
            least, most = args[0].aminmax()
            slack = OUTSIDE * (most - least)
            if bool((output.amin() >= least - slack) & (output.amax() <= most + slack)):
                calls[module] = args, kwargs

    # A user's model may raise any error on inputs for which it was not written.
    with contextlib.suppress(Exception), contextlib.ExitStack() as stack, torch.no_grad():
        for module in dict.fromkeys(named.values()):
            stack.callback(module.register_forward_hook(note, with_kwargs=True).remove)
        model(x)
    blocked = {name: module for name, module in named.items() if module in calls and _blocks(module, *calls[module])}
    below = {name: {*list(module.modules())[1:]} for name, module in blocked.items()}
    innermost = {name: module for name, module in blocked.items() if not below[name] & {*blocked.values()}}
    outermost = {name: module for name, module in blocked.items() if not any(module in b for b in below.values())}
    return [group for group in (innermost, outermost)[: 1 + (innermost != outermost)] if group]


def _takes_images(args: tuple[Any, ...]) -> bool:
    return bool(args) and isinstance(args[0], Tensor) and args[0].is_floating_point() and args[0].dim() > 1


def _like(output: Any, x: Tensor) -> bool:
    return isinstance(output, Tensor) and output.is_floating_point() and output.shape == x.shape


def _blocks(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return True if the gradient through a module is missing, zero or not finite for every image."""
    with contextlib.suppress(Exception), torch.enable_grad(), frozen(module):
        leaf = args[0].detach().clone().requires_grad_()
        output = module(leaf, *args[1:], **kwargs)
        gradient = gradient_to(leaf, (output * torch.randn_like(output)).sum())
        if gradient is not None:
            return not bool((gradient.flatten(1).any(1) & gradient.isfinite().flatten(1).all(1)).any())
    return True
