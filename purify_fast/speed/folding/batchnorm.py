"""Fold BatchNorms into the layers before them. The result is the same function in evaluation mode with fewer layers.

    w' = w gamma / sqrt(var + eps),   b' = (b - mean) gamma / sqrt(var + eps) + beta

A forward pass finds the pairs. It does not show whether a layer's output is used elsewhere, or whether a subclass
computes something else. So a pair is folded only if the result is the same in float64.
"""

from __future__ import annotations

import contextlib
import copy
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

_Norm = nn.modules.batchnorm._BatchNorm
_FOLDABLE = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
#: The largest allowed difference from the original in float64, as a share of the largest value.
TOLERANCE = 1e-9


def fold_batchnorm(model: nn.Module, example: Tensor) -> list[tuple[str, str]]:
    """Fold as many BatchNorms as possible, in place. A folded BatchNorm is replaced by ``nn.Identity``.

    The output, the input gradient and the values in forward hooks remain equal to the original's, to 1e-9 in float64.

    Args:
        model: any module from a tensor to a tensor, in evaluation mode. Layers with forward hooks are not folded.
        example: a few typical inputs on the device of the model. Random inputs are better than constant inputs.

    Returns:
        The names of the folded pairs (layer, BatchNorm).

    Raises:
        ValueError: a module is in training mode, or the model does not run in float64.
    """
    _check_evaluation_mode(model)
    original = copy.deepcopy(model).double()
    try:
        want = _response(original, example.double())
    except RuntimeError as error:
        raise ValueError(
            f"model must run in float64, because folding is verified in float64. It failed with: {error}"
        ) from error

    def same(chosen: list[tuple[str, str]]) -> bool:
        trial = copy.deepcopy(original)
        for pair in chosen:
            _fold(trial, *pair)
        return all(close(a, b) for a, b in zip(_response(trial, example.double()), want, strict=True))

    pairs = _pairs(original, example.double())
    # If a pair cannot be folded, test the pairs one by one.
    if not same(pairs):
        candidates, pairs = pairs, []
        for pair in candidates:
            if same([*pairs, pair]):
                pairs.append(pair)
    for pair in pairs:
        _fold(model, *pair)
    return pairs


def _check_evaluation_mode(model: nn.Module) -> None:
    if any(module.training for module in model.modules()):
        raise ValueError("model must be in evaluation mode, got a module in training mode: call model.eval() first")


def fold_sequential(model: nn.Module) -> None:
    """Fold every BatchNorm that follows a layer in an ``nn.Sequential``, in place, without an example.

    A module could call the layers in another order, so its class must have ``runs_in_order = True``, which subclasses
    do not inherit. Layers that are used in several places, or that have hooks, are not folded.
    """
    _check_evaluation_mode(model)
    places = Counter(id(child) for module in model.modules() for child in module._modules.values())
    owners = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    for parent in list(_in_order(model)):
        for name, following in pairwise(list(parent._modules)):
            layer, norm = parent._modules[name], parent._modules[following]
            if foldable(layer, norm) and places[id(layer)] == places[id(norm)] == owners[id(layer.weight)] == 1:
                _fold(parent, name, following)


def _in_order(model: nn.Module) -> Iterator[nn.Sequential]:
    """Yield the Sequentials in modules whose class has ``runs_in_order = True``."""
    for owner in model.modules():
        parts = list(owner.children()) if vars(type(owner)).get("runs_in_order") is True else []
        for part in parts:
            # A subclass may call its children in another order.
            if type(part) in (nn.Sequential, nn.ModuleList):
                parts += part.children()
            if type(part) is nn.Sequential:
                yield part


def foldable(layer: Any, norm: Any) -> bool:
    """Tell whether ``norm`` is a BatchNorm that can be folded into a layer, if it follows this layer."""
    fits = isinstance(layer, _FOLDABLE) or (isinstance(layer, nn.ConvTranspose2d) and layer.groups == 1)
    follows = isinstance(norm, _Norm) and not norm.training and norm.running_mean is not None
    return fits and follows and not hooked(layer) and not hooked(norm)


