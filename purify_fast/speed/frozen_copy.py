"""Make a frozen copy of a model, which predicts and is attacked faster than the model, and follows its weights."""

from __future__ import annotations

import contextlib
import threading
import traceback
import warnings
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from .._library import ends_graphs, is_compiled, outside_graphs
from .._modules import hold, release
from .._settings import dtype_of, refuse_divided, without_autocast
from .._validation import in_one_line
from ..model_state import describe, hidden_modules
from ..protocols import supports
from .agreement import BFLOAT16, FLOAT32, apart, same_direction
from .copying import Snapshot, computes_in_modes, deep_copy, freeze
from .draws import same_draws
from .eager_mode import eager
from .folding.inference_copy import DTYPES, InferenceCopy
from .precision import fast_bfloat16, float32_products, is_dense
from .reading import NUMBERS, block
from .watch import FEWEST_WEIGHTS, Watch, matrix_weights, tensors_of


@contextlib.contextmanager
def images_only(*models: nn.Module) -> Iterator[None]:
    """A block in which the parameters of modules need no gradients, for attacks on the images alone.

    Use it for attacks that keep the training mode, or that call ``loss.backward()``. Afterwards ``requires_grad`` is as
    before. Computations in the block give no gradients of weights later.
    """
    # The flag of a tensor that was made in inference mode could not be restored.
    weights = [tensor for model in models for tensor in model.parameters() if not tensor.is_inference()]
    saved = hold("requires_grad", weights)
    try:
        for weight in weights:
            if weight.requires_grad:
                weight.requires_grad_(False)
        yield
    finally:
        release("requires_grad", saved)


# -- follow a model: tell when its copy must read the weights again, and whether the copy can still follow it ----------


def is_frozen_copy(model: object) -> bool:
    """Return True if a model is a frozen copy itself."""
    return isinstance(getattr(model, "_followed", None), Followed)


class Followed:
    """A model that a copy follows.

    A copy of this object in memory follows the same model, or the copy of the model that was made together with it. It
    reads the model at its first use. One that was pickled follows nothing.

    Attributes:
        reads: the number of the last read, larger than those of all blocks of `reading` that had begun; 0 if the copy
            must read. Several copies may follow by one object.
        watch: what the model held at the last read. It is another object if the model holds others.
        reason: why every call of the copy must read the model again; empty if counts of writes show a change.
        remade: why each read makes a new network; empty if it writes into the present one.
        graphs: the graphs of attacks that are called directly on the copy.

    Raises:
        TypeError: see `read`.
    """

    def __init__(self, model: nn.Module | None = None):
        self.graphs: Any = None
        self.reads, self.reason, self.remade = 0, "", ""
        self.watch: Any = None
        self._given, self._warned = model, False
        #: The memo of the copying in memory that has made this object, until the model is asked for.
        self._memo: dict[int, Any] | None = None
        if model is not None:
            self._layout = _layout(model)
            self.read()

    @property
    def _model(self) -> nn.Module | None:
        if self._memo is not None:
            # What is copied together may be copied in any order, so only now is it known whether the model was.
            self._given, self._memo = self._memo.get(id(self._given), self._given), None
        return self._given

    def read(self) -> Any:
        """Check the model, and return the watch of what it holds now. The caller makes the copy, and calls `finish`.

        Raises:
            TypeError: the model can no longer be copied, see `check_parts`.
            ValueError: names, shapes or the sharing of the model's tensors have changed.
        """
        # If a check or the caller fails, the next call of the copy tries again.
        self.reads = 0
        model: Any = self._model
        watch = Snapshot(model) if self.watch is None else self.watch.again()
        if watch is not self.watch:
            check_parts(model)
            if not self.fits():
                other = sorted({name for name, *_ in {*_layout(model)} ^ {*self._layout}})
                raise ValueError(
                    f"{type(model).__name__} has other parts, or tensors of other names, shapes or sharing, than when "
                    f"its frozen copy was made ({', '.join(other[:4])}): make a new one with "
                    "purify_fast.frozen_copy(model, x)"
                )
            self.watch, self.reason = watch, _uncounted(model, watch)
        return watch

    @property
    def may_write(self) -> bool:
        """Return True if a read may write into present tensors. A backward pass of an earlier call may need them."""
        return not self.reason or block.get() > 0

    def finish(self, values: Any) -> None:
        """Remember that the copy has been made from what was read last. ``values``: its `Values`."""
        self.reads = next(NUMBERS)
        self.remade = "" if values.possible else self.reason or "it holds objects whose copies may differ"

    def fits(self) -> bool:
        """Return True if names, shapes and the sharing of the model's tensors are those of the copy."""
        return self._model is None or _layout(self._model) == self._layout

    def changed(self) -> bool:
        """Return True if the copy must read: once in a block of `reading`, or if the model may have changed outside."""
        if self._model is None:
            return False
        now = block.get()
        return self.reads <= now or (not now and (self.reason != "" or self.watch.changed()))

    def keep_mode(self, mode: bool) -> None:
        """Warn once that ``train()`` changes nothing in a frozen copy."""
        if mode and not self._warned:
            text = "a frozen copy keeps its mode: train() changes nothing. Call train() on the model itself"
            warnings.warn(text, RuntimeWarning, stacklevel=3)
        self._warned = self._warned or mode

    def refuse_state(self) -> None:
        """Refuse to load weights into a copy, because it would read those of its model again."""
        if self._model is not None:
            raise TypeError("a frozen copy has the weights of its model: call load_state_dict of the model")

    def __deepcopy__(self, memo: dict[int, Any]) -> Followed:
        other = type(self)()
        vars(other).update(vars(self), reads=0, watch=None, _given=self._model, _memo=memo)
        return other

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()


