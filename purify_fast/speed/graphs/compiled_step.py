"""Compile a whole step of an attack: the forward pass, the loss, the gradient of the images and their move.

The step is traced to a single graph of operators, which `torch.compile` compiles for one batch size. So the compiler
also fuses operators of the forward pass with others. The weights are inputs of the graph, so they may change.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

from ..._compiler import traced
from ..._validation import in_one_line
from ...protocols import CountsImages, Passes
from ..agreement import BFLOAT16, COSINE
from ..draws import same_draws
from ..frozen_weights import eager
from .step_graphs import host_generators
from .step_loop import State, parts_of

#: The compiler. Tests replace it by a faster one.
BACKEND = "inductor"

#: The methods that read the value of a tensor on the host.
READS = frozenset({"item", "tolist", "numpy", *(f"__{name}__" for name in ("float", "int", "bool", "index", "array"))})

#: A compiled step.
Compiled = Callable[[Mapping[str, Tensor]], State]


class _OnTheDevice(TorchFunctionMode):
    """Refuses to read the value of a tensor on the host, because every compiled step would have this value."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(function, "__name__", "") in READS:
            raise RuntimeError(f"the step reads the value of a tensor by {function.__name__}()")
        return function(*args, **(kwargs or {}))


def compiled_step(function: Any, state: State) -> tuple[Compiled, list[Passes]]:
    """Compile a step, and compare the results once, from the same state. Return it with the images that a step counts.

    Raises:
        RuntimeError: tracing or compiling fails, or the results differ.
    """
    # The trace would confuse two names of one tensor.
    state = {name: value.detach().clone() for name, value in state.items()}
    device = next(iter(state.values())).device
    counters: list[CountsImages] = parts_of(function.model, CountsImages)
    start = [counter.counted() for counter in counters]
    try:
        with same_draws(device=device):
            made = _traced(function, state)
        with same_draws(device=device):
            got = made(state)
        before = [counter.counted() for counter in counters]
        with same_draws(device=device):
            wanted = function(state)
        counts = [counter.counted() - first for counter, first in zip(counters, before, strict=True)]
    except Exception as error:
        # A user's model may raise any error when it is traced or compiled.
        raise RuntimeError(in_one_line(error)) from error
    finally:
        # The trials are no steps of the attack.
        for counter, first in zip(counters, start, strict=True):
            counter.count(first - counter.counted())
    if not agrees(got, wanted, state):
        raise RuntimeError("it gives another result")
    return made, counts


def _traced(function: Any, state: State) -> Compiled:
    names, device = sorted(state), next(iter(state.values())).device

    def flat(*values: Tensor) -> State:
        result: State = function(dict(zip(names, values, strict=True)))
        return result

    # A backward pass in another thread would not be traced, and neither would compiled parts of the model.
    token, before = traced.set(True), host_generators(device)
    try:
        with torch.autograd.set_multithreading_enabled(False), eager(function.model), _OnTheDevice():
            made = make_fx(flat)(*[state[name] for name in names])
    finally:
        traced.reset(token)
    if host_generators(device) != before:
        raise RuntimeError("the step draws random numbers on the host, which every compiled step would repeat")
    graph, tensors, draws = _with_inputs(made)
    # The result is compared with the step, so a later trace of another shape would be wrong: `dynamic` is False.
    called = torch.compile(graph, dynamic=False, fullgraph=True, backend=BACKEND)

    def run(state: Mapping[str, Tensor]) -> State:
        # The compiler would compile again for a tensor that has two names.
        values = {id(value): name for name, value in state.items()}
        given = [state[name] if values[id(state[name])] == name else state[name].clone() for name in names]
        # The graph already has the casts of an autocast. The compiler would compile again for another state of
        # autocast's cache, which is off in a capture.
        with torch.no_grad(), torch.autocast(device.type, enabled=False, cache_enabled=False):
            result: State = called(*tensors, *[draw() for draw in draws], *given)
        return result

    return run


def _with_inputs(step: fx.GraphModule) -> tuple[fx.GraphModule, list[Tensor], list[Callable[[], Tensor]]]:
    """Make inputs of the tensors in a traced step, such as weights, and of the seeds that it draws.

    Returns:
        The new graph, these tensors, and functions that draw the seeds. Its inputs are the tensors, the seeds, and the
        inputs of ``step``. The compiler may store the values of constants in its code, but weights may change from
        replay to replay, and compiled code would draw other numbers.
    """
    graph, tensors, inputs = fx.Graph(), dict[str, Tensor](), dict[str, Any]()
    draws = list[Callable[[], Tensor]]()
    known: dict[Any, Any] = {}
    for node in step.graph.nodes:
        if node.op == "get_attr" and node.target not in inputs:
            value = operator.attrgetter(node.target)(step)
            if not isinstance(value, Tensor):
                raise RuntimeError(f"the step has the constant {node.target}, which is not a tensor")
            inputs[node.target] = graph.placeholder(f"tensor_{len(inputs)}")
            tensors[node.target] = value.detach()
    for node in step.graph.nodes:
        if node.target is torch.ops.aten.randint.default and not node.all_input_nodes:
            draws.append(functools.partial(node.target, *node.args, **node.kwargs))
            known[node] = graph.placeholder(f"seed_{len(draws)}")
    for node in step.graph.nodes:
        if node in known:
            continue
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            raise RuntimeError(f"the step draws random numbers in the operator {node.target}")
        known[node] = inputs[node.target] if node.op == "get_attr" else graph.node_copy(node, lambda one: known[one])
    graph.eliminate_dead_code()
    return fx.GraphModule(nn.Module(), graph), list(tensors.values()), draws


def agrees(got: Mapping[str, Tensor], wanted: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> bool:
    """Return True if a compiled step has the results of the step, up to rounding, after the state ``before``."""
    if not got.keys() >= wanted.keys():
        return False
    return all(
        _close(got[name], value, before[name])
        for name, value in wanted.items()
        if value.is_floating_point() and value.numel()
    )


def _close(got: Tensor, wanted: Tensor, before: Tensor) -> bool:
    if got.shape != wanted.shape or got.dtype != wanted.dtype:
        return False
    # NaN and infinite numbers, such as the loss of a point that was never judged, must be equal.
    finite = wanted.isfinite()
    if not torch.allclose(got[~finite], wanted[~finite], equal_nan=True):
        return False
    one, other = got[finite].double(), wanted[finite].double()
    if wanted.dim() < 2:
        return not len(other) or bool((one - other).abs().mean() <= BFLOAT16 * other.abs().amax())
    old = before[finite].double().nan_to_num(0.0, 0.0, 0.0)
    moved, target = one - old, other - old
    if not bool(target.any()):
        return not bool(moved.any())
    return bool(torch.dot(moved, target) >= COSINE[BFLOAT16] * moved.norm() * target.norm() > 0)
