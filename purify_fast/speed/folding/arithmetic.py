"""The arithmetic of folding BatchNorms into the layers before them, and the layers and BatchNorms that it knows.

w' = w gamma / sqrt(var + eps),   b' = (b - mean) gamma / sqrt(var + eps) + beta
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...models.layers import Recorder

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_FOLDABLE = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
TRANSPOSED = nn.modules.conv._ConvTransposeNd


def foldable(layer: Any, norm: Any) -> bool:
    """Return True if ``norm`` is a BatchNorm that can be folded into a layer, if it follows this layer."""
    if type(layer) not in _FOLDABLE or not is_norm(norm) or norm.training:
        return False
    transposed = isinstance(layer, TRANSPOSED)
    computed = not isinstance(layer._parameters.get("weight"), Tensor) or "forward" in vars(layer) | vars(norm)
    fits = norm.running_mean is not None and not (transposed and layer.groups > 1) and not computed
    return fits and layer.weight.shape[int(transposed)] == norm.num_features and not (hooked(layer) or hooked(norm))


def is_norm(module: Any) -> bool:
    """Return True if a module is a BatchNorm of PyTorch or of this package; one of another class may do more."""
    ours = type(module).__module__.startswith("purify_fast.") and isinstance(module, _NORMS)
    return ours or type(module) in _NORMS


def hooked(module: nn.Module, readers: bool = True) -> bool:
    """Return True if a module has a forward hook or a forward pre-hook. ``readers``: those of representations too."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return any(readers or not isinstance(hook, Recorder) for hook in hooks)


@torch.no_grad()
def fold(pairs: Sequence[tuple[Any, Any]]) -> None:
    """Fold BatchNorms into the linear layers or convolutions before them, in place."""
    for (layer, _), (factor, bias) in zip(pairs, scales_of(pairs), strict=True):
        layer.weight.mul_(factor)
        layer.bias = nn.Parameter(bias.to(layer.weight.dtype), layer.weight.requires_grad)


@torch.no_grad()
def scales_of(pairs: Sequence[tuple[Any, Any]]) -> list[tuple[Tensor, Tensor]]:
    """Return the factor of each layer's weight, and its new bias, with which it needs no BatchNorm after it.

    The computation is in float32 for weights of less precision. On a GPU, it takes few launches.
    """
    if not pairs:
        return []
    # torch.nn.utils.fuse_conv_bn_weights does not support linear layers, and takes one pair at a time.
    layers, norms = zip(*pairs, strict=True)

    most = max(norms, key=lambda norm: norm.num_features).running_var
    ones, zeros = torch.ones_like(most), torch.zeros_like(most)

    def numbers(modules: Sequence[Any], name: str, missing: Tensor = zeros) -> list[Tensor]:
        values = zip((getattr(module, name) for module in modules), norms, strict=True)
        present = [missing[: norm.num_features] if value is None else value for value, norm in values]
        return [value.to(torch.promote_types(value.dtype, torch.float32)) for value in present]

    scales = list(torch._foreach_add(numbers(norms, "running_var"), [float(norm.eps) for norm in norms]))
    torch._foreach_rsqrt_(scales)
    torch._foreach_mul_(scales, numbers(norms, "weight", ones))
    centered = torch._foreach_sub(numbers(layers, "bias"), numbers(norms, "running_mean"))
    biases = torch._foreach_addcmul(numbers(norms, "bias"), centered, scales)
    # The weight of a transposed convolution has the output channels in its second dimension.
    after = [layer.weight.dim() - 1 - int(isinstance(layer, TRANSPOSED)) for layer in layers]
    factors = [scale.view(-1, *[1] * dims) for scale, dims in zip(scales, after, strict=True)]
    return list(zip(factors, biases, strict=True))
