"""Make the predictions and input gradients of any module faster, in place, without changing the module otherwise."""

from __future__ import annotations

import abc
import contextlib
import copy
import logging
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from .._compiler import is_compiled
from .._processor import fast_bfloat16
from ..model_state import HOOKS
from ..ops.dispatch.gradient import transformed
from .agreement import same_direction, same_logits
from .folding.inference_copy import DTYPES, InferenceCopy
from .memory import draws_numbers
from .watch import FEWEST_WEIGHTS, Watch, can_read_values, matrix_weights, tensors_of

logger = logging.getLogger("purify_fast")

Model = TypeVar("Model", bound=nn.Module)
Dtype = torch.dtype | Literal["auto"]

#: The number of images on which a copy is compared and timed.
TRIED = 8
#: The largest error of the logits and the least cosine of the gradient of a copy in float32.
ERROR, COSINE = 1e-3, 0.999
#: The number of times that a copy is made for a model whose parts change. A model that counts its own calls in an
#: attribute would otherwise get a new copy for each count.
MOST_COPIES = 8
#: Attributes of these types are compared by their values.
_PLAIN = (bool, int, float, str, type(None))
#: The attributes that every module has, such as its hooks.
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


def accelerate(model: Model, *, dtype: Dtype = "auto", compile: bool = False) -> Model:
    """Make predictions and input gradients of a module faster, in place.

    In evaluation mode, calls with float32 images run on a frozen copy, which is made at the first such call and follows
    every change of the weights. Its BatchNorms are folded, and its products are in ``dtype``. A constant batch without
    gradient is computed once for the same weights. Everything else runs the module itself: training mode, other inputs,
    an autocast of the caller, hooks on inner modules. Gradients of weights are right, but call the module again, so an
    attack should not ask for them (`images_only`).

    If the copy disagrees with the module or cannot be made, a warning says why, and the module itself runs, as it does
    if it is faster. Parameters, state dict, hooks and names do not change. A copy or a pickle is accelerated too.

    Args:
        model: module from images ``[B, C, H, W]`` to logits ``[B, classes]``. A defence of this package is accelerated
            by its own method of this name. For ``DistributedDataParallel`` the module inside is accelerated.
        dtype: dtype of the products, ``torch.float32`` or ``torch.bfloat16``. "auto" is bfloat16 where the device
            multiplies faster in it and the model is not tiny, or else float32.
        compile: whether to compile the copy by `torch.compile`, and whole steps of this package's attacks on it.

    Returns:
        The module itself.

    Raises:
        TypeError: the model is no module in eager mode.
        ValueError: the dtype is not allowed.
    """
    if not isinstance(model, nn.Module) or isinstance(model, (torch.jit.ScriptModule, nn.DataParallel)):
        raise TypeError(f"model must be a torch.nn.Module in eager mode, got {type(model).__name__}")
    if is_compiled(model):
        raise TypeError("model must not be compiled yet: call accelerate(model, compile=True) on the plain module")
    if dtype != "auto" and dtype not in DTYPES:
        raise ValueError(f'dtype must be "auto", {", ".join(map(str, DTYPES))}, got {dtype}')
    if isinstance(model, nn.parallel.DistributedDataParallel):
        accelerate(model.module, dtype=dtype, compile=compile)
    elif callable(own := getattr(model, "accelerate", None)):
        own(dtype, compile=compile)
    else:
        restore(model)
        model.forward = _Forward(model, dtype, compile)
    return model


