"""Copies of frozen networks for inference: BatchNorm folded, channels_last, bfloat16 inside, float32 at their borders.

A part of a copy can be compiled: for every batch size at once, or on a GPU for the few sizes that occur.
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..._tensors import first_tensor, without_autocast
from ...models.representation import Representation, evaluation_mode, without_recorders
from .batchnorm import FoldedPairs, fold_batchnorm

DTYPES = (torch.float32, torch.bfloat16)
#: For batches below this size PyTorch chooses another CPU convolution, for which a compiler makes another graph.
SMALL_BATCH = 16
#: On a GPU this many batch sizes get a graph of their own: a full batch and the last, smaller one. A compiler makes no
#: more than eight graphs of a function.
STATIC_SIZES = 2


def pad_batch(x: Tensor) -> Tensor:
    """``x [B, ...]`` with zeros appended along the batch until it holds at least 16 items; a copy.

    The number that is missing may be symbolic: a compiler then makes one graph for all batch sizes.
    """
    missing = torch.sym_max(SMALL_BATCH - x.shape[0], 0)
    return F.pad(x, [0, 0] * (x.dim() - 1) + [0, missing])  # type: ignore[list-item]  # a SymInt, perhaps


def keeps_sizes(device: torch.device) -> bool:
    """Tell whether every batch size gets its own CUDA graph on a device."""
    return device.type == "cuda"


class CompiledRegion:
    """A function of tensors ``[B, ...]``, compiled for any batch size.

    Inside another torch.compile graph it is traced as it is.

    Without help a compiler makes new graphs for a batch of 1, for one below 16, for views and for other strides. So
    small batches are filled up with zeros, and all inputs are copied to one layout. On a CPU a batch below 8 is
    computed without the compiler: filled up, it would cost twice as much or more, where compiling gains less than that.

    On a GPU the first sizes that occur are compiled as they are: launches and indices are constants then, and nothing
    is filled up. Further sizes share one graph, as all do on a CPU.

    Args:
        function: maps tensors ``[B, ...]`` to a tensor ``[B, ...]``; an item of the result must depend only on the
            items at its own place.
    """

    def __init__(self, function: Callable[..., Tensor]):
        self.function, self.compiled = function, torch.compile(function)
        self.static: dict[tuple[int, torch.device], Callable[..., Tensor]] = {}

    def __call__(self, *inputs: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
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
        # A copied or pickled region has the function, and with a bound method its object. The copy compiles the
        # function again.
        return CompiledRegion, (self.function,)


def autocast_to(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """The context in which accelerated parts compute on a device: matrix products in bfloat16 or float32.

    float32 turns an autocast off that the caller may have turned on.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)


def convert_to_channels_last(model: nn.Module, image_shape: tuple[int, ...]) -> bool:
    """Give a model's convolutions channels_last weights, in place, if the model still runs then; whether it does.

    A model that flattens maps or images by ``view`` does not run: its weights stay contiguous, and it needs contiguous
    images. Parameters of other layers stay as they are.
    """
    layers = [module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d))]
    for layer in layers:
        layer.to(memory_format=torch.channels_last)
    first = first_tensor(model)
    example = torch.full((2, *image_shape), 0.5, device=first.device, dtype=first.dtype)
    try:
        # The model is in evaluation mode here, because this example must not enter BatchNorm's statistics.
        with evaluation_mode(model), torch.no_grad():
            model(example.contiguous(memory_format=torch.channels_last))
    except RuntimeError:
        for layer in layers:
            layer.to(memory_format=torch.contiguous_format)
        return False
    return True


class _InFloat32(nn.Module):
    """A layer that computes in float32 under an autocast, and whose results have the autocast's dtype."""

    def forward(self, input: Tensor) -> Tensor:
        kind = input.device.type
        wanted = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32
        with without_autocast(input.device):
            return super().forward(input.float()).to(wanted)


class _ConvolvesImages(_InFloat32, nn.Conv2d):
    pass


class _MapsImages(_InFloat32, nn.Linear):
    pass


