"""Make copies of frozen networks for inference, with folded BatchNorms, channels_last, and products in bfloat16."""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import _get_current_dispatch_mode

from ..._tensors import first_tensor, without_autocast
from ...models.representation import Representation, evaluation_mode, without_recorders
from ..draws import same_draws, shared_generators
from ..watch import Watch, tensors_of
from .batchnorm import TRANSPOSED, FoldedPairs, fold_batchnorm

DTYPES = (torch.float32, torch.bfloat16)
#: For batches below this size, PyTorch chooses another convolution algorithm on a CPU, so torch.compile makes another
#: graph.
SMALL_BATCH = 16
#: The number of batch sizes that are compiled separately on a GPU: that of a full batch, and that of the last, smaller
#: batch. torch.compile makes at most eight graphs of a function.
STATIC_SIZES = 2


def pad_batch(x: Tensor) -> Tensor:
    """Copy ``x [B, ...]`` and append zeros, up to at least 16 items, also for a symbolic batch size."""
    missing = torch.sym_max(SMALL_BATCH - x.shape[0], 0)
    # The number may be a SymInt.
    return F.pad(x, [0, 0] * (x.dim() - 1) + [0, missing])  # type: ignore[list-item]


def keeps_sizes(device: torch.device) -> bool:
    """Tell whether functions are compiled separately for the first batch sizes on a device."""
    return device.type == "cuda"


class CompiledRegion:
    """A function of tensors ``[B, ...]`` that is compiled for any batch size.

    Small batches are padded with zeros, and inputs are copied to the same layout, because torch.compile would make new
    graphs for them. On a CPU, a batch below 8 runs without the compiler, which is faster.

    On a GPU, the first `STATIC_SIZES` batch sizes are compiled separately and without padding. All further sizes share
    a graph, as on a CPU. Inside another torch.compile graph, the function is traced without these steps.

    Args:
        function: function from tensors ``[B, ...]`` to a tensor ``[B, ...]``. Item i of the result must depend only on
            item i of the inputs.
    """

    def __init__(self, function: Callable[..., Tensor]):
        self.function, self.compiled = function, torch.compile(function)
        self.static: dict[tuple[int, torch.device], Callable[..., Tensor]] = {}

    def __call__(self, *inputs: Tensor) -> Tensor:
        # A step that is traced or compiled as a whole contains the operators of this function.
        if torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None:
            return self.function(*inputs)
        batch, device = len(inputs[0]), inputs[0].device
        if not keeps_sizes(device):
            if 2 * batch < SMALL_BATCH:
                return self.function(*inputs)
        elif (batch, device) not in self.static and len(self.static) < STATIC_SIZES:
            self.static[batch, device] = torch.compile(self.function, dynamic=False)
        static = self.static.get((batch, device))
        if static is None and batch < SMALL_BATCH:
            inputs = tuple(pad_batch(x) for x in inputs)
        inputs = tuple(x.clone(memory_format=torch.contiguous_format) for x in inputs)
        if static is not None:
            return static(*inputs)
        for x in inputs:
            torch._dynamo.maybe_mark_dynamic(x, 0)
        return self.compiled(*inputs)[:batch]

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy or a pickle contains only the function (and the object of a bound method), and compiles it again.
        return CompiledRegion, (self.function,)


