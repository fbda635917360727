"""The model under attack: it is frozen and tested, and a model that writes to its input is refused."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import _engine_run_backward
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from .._modules import hold, may_hide_modules, modules_of, release
from .._tensors import FLOATING, check_floating, check_one_device, repeat_batch
from .._validation import Range, check_number
from ..protocols import Classifier, SharesDraws, supports

#: Because of rounding, a pixel may lie outside of [clip_min, clip_max] by this share of the range's width.
RANGE_SLACK = 1e-4
#: Advice for images that are not in [0, 1].
INTO_RANGE = (
    "divide images in 0..255 by 255; for normalized images give x * std + mean as the images, and lambda x: "
    "model((x - mean) / std) as the model; after a resize give x.clamp(0, 1)"
)


def check_images(
    x: Tensor, y: Tensor, clip_min: float | Tensor | None = None, clip_max: float | Tensor = 1.0, *, labels: bool = True
) -> None:
    """Refuse images or labels that are not allowed, with TypeError or ValueError.

    The values of tensors are checked only on a CPU, because on a GPU the check would have to wait for the device. They
    are not checked while a compiler or a dispatch mode is active.
    """
    # Most calls pass these tests, which take no time.
    if not isinstance(x, Tensor) or x.dtype not in FLOATING or x.layout != torch.strided:
        check_floating(x=x)
    if not isinstance(y, Tensor):
        raise TypeError(f"y must be a torch.Tensor, got {type(y).__name__}: give torch.as_tensor(y)")
    if x.device != y.device:
        check_one_device(x=x, y=y)
    if x.dim() < 2 or (x.dim() == 3 and len(x) > 1 and y.shape == (1,)):
        raise ValueError(f"x must be a batch [B, ...], got {list(x.shape)}: give x[None] if x is a single image")
    if not labels and (y.dim() == 0 or len(y) != len(x)):
        raise ValueError(f"y must have a row for each of the {len(x)} images, got {list(y.shape)}")
    if labels and (y.shape != (x.shape[0],) or y.dtype != torch.int64):
        raise ValueError(f"y must be int64 [B] = [{x.shape[0]}], got {y.dtype} {list(y.shape)}")
    # See `can_read`.
    if x.device.type != "cpu" or not x.numel() or torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
        return
    if labels and int(y.amin()) < 0:
        check_labels("y", y)
    if clip_min is None:
        return
    if isinstance(clip_min, Tensor) or isinstance(clip_max, Tensor):
        # Each pixel has its own range, so the images are moved and scaled into [0, 1].
        low, high = (torch.as_tensor(bound, device=x.device) for bound in (clip_min, clip_max))
        if not bool((high > low).all()):
            raise ValueError(f"clip_max must be above clip_min, got a smallest width of {float((high - low).min()):g}")
        x, clip_min, clip_max = (x - low) / (high - low), 0.0, 1.0
    low, high = x.detach().aminmax()
    least, most = float(low), float(high)
    slack = RANGE_SLACK * (clip_max - clip_min)
    # The condition is negated so that NaN is refused too.
    if not (least >= clip_min - slack and most <= clip_max + slack):
        allowed = f"[clip_min, clip_max] = [{clip_min:g}, {clip_max:g}]"
        raise ValueError(f"x must be in {allowed}, got values from {least:.5g} to {most:.5g}: {INTO_RANGE}")


def can_read(values: Tensor) -> bool:
    """Return True if a check may read the values of a tensor: on a CPU, outside of a compiler or a dispatch mode."""
    traced = torch.compiler.is_compiling() or is_in_torch_dispatch_mode()
    return values.device.type == "cpu" and values.numel() > 0 and not traced


def check_labels(name: str, labels: Tensor, classes: int | None = None) -> None:
    """Refuse labels ``[B]`` that no class has, where `can_read` allows it; ``classes``: how many, if known."""
    low, high = map(int, labels.aminmax()) if can_read(labels) else (0, 0)
    if low < 0 or (classes is not None and high >= classes):
        allowed = "of at least 0" if classes is None else f"from 0 to {classes - 1}"
        raise ValueError(f"{name} must have class numbers {allowed}, got {low if low < 0 else high}")


def check_tensor(name: str, values: Tensor, most: float | Tensor = math.inf) -> None:
    """Refuse a tensor with NaN, a value below 0, or a value above ``most``, as `check_eps` refuses a number."""
    if can_read(values) and not bool(((values >= 0) & (values <= torch.as_tensor(most) * (1 + 1e-6))).all()):
        low, high = (float(value) for value in values.aminmax())
        raise ValueError(f"{name} must be at least 0 and at most the range's width, got {low:g} to {high:g}")


def largest_distance(norm: str, pixels: int, width: float = 1.0) -> float:
    """The largest distance between two images of ``pixels`` values, whose range has the given width."""
    return width * {"linf": 1.0, "l2": pixels**0.5, "l1": pixels}[norm]


def check_eps(eps: float, norm: str | None, largest: float = 1.0, *, pixels: int = 0) -> None:
    """Refuse a radius that is not allowed."""
    check_number("eps", eps)
    Range(0).check("eps", eps)
    if norm is None or (norm != "linf" and pixels == 0):
        return
    most = largest_distance(norm, pixels, largest)
    if eps > most:
        raise ValueError(f"eps must be at most {most:g} for {norm}, in image units, got {eps}: is {eps:g}/255 meant?")


# -- checks the output of a model: logits ``[B, classes]`` -------------------------------------------------------------

#: Advice for a model that returns probabilities instead of logits.
INSTEAD_OF_PROBABILITIES = (
    "return the logits before the softmax, or give lambda x: model(x).clamp_min(1e-30).log(), which predicts the same "
    "classes"
)
#: The problem and the advice for a model that returns one-hot vectors, in the words of errors and reports.
ONE_HOT = (
    "returns one-hot rows (each has a single 1, and otherwise zeros). They name a class and have no gradient: return "
    "the logits [B, classes] from which the class is chosen"
)


def checked_logits(logits: object, images: int) -> Tensor:
    """Return a model's output, ``[B, classes]``, if it may be logits by its type and shape, which takes no time."""
    if not isinstance(logits, Tensor):
        needs = "the model must return a torch.Tensor of logits [B, classes]"
        raise TypeError(f"{needs}, got {type(logits).__name__}: give a module whose forward returns the logits in it")
    if not (logits.dim() == 2 and logits.shape[0] == images and logits.shape[1] > 1 and logits.is_floating_point()):
        needs = "floating-point logits [B, classes] of at least two classes for every batch size B"
        raise ValueError(f"the model must return {needs}, got {logits.dtype} {list(logits.shape)} for B = {images}")
    return logits


