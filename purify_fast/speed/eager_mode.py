"""Blocks in which compiled functions, or the compiled parts of a model, run as they were written."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class EagerDispatchMode(TorchDispatchMode):
    """Blocks in which compiled functions, or the compiled parts of a model, run as they were written."""

    #: The stance belongs to the whole process: the first of several modes sets it, and the last restores it.
    _lock = threading.Lock()
    _active = 0
    _stance: contextlib.AbstractContextManager[Any] | None = None

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __enter__(self) -> Any:
        mode = EagerDispatchMode
        with mode._lock:
            mode._active += 1
            # Nothing is compiled before the compiler is imported.
            if mode._stance is None and "torch._dynamo" in sys.modules:
                # PyTorch refuses this where a compiled function has called us. Then it compiles nothing here anyway.
                with contextlib.suppress(RuntimeError):
                    mode._stance = torch.compiler.set_stance("force_eager")
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> Any:
        mode = EagerDispatchMode
        try:
            return super().__exit__(*error)  # type: ignore[no-untyped-call]
        finally:
            with mode._lock:
                mode._active -= 1
                if mode._active == 0 and mode._stance is not None:
                    mode._stance.__exit__(None, None, None)
                    mode._stance = None


@contextlib.contextmanager
def eager(model: Any) -> Iterator[None]:
    """A block in which the parts of a model run without the compiled calls of ``nn.Module.compile``."""
    compiled = [(part, call) for part in model.modules() if (call := part._compiled_call_impl) is not None]
    try:
        for part, _ in compiled:
            part._compiled_call_impl = None
        yield
    finally:
        for part, call in compiled:
            part._compiled_call_impl = call
