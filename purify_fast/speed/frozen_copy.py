"""Make a frozen copy of a model, which predicts and is attacked faster than the model, and follows its weights."""

from __future__ import annotations

import copy
import traceback
import warnings
import weakref
from collections.abc import Callable, Hashable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .._compiler import is_compiled
from .agreement import same_direction, same_logits
from .draws import same_draws, shared_generators
from .folding.inference_copy import DTYPES, InferenceCopy
from .processor import fast_bfloat16
from .watch import FEWEST_WEIGHTS, matrix_weights, tensors_of

Dtype = torch.dtype | Literal["auto"]

#: The number of images on which a copy is compared with its model.
COMPARED = 8
#: The largest error of the logits of a copy in float32, as a share of the largest logit, and the least cosine of its
#: gradient.
ERROR, COSINE = 1e-3, 0.999


def frozen_copy(model: nn.Module, x: Tensor, *, dtype: Dtype = "auto", compile: bool = False) -> FrozenCopy:
    """Make a frozen copy of a model, for predictions and attacks that need gradients of the images only.

    The copy is compared with the model once, on up to 8 images of ``x``: their logits, and the direction of their
    gradient. If it differs, a simpler form is taken, and a warning says why.

    Args:
        model: module from images ``[B, C, H, W]`` to logits ``[B, classes]``. It is not changed or called; a copy of it
            is. For ``DistributedDataParallel`` the module inside is copied.
        x: an example batch of images ``[B, C, H, W]``, floating point, on the device of the model.
        dtype: dtype of the products, ``torch.float32`` or ``torch.bfloat16``. "auto" is bfloat16 where the device
            multiplies faster in it and the model has enough weights, or else float32.
        compile: whether to compile the copy by `torch.compile`, and whole steps of this package's attacks on it.

    Returns:
        The copy.

    Raises:
        TypeError: the model is no module in eager mode, or a defence of this package.
        ValueError: x is no batch of images, or the dtype is not allowed.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    _check(model, x, dtype)
    if dtype == "auto":
        dtype = auto_dtype(model, x.device)
    x, shape, name = x[:COMPARED].detach().float(), tuple(x.shape[1:]), type(model).__name__
    # The copies are made outside inference mode even if the caller is in it, because attacks differentiate them.
    with torch.inference_mode(False), torch.enable_grad():
        x = x.clone()
        original = copy.deepcopy(model, shared_generators(model)).requires_grad_(False)
        if original.training:
            original.eval()
        # An error of the model itself leaves this function.
        want = _answers(original, x)
        forms = list(dict.fromkeys([(dtype, False), (torch.float32, False), (torch.float32, True)]))
        for (each, plain), following in zip(forms, [*forms[1:], None], strict=True):
            try:
                made = FrozenCopy(model, shape, each, compile=compile, plain=plain)
                if _agree(_answers(made, x), want, each):
                    return made
                reason = "it gives other logits or gradients than the model"
            except Exception as error:
                # A user's module may raise any error when it is traced, converted, compiled or run in another dtype.
                if following is None:
                    raise
                where = traceback.extract_tb(error.__traceback__)[-1]
                line = (str(error).strip().splitlines() or [""])[0]
                reason = f"{type(error).__name__}: {line} ({where.filename}, line {where.lineno})"
            if following is not None:
                simpler = "without folded BatchNorms, in float32" if following[1] else "in float32"
                text = f"the frozen copy of {name} in {each} is not used: {reason}. It is made {simpler} instead"
                warnings.warn(f"{text}; dtype=torch.float32 asks for float32 at once", RuntimeWarning, stacklevel=2)
    text = f"{name} and its plain copy give other logits for the same images and random numbers"
    warnings.warn(f"{text}, so the copy could not be compared with it", RuntimeWarning, stacklevel=2)
    return made


def auto_dtype(model: nn.Module, device: torch.device) -> torch.dtype:
    """The dtype of products that "auto" means for a model on a device."""
    return torch.bfloat16 if fast_bfloat16(device) and matrix_weights(model) >= FEWEST_WEIGHTS else torch.float32


class FrozenCopy(InferenceCopy):
    """The copy that `frozen_copy` makes: images ``[B, C, H, W]`` -> float32 logits ``[B, classes]``.

    Each call compares the tensors of the model, and PyTorch's counts of writes to them, with those of the call before.
    If they differ, it reads the weights again. No value is read, so call `update` after a write through ``.data``. The
    copy does not follow other changes, such as another attribute, and keeps its mode. If the model is gone, or the copy
    was pickled, the copy keeps its weights.

    Attributes:
        about: a line that says what the copy is.
    """

    not_dependencies = frozenset({"_followed", "_refs", "_stamps", "_slots", "_layout", "_warned"})

    def __init__(self, model: nn.Module, image_shape: tuple[int, ...], dtype: torch.dtype, compile: bool, plain: bool):
        super().__init__(model, image_shape, dtype, compile, plain=plain)
        self.training = self._warned = False
        self._followed: Callable[[], nn.Module | None] = weakref.ref(model)
        self._layout = _layout(model)
        self._slots = [vars(part)[group] for part in model.modules() for group in _GROUPS]
        self._refs, self._stamps = self._look()
        layout = "channels_last" if self.uses_channels_last else "its own memory format"
        compiled = ", compiled" if compile else ""
        name = type(model).__name__
        self.about = f"{name} in {dtype}, {layout}, {self.folded} folded BatchNorms{compiled}".replace("torch.", "")

    def forward(self, x: Tensor) -> Tensor:
        # A compiler would keep the count of writes as a constant.
        if not torch.compiler.is_compiling():
            self.prepare_replay()
        return super().forward(x)

    def prepare_replay(self) -> None:
        """Follow the model before a captured or compiled step runs, which does not call `forward`."""
        if self._stamps != self._look()[1]:
            self.update()

    def compiled_steps(self) -> dict[Hashable, Any] | None:
        self.prepare_replay()
        return super().compiled_steps()

    def update(self) -> None:
        """Read the weights and buffers of the model again.

        Raises:
            ValueError: names, shapes or the sharing of the model's tensors have changed.
        """
        model = self._followed()
        if model is None:
            return
        if (now := _layout(model)) != self._layout:
            other = sorted({name for name, *_ in {*now} ^ {*self._layout}})
            raise ValueError(
                f"the tensors of {type(model).__name__} have other names, shapes or sharing than when its frozen copy "
                f"was made ({', '.join(other[:4])}): make a new one with purify_fast.frozen_copy(model, x)"
            )
        self.refresh(model)
        # A part may have been replaced by another one with equal names and shapes.
        self._slots = [vars(part)[group] for part in model.modules() for group in _GROUPS]
        self._refs, self._stamps = self._look()

    def train(self, mode: bool = True) -> FrozenCopy:
        """Change nothing. Attacks of other packages call this method; the first call with ``mode=True`` warns."""
        if mode and not self._warned:
            self._warned = True
            text = "a frozen copy keeps its mode: train() changes nothing. Call train() on the model itself"
            warnings.warn(text, RuntimeWarning, stacklevel=2)
        return self

    def extra_repr(self) -> str:
        return self.about

    def _look(self) -> tuple[list[Any], list[Any]]:
        """Return weak references to the model's parts and tensors, and stamps: their ids, counts of writes, addresses.

        A new object may get the id and the address of one that is gone. A reference that is kept has its id alone.
        """
        if self._followed() is None:
            return [], []
        tensors, refs = list[Tensor](), list[Any]()
        for held in self._slots:
            if held:
                refs += [weakref.ref(one) for one in held.values() if one is not None]
                tensors += [one for one in held.values() if isinstance(one, Tensor)]
        versions = [-1 if one.is_inference() else one._version for one in tensors]
        return refs, [list(map(id, refs)), versions, [one.data_ptr() for one in tensors]]

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = vars(self)
        return {**state, "_followed": _nothing, "_slots": [], "_refs": [], "_stamps": []}

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenCopy:
        # A copy in memory follows the same model.
        kept = {"_followed": self._followed, "_slots": self._slots, "_refs": self._refs, "_stamps": self._stamps}
        other = FrozenCopy.__new__(FrozenCopy)
        memo[id(self)] = other
        vars(other).update(copy.deepcopy(self.__getstate__(), memo) | kept)
        return other


#: The dictionaries in which a module holds its tensors and parts.
_GROUPS = ("_parameters", "_buffers", "_modules")


def _nothing() -> None:
    return None


def _layout(model: nn.Module) -> list[tuple[str, torch.Size, int]]:
    """The names and shapes of a model's tensors, each with the number of its first place."""
    first = dict[int, int]()
    return [(name, one.shape, first.setdefault(id(one), len(first))) for name, one in tensors_of(model)]