def are_probabilities(logits: Tensor) -> bool:
    """Return True if every row of the output consists of probabilities: numbers in [0, 1] whose sum is 1."""
    # The tolerance is for rounding: the sum has many rounded terms, and half precision has only three or four digits.
    slack = 1e-3 if logits.dtype in (torch.float32, torch.float64) else 2e-2
    values = logits.double()
    return bool((values >= 0).all() and ((values.sum(1) - 1).abs() <= slack).all())


def not_logits(*outputs: Tensor) -> str:
    """The problem and the advice for a model whose outputs are all probabilities; empty for any other model."""
    if not all(map(are_probabilities, outputs)):
        return ""
    one_hot = all(bool(((output == 0) | (output == 1)).all()) for output in outputs)
    return ONE_HOT if one_hot else f"returns probabilities, not logits: {INSTEAD_OF_PROBABILITIES}"


# -- the model under attack: it is frozen and tested, and a model that writes to its input is refused ------------------


@contextlib.contextmanager
def frozen(model: Classifier, *, keep_mode: bool = False) -> Iterator[None]:
    """A context in which ``model`` is in evaluation mode, and its parameters have ``requires_grad=False``.

    At the end, modes and flags are restored; if blocks of several threads overlap, at the end of the last. Modules in a
    plain list, in an object or in a hook of the model are frozen too. Frozen parameters save time, because a compiled
    backward pass would compute their gradients.

    Args:
        model: an ``nn.Module``; any other callable is not changed. If an attack runs on a method of a module, the
            caller must freeze the module.
        keep_mode: whether the modes are left as they are.
    """
    if not isinstance(model, nn.Module):
        yield
        return
    parts = modules_of(model)
    hidden = list[nn.Module]()
    if may_hide_modules(parts):
        from ..model_state import hidden_modules

        hidden = [module for _, module in hidden_modules(model)]
    parts += [part for network in hidden for part in modules_of(network)]
    weights = [tensor for part in parts for tensor in part._parameters.values() if tensor is not None]
    # The flag of a tensor that was made in inference mode could not be restored.
    weights = [weight for weight in weights if not weight.is_inference()]
    modes, flags = hold("training", [] if keep_mode else parts), hold("requires_grad", weights)
    try:
        if not keep_mode and any([part.training for part in parts]):
            # A BatchNorm in training mode would give other numbers, and nothing would tell of it.
            for network in (model, *hidden):
                network.eval()
        for weight in weights:
            if weight.requires_grad:
                weight.requires_grad_(False)
        yield
    finally:
        release("requires_grad", flags)
        release("training", modes)


