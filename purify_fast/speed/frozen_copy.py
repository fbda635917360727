"""Make a frozen copy of a model, which predicts and is attacked faster than the model, and follows its weights."""

from __future__ import annotations

import copy
import functools
import traceback
import warnings
from collections.abc import Hashable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from .._compiler import is_compiled
from .._tensors import refuse_divided
from .._validation import in_one_line
from ..models.representation import evaluation_mode
from ..protocols import CopiesItself, Purifies, supports
from .agreement import BFLOAT16, FLOAT32, same_direction
from .draws import same_draws, shared_generators
from .folding.inference_copy import DTYPES, InferenceCopy
from .followed import Followed, is_frozen_copy, keeps_its_mode, settings_of
from .frozen_weights import images_only
from .processor import fast_bfloat16
from .watch import FEWEST_WEIGHTS, matrix_weights, tensors_of

if TYPE_CHECKING:
    from .graphs.graphed_calls import GraphedCalls

Dtype = torch.dtype | Literal["auto"]

#: The number of images on which a copy is compared with its model.
COMPARED = 8


def frozen_copy(
    model: nn.Module, x: Tensor, *, dtype: Dtype = "auto", compile: bool = False, graphs: bool = False
) -> nn.Module:
    """Make a frozen copy of a model, for predictions and attacks that need gradients of the images only.

    The copy is compared with the model once, on up to 8 images of ``x``: their logits, and the direction of their
    gradient. If it differs, a simpler form is taken, and a warning says why.

    Args:
        model: module from images ``[B, C, H, W]`` to logits ``[B, classes]``. It is not changed or called; a copy of it
            is. For ``DistributedDataParallel`` the module inside is copied. A defence of this package makes its own
            copy (`purify_fast.defences.Defence.make_frozen_copy`).
        x: an example batch of images ``[B, C, H, W]``, floating point, on the device of the model.
        dtype: dtype of the products, ``torch.float32`` or ``torch.bfloat16``. "auto" is bfloat16 where the device
            multiplies faster in it and the model has enough weights or is a defence, or else float32.
        compile: whether to compile the copy by `torch.compile`, and whole steps of this package's attacks on it.
        graphs: whether calls of the copy on a CUDA device are captured as CUDA graphs, see
            `purify_fast.speed.graphs.graphed_calls.GraphedCalls`. Without it, only steps of this package's attacks are.

    Returns:
        A `FrozenCopy`; for a defence of this package, a defence of the same class.

    Raises:
        TypeError: the model is no module in eager mode, or a frozen copy itself.
        ValueError: x is no batch of images, the dtype is not allowed, the noise of a defence is fixed or off, or
            ``graphs`` is True for a defence.
    """
    # An attack on a CPU needs none of what makes graphs.
    from .graphs.graphed_calls import GraphedCalls
    from .graphs.step_graphs import StepGraphs

    if graphs and supports(model, CopiesItself):
        raise ValueError("graphs must be False for a defence, got True: only steps of attacks on it are captured")
    if not getattr(model, "noise_is_fresh", True) or getattr(model, "_noise_ids", None) is not None:
        raise ValueError("model must draw fresh noise: make its copy outside of fixed_noise, deterministic, noise_ids")
    made, same = _compared(model, x, dtype, compile)
    if not same:
        text = f"{type(model).__name__} and its plain copy give other logits for the same images and random numbers"
        warnings.warn(f"{text}, so the copy could not be compared with it", RuntimeWarning, stacklevel=2)
    copied: Any = made
    copied._followed.graphs = StepGraphs()
    if graphs:
        copied.graphed_calls = copied._followed.graphs.beside = GraphedCalls()
        copied.about += ", calls as CUDA graphs"
    return made


