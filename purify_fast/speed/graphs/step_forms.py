"""The forms of a step: several ways to compute the same results. A CUDA graph of the fastest form is kept.

- "launched" runs the step as it is written. PyTorch launches an operator at a time, and a layer whose fused convolution
  won its race launches this kernel.
- "unfused" is the same without fused convolutions. It exists only if there are any.
- "compiled" compiles the inference copies in the step's model, as a forward and a backward function.
- "joint" traces the whole step to a single graph of operators: the forward pass, the loss, the gradient and the move of
  the images. This graph is compiled, so the compiler also fuses operators of the forward pass with others.

It depends on the network, the batch and the GPU which form is fastest. A form serves only if its first replay agrees
with the step as it is written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import operator
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from ..._tensors import without_autocast
from ...ops.dispatch import records
from ..folding.fused_networks import has_fused_parts, without_fusion
from ..folding.inference_copy import Accelerated, CompiledRegion, InferenceCopy

logger = logging.getLogger("purify_fast")

Form = Literal["launched", "unfused", "compiled", "joint"]
FORMS: tuple[Form, ...] = get_args(Form)
#: The compiler. Tests replace it by a faster one.
BACKEND = "inductor"
#: A changed file of choices gets another number, so that older choices are not used.
VERSION = 1
#: Tolerances for a form: the least cosine between the changes of an image tensor, and the largest mean error of another
#: tensor, as a share of its largest value. Products in bfloat16 have other rounding errors in each form.
LEAST_COSINE, LARGEST_ERROR = 0.8, 0.05

State = dict[str, Tensor]
Run = Callable[[Mapping[str, Tensor]], State]


class MadeForm(NamedTuple):
    """A form of a step for one shape of the state.

    Attributes:
        run: function that computes the step in this form.
        objects: objects that a graph of this form needs, such as compiled code.
    """

    run: Run
    objects: list[Any]


def copies_in(model: nn.Module) -> list[InferenceCopy]:
    """The inference copies in a model, also those of accelerated defences."""
    found: list[Any] = []
    for part in model.modules():
        fast = getattr(part, "fast", None)
        found += [part, *([fast.classifier] if isinstance(fast, Accelerated) else [])]
    return [part for part in dict.fromkeys(found) if isinstance(part, InferenceCopy)]


def candidates(function: Any) -> list[Form]:
    """The forms that may exist for a step, by the parts of its model."""
    copies = copies_in(function.model)
    if any(part.region is not None for part in copies):
        # The user has chosen to compile the copies. The whole step cannot be traced through compiled functions.
        return ["launched"]
    fused = any(map(has_fused_parts, (function.model, *copies)))
    without = {"unfused": not fused, "compiled": not copies}
    return [form for form in FORMS if not without.get(form, False)]


def make_form(form: Form, function: Any, buffers: State) -> MadeForm:
    """Make a form of a step.

    Args:
        form: the form.
        function: the step.
        buffers: the state: tensors by name. They are not changed.

    Raises:
        RuntimeError: the step draws random numbers, which the compiler would draw in another way.
        Exception: tracing or compiling the step fails, for any reason of the user's model.
    """
    if form == "launched":
        return MadeForm(function, [])
    if form == "unfused":
        return MadeForm(_unfused(function), [])
    return _compiled(function) if form == "compiled" else _joint(function, buffers)


def _unfused(function: Any) -> Run:
    def run(state: Mapping[str, Tensor]) -> State:
        with without_fusion():
            result: State = function(state)
        return result

    return run


def _compiled(function: Any) -> MadeForm:
    regions = [(part, CompiledRegion(_with_own_code(part._logits))) for part in copies_in(function.model)]

    def run(state: Mapping[str, Tensor]) -> State:
        for part, region in regions:
            part.region = region
        try:
            result: State = function(state)
        finally:
            for part, _ in regions:
                part.region = None
        return result

    return MadeForm(run, regions)


def _with_own_code(method: Any) -> Any:
    """Copy a method. PyTorch compiles a code object only a few times, and then runs all of its functions uncompiled."""
    function = method.__func__
    code, given = function.__code__.replace(), (function.__defaults__, function.__closure__)
    duplicate = types.FunctionType(code, function.__globals__, function.__name__, *given)
    return types.MethodType(duplicate, method.__self__)


def _joint(function: Any, buffers: State) -> MadeForm:
    names, device = sorted(buffers), next(iter(buffers.values())).device

    def flat(*values: Tensor) -> State:
        result: State = function(dict(zip(names, values, strict=True)))
        return result

    with without_fusion():
        traced = make_fx(flat)(*[buffers[name] for name in names])
    graph, tensors = _with_inputs(traced)
    # The result is compared with the step, so a later trace of another shape would be wrong: `dynamic` is False.
    called = torch.compile(graph, dynamic=False, fullgraph=True, backend=BACKEND)

    def run(state: Mapping[str, Tensor]) -> State:
        # The graph already has the casts of an autocast.
        with torch.no_grad(), without_autocast(device):
            result: State = called(*tensors, *[state[name] for name in names])
        return result

    return MadeForm(run, [called, *tensors])


def _with_inputs(traced: fx.GraphModule) -> tuple[fx.GraphModule, list[Tensor]]:
    """Make inputs of the tensors in a traced step, such as weights, and return the new graph and these tensors.

    The compiler may store the values of constants in its code, but weights may change from replay to replay.
    """
    graph, tensors, inputs = fx.Graph(), dict[str, Tensor](), dict[str, Any]()
    known: dict[Any, Any] = {}
    for node in traced.graph.nodes:
        if node.op == "get_attr" and node.target not in inputs:
            value = operator.attrgetter(node.target)(traced)
            if not isinstance(value, Tensor):
                raise RuntimeError(f"the step has the constant {node.target}, which is not a tensor")
            inputs[node.target] = graph.placeholder(f"tensor_{len(inputs)}")
            tensors[node.target] = value.detach()
    for node in traced.graph.nodes:
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            raise RuntimeError(f"the step draws random numbers in the operator {node.target}")
        known[node] = inputs[node.target] if node.op == "get_attr" else graph.node_copy(node, lambda one: known[one])
    graph.eliminate_dead_code()
    return fx.GraphModule(nn.Module(), graph), list(tensors.values())


def agrees(got: Mapping[str, Tensor], wanted: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> bool:
    """Tell whether a form has the same results as the step, up to rounding errors. This waits for the device.

    Args:
        got: the results of the form.
        wanted: the results of the step.
        before: the state before the step.
    """
    if not got.keys() >= wanted.keys():
        return False
    return all(
        _close(got[name], value, before[name])
        for name, value in wanted.items()
        if value.is_floating_point() and value.numel()
    )


def _close(got: Tensor, wanted: Tensor, before: Tensor) -> bool:
    if got.shape != wanted.shape or got.dtype != wanted.dtype or not torch.equal(got.isnan(), wanted.isnan()):
        return False
    # Infinite numbers, such as the loss of a point that was never judged, must be equal.
    rest = wanted.isfinite()
    if not torch.equal(got[~rest & ~wanted.isnan()], wanted[~rest & ~wanted.isnan()]):
        return False
    zeros = torch.zeros_like(wanted)
    one, other = (torch.where(rest, value, zeros).double() for value in (got, wanted))
    if wanted.dim() < 2:
        return bool((one - other).abs().mean() <= LARGEST_ERROR * other.abs().amax())
    old = torch.where(rest & before.isfinite(), before, zeros).double()
    moved, target = (one - old).flatten(), (other - old).flatten()
    if not bool(target.any()):
        return not bool(moved.any())
    return bool(torch.dot(moved, target) >= LEAST_COSINE * moved.norm() * target.norm() > 0)


def structure(function: Any, state: Mapping[str, Tensor], settings: tuple[Any, ...]) -> str:
    """Return a digest of everything that decides how long the forms of a step take, beside the machine.

    Args:
        function: the step.
        state: the state: tensors by name.
        settings: further settings of the process.
    """
    shapes = [(name, list(one.shape), list(one.stride()), str(one.dtype)) for name, one in sorted(state.items())]
    tensors = [*function.model.named_parameters(), *function.model.named_buffers()]
    weights = [(name, list(one.shape), str(one.dtype)) for name, one in tensors]
    facts = VERSION, plain_facts(function), str(function.model), shapes, weights, [str(one) for one in settings]
    return hashlib.blake2b(repr(facts).encode(), digest_size=16).hexdigest()


def plain_facts(value: Any) -> Any:
    """The class of a dataclass, and its fields that are plain values or dataclasses of such."""
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value if isinstance(value, (str, int, float, bool, type(None))) else type(value).__qualname__
    fields = [(field.name, plain_facts(getattr(value, field.name))) for field in dataclasses.fields(value)]
    return type(value).__qualname__, fields


class KnownForm(NamedTuple):
    """The fastest form of a step on this machine, and the seconds that it took to make it."""

    form: Form
    cost: float


def known_form(digest: str, device: torch.device) -> KnownForm | None:
    """The fastest form of a step on this machine, from its file; None if it is not known.

    Args:
        digest: the step's `structure`.
        device: device of its state.
    """
    entry = records.read("formed", device).get("ops", {}).get(digest, {})
    form, cost = entry.get("form"), entry.get("cost")
    return KnownForm(form, cost) if form in FORMS and isinstance(cost, (int, float)) else None


def keep_form(digest: str, device: torch.device, times: Mapping[Form, tuple[float, float]]) -> None:
    """Write the fastest form of a step to this machine's file.

    Args:
        digest: the step's `structure`.
        device: device of its state.
        times: for each form, the seconds of a replay, and the seconds that it took to make the form.
    """
    fastest = min(times, key=lambda form: times[form][0])
    replays = {form: round(1e3 * seconds, 4) for form, (seconds, _) in times.items()}
    logger.info("milliseconds of a step in each form: %s; the fastest is used", replays)
    entry = {"form": fastest, "cost": times[fastest][1], "milliseconds": replays}
    # A folder without write permission must not end an attack.
    with contextlib.suppress(OSError), records.locked("formed", device):
        records.update("formed", device, {digest: entry}, {})


@contextlib.contextmanager
def form_errors(form: Form) -> Iterator[None]:
    """A block in which any error means that a form does not exist. The error is logged."""
    try:
        yield
    except Exception as error:
        # A user's model may raise any error when it is traced or compiled. The other forms remain.
        first = (str(error).strip().splitlines() or [""])[0]
        logger.info("a step has no form %r (%s: %s)", form, type(error).__name__, first)
