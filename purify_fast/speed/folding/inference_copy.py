"""Make copies of frozen networks for inference, with folded BatchNorms, channels_last, and products in bfloat16."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from ..._library import section
from ..._settings import first_tensor, without_autocast
from ...models.layers import Normalize, without_recorders
from ...ops.dispatch.gradient import transformed
from ..copying import Snapshot, deep_copy, freeze
from ..draws import same_draws
from ..layout import autocast_to, convert, convert_to_channels_last, to_format
from ..watch import matrix_weights, tensors_of
from .arithmetic import TRANSPOSED
from .batchnorm import Values, fold_pairs, foldable_pairs

DTYPES = (torch.float32, torch.bfloat16)
#: For a model with fewer weights, the conversion of an image to channels_last takes longer than it saves.
TINY = 2_000


class _InFloat32(nn.Module):
    """A layer that computes in float32 under an autocast, and converts its result to the dtype of the autocast."""

    def forward(self, input: Tensor) -> Tensor:
        kind = input.device.type
        # The weights are in float32, or in float64 in a copy of the model that is compared with it.
        own: torch.dtype = self.weight.dtype  # type: ignore[assignment]
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else own
        with without_autocast(input.device):
            return super().forward(input.to(own)).to(dtype)


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


class _Affine(torch.autograd.Function):
    """``shift + scale x`` in a dtype, which is rounded once: a launch, and another for the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, shift: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(scale)
        ctx.dtype = x.dtype
        return torch.addcmul(shift, x, scale, out=torch.empty_like(x, dtype=dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return (grads[0] * ctx.saved_tensors[0]).to(ctx.dtype), None, None, None


class _NormalizesAtOnce(Normalize):
    """Normalizes images and converts them to the dtype of an autocast, in one launch.

    The convolution after it cannot do this: it pads the normalized images with zeros, which are no zeros before.
    """

    scale: Tensor
    shift: Tensor

    def forward(self, x: Tensor) -> Tensor:
        kind = x.device.type
        # A compiler fuses the steps of the layer itself, and forward derivatives need them.
        apart = torch.compiler.is_compiling() or transformed() or forward_ad._current_level >= 0
        if apart or not torch.is_autocast_enabled(kind):
            return super().forward(x)
        return cast(Tensor, _Affine.apply(x, self.scale, self.shift, torch.get_autocast_dtype(kind)))


def _normalize_at_once(model: nn.Module) -> None:
    """Let the normalizations of a model round under an autocast, in place, as the layers after them do anyway."""
    layers: list[Any] = [module for module in model.modules() if type(module) is Normalize]
    for module in layers:
        module.__class__ = _NormalizesAtOnce
        for name, value in _scale_and_shift(module).items():
            module.register_buffer(name, value, persistent=False)


def _scale_and_shift(layer: Any) -> dict[str, Tensor]:
    """The buffers of a `_NormalizesAtOnce` for the mean and the standard deviation of a layer."""
    return {"scale": 1 / layer.std, "shift": -layer.mean / layer.std}


class _SequenceFirst(nn.MultiheadAttention):
    """Copies batch-first tokens to the order in which PyTorch computes.

    With frozen weights, PyTorch would multiply each image of the transposed tokens on its own, which is slower.
    """

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Any:
        if query.dim() != 3:
            return super().forward(query, key, value, *args, **options)
        tokens = query.transpose(0, 1).contiguous()
        others = (tokens, tokens) if query is key is value else (key.transpose(0, 1), value.transpose(0, 1))
        out, weights = super().forward(tokens, *others, *args, **options)
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


class Prepared(NamedTuple):
    """How a network was prepared for inference.

    Attributes:
        pairs: the names of the folded layers and BatchNorms.
        unfolded: why no BatchNorm is folded, or an empty text.
        channels_last: whether the network runs in channels_last.
    """

    pairs: list[tuple[str, str]]
    unfolded: str
    channels_last: bool


def prepare_for_inference(
    model: nn.Module,
    image_shape: tuple[int, ...],
    dtype: torch.dtype,
    fine: bool = False,
    plain: bool = False,
    *,
    channels_last: bool | None = None,
) -> Prepared:
    """Prepare a frozen model for `autocast_to`, in place.

    With ``fine``, the layers that read the images compute in float32, for small radii. With ``plain``, no BatchNorm is
    folded, and the layout of the weights remains. Tiny models, and models in float32 with transposed convolutions, are
    slower in channels_last, so they are not converted either. ``channels_last`` is known if it has been tried before.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype}")
    if any(tensor.is_floating_point() and tensor.dtype != torch.float32 for _, tensor in tensors_of(model)):
        model.float()
    pairs, unfolded = ([], "") if plain else foldable_pairs(model)
    fold_pairs(model, pairs)
    if channels_last is None:
        transposed = any(isinstance(layer, TRANSPOSED) for layer in model.modules())
        slower = matrix_weights(model) < TINY or (dtype == torch.float32 and transposed)
        with same_draws(model):
            # The trial runs another copy, because a call may fill caches or move counters.
            channels_last = not (plain or slower) and convert_to_channels_last(deep_copy(model), image_shape)
    if channels_last:
        to_format(model, torch.channels_last)
    if not plain:
        _attend_sequence_first(model)
        # With ``fine``, the first layer computes in float32, so its images are not rounded.
        if dtype == torch.bfloat16 and not fine:
            _normalize_at_once(model)
    in_float32 = _see_images_in_float32(model, image_shape) if fine else []
    products = (nn.modules.conv._ConvNd, nn.Linear)
    convert([m for m in model.modules() if isinstance(m, products) and m not in in_float32], dtype=dtype)
    return Prepared(pairs, unfolded, channels_last)


def computed_values(network: nn.Module, model: nn.Module) -> list[tuple[Tensor, Any]]:
    """The tensors that only a prepared network has, each with the function that computes its value from its model."""
    parts = [(name, part) for name, part in network.named_modules() if isinstance(part, _NormalizesAtOnce)]
    layers = [(part, partial(_scale_and_shift, model.get_submodule(name))) for name, part in parts]
    return [(getattr(part, key), lambda at=key, of=of: of()[at]) for part, of in layers for key in ("scale", "shift")]


def kept_modes(model: nn.Module) -> set[str]:
    """The names of modules that the user keeps in training mode in a model in evaluation mode, such as a dropout."""
    return set() if model.training else {name for name, part in model.named_modules() if part.training}


def set_modes(model: nn.Module, kept: set[str]) -> None:
    """Put the modules of these names into training mode, and all others into evaluation mode."""
    for name, part in model.named_modules():
        part.training = name in kept


class InferenceCopy(nn.Module):
    """A copy of a classifier for inference and for attacks: images ``[B, *image_shape]`` -> float32 logits.

    It has no hooks of a `Representation`, and no parameter that needs a gradient. It keeps the classifier's weights of
    the moment when it was made; `purify_fast.frozen_copy` makes a copy that follows its model.

    Args:
        classifier: module from images in [0, 1] to logits. It is copied.
        image_shape: shape (C, H, W) of an image.
        dtype: dtype of the matrix products, float32 or bfloat16.
        compile: whether to compile the copy by `torch.compile`, and whole steps of attacks on it.
        fine: whether the layers that read the images compute in float32, for attacks with a small radius.
        plain: whether no BatchNorm is folded, and the layout of the weights remains.
        kept: the `kept_modes` of the copy, which never change; None: those of the classifier.
        watch: the caller's watch of the classifier; None: the copy makes its own.

    Attributes:
        classifier: the prepared network.
        prepared: how it was prepared.
        steps: the compiled steps of attacks on the copy; None if they are not to be compiled.

    Raises:
        ValueError: the dtype is not allowed.
    """

    #: Captured steps read the refreshed weights.
    not_dependencies = frozenset({"steps", "_values"})
    classifier: nn.Module

    def __init__(
        self,
        classifier: nn.Module,
        image_shape: tuple[int, ...],
        dtype: torch.dtype = torch.bfloat16,
        compile: bool = False,
        fine: bool = False,
        plain: bool = False,
        kept: set[str] | None = None,
        watch: Snapshot | None = None,
    ):
        super().__init__()
        self.training = False
        self.image_shape, self.dtype, self.compiled = image_shape, dtype, compile
        self.fine, self.plain = fine, plain
        self._kept = kept_modes(classifier) if kept is None else kept
        self.prepared: Any = None
        self.steps: Any = None
        if compile:
            self.compile_steps()
        self._values: Any = None
        self._read(classifier, Snapshot(classifier) if watch is None else watch)

    @property
    def folded(self) -> int:
        """The number of folded BatchNorms."""
        return len(self.prepared.pairs)

    @property
    def uses_channels_last(self) -> bool:
        """True if the copy accepts images in channels_last."""
        return bool(self.prepared.channels_last)

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of the products."""
        return self.dtype

    def forward(self, x: Tensor) -> Tensor:
        return self._predict(x)

    def _predict(self, x: Tensor) -> Tensor:
        x = x.float() if self.prepared.channels_last else x.float().contiguous()
        # Where a compiled graph needs the images for their gradient, it does not notice that they were overwritten.
        x = x.clone() if self.compiled and x.requires_grad else x
        # An attribute that PyTorch searches among the parts, and a context, take as long as a small layer.
        classifier: Any = self._modules["classifier"]
        if self.dtype == torch.float32 and not torch._C._is_any_autocast_enabled():
            return classifier(x).float()
        with autocast_to(x.device, self.dtype):
            return classifier(x).float()

    def compile_steps(self, at_once: bool = False) -> None:
        """Let whole steps of attacks on the copy be compiled, see `purify_fast.speed.graphs.compiled_step`."""
        # Most copies do not need the compiler, whose import takes seconds.
        from ..graphs.compiled_step import CompiledSteps

        self.steps = CompiledSteps(at_once)

    def compiled_steps(self) -> Any:
        return self.steps

    @torch.inference_mode(False)
    def _read(self, classifier: nn.Module, watch: Snapshot, in_place: bool = True, graphs: Any = None) -> None:
        """Read the classifier. ``watch``: what it holds now; ``in_place``: whether present tensors may be written."""
        with section("a copy reads its model"):
            if not (in_place and self._values is not None and self._values.fit(watch)):
                self._make(classifier, watch)
            self._values.write(graphs)

    def _make(self, classifier: nn.Module, watch: Snapshot) -> None:
        copied = freeze(without_recorders(deep_copy(classifier)))
        set_modes(copied, self._kept)
        how: dict[str, Any] = {} if self.prepared is None else {"channels_last": self.prepared.channels_last}
        self.prepared = prepare_for_inference(copied, self.image_shape, self.dtype, self.fine, self.plain, **how)
        self.classifier = copied
        if self.compiled:
            from ..graphs.compiled_step import compile_calls

            compile_calls(copied)
        more = computed_values(self.classifier, classifier)
        self._values = Values(watch, [(self.classifier, classifier, self.prepared.pairs)], more)