def restore(model: Model) -> Model:
    """Undo `accelerate`.

    Args:
        model: an accelerated module. Any other module is not changed.

    Returns:
        The module itself.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel):
        restore(model.module)
    elif callable(own := getattr(model, "accelerate", None)):
        own(None)
    elif (forward := accelerated(model)) is not None:
        del model.forward
        if forward.own is not None:
            model.forward = forward.own
    return model


@contextlib.contextmanager
def images_only(*models: nn.Module) -> Iterator[None]:
    """A block in which the parameters of modules need no gradients, for attacks on the images alone.

    Use it for attacks that keep the training mode, or that call ``loss.backward()``. Afterwards ``requires_grad`` is as
    before. Computations in the block give no gradients of weights later.

    Args:
        models: any modules.
    """
    # The flag of a tensor that was made in inference mode could not be restored.
    learning = [one for model in models for one in model.parameters() if one.requires_grad and not one.is_inference()]
    try:
        for parameter in learning:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


def unaccelerated_copy(model: Model) -> Model:
    """Copy a module, and undo `accelerate` in the copy and its parts."""
    duplicate = copy.deepcopy(model)
    for part in duplicate.modules():
        if accelerated(part) is not None:
            restore(part)
    return duplicate


def accelerated(model: object) -> _Forward | None:
    """Return the forward of a module that `accelerate` has changed; None for everything else."""
    forward = vars(model).get("forward") if isinstance(model, nn.Module) else None
    return forward if isinstance(forward, _Forward) else None


@contextlib.contextmanager
def plainly(*models: object) -> Iterator[None]:
    """A block in which accelerated modules, also inside others, run as they are; other objects are ignored."""
    parts = [part for model in models if isinstance(model, nn.Module) for part in model.modules()]
    found = [forward for part in parts if (forward := accelerated(part)) is not None and not forward.off]
    try:
        for forward in found:
            forward.off = True
        yield
    finally:
        for forward in found:
            forward.off = False


def auto_dtype(dtype: Dtype | None, model: nn.Module, device: torch.device) -> torch.dtype:
    """Return the dtype that "auto" means for a model on a device; any other dtype as it is."""
    if isinstance(dtype, torch.dtype):
        return dtype
    return torch.bfloat16 if fast_bfloat16(device) and matrix_weights(model) >= FEWEST_WEIGHTS else torch.float32


class Follower(abc.ABC):
    """A frozen copy of a model that follows the model's weights; ``copy`` is None if the model itself should run."""

    def __init__(self) -> None:
        self.copy: InferenceCopy | None = None
        self._facts: list[Any] | None = None
        self._watch = Watch()
        #: The number of images with which the copy was made, and the number of copies so far.
        self._tried = self._copies = 0

    def follow(self, model: nn.Module, x: Tensor) -> bool:
        """Give the copy the present weights, or make it anew if the parts changed; return True if anything changed."""
        facts, tensors = _facts_of(model), [one for _, one in tensors_of(model)]
        reads = can_read_values(x.device)
        new = facts != self._facts or (self.copy is not None and self.copy.device != x.device)
        # A copy pays more for a larger batch.
        new = new or (self.copy is None and self.may_pay(x))
        if not self._watch.changed(tensors, reads) and not new:
            return False
        if new and reads:
            self._tried, self._copies = min(TRIED, len(x)), self._copies + 1
            self.copy = self.make(model, x[:TRIED].detach(), len(x)) if self._copies <= MOST_COPIES else None
            # The trial of the copy may itself change attributes, such as a counter of calls.
            self._facts = _facts_of(model)
        elif self.copy is not None and not new:
            self.copy.refresh(model)
        return True

    def may_pay(self, x: Tensor) -> bool:
        """Tell whether a batch is so much larger than the one on which the copy was refused that it is tried again."""
        return self._tried < TRIED and len(x) >= 2 * self._tried

    @abc.abstractmethod
    def make(self, model: nn.Module, x: Tensor, batch: int) -> InferenceCopy | None:
        """Make the copy; None if the model itself should run."""