def _compared(model: Any, x: Tensor, dtype: Dtype, compile: bool) -> tuple[nn.Module, bool]:
    """Make a copy in the first form that agrees with the model, or in the last form. Tell whether it agrees."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    _check(model, x, dtype)
    if dtype == "auto":
        dtype = auto_dtype(model, x.device)
    x, shape, name = x[:COMPARED].detach(), tuple(x.shape[1:]), type(model).__name__
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
                # A model may draw random numbers while it is copied.
                with same_draws(model):
                    if supports(model, CopiesItself):
                        made = model.make_frozen_copy(each, compile=compile, plain=plain)
                    else:
                        made = FrozenCopy(model, shape, each, compile=compile, plain=plain)
                if _agree(_answers(made, x.float()), want, each):
                    return made, True
                reason = "it gives other logits or gradients than the model"
            except Exception as error:
                # A user's module may raise any error when it is traced, converted, compiled or run in another dtype.
                if following is None:
                    raise
                where = traceback.extract_tb(error.__traceback__)[-1]
                reason = f"{in_one_line(error)} ({where.filename}, line {where.lineno})"
            if following is not None:
                simpler = "without folded BatchNorms, in float32" if following[1] else "in float32"
                text = f"the frozen copy of {name} in {each} is not used: {reason}. It is made {simpler} instead"
                cure = "" if each == torch.float32 else "; dtype=torch.float32 asks for float32 at once"
                warnings.warn(text + cure, RuntimeWarning, stacklevel=3)
    return made, False


def auto_dtype(model: nn.Module, device: torch.device) -> torch.dtype:
    """The dtype of products that "auto" means for a model on a device."""
    # A defence makes many samples of an image, so bfloat16 is faster even with few weights.
    large = supports(model, CopiesItself) or matrix_weights(model) >= FEWEST_WEIGHTS
    return torch.bfloat16 if large and fast_bfloat16(device) else torch.float32


class FrozenCopy(InferenceCopy):
    """The copy that `frozen_copy` makes: images ``[B, C, H, W]`` -> float32 logits ``[B, classes]``.

    Each call compares the tensors of the model, and PyTorch's counts of writes to them, with those of the call before.
    If they differ, it reads the weights again. No value is read, so call `update` after a write through ``.data``. The
    copy does not follow other changes, such as another attribute, and keeps its mode. If the model is gone, or the copy
    was pickled, the copy keeps its weights.

    Attributes:
        about: a line that says what the copy is.
    """

    not_dependencies = frozenset({"_followed", "_warned", "graphed_calls"})

    def __init__(self, model: nn.Module, image_shape: tuple[int, ...], dtype: torch.dtype, compile: bool, plain: bool):
        fine = dtype == torch.bfloat16
        super().__init__(model, image_shape, dtype, compile, fine=fine, plain=plain)
        self.training = self._warned = False
        self.graphed_calls: GraphedCalls | None = None
        self._followed = Followed(model)
        layout = "channels_last" if self.uses_channels_last else "its own memory format"
        compiled = ", compiled" if compile else ""
        name = type(model).__name__
        self.about = f"{name} in {dtype}, {layout}, {self.folded} folded BatchNorms{compiled}".replace("torch.", "")

    def forward(self, x: Tensor) -> Tensor:
        # A compiler would keep the count of writes as a constant.
        if torch.compiler.is_compiling():
            return super().forward(x)
        self.prepare_replay()
        call = super().forward
        return call(x) if self.graphed_calls is None else self.graphed_calls(self.classifier, call, x)

    def prepare_replay(self) -> None:
        """Follow the model before a captured or compiled step runs, which does not call `forward`."""
        if self._followed.changed():
            self.update()

    def compiled_steps(self) -> dict[Hashable, Any] | None:
        self.prepare_replay()
        return super().compiled_steps()

    def update(self) -> None:
        """Read the weights and buffers of the model again.

        Raises:
            ValueError: names, shapes or the sharing of the model's tensors have changed.
        """
        model = self._followed.read()
        if model is not None:
            self.refresh(model)

    def follows(self, model: nn.Module) -> bool:
        """Read the weights of the model again; False if it has changed so much that it needs a new copy."""
        try:
            self.update()
        except ValueError:
            return False
        return True

    def train(self, mode: bool = True) -> FrozenCopy:
        """Change nothing. Attacks of other packages call this method; the first call with ``mode=True`` warns."""
        self._warned = keeps_its_mode(mode, self._warned)
        return self

    def extra_repr(self) -> str:
        return self.about


def _check(model: nn.Module, x: Tensor, dtype: Dtype) -> None:
    name = type(model).__name__
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        raise TypeError(f"model must be a torch.nn.Module in eager mode, got {name}")
    if isinstance(model, nn.DataParallel):
        raise TypeError("model must not be an nn.DataParallel: give model.module, and run one process per GPU")
    if is_compiled(model):
        raise TypeError("model must not be compiled: give model._orig_mod, and write frozen_copy(..., compile=True)")
    if is_frozen_copy(model):
        raise TypeError("model must not be a frozen copy itself: use this copy")
    inside = [one for one in model.modules() if one is not model and supports(one, CopiesItself)]
    if inside:
        raise TypeError(f"model must not contain a defence, got a {type(inside[0]).__name__}: copy the defence itself")
    refuse_divided(model)
    if not isinstance(x, Tensor) or x.dim() != 4 or not len(x) or not x.is_floating_point():
        got = f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"x must be a batch of images [B, C, H, W], floating point, got {got}")
    if dtype != "auto" and dtype not in DTYPES:
        raise ValueError(f'dtype must be "auto", {", ".join(map(str, DTYPES))}, got {dtype}')
    if next(tensors_of(model), None) is None:
        raise ValueError(f"model must have weights or buffers, got {name} without any: a copy would not be faster")


class _Answers(NamedTuple):
    logits: Tensor
    gradient: Tensor
    purified: Tensor
    #: The logits without recorded gradients, which may come from other code.
    predicted: Tensor


def _answers(model: Any, x: Tensor) -> _Answers:
    """Return the logits, the image gradient of a fixed combination of them, and the purified images of a defence.

    The random generators are restored.
    """
    purified = x
    if supports(model, Purifies):
        with same_draws(model), torch.no_grad():
            purified = model.purify(x)
    with same_draws(model), torch.no_grad():
        predicted = model(x)
    with same_draws(model):
        leaf = x.clone().requires_grad_()
        logits = model(leaf)
        if type(logits) is not Tensor:
            raise TypeError(f"the model must return a tensor of logits, got {type(logits).__name__}")
        weight = torch.linspace(-1, 1, logits.numel(), device=logits.device).sin_().view_as(logits)
        total = (logits * weight).sum()
        gradient = torch.autograd.grad(total, leaf, materialize_grads=True)[0] if total.requires_grad else 0 * leaf
        return _Answers(*(one.detach().float() for one in (logits, gradient, purified, predicted)))


def _agree(got: _Answers, want: _Answers, dtype: torch.dtype) -> bool:
    logits = want.logits
    if got.logits.shape != logits.shape or not bool((got.purified - want.purified).abs().mean() <= BFLOAT16):
        return False
    strength = FLOAT32 if dtype == torch.float32 else BFLOAT16
    for mine, theirs in ((got.logits, logits), (got.predicted, want.predicted)):
        if dtype == torch.bfloat16 and theirs.dim() == 2 and theirs.shape[1] > 1:
            same = same_logits(mine, theirs)
        else:
            same = bool((mine - theirs).abs().max() <= strength * theirs.abs().max())
        if not same:
            return False
    return same_direction(got.gradient, want.gradient, strength)


def same_logits(got: Tensor, want: Tensor) -> bool:
    """Tell whether a copy in bfloat16 has the logits ``[B, classes]`` of its model, up to a constant for each image.

    The gap of a class is the logit of the predicted class minus the logit of this class. Each gap may have twice the
    error BFLOAT16, because it is a difference of two logits. If a gap is small, the error is a share of the median gap
    of the class with the fourth highest logit.
    """
    if want.shape != got.shape or not bool(got.isfinite().all()):
        return False
    # Measure the gap from the first to the fourth class, because targeted DLR reads the four highest logits. With fewer
    # than nine classes, measure to an earlier class, because the smallest logit may be far from all others.
    leading = want.topk(min(4, 2 + (want.shape[1] - 1) // 4), 1).values
    top = want.argmax(1, keepdim=True)
    behind, its_own = (logits.gather(1, top) - logits for logits in (want, got))
    # Each class has its own limit: a class with a very low logit would allow large errors in all others.
    allowed = 2 * BFLOAT16 * behind.clamp_min((leading[:, 0] - leading[:, -1]).median())
    return bool(((its_own - behind).abs() <= allowed).all())


def same_answers(one: nn.Module, other: nn.Module, x: Tensor) -> bool:
    """Tell whether two models give the same logits and image gradients up to the rounding of bfloat16."""
    with torch.inference_mode(False), torch.enable_grad(), images_only(one, other):
        return _agree(_answers(one, x.clone()), _answers(other, x.clone()), torch.bfloat16)


def tell_of_copies(model: object, device: torch.device) -> None:
    """Warn once in a process of a direct attack on a large model in float32, which leaves matrix units unused."""
    if not isinstance(model, nn.Module) or is_frozen_copy(model) or supports(model, CopiesItself):
        return
    first = next(model.parameters(), None)
    if first is not None and first.dtype == torch.float32 and auto_dtype(model, device) == torch.bfloat16:
        _warn_once(
            "the attack computes in float32, without the matrix units of the device: attack "
            'purify_fast.frozen_copy(model, x), or give precision="bfloat16", or "float32" to keep it so'
        )


@functools.cache
def _warn_once(text: str) -> None:
    warnings.warn(text, stacklevel=2)


def copy_or_model(model: nn.Module, x: Tensor, dtype: Dtype) -> nn.Module:
    """Make a `frozen_copy` for attacks, or return the model itself, with a warning that says why it has no copy."""
    try:
        made, same = _compared(model, x, dtype, compile=False)
        reason = "it gives other logits than its plain copy"
    except Exception as error:
        # A user's module may raise any error when it is copied or called. The attack shows an error of the model.
        made, same = model, False
        reason = in_one_line(error)
    if same:
        return made
    text = f"{type(model).__name__} is attacked itself, because it has no frozen copy: {reason}"
    warnings.warn(text, RuntimeWarning, stacklevel=2)
    return model


class AttackedCopy:
    """The model that a training attacks: a frozen copy of the trained model, which reads the weights at every step.

    A model in float32 with few weights is attacked itself, because a copy takes more time than it saves.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype):
        self.model, self.dtype = model, dtype
        self._made: nn.Module | None = None
        self._settings: Any = None

    def now(self, x: Tensor) -> nn.Module:
        """Return the copy with the present weights, for images like ``x``, or the model itself."""
        if self.dtype == torch.float32 and matrix_weights(self.model) < FEWEST_WEIGHTS:
            return self.model
        with evaluation_mode(self.model):
            settings, objects = settings_of(self.model)
        made: Any = self._made
        if settings != self._settings or (made is not self.model and not made.follows(self.model)):
            # The images are always the same, so that a resumed run makes the same copy.
            some = torch.rand((COMPARED, *x.shape[1:]), generator=torch.Generator().manual_seed(0), device="cpu")
            made = copy_or_model(self.model, some.to(x), self.dtype)
        self._made, self._settings, self._objects = made, settings, objects
        return cast(nn.Module, made)