def _check(model: nn.Module, x: Tensor, dtype: Dtype) -> None:
    name = type(model).__name__
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        raise TypeError(f"model must be a torch.nn.Module in eager mode, got {name}")
    if isinstance(model, nn.DataParallel):
        raise TypeError("model must not be an nn.DataParallel: give model.module, and run one process per GPU")
    if is_compiled(model):
        raise TypeError("model must not be compiled: give model._orig_mod, and write frozen_copy(..., compile=True)")
    if isinstance(model, FrozenCopy):
        raise TypeError("model must not be a frozen copy itself: use this copy")
    if callable(getattr(model, "accelerate", None)):
        advice = "write copy.deepcopy(defence).accelerate()"
        raise TypeError(f"model must not be a defence of this package, got {name}: {advice}")
    if not isinstance(x, Tensor) or x.dim() != 4 or not len(x) or not x.is_floating_point():
        got = f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"x must be a batch of images [B, C, H, W], floating point, got {got}")
    if dtype != "auto" and dtype not in DTYPES:
        raise ValueError(f'dtype must be "auto", {", ".join(map(str, DTYPES))}, got {dtype}')
    if next(tensors_of(model), None) is None:
        raise ValueError(f"model must have weights or buffers, got {name} without any: a copy would not be faster")


def _answers(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return logits and the image gradient of a fixed combination of them; the random generators are restored."""
    with same_draws(model):
        leaf = x.clone().requires_grad_()
        logits = model(leaf)
        if type(logits) is not Tensor:
            raise TypeError(f"the model must return a tensor of logits, got {type(logits).__name__}")
        weight = torch.linspace(-1, 1, logits.numel(), device=logits.device).sin_().view_as(logits)
        total = (logits * weight).sum()
        gradient = torch.autograd.grad(total, leaf, materialize_grads=True)[0] if total.requires_grad else 0 * leaf
        return logits.detach(), gradient.detach()


def _agree(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor], dtype: torch.dtype) -> bool:
    if got[0].shape != want[0].shape:
        return False
    if dtype == torch.bfloat16 and want[0].dim() == 2 and want[0].shape[1] > 1:
        return same_logits(got[0], want[0]) and same_direction(got[1], want[1])
    error, cosine = (ERROR, COSINE) if dtype == torch.float32 else (50 * ERROR, 0.8)
    close = bool((got[0] - want[0]).abs().max() <= error * want[0].abs().max())
    return close and same_direction(got[1], want[1], cosine)
