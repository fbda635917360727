"""Compile modules and functions. The import of the compiler is slow, so this module is imported when it is needed."""

from __future__ import annotations

import contextlib
from types import FunctionType
from typing import Any

import torch
from torch._dynamo import config
from torch._dynamo.exc import FailOnRecompileLimitHit


def compile_calls(module: Any) -> None:
    """Compile the calls of a module, like ``module.compile()``; they are compiled again when hooks have changed."""
    made: Any = torch.compile(module._call_impl)

    def call(*given: Any, **options: Any) -> Any:
        with _guarding_hooks():
            return made(*given, **options)

    module._compiled_call_impl = call


def compiled_for_training(function: Any) -> Any:
    """Compile a function of modules and tensors, which is compiled again when hooks have changed.

    A call raises a ValueError if it would have more forms than PyTorch compiles, of which further ones would be eager.
    """
    # PyTorch counts the forms of all functions with the same code.
    code, closure = function.__code__.replace(), function.__closure__
    own = FunctionType(code, function.__globals__, function.__name__, function.__defaults__, closure)
    made: Any = torch.compile(own, dynamic=False)

    def call(*given: Any) -> Any:
        try:
            with _guarding_hooks(fail_on_recompile_limit_hit=True):
                return made(*given)
        except FailOnRecompileLimitHit as error:
            raise ValueError("compile must be False: a step has too many forms, such as sizes, got True") from error

    return call


def _guarding_hooks(**more: Any) -> contextlib.AbstractContextManager[Any]:
    """The block in which compiled code is called. By default, code for a model without its hooks would serve it."""
    patched: contextlib.AbstractContextManager[Any] = config.patch(skip_nnmodule_hook_guards=False, **more)
    return patched