def check_parts(model: nn.Module) -> None:
    """Refuse a model that cannot be copied rightly by a TypeError, which names the part."""
    for at, part in model.named_modules():
        where = f"{at or 'the model itself'} ({type(part).__name__})"
        if isinstance(part, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            part_name = f"model.{at}".rstrip(".")
            text = f"give {part_name}.module, and run one process per GPU"
            raise TypeError(f"model must not be or contain an nn.{type(part).__name__}: {text}")
        if part is not model and supports(part, "make_frozen_copy"):
            raise TypeError(f"model must not contain a defence, got {where}: copy the defence itself")
        if is_frozen_copy(part):
            raise TypeError(f"model must not contain a frozen copy, got {where}: keep the copy outside of the model")
        if "forward" in vars(part):
            raise TypeError(
                f"model must not have a forward that was bound to an instance, as {where} has: its copy would run the "
                "original. Define a class with this forward; for accelerate give accelerator.unwrap_model(model), for "
                "Lightning Fabric model.module, and for a part that torch.compile has made its _orig_mod"
            )
    if any(is_frozen_copy(item) and item._followed._model is model for item in describe(model).items):
        raise TypeError("model must not contain a frozen copy of itself in an attribute, list or dict: keep it outside")
    held = [(f"{at}.{n}".lstrip("."), item) for at, part in model.named_modules() for n, item in vars(part).items()]
    for at, tensor in (*tensors_of(model), *((name, item) for name, item in held if isinstance(item, Tensor))):
        if tensor.layout != torch.strided:
            raise TypeError(f"model must have dense tensors, got {tensor.layout} in {at}: call {at}.to_dense()")


def _uncounted(model: nn.Module, watch: Snapshot) -> str:
    """Say why counts of writes do not show all changes of a model; an empty text if they do."""
    if watch.has_uncounted:
        return "a tensor was made in inference mode"
    for name, part in model.named_modules():
        if computes_in_modes(part):
            return f"{type(part).__name__} ({name or 'the model'}) computes in train() or eval()"
    if hidden := hidden_modules(model):
        return f"{hidden[0][0]} is no registered part"
    ids = {id(item) for _, item in tensors_of(model)}
    ids |= {id(value) for part in model.modules() for value in vars(part).values()}
    if any(id(item) not in ids for item in watch.held.tensors):
        return "a tensor lies in a list, a dict or an object"
    return ""


def _layout(model: nn.Module) -> list[tuple[str, Any, int]]:
    """The names and shapes of a model's tensors, each with the number of its first place, and the classes of parts."""
    first = dict[int, int]()
    tensors = [(name, item.shape, first.setdefault(id(item), len(first))) for name, item in tensors_of(model)]
    return [*tensors, *((name, type(part).__qualname__, 0) for name, part in model.named_modules())]


# -- frozen copy -------------------------------------------------------------------------------------------------------

Dtype = torch.dtype | Literal["auto"]

#: The number of images on which a copy is compared with its model.
COMPARED = 8


def frozen_copy(model: nn.Module, x: Tensor, *, dtype: Dtype = "auto", compile: bool = False) -> nn.Module:
    """Make a frozen copy of a model, for predictions and attacks that need gradients of the images only.

    The copy is compared with the model once, on up to 8 images of ``x``: their logits, and the direction of their
    gradient. If BatchNorms are folded, it is compared again under random BatchNorm statistics, weights and biases. If
    it differs, a simpler form is taken, and a warning says why.

    Args:
        model: module from images ``[B, C, H, W]`` to logits ``[B, classes]``. It is not changed or called; a copy of it
            is. For ``DistributedDataParallel`` the module inside is copied. A defence of this package makes its own
            copy (`purify_fast.defences.Defence.make_frozen_copy`).
        x: an example batch of images ``[B, C, H, W]``, floating point, on the device of the model.
        dtype: dtype of the products, ``torch.float32`` or ``torch.bfloat16``. "auto" is bfloat16 where the device
            multiplies faster in it and the model is a defence or has enough dense products for a batch like x, or else
            float32.
        compile: whether to compile the copy by `torch.compile`, and whole steps of this package's attacks on it.

    Returns:
        A `FrozenCopy`; for a defence of this package, a defence of the same class.

    Raises:
        TypeError: the model cannot be copied rightly, such as a module in a data-parallel wrapper, or with a
            ``forward`` that was bound to the instance.
        ValueError: x is no batch of images, the dtype is not allowed, or the noise of a defence is fixed or off.
    """
    # An attack on a CPU needs none of what makes graphs.
    from .graphs.graphed_loop import StepGraphs

    if not getattr(model, "noise_is_fresh", True) or getattr(model, "_noise_ids", None) is not None:
        raise ValueError("model must draw fresh noise: make its copy outside of fixed_noise, deterministic, noise_ids")
    copied, same = _compared(model, x, dtype, compile=compile)
    if not same:
        text = f"{type(model).__name__} and its plain copy give other logits for the same images and random numbers"
        warnings.warn(f"{text}, so the copy could not be compared with it", RuntimeWarning, stacklevel=2)
    # A race of cuDNN's algorithms takes a second for each batch size, and changes the last bits in the middle of a run.
    copied._followed.graphs = StepGraphs(cudnn_benchmark="off")  # type: ignore[union-attr]
    return copied


class Form(NamedTuple):
    """How a copy is made.

    Attributes:
        dtype: dtype of the products.
        plain: whether the copy has no folds and no changed layouts.
        fine: whether a copy in bfloat16 reads the images in float32.
    """

    dtype: torch.dtype
    plain: bool = False
    fine: bool = False


# With TF32, PyTorch's default for convolutions on a GPU, two right forms of a deep network differ by more than allowed.
@float32_products()
def _compared(
    model: Any, x: Tensor, dtype: Dtype, *, compile: bool = False, fine: bool = True
) -> tuple[nn.Module, bool]:
    """Make a copy in the first form that agrees with the model, or in the last form. Tell whether it agrees."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    _check(model, x, dtype)
    if dtype == "auto":
        dtype = auto_dtype(model, x)
    x, name = x[:COMPARED].detach(), type(model).__name__
    # The copies are made outside inference mode even if the caller is in it, because attacks differentiate them. The
    # caller's autocast does not decide either.
    with torch.inference_mode(False), torch.enable_grad(), without_autocast(x.device):
        x = x.clone()
        with _not_run(model):
            # An error of the model itself leaves this function.
            want = _wanted(model, x)
        first = Form(dtype, fine=fine and dtype == torch.bfloat16)
        forms = list(dict.fromkeys([first, Form(torch.float32), Form(torch.float32, plain=True)]))
        for form, following in zip(forms, [*forms[1:], None], strict=True):
            try:
                with _not_run(model):
                    copied = made_in(form, model, x, compile)
                    # The compiler would compile again after this block, because of its hook.
                    with eager(copied):
                        got = _answers(copied, x.float())
                got = _answers(copied, x.float()) if compile else got
                if _agree(got, want, form.dtype) and _folds_rightly(model, x, form):
                    # A call may have filled caches or moved counters of the copy.
                    with same_draws(model):
                        copied.update()
                    return copied, True
                reason = "it gives other logits or gradients than the model"
            except CallsTheModel:
                raise
            except Exception as error:
                # A user's module may raise any error when it is traced, converted, compiled or run in another dtype.
                if following is None:
                    raise
                where = traceback.extract_tb(error.__traceback__)[-1]
                reason = f"{in_one_line(error)} ({where.filename}, line {where.lineno})"
            if following is not None:
                simpler = "without folded BatchNorms, in float32" if following.plain else "in float32"
                text = f"the frozen copy of {name} in {form.dtype} is not used: {reason}. It is made {simpler} instead"
                cure = "" if form.dtype == torch.float32 else "; dtype=torch.float32 asks for float32 at once"
                warnings.warn(text + cure, RuntimeWarning, stacklevel=4)
    return copied, False


def made_in(form: Form, model: Any, x: Tensor, compile: bool = False) -> Any:
    """Make a copy of a model in a form, without a comparison."""
    # A model may draw random numbers while it is copied.
    with torch.inference_mode(False), same_draws(model):
        if supports(model, "make_frozen_copy"):
            return model.make_frozen_copy(form.dtype, compile=compile, plain=form.plain)
        return FrozenCopy(model, tuple(x.shape[1:]), form, compile)


def _wanted(model: nn.Module, x: Tensor) -> _Answers:
    """Return the answers of a model in evaluation mode, in float32 if it is in half precision. A copy of it is run."""
    copied = deep_copy(model).requires_grad_(False)
    if copied.training:
        freeze(copied)
    if dtype_of(copied) in (torch.float16, torch.bfloat16):
        copied, x = copied.float(), x.float()
    return _answers(copied, x)


def _folds_rightly(model: nn.Module, x: Tensor, form: Form) -> bool:
    """Return True if the copy in float32 agrees with a model that has random BatchNorm statistics, weights and biases.

    Those of a new model, 0 and 1, would hide that a BatchNorm was folded along another dimension than its own.
    """
    other = deep_copy(model)
    norms = [part for part in other.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    if form.plain or not norms:
        return True
    source = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for norm in norms:
            for tensor, low, high in ((norm.weight, 0.5, 1.5), (norm.bias, -0.5, 0.5), (norm.running_mean, -0.5, 0.5)):
                if tensor is not None:
                    tensor.copy_(torch.rand(tensor.shape, generator=source, device="cpu") * (high - low) + low)
            if norm.running_var is not None and norm.running_mean is not None:
                # The mean and the variance keep their ratio, so that values in deep networks keep their size.
                norm.running_mean.mul_(norm.running_var.sqrt())
                norm.running_var.mul_(
                    torch.rand(norm.running_var.shape, generator=source, device="cpu").to(x.device) + 0.5
                )
    want = _wanted(other, x)
    got = _answers(made_in(Form(torch.float32), other, x), x.float())
    # The gradients of random networks may be so small that their direction is rounding.
    return _agree(got._replace(gradient=want.gradient), want, torch.float32)


class CallsTheModel(TypeError):
    """A copy runs modules of the model that it was made from."""


@contextlib.contextmanager
def _not_run(model: nn.Module) -> Iterator[None]:
    """A block in which no part of the model may run: its copies have parts of their own."""
    names = {id(part): name or "the model itself" for name, part in model.named_modules()}
    watch, thread = Watch(model), threading.get_ident()

    def refuse(module: nn.Module, *args: Any) -> None:
        if id(module) in names and threading.get_ident() == thread:
            raise CallsTheModel(
                f"model must not be called by its own copy, but the copy runs {names[id(module)]} "
                f"({type(module).__name__}): write what calls it as a method of the class, not as a closure"
            )

    handle = nn.modules.module.register_module_forward_pre_hook(refuse)
    try:
        yield
    finally:
        handle.remove()
    if not watch.has_uncounted and watch.changed():
        raise CallsTheModel(
            "model must not be written to by its own copy, but it has changed meanwhile: a hook or a function of the "
            "model that is no method may do this"
        )


def auto_dtype(model: nn.Module, x: Tensor) -> torch.dtype:
    """The dtype of products that "auto" means for a model, on batches of images like ``x``."""
    # A defence makes many samples of an image, so bfloat16 is faster even with few weights.
    dense = fast_bfloat16(x.device) and (
        supports(model, "make_frozen_copy")
        or (is_dense(model, x) if x.device.type == "cpu" else matrix_weights(model) >= FEWEST_WEIGHTS)
    )
    return torch.bfloat16 if dense else torch.float32


class FrozenCopy(InferenceCopy):
    """The copy that `frozen_copy` makes: images ``[B, C, H, W]`` -> float32 logits ``[B, classes]``.

    In an attack of this package, `evaluate` or `certify`, it reads its model once. Another call reads if PyTorch has
    counted a write to the model's tensors, or an optimizer has stepped, since the last time. To read is to make the
    copy again, with all that the model holds; where nothing but the values of parameters and buffers can differ, these
    are written into the copy. The copy keeps its model alive. A copy that was pickled keeps its weights.

    Attributes:
        about: a line that says what the copy is.
    """

    not_dependencies = frozenset({"_followed"})

    def __init__(self, model: nn.Module, image_shape: tuple[int, ...], form: Form, compile: bool):
        followed = Followed(model)
        super().__init__(model, image_shape, compile=compile, watch=followed.watch, **form._asdict())
        self._followed, self._name = followed, type(model).__name__
        followed.finish(self._values)

    @property
    def about(self) -> str:
        layout = "channels_last" if self.uses_channels_last else "its own memory format"
        compiled = ", compiled" if self.compiled else ""
        reads = f", reads its model at every call, because {self._followed.reason}" if self._followed.reason else ""
        unfolded = self.prepared.unfolded
        folds = f"{self.folded} folded BatchNorms" + (f" ({unfolded})" if unfolded else "")
        text = f"{self._name} in {self.dtype}, {layout}, {folds}{compiled}{reads}"
        return text.replace("torch.", "")

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            self.prepare_replay()
        elif ends_graphs():
            # A compiled graph would keep the first weights, so it ends here.
            self._read_outside()
        return self._predict(x)

    def prepare_replay(self) -> None:
        """Follow the model, before a prediction, or before a captured or compiled step runs."""
        # In a call of `torch.func.functional_call`, the given tensors serve.
        if self._followed.changed() and not (self._values is not None and self._values.own.swapped()):
            self.update(in_place=self._followed.may_write)

    _read_outside = outside_graphs(prepare_replay)

    def compiled_steps(self) -> Any:
        self.prepare_replay()
        return super().compiled_steps()

    def update(self, in_place: bool = True) -> None:
        """Read the model again. ``in_place``: whether the present tensors get the new values, if nothing else differs.

        Raises:
            TypeError, ValueError: see `Followed.read`.
        """
        if self._followed._model is not None:
            watch = self._followed.read()
            self._read(watch.roots[0], watch, in_place, self._followed.graphs)
            self._followed.finish(self._values)

    def known_identity(self) -> Any:
        """Within an attack, an object that is another one if the network is, without another look; else None."""
        held = self._values.possible and 0 < block.get() < self._followed.reads
        return self._values.own if held else None

    def follows(self, model: nn.Module) -> bool:
        """Read the model again; False if it has changed so much that it needs a new copy."""
        try:
            self.update()
        except (TypeError, ValueError):
            return False
        return True

    def state_dict(self, *args: Any, **options: Any) -> Any:
        self.prepare_replay()
        return super().state_dict(*args, **options)

    def _load_from_state_dict(self, *args: Any) -> None:
        self._followed.refuse_state()
        super()._load_from_state_dict(*args)

    def __getstate__(self) -> Any:
        self.prepare_replay()
        return super().__getstate__()  # type: ignore[no-untyped-call]

    def train(self, mode: bool = True) -> FrozenCopy:
        """Change nothing. Attacks of other packages call this method; the first call with ``mode=True`` warns."""
        self._followed.keep_mode(mode)
        return self

    def extra_repr(self) -> str:
        return self.about


def _check(model: nn.Module, x: Tensor, dtype: Dtype) -> None:
    name = type(model).__name__
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        raise TypeError(f"model must be a torch.nn.Module in eager mode, got {name}")
    if is_compiled(model):
        raise TypeError("model must not be compiled: give model._orig_mod, and write frozen_copy(..., compile=True)")
    if is_frozen_copy(model):
        raise TypeError("model must not be a frozen copy itself: use this copy")
    check_parts(model)
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
    if supports(model, "purify"):
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
        return _Answers(*(part.detach().float() for part in (logits, gradient, purified, predicted)))


def _agree(got: _Answers, want: _Answers, dtype: torch.dtype) -> bool:
    logits = want.logits
    if got.logits.shape != logits.shape or not bool((got.purified - want.purified).abs().mean() <= BFLOAT16):
        return False
    strength = FLOAT32 if dtype == torch.float32 else BFLOAT16
    for own, theirs in ((got.logits, logits), (got.predicted, want.predicted)):
        if theirs.dim() == 2 and theirs.shape[1] > 1:
            same = same_logits(own, theirs) if dtype == torch.bfloat16 else not apart(own, theirs, strength).any()
        else:
            # Classes may be masked by infinite logits.
            allowed = strength * float(theirs.nan_to_num(0.0, 0.0, 0.0).abs().max())
            same = torch.allclose(own, theirs, rtol=0.0, atol=allowed, equal_nan=True)
        if not same:
            return False
    return same_direction(got.gradient, want.gradient, strength)


def same_logits(got: Tensor, want: Tensor) -> bool:
    """Return True if a copy in bfloat16 has the logits ``[B, classes]`` of its model, up to a constant for each image.

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


def same_answers(model: nn.Module, other: nn.Module, x: Tensor) -> bool:
    """Return True if two models give the same logits and image gradients up to the rounding of bfloat16."""
    with torch.inference_mode(False), torch.enable_grad(), images_only(model, other):
        return _agree(_answers(model, x.clone()), _answers(other, x.clone()), torch.bfloat16)


def copy_or_model(model: nn.Module, x: Tensor, dtype: Dtype, *, fine: bool = True) -> nn.Module:
    """Make a `frozen_copy` for attacks, or return the model itself, with a warning that says why it has no copy."""
    try:
        copied, same = _compared(model, x, dtype, fine=fine)
        reason = "it gives other logits than its plain copy"
    except Exception as error:
        # A user's module may raise any error when it is copied or called. The attack shows an error of the model.
        copied, same = model, False
        reason = in_one_line(error)
    if same:
        return copied
    text = f"{type(model).__name__} is attacked itself, because it has no frozen copy: {reason}"
    warnings.warn(text, RuntimeWarning, stacklevel=2)
    return model


class AttackedCopy:
    """The model that a training attacks: a frozen copy of the trained model, which attacks let read the weights.

    A model in float32 with few weights is attacked itself, because a copy takes more time than it saves. A copy in
    bfloat16 rounds the images to bfloat16 as the trained model does.

    Attributes:
        decision: the form of the copy, ``[dtype, plain]``, or "model" for the model itself; None before the first
            attack. It depends on the weights at that time, so a resumed training takes over that of its checkpoint.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype):
        self.model, self.dtype = model, dtype
        self.decision: Any = None
        self._made: Any = None

    def __getstate__(self) -> dict[str, Any]:
        # A deep copy or pickle makes a copy of its own model.
        return vars(self) | {"_made": None}

    def now(self, x: Tensor, compile: bool = False) -> nn.Module:
        """Return the copy, for images like ``x``, or the model itself. ``compile``: whether attacks compile steps."""
        if self.dtype == torch.float32 and not compile and matrix_weights(self.model) < FEWEST_WEIGHTS:
            return self.model
        copied = self._chosen(x)
        # The copy of a defence has its copied classifier.
        inside = next((part for part in copied.modules() if isinstance(part, InferenceCopy)), None)
        if inside is not None and not compile:
            inside.steps = None
        elif inside is not None and inside.steps is None:
            inside.compile_steps(at_once=True)
        return copied

    def _chosen(self, x: Tensor) -> nn.Module:
        if self._made is not None and (self._made is self.model or self._made._followed.fits()):
            return cast(nn.Module, self._made)
        if self._made is not None or self.decision is None:
            # The images are always the same, so that a run makes the same copy whenever it is repeated.
            some = torch.rand((COMPARED, *x.shape[1:]), generator=torch.Generator().manual_seed(0), device="cpu")
            self._made = copy_or_model(self.model, some.to(x), self.dtype, fine=False)
            chosen = self._made is not self.model
            self.decision = [str(self._made.compute_dtype), self._made.plain] if chosen else "model"
        elif self.decision == "model":
            self._made = self.model
        else:
            dtype = next(kind for kind in DTYPES if str(kind) == self.decision[0])
            self._made = made_in(Form(dtype, self.decision[1]), self.model, x)
        return cast(nn.Module, self._made)
