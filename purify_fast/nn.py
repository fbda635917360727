"""The ops as modules, under the names that other code has for them, and a moving average of a model's weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from . import ops
from ._validation import check_literal
from .models.layers import AveragedModel
from .speed.decoding import PackedDecoder as PackedDecoder, decode_samples as decode_samples

Reduction = Literal["none", "mean", "sum"]


class _Reduced(nn.Module):
    """A module whose result has a number for each sample, and which reduces it as the losses of `torch.nn` do."""

    def __init__(self, reduction: Reduction = "none"):
        super().__init__()
        check_literal("reduction", reduction, Reduction)
        self.reduction = reduction

    def reduced(self, values: Tensor) -> Tensor:
        return values if self.reduction == "none" else getattr(values, self.reduction)()


class CosineDistance(_Reduced):
    """Computes 1 - cos of each sample's features, over all dimensions after the first, by `representation_distance`.

    ``forward(student [B, ...], teacher [B, ...]) -> [B]``, or ``[B, L]`` for sequences of L layers, before the
    reduction. Only the student
    gets a gradient, so a teacher that requires one is refused: detach it. The distance of a zero vector from every
    vector is 1, and no eps is added.

    Args:
        kind: ``cosine``, ``abs_cosine`` (1 - \\|cos\\|), ``angular`` or ``l2``.
        reduction: "none", as `torch.nn.CosineSimilarity` computes; or "mean" or "sum" over all distances.

    Raises:
        ValueError: the reduction is another one, or the teacher requires a gradient.
    """

    def __init__(self, kind: str = "cosine", reduction: Reduction = "none"):
        super().__init__(reduction)
        self.kind = kind

    def forward(self, student: Tensor | Sequence[Tensor], teacher: Tensor | Sequence[Tensor]) -> Tensor:
        layers = [teacher] if isinstance(teacher, Tensor) else teacher
        if torch.is_grad_enabled() and any(layer.requires_grad for layer in layers):
            raise ValueError("teacher must not require a gradient, since it would get none: give teacher.detach()")
        return self.reduced(ops.representation_distance(student, teacher, self.kind))


class SampleLatent(nn.Module):
    """Draws from a variational autoencoder's posterior, by `sample_latent`.

    ``forward(mu [..., D], logvar [..., D]) -> z [..., D], kl [...]``. A ``seed`` and ``sample_ids`` may follow.
    """

    def forward(self, mu: Tensor, logvar: Tensor, **stream: Tensor) -> tuple[Tensor, Tensor]:
        return ops.sample_latent(mu, logvar, **stream)


class ReconstructionLoss(_Reduced):
    """Computes the binary cross-entropy of reconstructions, summed over each of them, by `reconstruction_loss`.

    ``forward(logits [B, ...], target [B, ...]) -> [B]``, before the reduction. Only the logits get a gradient.

    Args:
        reduction: "none", or "mean" or "sum" over the samples. "sum" is `torch.nn.BCEWithLogitsLoss` with this
            reduction; "mean" divides by the number of samples, not by that of all values.

    Raises:
        ValueError: the reduction is another one, or, on a CPU, a target is outside [0, 1].
    """

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        # As in `binary_cross_entropy`, a GPU does not wait for the values.
        if target.device.type == "cpu" and target.numel() and not torch.compiler.is_compiling():
            low, high = (float(end) for end in target.aminmax())
            if not (low >= 0 and high <= 1):
                raise ValueError(f"target must be in [0, 1], got values from {low:g} to {high:g}")
        return self.reduced(ops.reconstruction_loss(logits, target))


class Aggregate(nn.Module):
    """Combines the logits of K samples, by `aggregate`: ``forward(logits [B, K, C]) -> [B, C]``.

    Args:
        method: ``lse``, ``peel``, ``mean``, ``mean_sigmoid`` or ``vote``.
    """

    def __init__(self, method: str = "lse"):
        super().__init__()
        self.method = method

    def forward(self, logits: Tensor) -> Tensor:
        return ops.aggregate(logits, self.method)


class GatedELU(nn.Module):
    """Computes ELU(a) sigmoid(b) by `gated_elu`: ``forward(features [B, 2C, ...]) -> [B, C, ...]``; a is first."""

    def forward(self, features: Tensor) -> Tensor:
        return ops.gated_elu(features)


class ContextualAttention(nn.Module):
    """Rebuilds features from patches that are known, by `key_validity` and `contextual_attention`.

    ``forward(features [B, C, H, W], mask [B, 1, H0, W0]) -> [B, C, H, W]``. The mask may have any resolution. Its
    nonzero pixels are missing.

    Args:
        scale: factor of the scores before the softmax.
    """

    def __init__(self, scale: float = 10.0):
        super().__init__()
        self.scale = scale

    def forward(self, features: Tensor, mask: Tensor) -> Tensor:
        height, width = features.shape[-2:]
        return ops.contextual_attention(features, ops.key_validity(mask, (height // 2, width // 2)), self.scale)


class RandomMask(nn.Module):
    """Adds noise to images, hides random blocks and appends the mask, by `random_transform`.

    ``forward(x [B, C, H, W]) -> packed [B, C + 2, H, W], owners``. Any argument of `random_transform` may follow.

    Args:
        block: side of a block in pixels.
        ratio: fraction of the blocks that are hidden.
        sigma: standard deviation of the noise.
    """

    def __init__(self, block: int = 32, ratio: float = 0.25, sigma: float = 0.0):
        super().__init__()
        self.settings = {"block": block, "mask_ratio": ratio, "sigma": sigma}

    def forward(self, x: Tensor, **more: Any) -> tuple[Tensor, Tensor]:
        return ops.random_transform(x, **(self.settings | more))


class Stitch(nn.Module):
    """Composes images by `stitch`.

    ``forward(images [S B N, C, H, W], owners [S, B, rows, columns]) -> [S B, C, H, W]``
    """

    def forward(self, images: Tensor, owners: Tensor) -> Tensor:
        return ops.stitch(images, owners)


class EMA(nn.Module):
    """A copy of a model whose weights and floating-point buffers are moving averages of the model's.

    ``forward`` runs the copy. Call ``update(model)`` after each step of the optimizer. The copy keeps the model's
    training mode until you call ``eval``.

    Args:
        model: the model. The average begins with its weights.
        decay: weight of the old average in each update.
        warm_up: True to limit this weight to (1 + n) / (10 + n) after n updates.
    """

    def __init__(self, model: nn.Module, decay: float = 0.999, warm_up: bool = False):
        super().__init__()
        self.average = AveragedModel(model, decay, warm_up)

    def update(self, model: nn.Module) -> None:
        """Move the averages towards the weights of ``model``, which has the structure of the copied model."""
        self.average.update_parameters(model)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.average(*args, **kwargs)
