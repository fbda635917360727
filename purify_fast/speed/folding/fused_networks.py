"""Rewrite a frozen network so that its convolutions compute what follows them, on a CPU with matrix tiles.

`torch.fx` traces the network to a graph, or else the largest parts that can be traced. All convolution groups between
two other operations are a `Chain`. A part is rewritten only if outputs and input gradients in float64 remain equal.
"""

from __future__ import annotations

import contextlib
import copy
import operator
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

from ...models.layers import BatchNorm2d, Conv2d
from ...ops.dispatch.gradient import needs_gradient, transformed
from ...ops.group_norm_silu import group_norm, group_norm_silu
from .batchnorm import answers, close, hooked
from .convolution_chains import NONE, RELU, SHAPE, SILU, Chain, Formula, Step, onednn_serves

_Norm = nn.modules.batchnorm._BatchNorm
#: Nodes of torch.fx, whose arguments have too many types for a type checker.
_Node: TypeAlias = Any
_SUMS = (operator.add, operator.iadd, torch.add, "add", "add_")
_ARITHMETIC = (operator.getitem, operator.mod, operator.add, operator.sub, operator.mul, operator.floordiv)
_PADS = (F.pad, torch._C._nn.pad)
_IN_PLACE = (operator.iadd, "add_", "relu_", torch.relu_, F.relu_)
_ACTIVATIONS: dict[Any, int] = {
    **dict.fromkeys((nn.ReLU, F.relu, torch.relu, torch.relu_, F.relu_, "relu", "relu_"), RELU),
    **dict.fromkeys((nn.SiLU, F.silu), SILU),
}
#: A layer with fewer input or output channels is rewritten for all sizes of its kernel.
FEW = 16


class _Tracer(fx.Tracer):
    def __init__(self) -> None:
        super().__init__(autowrap_functions=(group_norm, group_norm_silu))

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, (nn.Conv2d, _Norm)) or super().is_leaf_module(m, module_qualified_name)


@dataclass(frozen=True)
class _Group:
    """The nodes of a step: those of `Step`, and the node of the convolution. ``total`` may be the convolution."""

    layer: _Node
    input: _Node
    padding: tuple[Any, ...]
    total: _Node
    out: _Node
    added: _Node = None
    norm: _Node = None
    activation: int = NONE

    @property
    def nodes(self) -> set[_Node]:
        return {self.layer, self.total, self.norm, self.out}


def _zeros(pad: _Node) -> bool:
    """Return True if a node of ``F.pad`` adds zeros."""
    return pad.kwargs.get("mode", "constant") == "constant" and not pad.kwargs.get("value")


