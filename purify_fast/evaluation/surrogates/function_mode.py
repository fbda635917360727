"""A function mode of PyTorch that holds another context, and the types of the functions that such a mode replaces."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from torch.overrides import TorchFunctionMode

#: A function of PyTorch, or a formula that replaces it.
Rule = Callable[..., Any]
Args = tuple[Any, ...]


class HoldingMode(TorchFunctionMode):
    """A function mode that also enters another context, and that can be entered again inside its own block."""

    def __init__(self) -> None:
        super().__init__()
        self._open: list[contextlib.ExitStack] = []

    def held(self, stack: contextlib.ExitStack) -> None:
        """Enter the other context."""
        raise NotImplementedError

    def __enter__(self) -> Any:
        stack = contextlib.ExitStack()
        self.held(stack)
        self._open.append(stack)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._open.pop().close()
