"""Counts what CUDA would launch for operators that a test runs on a CPU, those over many tensors among them."""

import math

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

#: Tensors that one launch takes, by the number of lists, and its blocks of 65,536 numbers: PyTorch's
#: aten/src/ATen/native/cuda/MultiTensorApply.cuh, where a launch has 4 KiB of arguments.
MOST_TENSORS, MOST_BLOCKS, BLOCK = {1: 96, 2: 64, 3: 48, 4: 36}, 320, 65536
NO_LAUNCH = {"empty", "new_empty", "empty_like", "device", "_record_function_enter_new", "_record_function_exit"}
NO_LAUNCH |= {"empty_strided", "promote_types", "result_type"}


def launches_over_many(name: str, lists: list[list[Tensor]]) -> int:
    """Count the launches of an operator over many tensors: few for one dtype and layout, else one for each tensor."""
    alike = all(
        one.shape == other.shape and one.stride() == other.stride()
        for rest in lists[1:]
        for one, other in zip(lists[0], rest, strict=True)
    )
    dtypes = [{one.dtype for one in each} for each in lists]
    if not alike or max(map(len, dtypes)) > 1 or (name != "_foreach_copy_" and len(set.union(*dtypes)) > 1):
        return len(lists[0])
    # results that are tensors of their own are one list more
    number = len(lists) + (not name.endswith("_"))
    blocks = sum(math.ceil(one.numel() / BLOCK) for one in lists[0])
    return max(math.ceil(len(lists[0]) / MOST_TENSORS[number]), math.ceil(blocks / MOST_BLOCKS))


class CudaLaunches(TorchDispatchMode):
    """Counts, within a block, the launches by the operators' names; no views, and no memory that is only reserved."""

    def __init__(self):
        super().__init__()
        self.by_name: dict[str, int] = {}

    @property
    def count(self) -> int:
        return sum(self.by_name.values())

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.partition("::")[2]
        result = function(*args, **(kwargs or {}))
        views = any(r.alias_info is not None and not r.alias_info.is_write for r in function._schema.returns)
        if name.startswith("_foreach"):
            lists = [each for each in args if isinstance(each, (list, tuple)) and isinstance(each[0], Tensor)]
            number = launches_over_many(name, lists)
        else:
            number = 0 if views or name in NO_LAUNCH else 1
        if number:
            self.by_name[name] = self.by_name.get(name, 0) + number
        return result
