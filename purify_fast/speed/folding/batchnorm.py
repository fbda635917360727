"""Fold BatchNorms into the layers before them. The result is the same function in evaluation mode with fewer layers.

A pair is folded only where it is proven that nothing else reads the layer: where `torch.fx` traces the model without
the values or sizes of its inputs, or in a model that is an ``nn.Sequential`` itself. An example would show one path of
several.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..copying import Snapshot, deep_copy, only_registered
from ..draws import same_draws
from ..watch import copy_all, tensors_of
from .arithmetic import fold, foldable, hooked, is_norm, scales_of


def fold_batchnorm(model: nn.Module) -> list[tuple[str, str]]:
    """Fold as many BatchNorms as are proven to be foldable, in place. A folded one is replaced by ``nn.Identity``.

    Layers in training mode, with hooks, with computed weights, of subclasses, or used in several places are not folded.

    Args:
        model: any module, in evaluation mode. It is copied and traced, and the copy's ``forward`` is called.

    Returns:
        The names of the folded pairs (layer, BatchNorm).
    """
    pairs, _ = foldable_pairs(model)
    fold_pairs(model, pairs)
    return pairs


def foldable_pairs(model: nn.Module) -> tuple[list[tuple[str, str]], str]:
    """Return the names of the pairs (layer, BatchNorm) that `fold_batchnorm` folds; they do not depend on weights.

    The second result is why a model with BatchNorms has no pair, or an empty text.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return [], ""
    places = Counter(id(child) for module in model.modules() for child in module._modules.values())
    owners = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)

    graph = _traced(model)
    # The hook of a module may read the layers inside.
    closed = tuple(f"{name}.".lstrip(".") for name, module in model.named_modules() if hooked(module, readers=False))

    def fits(layer: Any, norm: Any) -> bool:
        own = [p for part in (layer, norm) for p in part._parameters.values() if p is not None]
        # A graph shows how often a module runs, whatever its names are.
        alone = graph is not None or places[id(layer)] == places[id(norm)] == 1
        return alone and all(owners[id(p)] == 1 for p in own) and foldable(layer, norm)

    candidates = _in_sequentials(model) if graph is None else _in_graph(graph)
    pairs = [pair for pair in candidates if not pair[0].startswith(closed) and fits(*map(model.get_submodule, pair))]
    if pairs:
        return pairs, ""
    odd = {type(norm).__name__ for norm in norms if not is_norm(norm)}
    if odd:
        return pairs, f"{odd.pop()} is a subclass of BatchNorm"
    return pairs, "torch.fx cannot trace the model" if graph is None else "no layer is read by a BatchNorm alone"


def fold_pairs(model: nn.Module, pairs: list[tuple[str, str]]) -> None:
    """Fold the pairs of these names, in place."""
    parts = [(model.get_submodule(layer), model.get_submodule(norm)) for layer, norm in pairs]
    fold(parts)
    folded = {norm for _, norm in parts}
    for parent in model.modules():
        for name, child in parent.named_children():
            if child in folded:
                setattr(parent, name, nn.Identity().eval())