def _see_images_in_float32(model: nn.Module, image_shape: tuple[int, ...]) -> list[nn.Module]:
    """Let a model's layers for images compute in float32 under an autocast to bfloat16, in place.

    Between 0.5 and 1 the numbers of bfloat16 are 1/256 apart. A layer that rounds images to them hardly sees a
    perturbation of 1/255. The layers behind it see differences between pixels, which are larger.

    Returns:
        The layers, whose weights must stay in float32: the convolutions of C channels, and the linear layers of C H W
        numbers. Layers of other classes that compute something of their own are none of them.
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
    model: nn.Module, image_shape: tuple[int, ...], dtype: torch.dtype, fold: bool = True, fine: bool = False
) -> tuple[list[tuple[str, str]], bool]:
    """Prepare a frozen model for `autocast_to`, in place.

    Its matrix layers get weights in ``dtype``, and channels_last if the model allows that. Everything else stays
    float32: normalization, statistics, and whatever else a user's module holds. Layers with forward hooks are not
    folded.

    Args:
        model: from images ``[B, *image_shape]`` in [0, 1] to logits; no parameter may need a gradient.
        image_shape: (C, H, W).
        dtype: float32 or bfloat16.
        fold: whether BatchNorms are folded into the layers before them.
        fine: whether the layers for images compute in float32, so that an attack of a small radius is seen.

    Returns:
        The names of the pairs (layer, BatchNorm) that were folded, and what `convert_to_channels_last` returned.

    Raises:
        ValueError: another dtype, or a model that `purify_fast.speed.fold_batchnorm` refuses.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype}")
    model.float().eval()
    pairs: list[tuple[str, str]] = []
    if fold:
        example = torch.rand((4, *image_shape), generator=torch.Generator().manual_seed(0))
        pairs = fold_batchnorm(model, example.to(first_tensor(model).device))
    uses_channels_last = convert_to_channels_last(model, image_shape)
    in_float32 = _see_images_in_float32(model, image_shape) if fine else []
    for module in model.modules():
        if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)) and module not in in_float32:
            module.to(dtype)
    return pairs, uses_channels_last


class InferenceCopy(nn.Module):
    """A copy of a classifier for inference and for attacks on it: images ``[B, *image_shape]`` -> float32 logits.

    It has none of the hooks of a `Representation`, and no parameter that needs a gradient. Later changes of the
    classifier's weights reach it by `refresh` alone, as where an attack needs a copy of what is trained.

    Args:
        classifier: images in [0, 1] to logits; it is copied.
        image_shape: (C, H, W).
        dtype: dtype of the matrix products, float32 or bfloat16.
        fold: whether BatchNorms are folded into the layers before them.
        compile: whether the copy is a `CompiledRegion`.
        fine: whether the layers for images compute in float32, so that an attack of a small radius is seen.

    Attributes:
        folded: how many BatchNorms were folded.
        uses_channels_last: whether the copy takes images in channels_last.

    Raises:
        ValueError: `prepare_for_inference` refuses the arguments.
    """

    #: Only `refresh` uses `_folding`. Captured steps do not: they read the weights that `refresh` writes.
    not_dependencies = frozenset({"_folding"})

    def __init__(
        self,
        classifier: nn.Module,
        image_shape: tuple[int, ...],
        dtype: torch.dtype = torch.bfloat16,
        fold: bool = True,
        compile: bool = False,
        fine: bool = False,
    ):
        super().__init__()
        self.dtype = dtype
        self.classifier = without_recorders(copy.deepcopy(classifier)).requires_grad_(False)
        self._pairs, self.uses_channels_last = prepare_for_inference(self.classifier, image_shape, dtype, fold, fine)
        self.folded = len(self._pairs)
        self.region = CompiledRegion(self._logits) if compile else None
        self._folding: FoldedPairs | None = None

    def forward(self, x: Tensor) -> Tensor:
        return self._logits(x) if self.region is None else self.region(x)

    def _logits(self, x: Tensor) -> Tensor:
        with autocast_to(x.device, self.dtype):
            return self.classifier(x.float() if self.uses_channels_last else x.float().contiguous()).float()

    @torch.no_grad()
    def refresh(self, classifier: nn.Module) -> None:
        """Take the parameters and buffers that ``classifier`` has now.

        A BatchNorm's count of its batches, which an evaluation does not read, stays as it was.

        Args:
            classifier: the one that this is a copy of; its modules must be the same.
        """
        # A tensor may have several names. List all of them, because the copy may use any.
        parameters = classifier.named_parameters(remove_duplicate=False)
        theirs = {**dict(parameters), **dict(classifier.named_buffers(remove_duplicate=False))}
        if self._pairs:
            self._folding = self._folding or FoldedPairs(classifier, self._pairs, self.classifier)
            theirs |= self._folding(theirs)
        # Tensors are grouped by dtypes: on CUDA, copying a group to tensors of one dtype takes one launch.
        copies = defaultdict[tuple[torch.dtype, torch.dtype], tuple[list[Tensor], list[Tensor]]](lambda: ([], []))
        for name, mine in (*self.classifier.named_parameters(), *self.classifier.named_buffers()):
            if not name.endswith("num_batches_tracked"):
                targets, sources = copies[mine.dtype, theirs[name].dtype]
                targets.append(mine)
                sources.append(theirs[name])
        for targets, sources in copies.values():
            torch._foreach_copy_(targets, sources)


