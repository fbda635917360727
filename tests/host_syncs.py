"""Names the operators for which the host would wait on a GPU, on any device.

A tensor that is made from Python numbers also counts, because on a GPU the numbers are copied to the device, and the
host waits for this copy.
"""

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from purify_fast.speed.eager_mode import EagerDispatchMode

#: Operators whose result the host reads, and operators whose data decide how many elements the result has.
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "lift_fresh", "unique_dim", "_unique2"}
#: Operators that index a tensor, by a mask perhaps. The host must then know the number of chosen elements.
INDEXING = {"index", "index_put_", "_index_put_impl_"}
#: Operators that copy from one tensor to another. They wait if the two tensors are on different devices.
COPIES = {"_to_copy", "copy_"}


class HostSyncs(EagerDispatchMode):
    """Counts in a block the operators for which the host waits for the device.

    Attributes:
        counts: number of waits for each operator.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function._schema.name.removeprefix("aten::")
        result = function(*args, **(kwargs or {}))
        indices = [leaf for leaf in tree_leaves(args[1]) if isinstance(leaf, Tensor)] if name in INDEXING else []
        source = args[name == "copy_"] if name in COPIES else None
        crosses = isinstance(source, Tensor) and source.device.type != result.device.type
        if name in WAITING or crosses or any(index.dtype in (torch.bool, torch.uint8) for index in indices):
            self.counts[name] += 1
        return result
