"""Compile functions and whole steps of attacks by `torch.compile`, whose guards decide when a form is compiled again.

A step is the forward pass, the loss, the gradient of the images and their move, in one graph. The weights are inputs of
the graph, so they may change. The import of the compiler is slow, so this module imports it when it is needed.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Callable
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch.nn.modules import module as modules

from ..._library import in_one_graph
from ..._validation import in_one_line
from ..agreement import nearly_as_exact
from ..draws import same_draws
from ..eager_mode import eager
from .graphed_loop import parts_of
from .step_loop import State, StepFunction

#: The compiler. Tests replace it by a faster one.
BACKEND = "inductor"
#: The hooks of all modules, which no guard of the compiler sees.
_EVERY_MODULE = ("_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks")

logger = logging.getLogger("purify_fast")


def compiled(function: Any, **options: Any) -> Any:
    """Compile a function, which is compiled again when hooks of its modules have changed.

    With hooks of all modules, it runs as it is written. After as many forms as PyTorch compiles, further forms run as
    they are written too, and PyTorch warns.
    """
    from torch._dynamo import config
    from torch._functorch import config as of_autograd

    own = function
    if isinstance(function, FunctionType):
        # PyTorch counts the forms of all functions with the same code.
        code, closure = function.__code__.replace(), function.__closure__
        own = FunctionType(code, function.__globals__, function.__name__, function.__defaults__, closure)
        own.__kwdefaults__ = function.__kwdefaults__
    program: Any = torch.compile(own, **{"backend": BACKEND, **options})

    def call(*args: Any, **more: Any) -> Any:
        if any(getattr(modules, name) for name in _EVERY_MODULE):
            return function(*args, **more)
        # By default, code for a model without its hooks would serve it, and a backward pass would be in the autocast of
        # the call, also for parts that switch it off.
        with config.patch(skip_nnmodule_hook_guards=False), of_autograd.patch(backward_pass_autocast="off"):
            return program(*args, **more)

    return call


def compile_calls(module: Any) -> None:
    """Compile the calls of a module, like ``module.compile()``."""
    module._compiled_call_impl = compiled(module._call_impl)


class CompiledSteps:
    """The compiled steps of attacks on a copy, whose owner has this object.

    Args:
        must: whether a step that cannot be compiled raises a ValueError. A training needs this, because a resumed
            training must take the same steps to the bit. Otherwise the step runs as it is written, with a warning.

    Attributes:
        refusal: why steps run as they are written; empty if they are compiled.
        checked: whether a compiled step was compared with the step as written.
    """

    def __init__(self, must: bool = False):
        self.must, self.refusal, self.checked = must, "", False
        self._take: Any = None

    def __reduce__(self) -> tuple[Any, ...]:
        # The owner of a copy has other modules.
        return CompiledSteps, (self.must,)

    def form_of(self, function: StepFunction, state: State) -> Callable[[State], State]:
        """Return a step in its compiled form, or the step itself if it cannot be compiled.

        Raises:
            ValueError: a step cannot be compiled, but must be.
        """
        if not self.refusal and not self.checked:
            self._try(partial(self._check, function, state), function)
            self.checked = True
        return function if self.refusal else partial(self._run, function)

    def _run(self, function: StepFunction, state: State) -> State:
        result = None if self.refusal else self._try(partial(self._call, function, state), function)
        return function(state) if result is None else result

    def _try(self, work: Callable[[], Any], function: StepFunction) -> Any:
        """Do some work with a compiled step. If this fails, steps are not compiled any more."""
        from torch._dynamo.exc import TorchDynamoException

        try:
            return work()
        except (TorchDynamoException, _OtherResult) as error:
            self.refusal = in_one_line(error)
        name = getattr(function.model, "_name", type(function.model).__name__)
        if self.must:
            reason = f"an attack on {name} cannot be compiled ({self.refusal})"
            raise ValueError(f"compile must be False: {reason}, got True")
        logger.warning("a step of %s is not compiled: %s", name, self.refusal)
        return None

    def _call(self, function: StepFunction, state: State) -> State:
        if self._take is None:
            on_gpu = next(iter(state.values())).device.type == "cuda"
            mode = {"mode": "reduce-overhead"} if on_gpu and BACKEND == "inductor" else {}
            self._take = compiled(lambda function, state: function(state), fullgraph=True, dynamic=False, **mode)
        # A replay of a CUDA graph overwrites the results of the step before.
        torch.compiler.cudagraph_mark_step_begin()
        with contextlib.ExitStack() as stack:
            # The seeds of a random defence are inputs of the graph.
            for part in parts_of(function.model, "with_drawn_seed"):
                stack.enter_context(part.with_drawn_seed())
            # The step is compiled as a whole, without the compiled calls of its parts.
            stack.enter_context(eager(function.model))
            with torch.no_grad(), in_one_graph():
                result: State = self._take(function, _without_aliases(state))
        return {name: value.clone() for name, value in result.items()}

    def _check(self, function: StepFunction, state: State) -> None:
        """Compare a compiled step with the step as written: it must be about as near to the step in float32."""
        device = next(iter(state.values())).device
        with same_draws(function.model, device) as drew:
            written = function(state)
            if drew(on_host=True):
                raise _OtherResult("the step draws random numbers on the host, which every compiled step would repeat")
        exact = _in_float32(function)
        with same_draws(exact.model, device):
            ideal = exact(state)
        with same_draws(function.model, device):
            got = self._call(function, state)
        for name, value in written.items():
            if value.is_floating_point() and not nearly_as_exact(got[name], value, ideal[name], state[name]):
                raise _OtherResult(f"it gives another result ({name})")


def _without_aliases(state: State) -> State:
    """Copy the tensors that have several names, because the compiler would compile again without the second name."""
    first = {id(value): name for name, value in reversed(state.items())}
    return {name: value if first[id(value)] == name else value.clone() for name, value in state.items()}


class _OtherResult(Exception):
    """A compiled step differs from the step as written."""


def _in_float32(function: Any) -> Any:
    """Return a step on a copy of its model that computes in float32."""
    model = copy.deepcopy(function.model).float()
    for part in model.modules():
        for name in ("dtype", "compute_dtype"):
            if vars(part).get(name) is torch.bfloat16:
                setattr(part, name, torch.float32)
    return function.on(model)
