"""A loop of steps, which is eager at first, and replays a graph after its step was captured.

A step is a function from named tensors to named tensors. Its results replace the tensors of the same names, which are
the state. In an eager loop (without a graph), the new tensors become the state. In a captured loop, the state is in
fixed buffers, and the step writes its results to them. Both loops call the same function, so the formula of an attack
is written only once.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from ..._library import section

State = dict[str, Tensor]


class StepFunction(Protocol):
    """A step. It can be hashed, and equal steps compute equal results from equal states."""

    @property
    def model(self) -> Any:
        """The model that the step uses. Only a step with a module as model can be captured."""

    def may_be_compiled(self, state: State) -> bool:
        """Return True if the whole step may be compiled for the shapes of a state."""

    def __call__(self, state: State) -> State:
        """Compute new values, with unchanged shapes and dtypes, for some tensors of the state. Do not write to it."""


class Steps:
    """An eager loop of steps.

    Args:
        function: the step.
        state: initial tensors by name, which are not written to.

    Attributes:
        state: the current tensors, which the next step may overwrite. `values` returns tensors that are not
            overwritten.
    """

    def __init__(self, function: StepFunction, state: State):
        self.function, self.state = function, dict(state)

    def advance(self) -> None:
        """Do a step."""
        # Every eager step runs these lines, so they must be fast.
        if torch._C._autograd._profiler_enabled():
            with section("attack step"):
                self.state |= self.function(self.state)
        else:
            self.state |= self.function(self.state)

    def put(self, **values: Tensor) -> None:
        """Replace tensors of the state by tensors of the same shapes and dtypes."""
        self.state |= values

    def values(self, *names: str) -> State:
        """The current tensors of these names, or of all names. Later steps do not overwrite them."""
        return {name: self.state[name] for name in names or self.state}


#: True within `eager_steps`.
_eager = ContextVar("eager", default=False)


@contextlib.contextmanager
def eager_steps(eager: bool = True) -> Iterator[None]:
    """Within the block, steps are not compiled, because each batch has another number of images."""
    token = _eager.set(eager)
    try:
        yield
    finally:
        _eager.reset(token)


def compiler_of(function: StepFunction, state: State) -> Any:
    """Return the `CompiledSteps` of the copy that a step attacks; None if the step is not to be compiled.

    A step whose number of images changes is not compiled as a whole, and neither is a step that counts images.
    """
    from ...protocols import CountsImages, supports

    model = function.model
    # Inside a larger graph of torch.compile, there is nothing to compile here.
    if not isinstance(model, nn.Module) or _eager.get() or torch.compiler.is_compiling():
        return None
    steps = None
    for part in model.modules():
        if supports(part, CountsImages):
            return None
        if steps is None and supports(part, "compiled_steps"):
            steps = cast(Any, part).compiled_steps()
    return steps if steps is not None and function.may_be_compiled(state) else None


def begin_steps(graphs: Any, function: StepFunction, state: State) -> Steps:
    """Begin a loop of a step, from tensors on the same device.

    The step is compiled if the user has asked for this, or ``graphs`` may capture it. Otherwise the loop is eager.
    """
    # Nothing is compiled before this module is imported.
    compiles = "purify_fast.speed.graphs.compiled_step" in sys.modules
    if compiles and (compiler := compiler_of(function, state)) is not None:
        return Steps(compiler.form_of(function, state), state)
    return Steps(function, state) if graphs is None else graphs.begin(function, state)
