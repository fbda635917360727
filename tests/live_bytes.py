"""How much memory the tensors of a computation take at most."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operators made and that are still held, and the most of them."""

    def __init__(self):
        super().__init__()
        self.live, self.most, self.seen = 0, 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.count(tensor.untyped_storage())
        return result

    def count(self, storage):
        if storage._cdata in self.seen:
            return
        size, key = storage.nbytes(), storage._cdata
        self.seen.add(key)
        self.live += size
        self.most = max(self.most, self.live)
        weakref.finalize(storage, self.release, key, size)

    def release(self, key, size):
        self.seen.discard(key)
        self.live -= size
