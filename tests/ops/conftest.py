"""Two functions that check every op's contract, as fixtures."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only


def tensors(value) -> tuple[Tensor, ...]:
    return (value,) if isinstance(value, Tensor) else tuple(value)


def _registered(handle, *inputs: tuple) -> None:
    """The schema, the fake and the registrations of an opaque op, for every set of arguments."""
    for arguments in inputs:
        torch.library.opcheck(handle, arguments)
        outputs = tensors(handle(*arguments))
        with FakeTensorMode() as mode:
            fakes = tensors(handle(*tree_map_only(Tensor, mode.from_tensor, arguments)))
        leaves = [a for a in tree_leaves(arguments) if isinstance(a, Tensor)]
        given = {a.untyped_storage().data_ptr() for a in leaves if a.numel()}
        for real, imagined in zip(outputs, fakes, strict=True):
            assert (real.shape, real.dtype) == (imagined.shape, imagined.dtype)
            # strides of an empty tensor, or of a dimension of size 1, address nothing: kernels of PyTorch differ there
            differing = [n for n, a, b in zip(real.shape, real.stride(), imagined.stride(), strict=True) if a != b]
            assert real.numel() == 0 or all(n == 1 for n in differing), (real.stride(), imagined.stride())
            assert real.is_contiguous() or real.is_contiguous(memory_format=torch.channels_last)
            assert real.numel() == 0 or real.untyped_storage().data_ptr() not in given, "an output aliases an input"


def _compiles(
    function: Callable,
    make: Callable[[int], tuple],
    sizes: Sequence[int] = (5, 8, 13),
    *,
    exact: bool = False,
    compiler: str = "inductor",
    batch_only: bool = False,
) -> None:
    """One graph for every batch size, equal to eager in outputs and gradients; batch_only: all else is constant."""
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=None if batch_only else True, backend=compiler)
    tolerance = {"rtol": 0, "atol": 0} if exact else {}
    for index, size in enumerate(sizes):
        arguments = make(size)
        if batch_only:
            for a in arguments:
                torch._dynamo.mark_dynamic(a, 0)
        leaves = [a for a in arguments if isinstance(a, Tensor) and a.requires_grad]
        results = []
        for call in (function, compiled):
            with torch._dynamo.config.patch(error_on_recompile=index > 0):
                outputs = tensors(call(*arguments))
            differentiable = [out for out in outputs if out.requires_grad]
            total = sum(
                (out.float() * torch.linspace(0.5, 1.5, out.numel()).view_as(out)).sum() for out in differentiable
            )
            results.append((*outputs, *(torch.autograd.grad(total, leaves) if leaves else ())))
        for eager, fast in zip(*results, strict=True):
            torch.testing.assert_close(fast, eager, **tolerance)


@pytest.fixture
def registered() -> Callable:
    return _registered


@pytest.fixture
def compiles() -> Callable:
    return _compiles
