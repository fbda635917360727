"""A frozen classifier made fast: BatchNorm folded, channels_last, bfloat16 inside, float32 at its borders."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..models.representation import evaluating, first_tensor, untapped
from .folding import fold_pairs, folded

DTYPES = (torch.float32, torch.bfloat16)


def inside(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """The context accelerated parts compute in: matrix products in ``dtype``; float32 turns an outer autocast off."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)


def channels_last(model: nn.Module, image_shape: tuple[int, ...]) -> bool:
    """Give a model's convolutions channels_last weights, in place, if it still runs then; whether it does.

    One that flattens maps or images by ``view`` does not: it stays contiguous, and needs contiguous images. Parameters
    of other layers stay as they are.
    """
    layers = [module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d))]
    for layer in layers:
        layer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    first = first_tensor(model)
    example = torch.full((2, *image_shape), 0.5, device=first.device, dtype=first.dtype)
    try:
        with evaluating(model), torch.no_grad():  # BatchNorm's statistics are of the data alone
            model(example.contiguous(memory_format=torch.channels_last))
    except RuntimeError:
        for layer in layers:
            layer.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        return False
    return True


class Region:
    """A function of tensors ``[B, ...]``, compiled once for every batch size; within another graph it is itself.

    A compiler makes new graphs for a batch of 1, for one below 16, where torch's CPU convolutions are chosen
    differently, for views and other strides: small batches are filled up with zeros, all are copied to one layout.
    """

    def __init__(self, function: Callable[..., Tensor]):
        self.function, self.compiled = function, torch.compile(function)

    def __call__(self, *inputs: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return self.function(*inputs)
        batch = len(inputs[0])
        if batch < 16:
            inputs = tuple(F.pad(x, (0, 0) * (x.dim() - 1) + (0, 16 - batch)) for x in inputs)
        inputs = tuple(x.clone(memory_format=torch.contiguous_format) for x in inputs)
        for x in inputs:
            torch._dynamo.maybe_mark_dynamic(x, 0)
        return self.compiled(*inputs)[:batch]

    def __reduce__(self) -> tuple:
        return Region, (self.function,)  # copied and pickled, a method goes along with its object


def quicken(
    model: nn.Module, image_shape: tuple[int, ...], dtype: torch.dtype, fold: bool = True
) -> tuple[list[tuple[str, str]], bool]:
    """Prepare a frozen model for `inside`, in place.

    Its matrix layers get weights in ``dtype``, channels_last if the model allows that (`channels_last`); all else
    stays float32: normalisation, statistics and whatever else a user's module holds. Layers with forward hooks are
    not folded.

    Args:
        model: from images ``[B, *image_shape]`` in [0, 1] to logits; no parameter may need a gradient.
        dtype: float32 or bfloat16. fold: whether BatchNorms are folded into the layers before them.

    Returns:
        The names of the (layer, BatchNorm) that were folded, and what `channels_last` said.

    Raises:
        ValueError: another dtype, or see `purify_fast.speed.fold_batchnorm`.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype}")
    model.float().eval()
    pairs: list[tuple[str, str]] = []
    if fold:
        example = torch.rand((4, *image_shape), generator=torch.Generator().manual_seed(0))
        pairs = fold_pairs(model, example.to(first_tensor(model).device))
    last = channels_last(model, image_shape)
    for module in model.modules():
        if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)):
            module.to(dtype)
    return pairs, last


class FrozenView(nn.Module):
    """A copy of ``classifier`` for inference and for attacks on it: images ``[B, *image_shape]`` -> float32 logits.

    It has no hooks of a `Representation`, and no parameter that needs a gradient. Later changes of the classifier's
    weights do not reach it. Arguments and errors as in `quicken`; compile: as a `Region`.
    """

    def __init__(
        self,
        classifier: nn.Module,
        image_shape: tuple[int, ...],
        dtype: torch.dtype = torch.bfloat16,
        fold: bool = True,
        compile: bool = False,
    ):
        super().__init__()
        self.dtype = dtype
        self.classifier = untapped(copy.deepcopy(classifier)).requires_grad_(False)
        self._pairs, self.channels_last = quicken(self.classifier, image_shape, dtype, fold)
        self.folded = len(self._pairs)
        self.region = Region(self._logits) if compile else None

    def forward(self, x: Tensor) -> Tensor:
        return self._logits(x) if self.region is None else self.region(x)

    def _logits(self, x: Tensor) -> Tensor:
        with inside(x.device, self.dtype):
            return self.classifier(x.float() if self.channels_last else x.float().contiguous()).float()


class LiveView(FrozenView):
    """A `FrozenView` of a classifier that is being trained, for attacks on it: `refresh` takes the weights of now."""

    def __init__(
        self,
        classifier: nn.Module,
        image_shape: tuple[int, ...],
        dtype: torch.dtype = torch.bfloat16,
        compile: bool = False,
    ):
        super().__init__(classifier, image_shape, dtype, compile=compile)
        self._source = (classifier,)  # a tuple, so that it is no submodule
        own = {name for pair in self._pairs for name in pair}
        self._copied = [name for name, _ in self.classifier.named_modules() if name not in own]

    @torch.no_grad()
    def refresh(self) -> None:
        """Take the classifier's parameters and buffers as they are now; its modules must be the same."""
        (source,) = self._source
        mine: list[Tensor] = []
        theirs: list[Tensor] = []
        for name in self._copied:
            to, of = self.classifier.get_submodule(name), source.get_submodule(name)
            for kind in ("_parameters", "_buffers"):
                named = {key: value for key, value in getattr(to, kind).items() if value is not None}
                mine += named.values()
                theirs += [getattr(of, kind)[key] for key in named]
        if mine:
            torch._foreach_copy_(mine, theirs)
        for layer, norm in self._pairs:
            new = folded(source.get_submodule(layer), source.get_submodule(norm), torch.float32)
            old = self.classifier.get_submodule(layer)
            for name, value in zip(("weight", "bias"), new, strict=True):
                old.get_parameter(name).copy_(value)