def autocast_to(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """The autocast context in which accelerated parts compute; float32 switches off an autocast of the caller."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)


def convert_to_channels_last(model: nn.Module, image_shape: tuple[int, ...]) -> bool:
    """Convert the convolutions' weights to channels_last in place, if the model then still runs; return True if it
    does.

    A model that flattens maps or images with ``view`` does not run in channels_last.
    """
    layers = [module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d))]
    for layer in layers:
        layer.to(memory_format=torch.channels_last)
    first = first_tensor(model)
    example = torch.full((2, *image_shape), 0.5, device=first.device, dtype=first.dtype)
    try:
        # The model is in evaluation mode, because this example must not change the statistics of BatchNorms.
        with evaluation_mode(model), torch.no_grad():
            model(example.contiguous(memory_format=torch.channels_last))
    except RuntimeError:
        for layer in layers:
            layer.to(memory_format=torch.contiguous_format)
        return False
    return True


class _InFloat32(nn.Module):
    """A layer that computes in float32 under an autocast, and converts its result to the dtype of the autocast."""

    def forward(self, input: Tensor) -> Tensor:
        kind = input.device.type
        # The weights are in float32, or in float64 in a copy of the model that is compared with it.
        own: torch.dtype = self.weight.dtype  # type: ignore[assignment]
        wanted = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else own
        with without_autocast(input.device):
            return super().forward(input.to(own)).to(wanted)


class _ConvolvesImages(_InFloat32, nn.Conv2d):
    pass


class _MapsImages(_InFloat32, nn.Linear):
    pass


def _see_images_in_float32(model: nn.Module, image_shape: tuple[int, ...]) -> list[nn.Module]:
    """Let the layers that read the images compute in float32 under an autocast, in place; return these layers.

    Between 0.5 and 1, the numbers of bfloat16 are 1/256 apart, so a perturbation of 1/255 would almost be lost. Layers
    of subclasses are not changed, because they may compute something else.
    """
    layers: list[nn.Module] = []
    for module in model.modules():
        if type(module) is nn.Conv2d and module.in_channels == image_shape[0] and module.groups == 1:
            module.__class__ = _ConvolvesImages
            layers.append(module)
        elif type(module) is nn.Linear and module.in_features == math.prod(image_shape):
            module.__class__ = _MapsImages
            layers.append(module)
    return layers


def prepare_for_inference(
    model: nn.Module,
    image_shape: tuple[int, ...],
    dtype: torch.dtype,
    fine: bool = False,
    plain: bool = False,
) -> tuple[list[tuple[str, str]], bool]:
    """Prepare a frozen model for `autocast_to`, in place; return the folded pairs, and True if it is in channels_last.

    With ``fine``, the layers that read the images compute in float32, for small radii. With ``plain``, no BatchNorm is
    folded, and the layout of the weights remains. Models in float32 with transposed convolutions are slower in
    channels_last, so they are not converted either.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype}")
    model.float()
    pairs = [] if plain else fold_batchnorm(model)
    slower = dtype == torch.float32 and any(isinstance(one, TRANSPOSED) for one in model.modules())
    with same_draws(model):
        uses_channels_last = not (plain or slower) and convert_to_channels_last(model, image_shape)
    in_float32 = _see_images_in_float32(model, image_shape) if fine else []
    for module in model.modules():
        if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)) and module not in in_float32:
            module.to(dtype)
    return pairs, uses_channels_last


class InferenceCopy(nn.Module):
    """A copy of a classifier for inference and for attacks: images ``[B, *image_shape]`` -> float32 logits.

    It has no hooks of a `Representation`, and no parameter that needs a gradient. Call `refresh` after the classifier
    changes.

    Args:
        classifier: module from images in [0, 1] to logits. It is copied.
        image_shape: shape (C, H, W) of an image.
        dtype: dtype of the matrix products, float32 or bfloat16.
        compile: whether to compile the copy as a `CompiledRegion`, and whole steps of attacks on it.
        fine: whether the layers that read the images compute in float32, for attacks with a small radius.
        plain: whether no BatchNorm is folded, and the layout of the weights remains.

    Attributes:
        folded: number of folded BatchNorms.
        uses_channels_last: whether the copy accepts images in channels_last.

    Raises:
        ValueError: the dtype is not allowed.
    """

    #: Captured steps do not depend on `_folding`, which only `refresh` uses, and read the refreshed weights.
    not_dependencies = frozenset({"_folding", "_steps"})

    def __init__(
        self,
        classifier: nn.Module,
        image_shape: tuple[int, ...],
        dtype: torch.dtype = torch.bfloat16,
        compile: bool = False,
        fine: bool = False,
        plain: bool = False,
    ):
        super().__init__()
        self.dtype = dtype
        duplicate = copy.deepcopy(classifier, shared_generators(classifier))
        self.classifier = without_recorders(duplicate).requires_grad_(False)
        if self.classifier.training:
            # A model in evaluation mode may have modules that the user keeps in training mode, such as a dropout.
            self.classifier.eval()
        self._pairs, self.uses_channels_last = prepare_for_inference(
            self.classifier, image_shape, dtype, fine=fine, plain=plain
        )
        self.folded = len(self._pairs)
        self.region = CompiledRegion(self._logits) if compile else None
        self._folding: FoldedPairs | None = None
        self._steps: dict[Hashable, Any] = {}

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return first_tensor(self.classifier).device

    def forward(self, x: Tensor) -> Tensor:
        return self._logits(x) if self.region is None else self.region(x)

    def compiled_steps(self) -> dict[Hashable, Any] | None:
        return None if self.region is None else self._steps

    def _logits(self, x: Tensor) -> Tensor:
        with autocast_to(x.device, self.dtype):
            return self.classifier(x.float() if self.uses_channels_last else x.float().contiguous()).float()

    @torch.no_grad()
    def refresh(self, classifier: nn.Module) -> None:
        """Update the copy with the current parameters and buffers of the classifier, except ``num_batches_tracked``.

        Args:
            classifier: the original classifier, with unchanged modules.
        """
        # A tensor may have several names. List all of them, because the copy may use any name.
        parameters = classifier.named_parameters(remove_duplicate=False)
        theirs = {**dict(parameters), **dict(classifier.named_buffers(remove_duplicate=False))}
        if self._pairs:
            self._folding = self._folding or FoldedPairs(classifier, self._pairs)
            theirs |= self._folding(theirs)
        # Group the tensors by dtypes. On CUDA, a group is copied in a single launch.
        copies = defaultdict[tuple[torch.dtype, torch.dtype], tuple[list[Tensor], list[Tensor]]](lambda: ([], []))
        for name, mine in (*self.classifier.named_parameters(), *self.classifier.named_buffers()):
            if not name.endswith("num_batches_tracked"):
                targets, sources = copies[mine.dtype, theirs[name].dtype]
                targets.append(mine)
                sources.append(theirs[name])
        for targets, sources in copies.values():
            torch._foreach_copy_(targets, sources)


