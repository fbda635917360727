"""Make copies of frozen networks for inference, with folded BatchNorms, channels_last, and products in bfloat16."""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, nn

from ..._compiler import section
from ..._tensors import first_tensor, without_autocast
from ...models.representation import evaluation_mode, without_recorders
from ..draws import same_draws, shared_generators
from ..watch import tensors_of
from .batchnorm import TRANSPOSED, FoldedPairs, fold_batchnorm

DTYPES = (torch.float32, torch.bfloat16)


def autocast_to(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """The autocast context in which copies compute; float32 switches off an autocast of the caller."""
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


class _SequenceFirst(nn.MultiheadAttention):
    """Copies batch-first tokens to the order in which PyTorch computes.

    With frozen weights, PyTorch would multiply each image of the transposed tokens on its own, which is slower.
    """

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *given: Any, **options: Any) -> Any:
        if query.dim() != 3:
            return super().forward(query, key, value, *given, **options)
        tokens = query.transpose(0, 1).contiguous()
        others = (tokens, tokens) if query is key is value else (key.transpose(0, 1), value.transpose(0, 1))
        out, weights = super().forward(tokens, *others, *given, **options)
        return out.transpose(0, 1), weights


_ENCODERS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


def _attend_sequence_first(model: nn.Module) -> None:
    """Let the attention layers on a CPU copy their tokens, in place. PyTorch's own encoders have another fast path."""
    for parent in model.modules():
        for module in parent.children() if not isinstance(parent, _ENCODERS) else ():
            if (
                type(module) is nn.MultiheadAttention
                and module.batch_first
                and first_tensor(module).device.type == "cpu"
            ):
                module.__class__, module.batch_first = _SequenceFirst, False


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
    if not plain:
        _attend_sequence_first(model)
    in_float32 = _see_images_in_float32(model, image_shape) if fine else []
    for module in model.modules():
        if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)) and module not in in_float32:
            module.to(dtype)
    return pairs, uses_channels_last


class CopiedWeights:
    """Copies the weights of a model into a copy of it, after `prepare_for_inference` has changed this copy."""

    def __init__(self, copied: nn.Module, pairs: list[tuple[str, str]]):
        self.copied, self.pairs = copied, pairs
        self._folding: FoldedPairs | None = None

    @torch.no_grad()
    def read(self, model: nn.Module) -> None:
        """Copy the current parameters and buffers of the model, except ``num_batches_tracked``."""
        # A tensor may have several names. List all of them, because the copy may use any name.
        theirs = dict(tensors_of(model))
        with section("refresh of a copy"):
            if self.pairs:
                self._folding = self._folding or FoldedPairs(model, self.pairs)
                theirs |= self._folding(theirs)
            # Group the tensors by dtypes. On CUDA, a group is copied in a single launch.
            copies = defaultdict[tuple[torch.dtype, torch.dtype], tuple[list[Tensor], list[Tensor]]](lambda: ([], []))
            for name, mine in (*self.copied.named_parameters(), *self.copied.named_buffers()):
                # A random defence in the copy has noise of its own.
                if not name.endswith(("num_batches_tracked", "_noise_seed")):
                    targets, sources = copies[mine.dtype, theirs[name].dtype]
                    targets.append(mine)
                    sources.append(theirs[name])
            for targets, sources in copies.values():
                torch._foreach_copy_(targets, sources)


class InferenceCopy(nn.Module):
    """A copy of a classifier for inference and for attacks: images ``[B, *image_shape]`` -> float32 logits.

    It has no hooks of a `Representation`, and no parameter that needs a gradient. Call `refresh` after the classifier
    changes.

    Args:
        classifier: module from images in [0, 1] to logits. It is copied.
        image_shape: shape (C, H, W) of an image.
        dtype: dtype of the matrix products, float32 or bfloat16.
        compile: whether to compile the copy by `torch.compile`, and whole steps of attacks on it.
        fine: whether the layers that read the images compute in float32, for attacks with a small radius.
        plain: whether no BatchNorm is folded, and the layout of the weights remains.

    Attributes:
        folded: number of folded BatchNorms.
        uses_channels_last: whether the copy accepts images in channels_last.

    Raises:
        ValueError: the dtype is not allowed.
    """

    #: Captured steps read the refreshed weights.
    not_dependencies = frozenset({"_weights", "_steps"})

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
        pairs, self.uses_channels_last = prepare_for_inference(
            self.classifier, image_shape, dtype, fine=fine, plain=plain
        )
        self.folded, self.compile_steps = len(pairs), compile
        self._weights = CopiedWeights(self.classifier, pairs)
        self._steps: dict[Hashable, Any] = {}
        if compile:
            self.classifier.compile()

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return first_tensor(self.classifier).device

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of the products."""
        return self.dtype

    def forward(self, x: Tensor) -> Tensor:
        with autocast_to(x.device, self.dtype):
            return self.classifier(x.float() if self.uses_channels_last else x.float().contiguous()).float()

    def compiled_steps(self) -> dict[Hashable, Any] | None:
        return self._steps if self.compile_steps else None

    def refresh(self, classifier: nn.Module) -> None:
        """Update the copy with the weights of the classifier, whose modules are unchanged, see `CopiedWeights`."""
        self._weights.read(classifier)
