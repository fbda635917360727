"""Cases of tests of operations."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

from purify_fast.kernels.decoder_sizes import Geometry
from purify_fast.ops.decode_samples import pack
from purify_fast.ops.dispatch.examples import tensors

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def by_threads(call):
    """Return the results of a function with one thread, two and three."""
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(call())
    finally:
        torch.set_num_threads(before)
    return results


def decoder() -> dict[str, Any]:
    """The arguments of `decode_prior` for two images and a small decoder."""
    geometry = Geometry.of([6, 4, 2, 2, 3, 3, 2, 1, 3, 3])
    generator = torch.Generator().manual_seed(0)
    first = torch.rand(*geometry.start, geometry.latent_dim, generator=generator)
    packed, biases = pack(first, [torch.rand(4, 3, 3, 3, generator=generator)], [torch.rand(3, generator=generator)])
    stream = {"seed": torch.tensor([1]), "sample_ids": torch.arange(2)}
    sizes = {"packed": packed.float(), "biases": biases.float(), "geometry": geometry}
    return {"condition": torch.rand(2, math.prod(geometry.start), generator=generator), **stream, **sizes}


def normal(*shape: int, seed: int = 0, scale: float = 1.0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal numbers, the same for every dtype but for their rounding."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


def points(*shape, dtype=torch.float32, seed=0):
    """x, grad, x_nat and the point before of a step: a little outside the ball, so that every branch is taken."""
    generator = torch.Generator().manual_seed(seed)
    nat, first, second = (torch.rand(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    x, previous = ((nat + 0.2 * (moved - 0.5)).clamp(0, 1) for moved in (first, second))
    grad = torch.randn(shape, generator=generator, dtype=torch.float64)
    grad[torch.rand(shape, generator=generator) < 0.1] = 0
    return tuple(t.to(dtype) for t in (x, grad, nat, previous))


def registered(handle, *inputs: tuple) -> None:
    """The schema and the registrations of an opaque op, and its fake for every set of arguments."""
    torch.library.opcheck(handle, inputs[0])
    for arguments in inputs:
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


def compiles(
    function: Callable,
    make: Callable[[int], tuple],
    sizes: Sequence[int] = (5, 8, 13),
    *,
    exact: bool = False,
    compiler: str = "inductor",
    batch_only: bool = False,
) -> None:
    """Check that one graph serves every batch size and equals eager; batch_only: all else is constant."""
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
            differentiable = [out.float().flatten() for out in outputs if out.requires_grad]
            total = sum(out @ torch.linspace(0.5, 1.5, len(out)) for out in differentiable)
            results.append((*outputs, *(torch.autograd.grad(total, leaves) if leaves else ())))
        for eager, fast in zip(*results, strict=True):
            torch.testing.assert_close(fast, eager, **tolerance)
