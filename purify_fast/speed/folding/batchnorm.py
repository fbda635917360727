"""Fold BatchNorms into the layers before them. The result is the same function in evaluation mode with fewer layers.

    w' = w gamma / sqrt(var + eps),   b' = (b - mean) gamma / sqrt(var + eps) + beta

A pair is folded only where it is proven that nothing else reads the layer: where `torch.fx` traces the model without
the values or sizes of its inputs, or in a model that is an ``nn.Sequential`` itself. An example would show one path of
several.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..draws import same_draws, shared_generators

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_FOLDABLE = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
TRANSPOSED = nn.modules.conv._ConvTransposeNd


def fold_batchnorm(model: nn.Module) -> list[tuple[str, str]]:
    """Fold as many BatchNorms as are proven to be foldable, in place. A folded one is replaced by ``nn.Identity``.

    Layers in training mode, with hooks, with computed weights, of subclasses, or used in several places are not folded.

    Args:
        model: any module, in evaluation mode. It is copied and traced, and the copy's ``forward`` is called.

    Returns:
        The names of the folded pairs (layer, BatchNorm).
    """
    places = Counter(id(child) for module in model.modules() for child in module._modules.values())
    owners = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)

    graph = _traced(model)

    def fits(layer: Any, norm: Any) -> bool:
        own = [p for part in (layer, norm) for p in part._parameters.values() if p is not None]
        # A graph shows how often a module runs, whatever its names are.
        alone = graph is not None or places[id(layer)] == places[id(norm)] == 1
        return alone and all(owners[id(p)] == 1 for p in own) and foldable(layer, norm)

    found = _in_sequentials(model) if graph is None else _in_graph(graph)
    pairs = [pair for pair in found if fits(*map(model.get_submodule, pair))]
    for layer, norm in (map(model.get_submodule, pair) for pair in pairs):
        fold(layer, norm)
        for parent in model.modules():
            for name, child in parent.named_children():
                if child is norm:
                    setattr(parent, name, nn.Identity().eval())
    return pairs


def _read(*values: Any) -> None:
    """Stands in a traced graph for hooks that read or change the values."""


class _Tracer(fx.Tracer):
    """Traces a model without calling its hooks. What they could read has a second reader in the graph."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return _is_norm(m) or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if not hooked(m) or self.is_leaf_module(m, self.path_of_module(m)):
            return super().call_module(m, forward, args, kwargs)
        out = m.forward(*args, **kwargs)
        self.create_proxy("call_function", _read, (args, kwargs, out), {})
        return out


def _traced(model: nn.Module) -> fx.Graph | None:
    """Trace a copy of a model; None if its path may depend on the inputs, or on random numbers."""
    with same_draws(model) as drew:
        try:
            graph = _Tracer().trace(copy.deepcopy(model, shared_generators(model)))
        except Exception:
            # A user's module may raise any error for symbolic inputs.
            return None
        return None if drew() else graph


def _in_graph(graph: fx.Graph) -> Iterator[tuple[str, str]]:
    """Yield the pairs in which both modules run once, and the layer's output is read by the BatchNorm alone."""
    nodes = list(graph.nodes)
    runs = Counter(node.target for node in nodes if node.op == "call_module")
    # A forward may also read the weights of a layer.
    read = {str(node.target).rpartition(".")[0] for node in nodes if node.op == "get_attr"}
    for node in nodes:
        before = node.args[0] if node.op == "call_module" and len(node.args) == 1 and not node.kwargs else None
        if isinstance(before, fx.Node) and before.op == "call_module" and list(before.users) == [node]:
            pair = str(before.target), str(node.target)
            if len(before.args) == 1 and all(runs[name] == 1 and name not in read for name in pair):
                yield pair


def _in_sequentials(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield neighbors in Sequentials that are called as a whole.

    These are the model itself, the parts of a class that promises ``runs_in_order = True`` (subclasses do not inherit
    it), and the Sequentials in them. Another module may call the children of its Sequentials one by one.
    """
    names = {module: name for name, module in model.named_modules()}
    owners = [owner for owner in names if vars(type(owner)).get("runs_in_order") is True]
    parts = [model, *(part for owner in owners for part in owner.children())]
    for part in parts:
        if type(part) in (nn.Sequential, nn.ModuleList) and "forward" not in vars(part):
            parts += part.children()
            if type(part) is nn.Sequential:
                yield from pairwise(f"{names[part]}.{name}".lstrip(".") for name in part._modules)


def foldable(layer: Any, norm: Any) -> bool:
    """Tell whether ``norm`` is a BatchNorm that can be folded into a layer, if it follows this layer."""
    if type(layer) not in _FOLDABLE or not _is_norm(norm) or norm.training:
        return False
    transposed = isinstance(layer, TRANSPOSED)
    computed = not isinstance(layer._parameters.get("weight"), Tensor) or "forward" in vars(layer) | vars(norm)
    fits = norm.running_mean is not None and not (transposed and layer.groups > 1) and not computed
    return fits and layer.weight.shape[int(transposed)] == norm.num_features and not (hooked(layer) or hooked(norm))


def _is_norm(module: Any) -> bool:
    """Tell whether a module is a BatchNorm of PyTorch or of this package; one of another class may do more."""
    ours = type(module).__module__.startswith("purify_fast.") and isinstance(module, _NORMS)
    return ours or type(module) in _NORMS


def hooked(module: nn.Module) -> bool:
    """Tell whether a module has a forward hook or a forward pre-hook."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


@torch.no_grad()
def fold(layer: Any, norm: Any) -> None:
    """Fold a BatchNorm into the linear layer or convolution before it, in place."""
    # torch.nn.utils.fuse_conv_bn_weights does not support linear layers. It also multiplies the bias in another order,
    # which would change its last bits in float32.
    old, mean = layer.weight, norm.running_mean.double()
    scale = (norm.running_var.double() + norm.eps).rsqrt() * (1 if norm.weight is None else norm.weight.double())
    shift = 0 if norm.bias is None else norm.bias.double()
    bias = ((0 if layer.bias is None else layer.bias.double()) - mean) * scale + shift
    # The weight of a transposed convolution has the output channels in its second dimension.
    outputs = int(isinstance(layer, TRANSPOSED))
    weight = old.double() * scale.view(-1, *[1] * (old.dim() - 1 - outputs))
    # The computation is in float64, so that the values are rounded only here.
    layer.weight = nn.Parameter(weight.to(old.dtype), old.requires_grad)
    layer.bias = nn.Parameter(bias.to(old.dtype), old.requires_grad)


class FoldedPairs:
    """Computes `folded` for a model that is being trained: for all of its pairs together, in float32."""

    def __init__(self, model: nn.Module, pairs: list[tuple[str, str]]):
        self.layers, self.norms = [layer for layer, _ in pairs], [norm for _, norm in pairs]
        norms: list[Any] = [model.get_submodule(name) for name in self.norms]
        self._eps = [norm.eps for norm in norms]
        #: The dimension of the output channels in each weight.
        self._outputs = [int(isinstance(model.get_submodule(name), TRANSPOSED)) for name in self.layers]
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
        each_weight = zip(scales, weights, self._outputs, strict=True)
        shaped = [one.view(-1, *[1] * (weight.dim() - 1 - outputs)) for one, weight, outputs in each_weight]
        weights = list(torch._foreach_mul(weights, shaped))
        names = [f"{name}.{part}" for part in ("weight", "bias") for name in self.layers]
        return dict(zip(names, [*weights, *biases], strict=True))