class _Forward(Follower):
    """The forward of an accelerated module. ``own`` is the ``forward`` that the user had set, or None.

    ``off`` is True within `plainly`, and ``asked`` after a backward pass that asked for gradients of weights.
    """

    not_dependencies = frozenset(
        {"off", "copy", "asked", "_facts", "_watch", "_tried", "_copies", "_constant", "_draws"}
    )

    def __init__(self, model: nn.Module, dtype: Dtype, compile: bool):
        super().__init__()
        self.model, self.dtype, self.compile = model, dtype, compile
        # While a module is unpickled, it has no attributes yet.
        self.own = vars(model).get("forward")
        #: The last batch without gradient: the batch itself, its values, and the logits.
        self._constant: tuple[weakref.ref[Tensor], Tensor, Tensor] | None = None
        self.off = self.asked = self._draws = False

    def __reduce__(self) -> tuple[Any, ...]:
        return _Forward, (self.model, self.dtype, self.compile), {"own": self.own}

    def plain(self, *given: Any, **named: Any) -> Any:
        """Run the module itself."""
        return type(self.model).forward(self.model, *given, **named) if self.own is None else self.own(*given, **named)

    def __call__(self, *given: Any, **named: Any) -> Any:
        if torch.compiler.is_compiling() or self.off or named or len(given) != 1 or not _is_batch(given[0]):
            return self.plain(*given, **named)
        x: Tensor = given[0]
        records = torch.is_grad_enabled()
        gradient = records and x.requires_grad
        # In an attack on a small network, even a look at its modules would take a share of the time.
        if gradient and self.copy is None and self._tried and not self.may_pay(x):
            return self.plain(x)
        wanted = gradient and self.asked and any(one.requires_grad for one in self.model.parameters())
        if wanted or not self._takes(x):
            return self.plain(x)
        if self.follow(self.model, x):
            self._constant = None
        weights = [one for one in self.model.parameters() if one.requires_grad] if records else []
        if weights and self._draws:
            return self.plain(x)
        if not gradient:
            return self._of_constant(x, weights)
        if self.copy is None:
            return self.plain(x)
        return _with_weights(self, x, weights, None) if weights else self.copy(x)

    def _takes(self, x: Tensor) -> bool:
        """Tell whether the copy can stand for the module: for these images, in its present mode and context."""
        if torch.is_autocast_enabled(x.device.type) or transformed() or forward_ad._current_level >= 0:
            return False
        first = next(self.model.parameters(), None)
        if first is None or first.device != x.device or first.dtype != torch.float32:
            return False
        hooked = any(getattr(nn.modules.module, f"_global{name}") for name in HOOKS)
        inner = (part for part in self.model.modules() if part is not self.model)
        return not (hooked or self.model.training or any(_is_special(part) for part in inner))

    def make(self, model: nn.Module, x: Tensor, batch: int) -> InferenceCopy | None:
        dtype = auto_dtype(self.dtype, model, x.device)
        forks = [x.device] if x.device.type == "cuda" else []
        with torch.inference_mode(False), torch.random.fork_rng(forks), plainly(model):
            x = x.clone()
            try:
                # PyTorch calls the hooks of the module itself, before and after the copy. So neither side calls them.
                want, seconds = _answers(self.plain, x)
                torch.manual_seed(0)
                self._draws = draws_numbers(lambda: self.plain(x), x.device)
            except Exception as error:
                # The call of the module itself will raise this error, if it is not about the gradient or the output.
                self._refuse(_line(error))
                return None
            made, reasons = dict[float, InferenceCopy](), list[str]()
            # Transposed convolutions in float32 are slower in channels_last, and so are some small networks.
            for last in (True,) if dtype == torch.bfloat16 else (True, False):
                try:
                    duplicate = unaccelerated_copy(model)
                    for name in HOOKS:
                        getattr(duplicate, name).clear()
                    one = InferenceCopy(duplicate, tuple(x.shape[1:]), dtype, compile=self.compile, channels_last=last)
                    got, time_of_copy = _answers(one, x)
                    if not _agree(got, want, dtype):
                        reasons.append(f"its copy in {dtype} gives other logits or gradients")
                    made[time_of_copy] = one
                except Exception as error:
                    # A user's module may raise any error when it is copied, folded or run in another dtype.
                    reasons.append(_line(error))
            if reasons:
                self._refuse(reasons[0])
                return None
            fastest, watch = min(made), Watch()
            for _ in range(2):
                begin = time.process_time()
                self._takes(x)
                _facts_of(model)
                watch.changed([one for _, one in tensors_of(model)])
                extra = time.process_time() - begin
            # A look at the modules and their weights takes as long for a larger batch.
            pays = fastest + extra * len(x) / batch < seconds
            text = f"{type(model).__name__} in {dtype} takes {1e3 * fastest:.3g} ms for {len(x)} images"
            chosen = "the copy" if pays else "the model itself"
            logger.info("%s, and the model itself %.3g ms: %s runs", text, 1e3 * seconds, chosen)
            return made[fastest] if pays else None

    def _refuse(self, reason: str) -> None:
        name = type(self.model).__name__
        warnings.warn(f"{name} is not accelerated: {reason}. The model itself runs", RuntimeWarning, stacklevel=5)

    def _of_constant(self, x: Tensor, weights: list[nn.Parameter]) -> Any:
        """Return the logits of images that need no gradient. Those of the last batch are not computed again."""
        if self._constant is not None:
            batch, values, logits = self._constant
            if batch() is x and can_read_values(x.device) and torch.equal(values, x):
                return _with_weights(self, x, weights, logits) if weights else logits.clone()
        self._constant = None
        out = self.plain(x) if weights or self.copy is None else self.copy(x)
        if type(out) is Tensor and not (self._draws or out.is_inference()) and can_read_values(x.device):
            owner = weakref.ref(self)

            def forget(batch: weakref.ref[Tensor]) -> None:
                forward = owner()
                if forward is not None and forward._constant is not None and forward._constant[0] is batch:
                    forward._constant = None

            self._constant = weakref.ref(x, forget), x.detach().clone(), out.detach().clone()
        return out