def hooked(module: nn.Module) -> bool:
    """Tell whether a module has a forward hook or a forward pre-hook."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _response(model: nn.Module, example: Tensor) -> list[Tensor]:
    """The output, the input gradient of a random weighted sum of the output, and the outputs of modules with hooks."""
    seen: list[Tensor] = []

    def see(module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        if isinstance(output, Tensor):
            seen.append(output.detach().clone())

    with contextlib.ExitStack() as stack:
        for module in [module for module in model.modules() if hooked(module)]:
            stack.enter_context(module.register_forward_hook(see, prepend=True))
        return [*answers(model, (example,)), *seen]


def answers(function: Callable[..., Any], given: tuple[Any, ...]) -> list[Tensor]:
    """Return the output, and the gradients of a random weighted sum of it with respect to floating-point tensors."""
    leaves = [
        one.detach().clone().requires_grad_() if isinstance(one, Tensor) and one.is_floating_point() else one
        for one in given
    ]
    with torch.enable_grad():
        output = function(*leaves)
        weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(0), device="cpu", dtype=output.dtype)
        total = (output * weight.to(output.device)).sum()
        floating = [one for one in leaves if isinstance(one, Tensor) and one.requires_grad]
        return [output.detach(), *torch.autograd.grad(total, floating, materialize_grads=True)]


def close(a: Tensor, b: Tensor) -> bool:
    """Tell whether a tensor equals another one, up to `TOLERANCE`."""
    return a.shape == b.shape and bool((a - b).abs().max() <= TOLERANCE * b.abs().max())


def _pairs(model: nn.Module, example: Tensor) -> list[tuple[str, str]]:
    """The names of pairs (layer, BatchNorm), where both run once and the BatchNorm's input is the layer's output."""
    names = {module: name for name, module in model.named_modules()}
    owners = Counter(id(p) for module in names for p in module._parameters.values() if p is not None)
    runs: Counter[nn.Module] = Counter()
    # The values contain the tensors, because an id is unique only while its tensor exists.
    outputs: dict[int, tuple[nn.Module, Tensor, int]] = {}
    pairs: list[tuple[Any, Any]] = []

    def after(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        runs[module] += 1
        outputs[id(output)] = module, output, output._version

    def before(module: nn.Module, args: tuple[Any, ...]) -> None:
        runs[module] += 1
        layer, _, version = outputs.get(id(args[0]), (None, None, -1)) if args else (None, None, -1)
        if layer is not None and args[0]._version == version:
            pairs.append((layer, module))

    with contextlib.ExitStack() as stack, torch.no_grad():
        for module in names:
            if hooked(module):
                continue
            # Skip layers whose weight is computed, for example by weight normalization.
            plain = isinstance(module._parameters.get("weight"), Tensor)
            if isinstance(module, _FOLDABLE) and plain and owners[id(module.weight)] == 1:
                stack.enter_context(module.register_forward_hook(after))
            elif isinstance(module, _Norm) and module.running_mean is not None:
                stack.enter_context(module.register_forward_pre_hook(before))
        model(example)
    return [(names[a], names[b]) for a, b in pairs if runs[a] == runs[b] == 1 and len(a.weight) == b.num_features]


@torch.no_grad()
def folded(layer: Any, norm: Any, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Compute the weight and bias of a linear layer or a convolution with a folded BatchNorm."""
    # torch.nn.utils.fuse_conv_bn_weights does not support linear layers. It also multiplies the bias in another order,
    # which would change its last bits in float32.
    mean, variance = norm.running_mean.to(dtype), norm.running_var.to(dtype)
    scale = (variance + norm.eps).rsqrt() * (1 if norm.weight is None else norm.weight.to(dtype))
    shift = 0 if norm.bias is None else norm.bias.to(dtype)
    bias = 0 if layer.bias is None else layer.bias.to(dtype)
    # The weight of a transposed convolution has the output channels in its second dimension.
    outputs = 1 if isinstance(layer, nn.ConvTranspose2d) else 0
    weight = layer.weight.to(dtype) * scale.view(-1, *[1] * (layer.weight.dim() - 1 - outputs))
    return weight, (bias - mean) * scale + shift


@torch.no_grad()
def fold(layer: Any, norm: nn.Module) -> None:
    """Fold a BatchNorm into the layer before it, in place."""
    old = layer.weight
    # The computation is in float64, so that the values are rounded only here.
    weight, bias = (value.to(old.dtype) for value in folded(layer, norm))
    layer.weight = nn.Parameter(weight, old.requires_grad)
    layer.bias = nn.Parameter(bias, old.requires_grad)


def _fold(model: nn.Module, layer_name: str, norm_name: str) -> None:
    norm = model.get_submodule(norm_name)
    fold(model.get_submodule(layer_name), norm)
    for parent in model.modules():
        for name, child in parent.named_children():
            if child is norm:
                setattr(parent, name, nn.Identity().eval())


class FoldedPairs:
    """Computes `folded` for a model that is being trained: for all of its pairs together, in float32."""

    def __init__(self, model: nn.Module, pairs: list[tuple[str, str]]):
        self.layers, self.norms = [layer for layer, _ in pairs], [norm for _, norm in pairs]
        norms: list[Any] = [model.get_submodule(name) for name in self.norms]
        self._eps = [norm.eps for norm in norms]
        ones = {f"{name}.weight": torch.ones(norm.num_features) for (_, name), norm in zip(pairs, norms, strict=True)}
        zeros = {
            f"{n}.bias": torch.zeros(norm.num_features) for pair, norm in zip(pairs, norms, strict=True) for n in pair
        }
        #: Default values, by name, for parameters that a module does not have.
        self._defaults = ones | zeros

    @torch.no_grad()
    def __call__(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Compute the folded weights and biases in float32 from the current tensors, by name."""
        device = tensors[f"{self.norms[0]}.running_mean"].device
        self._defaults = {name: value.to(device) for name, value in self._defaults.items()}
        known = self._defaults | tensors

        def each(modules: list[str], part: str) -> list[Tensor]:
            return [known[f"{name}.{part}"].float() for name in modules]

        scales = list(torch._foreach_add(each(self.norms, "running_var"), self._eps))
        torch._foreach_rsqrt_(scales)
        torch._foreach_mul_(scales, each(self.norms, "weight"))
        centered = torch._foreach_sub(each(self.layers, "bias"), each(self.norms, "running_mean"))
        biases = torch._foreach_addcmul(each(self.norms, "bias"), centered, scales)
        weights = each(self.layers, "weight")
        shaped = [one.view(-1, *[1] * (weight.dim() - 1)) for one, weight in zip(scales, weights, strict=True)]
        weights = list(torch._foreach_mul(weights, shaped))
        names = [f"{name}.{part}" for part in ("weight", "bias") for name in self.layers]
        return dict(zip(names, [*weights, *biases], strict=True))
