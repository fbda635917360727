"""Ctrl-C during an evaluation: one line that says how to go on, in place of a traceback through the attack."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

F = TypeVar("F", bound=Callable[..., Any])


def short_interrupts(function: F) -> F:
    """A decorator of `evaluate`: a KeyboardInterrupt is raised again from here, with a message.

    The frames of the attack say nothing to whoever pressed Ctrl-C; a debugger finds them in ``__context__``.
    Subclasses, and an interrupt that has a message, are of somebody's own making and pass as they are.

    Args:
        function: is given the model first, or as ``defence``, and the folder of finished rows as ``out``.
    """

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except KeyboardInterrupt as error:
            if type(error) is not KeyboardInterrupt or error.args:
                raise
            raise KeyboardInterrupt(_how_to_go_on(args[0] if args else kwargs.get("defence"), kwargs)) from None

    return wrapper  # type: ignore[return-value]


def _how_to_go_on(model: Any, given: dict[str, Any]) -> str:
    out = given.get("out")
    if out is not None and isinstance(model, nn.Module):
        return f"evaluate was interrupted; what it has finished is kept in {out}: call it again to go on from there"
    if out is not None:
        return "evaluate was interrupted, and of a function nothing is kept: a module and out=FOLDER would go on"
    return "evaluate was interrupted, and nothing is kept: with out=FOLDER, calling it again would go on from there"