@dataclass
class _Asked:
    """The gradients of weights between the two functions of a call."""

    weights: tuple[nn.Parameter, ...]
    gradients: tuple[Tensor | None, ...] = ()
    node: Any = None


class _Weights(torch.autograd.Function):
    """A number that depends on all weights. Its backward passes the gradients on that `_Call` has computed."""

    @staticmethod
    def forward(ctx: Any, asked: _Asked, *weights: Tensor) -> Tensor:
        ctx.asked, ctx.number = asked, len(weights)
        return weights[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return None, *(ctx.asked.gradients or (None,) * ctx.number)


class _Call(torch.autograd.Function):
    """A call of the copy. For gradients of weights, or a second derivative, the module itself is called again."""

    @staticmethod
    def forward(ctx: Any, owner: _Forward, asked: _Asked, known: Tensor | None, x: Tensor, *weights: Tensor) -> Tensor:
        ctx.owner, ctx.asked = owner, asked
        # Autograd raises an error if a weight was changed between forward and backward.
        ctx.save_for_backward(x, *weights[1:])
        if known is not None:
            return known.clone()
        assert owner.copy is not None
        with torch.enable_grad():
            ctx.leaf = x.detach().requires_grad_()
            ctx.out = owner.copy(ctx.leaf)
        return ctx.out.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        # The weights are saved only so that autograd checks them.
        x, *saved = ctx.saved_tensors
        owner, asked, images = ctx.owner, ctx.asked, ctx.needs_input_grad[3]
        wanted = torch._C._will_engine_execute_node(asked.node)
        of_images, nothing = None, (None,) * len(saved)
        if not wanted and not torch.is_grad_enabled():
            of_images = torch.autograd.grad(ctx.out, ctx.leaf, grad, retain_graph=True)[0]
            return None, None, None, of_images, None, *nothing
        if wanted and not owner.asked:
            owner.asked = True
            warnings.warn(
                f"a backward pass asked for gradients of the weights of {type(owner.model).__name__} in evaluation "
                "mode, so the model itself runs from now on: in an attack, use torch.autograd.grad or "
                "purify_fast.images_only",
                RuntimeWarning,
                stacklevel=2,
            )
        again = torch.is_grad_enabled()
        with torch.enable_grad(), plainly(owner.model):
            leaf = x if again else x.detach().requires_grad_(images)
            out = owner.plain(leaf)
            inputs = ([leaf] if images else []) + (list(asked.weights) if wanted else [])
            found = torch.autograd.grad(out, inputs, grad, create_graph=again, allow_unused=True)
        of_images = found[0] if images else None
        asked.gradients = found[1:] if images else found
        return None, None, None, of_images, grad.new_zeros(()), *nothing


def _with_weights(owner: _Forward, x: Tensor, weights: list[nn.Parameter], known: Tensor | None) -> Tensor:
    """Return the logits of images as a function of the images and of the weights."""
    asked = _Asked(tuple(weights))
    number = _Weights.apply(asked, *weights)
    asked.node = number.grad_fn
    result: Tensor = _Call.apply(owner, asked, known, x, number, *(one.detach() for one in weights))
    return result


class _Same:
    """Equal only for the same object, and for a tensor only if PyTorch has counted no write to it since."""

    def __init__(self, value: object):
        self.value, self.version = value, value._version if isinstance(value, Tensor) else 0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value and self.version == other.version


def _facts_of(model: nn.Module) -> list[Any]:
    """The modules of a model, and their attributes, such as strides and temperatures."""
    facts: list[Any] = []
    for part in model.modules():
        # A weak reference lets the model go, and is equal to another one only for the same object.
        facts.append(weakref.ref(part))
        facts += [(name, _fact(value)) for name, value in vars(part).items() if name not in _OF_EVERY_MODULE]
    return facts


def _fact(value: Any) -> Any:
    """Return something that is equal for an equal value of an attribute. It does not look into other objects."""
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, (list, tuple)):
        return [_fact(each) for each in value]
    if isinstance(value, dict):
        return [(_fact(key), _fact(each)) for key, each in value.items()]
    return weakref.ref(value) if isinstance(value, nn.Module) else _Same(value)