class _Finder:
    """Finds the steps in the graph of a module."""

    def __init__(self, module: nn.Module, graph: fx.Graph):
        self.modules, self.graph = dict(module.named_modules()), graph
        for node in graph.nodes:
            if self._operation(node) is nn.Identity:
                node.replace_all_uses_with(node.args[0])
                graph.erase_node(node)
        self.order = {node: place for place, node in enumerate(graph.nodes)}

    def groups(self) -> list[_Group]:
        """Return the steps, in the order of their sums."""
        found = [self._convolution(node) for node in self.graph.nodes]
        every = [self._with_activation(self._with_sum(one)) for one in found if one is not None]
        return sorted(every, key=lambda one: self.order[one.total])

    def _module(self, node: _Node) -> Any:
        return self.modules[node.target] if node.op == "call_module" else None

    def _operation(self, node: _Node) -> Any:
        """Return the class of a module, or the function, or the name of a method; None for another node."""
        if node.op == "call_module":
            return type(self._module(node))
        return node.target if node.op in ("call_function", "call_method") else None

    def _convolution(self, node: _Node) -> _Group | None:
        if self._operation(node) not in (nn.Conv2d, Conv2d) or len(node.args) != 1 or node.kwargs:
            return None
        layer = self._module(node)
        plain = layer.groups == 1 and layer.dilation == (1, 1) and layer.padding_mode == "zeros"
        parameters = [layer.weight] if layer.bias is None else [layer.weight, layer.bias]
        half = all(one.dtype == torch.bfloat16 for one in parameters)
        usual = layer.kernel_size in ((1, 1), (3, 3)) or min(layer.in_channels, layer.out_channels) < FEW
        if not (plain and half and usual and layer.stride[0] == layer.stride[1] and type(layer.padding) is tuple):
            return None
        entered, (y, x) = node.args[0], layer.padding
        padding: tuple[Any, ...] = (y, y, x, x)
        if (y, x) == (0, 0) and self._operation(entered) in _PADS and len(entered.args) == 2 and _zeros(entered):
            around, shape_of = entered.args[1], entered.args[0]
            if isinstance(around, (tuple, list)) and len(around) == 4:
                formulas = [self._formula(one, shape_of) for one in around]
                if None not in formulas:
                    entered, padding = shape_of, (*formulas[2:], *formulas[:2])
        return _Group(node, entered, padding, total=node, out=node)

    def _formula(self, part: Any, of: _Node) -> Any:
        """Return a number of zeros as a formula of the shape of the map ``of``; None if it depends on anything else."""
        if not isinstance(part, fx.Node):
            return part
        operation = self._operation(part)
        if (operation, part.args) in ((getattr, (of, "shape")), ("size", (of,))):
            return SHAPE
        arguments = tuple(self._formula(one, of) for one in part.args)
        return Formula(operation, arguments) if operation in _ARITHMETIC and None not in arguments else None

    def _with_sum(self, group: _Group) -> _Group:
        """Add the sum of the convolution and another map. Of two convolutions, the later one includes the sum."""
        users = list(group.layer.users)
        if len(users) != 1 or self._operation(users[0]) not in _SUMS or len(users[0].args) != 2 or users[0].kwargs:
            return group
        (total,) = users
        others = [one for one in total.args if isinstance(one, fx.Node) and one is not group.layer]
        if len(others) != 1 or self._changes_another(total):
            return group
        (added,) = others
        if self.order[added] > self.order[group.layer] and len(added.users) == 1 and self._convolution(added):
            return group
        return replace(group, added=added, total=total, out=total)

    def _with_activation(self, group: _Group) -> _Group:
        norms = [one for one in group.total.users if self._operation(one) in (nn.BatchNorm2d, BatchNorm2d)]
        for norm in (None, *(one for one in norms if len(one.users) == 1 and self._usable(self._module(one)))):
            for node in (group.total if norm is None else norm).users:
                activation = _ACTIVATIONS.get(self._operation(node), NONE)
                plain = len(node.args) == 1 and set(node.kwargs) <= {"inplace"}
                if activation and plain and not self._changes_another(node):
                    return replace(group, norm=norm, out=node, activation=activation)
        return group

    def _usable(self, norm: Any) -> bool:
        parts = norm.running_mean, norm.running_var, norm.weight, norm.bias
        return all(one is not None for one in parts) and not norm.training

    def _changes_another(self, node: _Node) -> bool:
        """Return True if a node writes to a map that is also used elsewhere."""
        inplace = node.kwargs.get("inplace") or getattr(self._module(node), "inplace", False)
        written: Any = node.args[0]
        return bool(inplace or self._operation(node) in _IN_PLACE) and len(written.users) > 1


@dataclass(frozen=True)
class _Plan:
    """A chain in the graph: its name, its steps, the nodes that enter it, and the nodes that leave it."""

    name: str
    groups: list[_Group]
    maps: list[_Node]
    leaving: list[_Node]

    def chain(self, modules: dict[str, Any]) -> Chain:
        """Make the chain of a network from its modules."""
        places = {node: number for number, node in enumerate(self.maps)}
        for group in self.groups:
            for node in (group.total, group.out):
                places.setdefault(node, len(places))
        steps = [
            Step(
                layer=modules[group.layer.target],
                norm=None if group.norm is None else modules[group.norm.target],
                activation=group.activation,
                input=places[group.input],
                added=None if group.added is None else places[group.added],
                padding=group.padding,
                total=places[group.total],
                out=places[group.out],
            )
            for group in self.groups
        ]
        return Chain(steps, len(self.maps), [places[node] for node in self.leaving])