@dataclass(eq=False)
class Accelerated:
    """The copies of a defence's frozen parts: folded, in ``dtype``, channels_last.

    This is a plain object and no module, so that nothing in it is saved, trained or counted with the defence that holds
    it. `make` makes one; it follows neither moves nor changes of the weights by itself.

    Args:
        dtype: dtype of the matrix products, float32 or bfloat16.
        classifier: classifies the purified images.
        reader: reads the representation, for a defence that has one.
        regions: compiled functions of the defence, by name.
        packed: a part's weights as its kernel takes them, kept here by a defence that has such a part.
        packed_from: names the weights that were packed; None if they may have changed since.
    """

    #: A captured step does not depend on this attribute (`purify_fast.model_state`), which changes with every training
    #: step.
    not_dependencies = frozenset({"packed_from"})

    dtype: torch.dtype
    classifier: InferenceCopy
    reader: Representation | None = None
    regions: dict[str, CompiledRegion] = field(default_factory=dict)
    packed: Any = None
    packed_from: int | None = None

    def __post_init__(self) -> None:
        self.device = first_tensor(self.classifier).device

    @classmethod
    @torch.inference_mode(False)
    def make(
        cls,
        classifier: nn.Module,
        image_shape: tuple[int, ...],
        settings: Mapping[str, Any],
        reader: Representation | None = None,
        parts: tuple[Callable[..., Tensor], ...] = (),
    ) -> Accelerated:
        """Copy ``classifier`` and ``reader`` as they are now.

        They are made outside inference mode, wherever this is called, because attacks differentiate through them.

        Args:
            classifier: images ``[B, *image_shape]`` in [0, 1] to logits.
            image_shape: (C, H, W).
            settings: ``dtype``, ``fold`` and ``compile``, as `InferenceCopy` takes them.
            reader: the reader of the representation, or None.
            parts: functions of tensors ``[B, ...]`` that are compiled if the settings say so.

        Raises:
            ValueError: `prepare_for_inference` refuses the arguments.
        """
        if reader is not None:
            reader = copy.deepcopy(reader)
            prepare_for_inference(reader.model, image_shape, settings["dtype"], settings["fold"])
        regions = {part.__name__: CompiledRegion(part) for part in parts} if settings["compile"] else {}
        return cls(settings["dtype"], InferenceCopy(classifier, image_shape, **settings), reader, regions)

    def to(self, device: torch.device) -> None:
        """Move the copies."""
        self.device = device
        self.classifier.to(device)
        if self.reader is not None:
            self.reader.model.to(device)
        # The packed weights are on the old device, so they are packed again at their next use.
        self.packed = None

    def classify(self, x: Tensor) -> Tensor:
        """The classifier copy's logits of images, float32 ``[B, classes]``."""
        self._check_device(x)
        return self.classifier(x)

    def read(self, x: Tensor) -> list[Tensor]:
        """The representation of images, layer by layer."""
        assert self.reader is not None, "this defence has no representation"
        self._check_device(x)
        with autocast_to(x.device, self.dtype):
            return self.reader(x.float())

    def run(self, part: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """``part(*inputs)`` of a method of the defence and tensors ``[B, ...]``, compiled if it was to be."""
        return self.regions.get(part.__name__, part)(*inputs)

    def _check_device(self, x: Tensor) -> None:
        if x.device != self.device:
            raise RuntimeError(
                f"x must be on the device of the accelerated copies, {self.device}, got {x.device}: move the images, "
                "or call the defence's refresh() if the defence was moved as a part of another module"
            )