class Accelerated:
    """The inference copies of a defence's frozen parts, with their current weights.

    This object is no module, so its copies are not saved or trained with the defence, and do not follow it.

    Args:
        classifier: module from images ``[B, *image_shape]`` in [0, 1] to logits.
        image_shape: shape (C, H, W) of an image.
        dtype: dtype of the matrix products, float32 or bfloat16.
        compile: whether to compile the copies and the parts.
        reader: the reader of the representation, for a defence that uses a representation.
        parts: functions of tensors ``[B, ...]``, which are compiled if ``compile`` is True.

    Attributes:
        dtype: the given dtype.
        compile: the given setting.
        classifier: copy of the classifier, for the purified images.
        reader: copy that returns the representation; None without a representation.
        regions: compiled functions of the defence, by name.
        packed: weights in the layout of a kernel, for a defence with such a kernel.
        packed_from: identifies the weights that were packed; None if they may have changed since.

    Raises:
        ValueError: the dtype is not allowed.
    """

    #: A captured step does not depend on this attribute (`purify_fast.model_state`), which changes with every training
    #: step.
    not_dependencies = frozenset({"packed_from", "_source", "_watch"})

    # The copies are made outside inference mode even if the caller is in it, because attacks differentiate through
    # them.
    @torch.inference_mode(False)
    def __init__(
        self,
        classifier: nn.Module,
        image_shape: tuple[int, ...],
        dtype: torch.dtype,
        compile: bool,
        reader: Representation | None = None,
        parts: tuple[Callable[..., Tensor], ...] = (),
    ):
        self.dtype, self.compile = dtype, compile
        self.classifier = InferenceCopy(classifier, image_shape, dtype, compile)
        self.reader = copy.deepcopy(reader)
        if self.reader is not None:
            prepare_for_inference(self.reader.model.eval(), image_shape, self.dtype)
        self.regions = {part.__name__: CompiledRegion(part) for part in parts} if compile else {}
        self.packed: Any = None
        self.packed_from: int | None = None
        # In a tuple and not registered, the classifier is no part of this object.
        self._source, self._watch = (classifier,), Watch()
        self.outdated()

    def outdated(self) -> bool:
        """Tell whether a counted write has changed the classifier since the last call, of which there was one."""
        return self._watch.changed([one for _, one in tensors_of(self._source[0])])

    def to(self, device: torch.device) -> None:
        """Move the copies."""
        self.classifier.to(device)
        if self.reader is not None:
            self.reader.model.to(device)
        # The packed weights are on the old device, so they are packed again at their next use.
        self.packed = None
        self.outdated()

    def read(self, x: Tensor) -> list[Tensor]:
        """The representation of images: a tensor for each layer."""
        assert self.reader is not None, "this defence has no representation"
        with autocast_to(x.device, self.dtype):
            return self.reader(x.float())

    def run(self, part: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """Call ``part``, a method of the defence, on tensors ``[B, ...]``. Use its compiled form if there is any."""
        return self.regions.get(part.__name__, part)(*inputs)
