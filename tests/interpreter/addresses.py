"""Checks every address that a Triton kernel reads or writes in the interpreter.

Before a launch each tensor is copied to pages between two pages that can be neither read nor written: in every second
launch of a kernel to their end, else to their beginning. Between two rows of a view no address is an element's.
"""

from __future__ import annotations

import ctypes
import mmap
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from triton.runtime import interpreter

PAGE = mmap.PAGESIZE
#: The methods of the interpreter that access memory: a word for it, and where their pointers and their mask stand among
#: the arguments. All other accesses are made by one of them.
ACCESSES = {
    "create_masked_load": ("reads", 0, 1),
    "create_masked_store": ("writes", 0, 2),
    "create_atomic_rmw": ("writes", 1, 3),
    "create_atomic_cas": ("writes", 0, None),
}


def guarded_pages(count: int) -> Tensor:
    """Return the bytes of ``count`` pages, uint8 [count PAGE], between two pages that nobody can read or write."""
    whole = torch.frombuffer(mmap.mmap(-1, (count + 2) * PAGE), dtype=torch.uint8)
    for guard in (whole[:PAGE], whole[-PAGE:]):
        if ctypes.CDLL(None).mprotect(ctypes.c_void_p(guard.data_ptr()), PAGE, 0):
            raise OSError("a page of memory cannot be protected")
    return whole[PAGE:-PAGE]


