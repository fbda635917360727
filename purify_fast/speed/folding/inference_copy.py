"""Copies of a classifier for inference: BatchNorm folded, channels_last, bfloat16 inside, float32 at their borders."""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..._tensors import first_tensor, without_autocast
from ...models.representation import evaluation_mode, without_recorders
from ..compiled_region import CompiledRegion
from .batchnorm import FoldedPairs, fold_pairs

DTYPES = (torch.float32, torch.bfloat16)


def autocast_to(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """The context in which accelerated parts compute: matrix products in ``dtype``.

    Args:
        device: of the tensors.
        dtype: bfloat16 or float32; float32 turns an autocast off that the caller may have turned on.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)


def convert_to_channels_last(model: nn.Module, image_shape: tuple[int, ...]) -> bool:
    """Give a model's convolutions channels_last weights, in place, if the model still runs then.

    A model that flattens maps or images by ``view`` does not run: its weights stay contiguous, and it needs contiguous
    images. Parameters of other layers stay as they are.

    Args:
        model: from images ``[B, *image_shape]`` to logits.
        image_shape: (C, H, W).

    Returns:
        Whether the weights are channels_last now.
    """
    layers = [module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d))]
    for layer in layers:
        layer.to(memory_format=torch.channels_last)
    first = first_tensor(model)
    example = torch.full((2, *image_shape), 0.5, device=first.device, dtype=first.dtype)
    try:
        # Evaluation mode: BatchNorm's statistics must come from the data alone, not from this example.
        with evaluation_mode(model), torch.no_grad():
            model(example.contiguous(memory_format=torch.channels_last))
    except RuntimeError:
        for layer in layers:
            layer.to(memory_format=torch.contiguous_format)
        return False
    return True


class _ConvolvesImages(nn.Conv2d):
    """A convolution that computes in float32 under an autocast, and whose results have the autocast's dtype."""

    def forward(self, input: Tensor) -> Tensor:
        return _in_float32(super().forward, input)


class _MapsImages(nn.Linear):
    """A linear layer that computes in float32 under an autocast, and whose results have the autocast's dtype."""

    def forward(self, input: Tensor) -> Tensor:
        return _in_float32(super().forward, input)


def _in_float32(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    kind = x.device.type
    wanted = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32
    with without_autocast(x.device):
        return layer(x.float()).to(wanted)


def see_images_in_float32(model: nn.Module, image_shape: tuple[int, ...]) -> list[nn.Module]:
    """Let a model's layers for images compute in float32 under an autocast to bfloat16, in place.

    Between 0.5 and 1 the numbers of bfloat16 are 1/256 apart. A layer that rounds images to them hardly sees a
    perturbation of 1/255. The layers behind it see differences between pixels, which are larger.

    Args:
        model: from images ``[B, *image_shape]`` to logits.
        image_shape: (C, H, W).

    Returns:
        The layers, whose weights must stay in float32: the convolutions of C channels, and the linear layers of C H W
        numbers. Layers of other classes that compute something of their own are none of them.
    """
    layers: list[nn.Module] = []
    for module in model.modules():
        if type(module) is nn.Conv2d and module.in_channels == image_shape[0] and module.groups == 1:
            module.__class__ = _ConvolvesImages
        elif type(module) is nn.Linear and module.in_features == math.prod(image_shape):
            module.__class__ = _MapsImages
        else:
            continue
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
        fine: whether the layers for images compute in float32; see `see_images_in_float32`.

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
        pairs = fold_pairs(model, example.to(first_tensor(model).device))
    uses_channels_last = convert_to_channels_last(model, image_shape)
    in_float32 = see_images_in_float32(model, image_shape) if fine else []
    for module in model.modules():
        if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)) and module not in in_float32:
            module.to(dtype)
    return pairs, uses_channels_last


class InferenceCopy(nn.Module):
    """A copy of a classifier for inference and for attacks on it: images ``[B, *image_shape]`` -> float32 logits.

    It has none of the hooks of a `Representation`, and no parameter that needs a gradient. Later changes of the
    classifier's weights do not reach it.

    Args:
        classifier: images in [0, 1] to logits; it is copied.
        image_shape: (C, H, W).
        dtype: of the matrix products, float32 or bfloat16.
        fold: whether BatchNorms are folded into the layers before them.
        compile: whether the copy is a `CompiledRegion`.
        fine: whether the layers for images compute in float32, so that an attack of a small radius is seen.

    Attributes:
        folded: how many BatchNorms were folded.
        uses_channels_last: whether the copy takes images in channels_last.

    Raises:
        ValueError: as `prepare_for_inference`.
    """

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

    def forward(self, x: Tensor) -> Tensor:
        return self._logits(x) if self.region is None else self.region(x)

    def _logits(self, x: Tensor) -> Tensor:
        with autocast_to(x.device, self.dtype):
            return self.classifier(x.float() if self.uses_channels_last else x.float().contiguous()).float()


class LiveInferenceCopy(InferenceCopy):
    """An `InferenceCopy` of a classifier that is being trained, for attacks on it.

    Args:
        classifier: the classifier in training; `refresh` reads its weights.
        image_shape: (C, H, W).
        dtype: of the matrix products, float32 or bfloat16.
        compile: whether the copy is a `CompiledRegion`.
    """

    #: What `refresh` reads; captured steps read what it writes.
    not_dependencies = frozenset({"_folding"})

    def __init__(
        self,
        classifier: nn.Module,
        image_shape: tuple[int, ...],
        dtype: torch.dtype = torch.bfloat16,
        compile: bool = False,
    ):
        super().__init__(classifier, image_shape, dtype, compile=compile)
        self._folding = FoldedPairs(classifier, self._pairs, self.classifier) if self._pairs else None

    @torch.no_grad()
    def refresh(self, classifier: nn.Module) -> None:
        """Take the parameters and buffers that ``classifier`` has now.

        A BatchNorm's count of its batches, which an evaluation does not read, stays as it was.

        Args:
            classifier: the one that this is a copy of; its modules must be the same.
        """
        # under all of their names, of which the copy's may be any
        parameters = classifier.named_parameters(remove_duplicate=False)
        theirs = {**dict(parameters), **dict(classifier.named_buffers(remove_duplicate=False))}
        if self._folding is not None:
            theirs |= self._folding(theirs)
        # tensors of one dtype into those of one dtype are one launch on CUDA
        copies = defaultdict[tuple[torch.dtype, torch.dtype], tuple[list[Tensor], list[Tensor]]](lambda: ([], []))
        for name, mine in (*self.classifier.named_parameters(), *self.classifier.named_buffers()):
            if not name.endswith("num_batches_tracked"):
                targets, sources = copies[mine.dtype, theirs[name].dtype]
                targets.append(mine)
                sources.append(theirs[name])
        for targets, sources in copies.values():
            torch._foreach_copy_(targets, sources)