def _planned(graph: fx.Graph, groups: list[_Group]) -> tuple[fx.Graph, list[_Plan]]:
    """Return a graph with a node for each chain, which ends before another operation reads its maps, and the chains."""
    new, known, plans = fx.Graph(), dict[Any, Any](), list[_Plan]()
    owner = {node: group for group in groups for node in group.nodes if node is not None}
    by_total = {group.total: group for group in groups}
    layers = {group.layer: group for group in groups}
    # The zeros around a map, and the computation of their number, are a part of the convolution.
    absorbed: set[_Node] = set()
    for node in reversed(graph.nodes):
        used = [one not in absorbed and (one not in layers or layers[one].input is node) for one in node.users]
        if used and not any(used) and node not in owner and node.op != "placeholder":
            absorbed.add(node)
    waiting: list[_Group] = []

    def readers(node: _Node) -> set[_Node]:
        return set().union(*(readers(user) if user in absorbed else {user} for user in node.users))

    def end_chain() -> None:
        own = list(dict.fromkeys(node for group in waiting for node in (group.total, group.out)))
        entering = [node for group in waiting for node in (group.input, group.added) if node is not None]
        maps = [node for node in dict.fromkeys(entering) if node not in own]
        leaving = [node for node in own if any(owner.get(reader) not in waiting for reader in readers(node))]
        plan = _Plan(f"fused_chain_{len(plans)}", list(waiting), maps, leaving)
        plans.append(plan)
        call = new.call_module(plan.name, tuple(known[node] for node in maps))
        for place, node in enumerate(leaving):
            known[node] = new.call_function(operator.getitem, (call, place))
        waiting.clear()

    for node in graph.nodes:
        if node in by_total:
            waiting.append(by_total[node])
        elif node not in owner and node not in absorbed:
            if any(owner.get(read) in waiting for read in node.all_input_nodes):
                end_chain()
            known[node] = new.node_copy(node, lambda one: known[one])
    return new, plans


class _Attribute(nn.Module):
    """Returns an attribute of a module. The module may get another tensor, for example when it is moved."""

    def __init__(self, owner: nn.Module, name: str):
        super().__init__()
        # In a tuple, the module is not registered as a part of this module.
        self.owner, self.name = (owner,), name

    def forward(self) -> Any:
        return getattr(self.owner[0], self.name)


def _assembled(module: nn.Module, graph: fx.Graph, plans: list[_Plan]) -> fx.GraphModule:
    """Make the rewritten module, which shares all layers with ``module``."""
    modules = dict(module.named_modules())
    parts: dict[str, Any] = {plan.name: plan.chain(modules) for plan in plans}
    own = fx.Graph()
    known: dict[_Node, _Node] = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            owner, _, name = node.target.rpartition(".")
            if not isinstance(getattr(modules[owner], name), Tensor):
                raise TypeError(f"{node.target} is not a tensor")
            parts[f"attribute_{len(parts)}"] = _Attribute(modules[owner], name)
            known[node] = own.call_module(list(parts)[-1])
            continue
        if node.op == "call_module" and node.target not in parts:
            parts[node.target] = modules[node.target]
        known[node] = own.node_copy(node, lambda one: known[one])
    return fx.GraphModule(parts, own)


class FusedForward:
    """The forward of a rewritten module, which runs the chains where oneDNN serves, and otherwise the old forward.

    ``tensors`` tells which arguments were tensors at the trace, because the module may test whether an argument is
    None.
    """

    #: Captured steps read the tensors of the module, and no others.
    not_dependencies = frozenset({"module", "graph"})

    def __init__(self, module: nn.Module, graph: fx.GraphModule, tensors: tuple[bool, ...]):
        self.module, self.graph, self.tensors = module, graph, tensors

    def __call__(self, *given: Any, **named: Any) -> Any:
        other = named or tuple(isinstance(one, Tensor) for one in given) != self.tensors
        if _off or torch.compiler.is_compiling() or other or not _served(given, self.graph):
            return type(self.module).forward(self.module, *given, **named)
        return self.graph(*given)


