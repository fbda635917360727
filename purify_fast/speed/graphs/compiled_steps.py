"""The compiled steps of attacks on a copy: which steps are compiled, and when."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

from ..._validation import in_one_line
from ...model_description import identity_key
from ...protocols import CountsImages, Passes
from .compiled_step import Compiled, compiled_step
from .step_loop import State, StepFunction, parts_of, step_key, weak_key

#: The largest number of compiled steps of a copy.
MOST_STEPS = 16

logger = logging.getLogger("purify_fast")


@dataclass
class Begun:
    """A step that has begun.

    Attributes:
        model: the model of the step.
        objects: the objects whose addresses are in the key.
        compiled: the compiled step with the images that it counts; empty if it is not compiled, None: not yet.
    """

    model: weakref.ref[Any]
    objects: list[Any]
    compiled: tuple[Any, ...] | None = None


@dataclass
class CompiledSteps:
    """The compiled steps of a copy. The copy's owner asks for them, and `begin_steps` adds them.

    Attributes:
        at_once: whether a step is compiled when it begins for the first time, and must compile. A training needs this,
            because a resumed training must take the same steps to the bit. Otherwise a step is compiled when it begins
            for the second time, because attacks also begin loops with many batch sizes that never occur again.
        by_key: the steps that have begun, by their keys.
    """

    at_once: bool = False
    by_key: dict[Hashable, Begun] = field(default_factory=dict)

    def compiled_or_itself(self, function: StepFunction, state: State) -> Any:
        """Return the compiled form of a step, or the step itself.

        Raises:
            ValueError: a step of a training cannot be compiled.
        """
        try:
            # A compiled step reads the tensors and has the settings that the model had when it was traced.
            values, objects, _ = identity_key(function.model)
            key = weak_key((step_key(function, state), values))
        except TypeError as error:
            self._refuse(function, in_one_line(error))
            return function
        self.by_key = {key: begun for key, begun in self.by_key.items() if begun.model() is not None}
        first = key not in self.by_key
        begun = self.by_key.setdefault(key, Begun(weakref.ref(function.model), objects))
        if first and not self.at_once:
            return function
        if begun.compiled is None:
            begun.compiled = self.compiled(function, state) or ()
        if not begun.compiled:
            return function
        counters, (made, counts) = parts_of(function.model, CountsImages), begun.compiled

        def run(state: State) -> State:
            for counter, images in zip(counters, counts, strict=True):
                counter.count(images)
            return made(state)

        return run

    def compiled(self, function: StepFunction, state: State) -> tuple[Compiled, list[Passes]] | None:
        """Compile a step. If that fails, log a warning and return None, or raise a ValueError in a training."""
        if sum(bool(begun.compiled) for begun in self.by_key.values()) >= MOST_STEPS:
            return self._refuse(function, f"{MOST_STEPS} others of its copy are compiled")
        try:
            return compiled_step(function, state)
        except RuntimeError as error:
            return self._refuse(function, str(error))

    def _refuse(self, function: StepFunction, reason: str) -> Any:
        model = function.model
        name = getattr(model, "_name", type(model).__name__)
        if self.at_once:
            raise ValueError(f"compile must be False: an attack on {name} cannot be compiled ({reason}), got True")
        logger.warning("a step of %s is not compiled: %s", name, reason)

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy of the owner has tensors of its own.
        return CompiledSteps, (self.at_once,)