class WritesToItsInput(ValueError):
    """A model has changed its input in place."""

    def __init__(self) -> None:
        super().__init__(
            "model must not write to its input x, because the attack still needs x: call x = x.clone() in the model "
            "before its first in-place operation (x.mul_(), x.clamp_(), x += ..., x[...] = ...)"
        )


#: During a direct call of an attack, until the model has returned its first logits: the name and values of the labels.
#: With a loss of the user's own the labels are free, so there are no values.
first_output: ContextVar[tuple[str, Tensor] | None] = ContextVar("first_output", default=None)


def logits_of(model: Callable[[Tensor], Tensor], x: Tensor, images: int | None = None) -> Tensor:
    """Return the logits of a model for images, ``[B, classes]``, or of as many draws as ``images`` says.

    The output is checked, with the labels of a direct call if it is the first. A model that writes to the images is
    refused; writes through ``x.data`` are not seen.
    """
    if torch.compiler.is_compiling():
        return model(x)
    # Every step of an attack runs these lines, so they must be fast. Inference tensors have no count of writes.
    writes = None if x.is_inference() else x._version
    try:
        logits = model(x)
    except RuntimeError as error:
        # PyTorch itself refuses a write to images whose gradient is recorded.
        if x.requires_grad and "a leaf Variable that requires grad" in str(error):
            raise WritesToItsInput from error
        raise
    if writes is not None and x._version != writes:
        raise WritesToItsInput
    rows = x.shape[0] if images is None else images
    shape = logits.shape if type(logits) is Tensor else ()
    if len(shape) != 2 or shape[0] != rows or shape[1] < 2 or not logits.dtype.is_floating_point:
        logits = checked_logits(logits, rows)
    if (labels := first_output.get()) is not None:
        first_output.set(None)
        _check_first(logits, *labels)
    return logits


def _check_first(logits: Tensor, name: str, labels: Tensor) -> None:
    """Warn of NaN or probabilities as logits, and refuse labels that no class has. The values are read on a CPU."""
    if logits.device.type == "cpu" and logits.numel() and not is_in_torch_dispatch_mode():
        least = float(logits.detach().amin())
        # The smallest number is NaN if any number is.
        if math.isnan(least):
            warnings.warn("the model returns NaN for some images: an attack cannot move them", stacklevel=2)
        if least >= 0 and are_probabilities(logits):
            warnings.warn(f"the model returns probabilities, not logits: {INSTEAD_OF_PROBABILITIES}", stacklevel=2)
        if len(labels) and int(labels.amax()) < logits.shape[1]:
            return
    check_labels(name, labels, logits.shape[1])


def gradient_to(leaf: Tensor, value: Tensor, weights: Tensor | None = None) -> Tensor | None:
    """The gradient of ``value``, a number, or of the sum of ``value * weights``, with respect to ``leaf``.

    None if there is no dependence or no derivative.
    """
    if not value.requires_grad:
        return None
    try:
        if weights is None or type(value) is not Tensor:
            return torch.autograd.grad(value, leaf, weights, allow_unused=True)[0]
        # This is the call that `torch.autograd.grad` makes after its checks, which take a tenth of a small step.
        flags = {"keep_graph": False, "create_graph": False, "allow_unreachable": True, "accumulate_grad": False}
        return _engine_run_backward((value,), (weights,), inputs=(leaf,), **flags)[0]
    except RuntimeError as error:
        if "derivative for" in str(error) and "is not implemented" in str(error):
            return None
        raise


def logits_of_draws(model: Classifier, x: Tensor, draws: int) -> Tensor:
    """Logits ``[draws * B, classes]`` of several draws of each image; the first draws of all images come first."""
    if draws > 1 and supports(model, SharesDraws):
        shares = cast(SharesDraws, model)
        return logits_of(lambda images: shares.draw_logits(images, draws).flatten(0, 1), x, draws * len(x))
    return logits_of(model, repeat_batch(x, draws) if draws > 1 else x)