def _is_batch(x: Any) -> bool:
    return type(x) in (Tensor, nn.Parameter) and x.dim() == 4 and x.dtype == torch.float32 and len(x) > 0


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def _is_special(part: nn.Module) -> bool:
    """Tell whether an inner module is in training mode or has hooks, which a copy would not call."""
    return part.training or any(getattr(part, name) for name in HOOKS)


def _answers(model: Callable[[Tensor], Tensor], x: Tensor) -> tuple[tuple[Tensor, Tensor], float]:
    """Return logits and input gradient, from one seed, and the seconds of the fastest of three calls."""
    # Other work on the machine changes the time of a process less than the wall time.
    clock = time.perf_counter if x.device.type == "cuda" else time.process_time
    with torch.enable_grad():
        seconds = []
        for _ in range(4):
            torch.manual_seed(0)
            begin, leaf = clock(), x.clone().requires_grad_()
            out = model(leaf)
            if type(out) is not Tensor:
                raise TypeError(f"the model must return a tensor of logits, got {type(out).__name__}")
            weight = torch.linspace(-1, 1, out.numel(), device=out.device).sin_().view_as(out)
            gradient = torch.autograd.grad((out * weight).sum(), leaf)[0]
            if x.device.type == "cuda":
                torch.cuda.synchronize(x.device)
            seconds.append(clock() - begin)
    # The first call allocates memory and compiles.
    return (out.detach(), gradient), min(seconds[1:])


def _agree(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor], dtype: torch.dtype) -> bool:
    if got[0].shape != want[0].shape:
        return False
    if dtype == torch.bfloat16 and want[0].dim() == 2 and want[0].shape[1] > 1:
        return same_logits(got[0], want[0]) and same_direction(got[1], want[1])
    error, cosine = (ERROR, COSINE) if dtype == torch.float32 else (50 * ERROR, 0.8)
    close = bool((got[0] - want[0]).abs().max() <= error * want[0].abs().max())
    return close and same_direction(got[1], want[1], cosine)
