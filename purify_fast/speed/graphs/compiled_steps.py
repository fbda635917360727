"""The compiled steps of attacks on a copy: which steps are compiled, and when."""

from __future__ import annotations

import logging
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

from ..._validation import in_one_line
from ...model_description import identity_key
from .compiled_step import compiled_step
from .step_loop import State, StepFunction, step_key, weak_key

#: The largest number of compiled steps of a copy.
MOST_STEPS = 16

logger = logging.getLogger("purify_fast")


@dataclass
class CompiledSteps:
    """The compiled steps of a copy. The copy's owner asks for them, and `begin_steps` adds them.

    Attributes:
        at_once: whether a step is compiled when it begins for the first time, and must compile. A training needs this,
            because a resumed training must take the same steps to the bit. Otherwise a step is compiled when it begins
            for the second time, because attacks also begin loops with many batch sizes that never occur again.
        by_key: for each key of a step, the compiled step, None if it has begun once, or False if it is not compiled;
            and the objects whose addresses are in the key.
    """

    at_once: bool = False
    by_key: dict[Hashable, tuple[Any, list[Any]]] = field(default_factory=dict)

    def compiled_or_itself(self, function: StepFunction, state: State) -> Any:
        """Return the compiled form of a step, or the step itself.

        Raises:
            RuntimeError: a step of a training cannot be compiled.
        """
        try:
            # A compiled step reads the tensors and has the settings that the model had when it was traced.
            values, objects, _ = identity_key(function.model)
            key = weak_key((step_key(function, state), values))
        except TypeError as error:
            self._refuse(function, in_one_line(error))
            return function
        if key not in self.by_key:
            self.by_key[key] = None, objects
            if not self.at_once:
                return function
        compiled, _ = self.by_key[key]
        if compiled is None:
            compiled = self.compiled(function, state) or False
            self.by_key[key] = compiled, objects
        return compiled or function

    def compiled(self, function: StepFunction, state: State) -> Any:
        """Compile a step. If that fails, log a warning and return None, or raise a RuntimeError in a training."""
        if sum(callable(step) for step, _ in self.by_key.values()) >= MOST_STEPS:
            return self._refuse(function, f"{MOST_STEPS} others of its copy are compiled")
        try:
            return compiled_step(function, state)
        except RuntimeError as error:
            return self._refuse(function, str(error))

    def _refuse(self, function: StepFunction, reason: str) -> None:
        text = f"a step of {type(function.model).__name__} is not compiled: {reason}"
        if self.at_once:
            raise RuntimeError(f"{text}. Train with compile=False")
        logger.warning(text)

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy of the owner has tensors of its own.
        return CompiledSteps, (self.at_once,)
