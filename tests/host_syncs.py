"""Counts the operators for which the host would wait on a GPU, on any device.

A tensor that is made from Python numbers also counts, because on a GPU the numbers are copied to the device, and the
host waits for this copy.
"""

import sys
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import purify_fast
from purify_fast.speed.eager_mode import EagerDispatchMode

PACKAGE = Path(purify_fast.__file__).resolve().parent
#: Operators whose result the host reads, and operators whose data decide how many elements the result has.
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "lift_fresh", "unique_dim", "_unique2"}
#: Operators that copy from one tensor to another. They wait if the two tensors are on different devices.
COPIES = {"_to_copy", "copy_"}


class Wait(NamedTuple):
    """An operator that waits, and the function of this package that calls it."""

    operator: str
    #: The file of the innermost function of this package in the call stack, relative to the folder of the package.
    file: str
    function: str


class HostSyncs(EagerDispatchMode):
    """Counts all operators in a block, and separately those for which the host waits for the device.

    Attributes:
        counts: number of waits for each operator and place in the code.
        dispatched: number of all operators.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[Wait] = Counter()
        self.dispatched = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.dispatched += 1
        name = function._schema.name.removeprefix("aten::")
        result = function(*args, **(kwargs or {}))
        if name in WAITING or _masks(name, args) or _crosses(name, args, result):
            self.counts[Wait(name, *_place())] += 1
        return result


def _masks(name: str, args: Any) -> bool:
    """Tell whether a tensor is indexed by a mask. The host must then know the number of chosen elements."""
    if name not in ("index", "index_put_", "_index_put_impl_"):
        return False
    return any(isinstance(leaf, Tensor) and leaf.dtype in (torch.bool, torch.uint8) for leaf in tree_leaves(args[1]))


def _crosses(name: str, args: Any, result: Any) -> bool:
    """Tell whether a tensor is copied between devices."""
    if name not in COPIES:
        return False
    source = args[1] if name == "copy_" else args[0]
    return isinstance(source, Tensor) and source.device.type != result.device.type


def _place() -> tuple[str, str]:
    """The file and the name of the innermost function of this package in the call stack."""
    frame = sys._getframe(2)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(PACKAGE):
            return path.relative_to(PACKAGE).as_posix(), frame.f_code.co_name
        frame = frame.f_back  # type: ignore[assignment]
    return "elsewhere", ""