class Values:
    """Writes the values of models into the networks that were copied from them, in which BatchNorms may be folded.

    Args:
        watch: what the models held when the networks were made.
        copies: for each network: the network, its model, and the names of the folded pairs.
        more: further tensors of the copies, each with its source, or with a function that computes its value.

    Attributes:
        possible: whether new copies of the same models can differ in these values only.
    """

    def __init__(
        self,
        watch: Snapshot,
        copies: Sequence[tuple[nn.Module, nn.Module, list[tuple[str, str]]]],
        more: Sequence[tuple[Tensor, Any]] = (),
    ):
        self.watch, self.own = watch, Snapshot(*(network for network, _, _ in copies))
        # A tensor may have several names, so the sources are found by the tensors.
        sources_of = dict[int, tuple[Tensor, Any]]()
        self._folded, self._folds = list[tuple[Any, Any]](), list[tuple[Tensor, Tensor, Tensor]]()
        for network, model, pairs in copies:
            targets, sources = dict(tensors_of(network)), dict(tensors_of(model))
            sources_of |= {id(target): (target, sources.get(name)) for name, target in targets.items()}
            self._folded += [(model.get_submodule(layer), model.get_submodule(norm)) for layer, norm in pairs]
            for name, _ in pairs:
                self._folds.append((targets[f"{name}.weight"], sources[f"{name}.weight"], targets[f"{name}.bias"]))
        sources_of |= {id(target): (target, source) for target, source in more}
        self._targets = [target for target, _ in sources_of.values()]
        for weight, _, bias in self._folds:
            del sources_of[id(weight)], sources_of[id(bias)]
        self._computed = [(target, source) for target, source in sources_of.values() if callable(source)]
        self._pairs = [(target, source) for target, source in sources_of.values() if not callable(source)]
        written = [*self._pairs, *((weight, source) for weight, source, _ in self._folds)]
        # A value that is not rounded at once would have other bits than in a new copy. PyTorch refuses to write into a
        # tensor whose elements share memory, such as an expanded buffer.
        self.possible = only_registered(*(model for _, model, _ in copies)) and all(
            source is not None and source.dtype in (torch.float32, target.dtype) and 0 not in target.stride()
            for target, source in written
        )

    def fit(self, watch: Snapshot) -> bool:
        """Return True if new copies would differ in these values only. ``watch``: what the models hold now."""
        return self.possible and watch is self.watch and self.own.same()

    @torch.no_grad()
    def write(self, graphs: Any = None) -> None:
        """Write the present values of the models into the copies, where this is possible.

        ``graphs``: the `StepGraphs` of attacks on the copies, which have a graph of this function too.
        """
        if self.possible and (graphs is None or not graphs.repeat(self, self._write, self._targets)):
            self._write()

    def _write(self) -> None:
        pairs = [*self._pairs, *((target, compute()) for target, compute in self._computed)]
        for (weight, source, bias), (factor, new) in zip(self._folds, scales_of(self._folded), strict=True):
            pairs.append((bias, new))
            # A CPU is slow to change the dtype and the layout at once.
            exact = weight if weight.dtype == factor.dtype else torch.empty_like(weight, dtype=factor.dtype)
            torch.mul(source, factor, out=exact)
            if exact is not weight:
                pairs.append((weight, exact))
        copy_all(pairs)

    def __reduce__(self) -> tuple[Any, ...]:
        # The copy of a network has tensors of its own, so a copy or pickle of this object is None.
        return type(None), ()


def _read(*values: Any) -> None:
    """Stands in a traced graph for hooks that read or change the values."""


class _Tracer(fx.Tracer):
    """Traces a model without calling its hooks. What they could read has a second reader in the graph.

    PyTorch patches the calls of all modules in the process, so those in other threads are left as they are.
    """

    lock = threading.Lock()
    # A buffer may decide the path of the model, and its value may change.
    proxy_buffer_attributes = True

    def __init__(self) -> None:
        super().__init__()
        self.thread = threading.get_ident()

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        own = threading.get_ident() == self.thread
        return super().getattr(attr, attr_val, parameter_proxy_cache) if own else attr_val

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return is_norm(m) or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if threading.get_ident() != self.thread:
            return forward(*args, **kwargs)
        if not hooked(m) or self.is_leaf_module(m, self.path_of_module(m)):
            return super().call_module(m, forward, args, kwargs)
        out = m.forward(*args, **kwargs)
        self.create_proxy("call_function", _read, (args, kwargs, out), {})
        return out


def _traced(model: nn.Module) -> fx.Graph | None:
    """Trace a copy of a model; None if its path may depend on the inputs, or on random numbers."""
    with _Tracer.lock, same_draws(model) as drew:
        try:
            graph = _Tracer().trace(deep_copy(model))
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
