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
from .._tensors import repeat_batch
from ..protocols import Classifier, SharesDraws, supports
from .arguments import INSTEAD_OF_PROBABILITIES, are_probabilities, check_labels, checked_logits


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
    parts += [part for whole in hidden for part in modules_of(whole)]
    weights = [one for part in parts for one in part._parameters.values() if one is not None]
    # The flag of a tensor that was made in inference mode could not be restored.
    weights = [weight for weight in weights if not weight.is_inference()]
    modes, flags = hold("training", [] if keep_mode else parts), hold("requires_grad", weights)
    try:
        if not keep_mode and any([part.training for part in parts]):
            # A BatchNorm in training mode would give other numbers, and nothing would tell of it.
            for whole in (model, *hidden):
                whole.eval()
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
    wanted = x.shape[0] if images is None else images
    shape = logits.shape if type(logits) is Tensor else ()
    if len(shape) != 2 or shape[0] != wanted or shape[1] < 2 or not logits.dtype.is_floating_point:
        logits = checked_logits(logits, wanted)
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