#: True within `without_fusion`.
_off = False


@contextlib.contextmanager
def without_fusion() -> Iterator[None]:
    """A block in which rewritten modules run as they were."""
    global _off
    before, _off = _off, True
    try:
        yield
    finally:
        _off = before


def _served(given: tuple[Any, ...], graph: fx.GraphModule) -> bool:
    if transformed() or forward_ad._current_level >= 0:
        return False
    kinds = {type(one) for one in given}
    devices = {one.device for one in given if isinstance(one, Tensor)}
    if len(devices) != 1 or not kinds <= {Tensor, nn.Parameter, type(None)}:
        return False
    (device,) = devices
    if not onednn_serves(device):
        return False
    gradient = needs_gradient(*(one for one in given if isinstance(one, Tensor)))
    return not gradient or _has_gradient(graph)


def _has_gradient(graph: fx.GraphModule) -> bool:
    return all(chain.has_gradient for chain in graph.children() if isinstance(chain, Chain))


def fuse_where_faster(model: nn.Module, *example: Tensor) -> None:
    """Call `fuse_convolutions` on a device where oneDNN computes the steps of chains."""
    if onednn_serves(example[0].device):
        fuse_convolutions(model, *example)


def fuse_convolutions(model: nn.Module, *example: Tensor) -> int:
    """Rewrite a frozen network in bfloat16 in place, unless it has hooks; return the number of fused layers."""
    if any(map(hooked, model.modules())) or any(weight.requires_grad for weight in model.parameters()):
        return 0
    try:
        trial = copy.deepcopy(model).double()
        arguments = _arguments(trial, [one.double() if one.is_floating_point() else one for one in example])
    except Exception:
        # A user's module may raise any error when it is copied or run in float64.
        return 0
    seen: set[nn.Module] = set()

    def visit(module: nn.Module, tried: nn.Module) -> int:
        if module in seen:
            return 0
        seen.add(module)
        graph = _rewritten(module, tried, arguments.get(tried))
        if graph is None:
            return sum(map(visit, module.children(), tried.children()))
        module.forward = FusedForward(module, graph, tuple(isinstance(one, Tensor) for one in arguments[tried]))
        return sum(len(part.steps) for part in graph.children() if isinstance(part, Chain))

    return visit(model, trial)


@torch.no_grad()
def _arguments(model: nn.Module, example: list[Tensor]) -> dict[nn.Module, tuple[Any, ...]]:
    """Return the arguments of the first call of each module. Modules with named arguments are left out."""
    found: dict[nn.Module, tuple[Any, ...]] = {}

    def see(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        if not named and module not in found:
            # The module may change its arguments.
            found[module] = tuple(one.clone() if isinstance(one, Tensor) else one for one in given)

    handles = [part.register_forward_pre_hook(see, with_kwargs=True) for part in model.modules()]
    model(*example)
    for handle in handles:
        handle.remove()
    return found


def _rewritten(module: nn.Module, trial: nn.Module, given: tuple[Any, ...] | None) -> fx.GraphModule | None:
    """Return the rewritten module; None if it cannot be traced, has nothing to fuse, or is another function."""
    if given is None:
        return None
    try:
        # A forward may change its module. So the copy is traced, not the module itself.
        graph = _Tracer().trace(trial)
        groups = _Finder(module, graph).groups()
        if not any(group.out is not group.layer or _bias_of(module, group) for group in groups):
            return None
        new, plans = _planned(graph, groups)
        tried = _assembled(trial, new, plans)
        if _has_gradient(tried):
            got, want = answers(tried, given), answers(trial, given)
        else:
            with torch.no_grad():
                got, want = [tried(*given)], [trial(*given)]
        return _assembled(module, new, plans) if all(map(close, got, want)) else None
    except Exception:
        # Tracing fails for many modules, each with another error.
        return None


def _bias_of(module: nn.Module, group: _Group) -> bool:
    return module.get_submodule(group.layer.target).bias is not None