def span(tensor: Tensor) -> tuple[int, int]:
    """Return the addresses of a tensor's first byte and of the byte behind its last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


@dataclass
class Place:
    """Tensors that overlap, or one alone, and where they lie during a launch."""

    named: dict[str, Tensor]  # by argument, the tensor as the launch was given it
    source: Tensor  # its bytes
    pages: Tensor
    copy: Tensor  # those bytes in the pages
    # True for bytes that belong to an element; None if all do.
    owned: np.ndarray | None

    def __post_init__(self) -> None:
        self.begin = self.copy.data_ptr()
        self.end = self.begin + self.copy.numel()
        self.copy.copy_(self.source)

    def moved(self, tensor: Tensor) -> Tensor:
        """Return the copy of one of the tensors."""
        offset = self.copy.storage_offset() + tensor.data_ptr() - self.source.data_ptr()
        at = offset // tensor.element_size()
        return tensor.new_empty(0).set_(self.copy.untyped_storage(), at, tensor.shape, tensor.stride())

    def faulty(self, addresses: np.ndarray, size: int) -> np.ndarray:
        """Return which of the accesses of ``size`` bytes are outside of the elements."""
        bad = (addresses < self.begin) | (addresses + np.uint64(size) > self.end)
        if self.owned is not None:
            at = np.where(bad, 0, addresses - np.uint64(self.begin)).astype(np.int64)
            bad |= ~self.owned[at] | ~self.owned[np.minimum(at + size - 1, len(self.owned) - 1)]
        return bad


def owned_bytes(tensors: list[Tensor], begin: int, count: int) -> np.ndarray | None:
    """Return which of ``count`` bytes belong to an element of a tensor; None if all do."""
    owned = np.zeros(count, bool)
    for tensor in tensors:
        width = tensor.element_size()
        at = tensor.data_ptr() - begin + np.arange(width)
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
            at = at[..., None] + np.arange(size) * stride * width
        owned[at.ravel()] = True
    return None if owned.all() else owned


class AddressError(Exception):
    """A kernel reads or writes outside of the tensors of its launch."""


class Watch:
    """Places the tensors of each launch, and checks the addresses of its accesses."""

    def __init__(self) -> None:
        self.launches = Counter[str]()
        self._free = defaultdict[int, list[Tensor]](list)
        self._kernel, self._places = "", list[Place]()

    def _placed(self, named: dict[str, Tensor], begin: int, end: int, at_end: bool) -> Place:
        tensors = list(named.values())
        first = tensors[0]
        source = torch.empty(0, dtype=torch.uint8)
        source.set_(first.untyped_storage(), begin - first.untyped_storage().data_ptr(), (end - begin,), (1,))
        count = -(-(end - begin) // PAGE)
        pages = self._free[count].pop() if self._free[count] else guarded_pages(count)
        copy = pages[-len(source) :] if at_end else pages[: len(source)]
        whole = len(tensors) == 1 and first.numel() * first.element_size() == len(source) and first.is_contiguous()
        return Place(named, source, pages, copy, None if whole else owned_bytes(tensors, begin, len(source)))

    def begin(self, kernel: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors of a launch at the places where they are watched."""
        # The launch before may have failed.
        self._clear()
        self._kernel = kernel
        at_end = self.launches[kernel] % 2 == 0
        self.launches[kernel] += 1
        groups = list[tuple[dict[str, Tensor], int, int]]()
        spans = {name: span(tensor) for name, tensor in tensors.items() if tensor.numel()}
        for name, (begin, end) in sorted(spans.items(), key=lambda item: item[1]):
            if groups and begin < groups[-1][2]:
                group, first, last = groups.pop()
                groups.append((group | {name: tensors[name]}, first, max(last, end)))
            else:
                groups.append(({name: tensors[name]}, begin, end))
        self._places = [self._placed(*group, at_end) for group in groups]
        return tensors | {name: place.moved(t) for place in self._places for name, t in place.named.items()}

    def end(self) -> None:
        """Copy the tensors of the launch back."""
        for place in self._places:
            place.source.copy_(place.copy)
        self._clear()

    def _clear(self) -> None:
        for place in self._places:
            self._free[len(place.pages) // PAGE].append(place.pages)
        self._places = []

    def check(self, does: str, pointers: interpreter.TensorHandle, mask: np.ndarray | None) -> None:
        """Raise `AddressError` if an address is not that of an element of a tensor of the launch."""
        addresses = pointers.data if mask is None else pointers.data[np.asarray(mask, bool)]
        if not addresses.size:
            return
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        low, high = int(addresses.min()), int(addresses.max()) + size
        for place in self._places:
            if place.begin <= low and high <= place.end and place.owned is None:
                return
        bad = np.logical_and.reduce([place.faulty(addresses, size) for place in self._places], axis=0)
        if np.any(bad):
            address = int(np.broadcast_to(addresses, bad.shape)[bad][0]) if self._places else low
            places = {name: (place.begin, place.end) for place in self._places for name in place.named}
            raise AddressError(f"{self._kernel} {does} {size} bytes at {address}, between or outside of {places}")


def _named_tensors(name: str, argument: object) -> dict[str, Tensor]:
    """Return the tensors in an argument of a kernel, by the names by which a message calls them."""
    if isinstance(argument, tuple):
        parts = (_named_tensors(f"{name}[{i}]", part) for i, part in enumerate(argument))
        return {key: tensor for part in parts for key, tensor in part.items()}
    return {name: argument} if isinstance(argument, Tensor) else {}


def _replaced(name: str, argument: object, tensors: dict[str, Tensor]):
    """Return an argument with other tensors."""
    if isinstance(argument, tuple):
        parts = (_replaced(f"{name}[{i}]", part, tensors) for i, part in enumerate(argument))
        return interpreter._tuple_create(argument, parts)
    return tensors.get(name, argument)


@contextmanager
def watched() -> Iterator[Watch]:
    """Within the block, the launches in the interpreter are watched."""
    watch = Watch()

    def begin(self, args, keywords):
        named = dict(zip(self.arg_names, args, strict=False)) | keywords
        tensors = {key: t for name, argument in named.items() for key, t in _named_tensors(name, argument).items()}
        tensors = watch.begin(f"{self.fn.__module__.rpartition('.')[2]}.{self.fn.__name__}", tensors)
        replaced = {name: _replaced(name, argument, tensors) for name, argument in named.items()}
        return [replaced[name] for name in self.arg_names[: len(args)]], {key: replaced[key] for key in keywords}

    def checking(method: str):
        own, (does, pointers, mask) = getattr(interpreter.InterpreterBuilder, method), ACCESSES[method]

        def checked(self, *args, **keywords):
            watch.check(does, args[pointers], None if mask is None else args[mask].data)
            return own(self, *args, **keywords)

        return checked

    methods = {method: checking(method) for method in ACCESSES}
    with (
        mock.patch.object(interpreter.GridExecutor, "_init_args_hst", begin),
        mock.patch.object(interpreter.GridExecutor, "_restore_args_dev", lambda *_: watch.end()),
        mock.patch.multiple(interpreter.InterpreterBuilder, **methods),
    ):
        yield watch
