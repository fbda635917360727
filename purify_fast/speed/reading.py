"""The blocks in which frozen copies read their models once."""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

from torch import nn

from .._modules import modules_of

#: The numbers of blocks and of reads, in the order in which they began.
NUMBERS = itertools.count(1)
#: The number of the innermost block; 0 outside of all blocks.
block = ContextVar("block", default=0)


@contextlib.contextmanager
def reading(*models: object) -> Iterator[Any]:
    """A block in which each frozen copy reads its model once: the parts of the given modules now, others when called.

    It gives the `StepGraphs` of the first model if this is a frozen copy itself, and None for any other model.

    Writes may not have been counted, and a copy may be hidden in functions and objects. A step in the block meets the
    same networks as the step before.
    """
    token = block.set(next(NUMBERS))
    try:
        # Without this module there is no frozen copy. Every attack runs these lines, so they must be fast.
        for model in models if "purify_fast.speed.frozen_copy" in sys.modules else ():
            for part in modules_of(model) if isinstance(model, nn.Module) else ():
                if vars(part).get("_followed") is not None:
                    part.prepare_replay()  # type: ignore[operator]
        followed = getattr(models[0], "__dict__", {}).get("_followed") if models else None
        yield None if followed is None else followed.graphs
    finally:
        block.reset(token)
