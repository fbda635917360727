"""BatchNorm over processes by PyTorch's CUDA functions, on a device."""

from collections.abc import Iterator

import pytest
import torch
from on_device import DEVICE
from torch import nn
from torch_functions import register

from purify_fast.models import layers

pytestmark = pytest.mark.gpu
ONES_ZEROS = (torch.ones, torch.zeros)


@pytest.fixture(autouse=True)
def as_on_cuda(monkeypatch) -> Iterator[None]:
    """On a CPU, stand-ins for the functions that PyTorch has on CUDA alone."""
    with torch.library._scoped_library("aten", "IMPL") as library:
        if DEVICE.type == "cpu":
            register(library, "CPU")
            monkeypatch.setattr(layers, "BY_TORCH", ("cpu",))
        yield


@pytest.mark.parametrize(
    ("shape", "dtype", "layout"),
    [
        ((12, 5), torch.float64, torch.contiguous_format),
        ((12, 5, 4, 6), torch.float64, torch.contiguous_format),
        ((12, 5, 4, 6), torch.float64, torch.channels_last),
        ((12, 5, 4, 6), torch.bfloat16, torch.channels_last),
    ],
)
def test_batchnorm_is_that_of_all_images(monkeypatch, shape, dtype, layout):
    """Two processes have the same images; tests/training/test_distributed.py has other numbers of them."""
    generator = torch.Generator().manual_seed(0)
    x, outer = (torch.randn(shape, generator=generator).to(dtype).double().to(DEVICE) for _ in range(2))
    wanted = nn.BatchNorm2d(5).double().to(DEVICE) if len(shape) == 4 else nn.BatchNorm1d(5).double().to(DEVICE)
    whole, outers = torch.cat([x, x]).requires_grad_(), torch.cat([outer, outer])
    y = wanted(whole)
    dx, *of_parameters = torch.autograd.grad((y * outers).sum(), [whole, wanted.weight, wanted.bias])
    monkeypatch.setattr(layers, "_all_gather", lambda gathered, own: gathered.copy_(torch.cat([own, own])))
    monkeypatch.setattr(layers.dist, "all_reduce", lambda sums: sums.mul_(2))
    wide = torch.float32 if dtype == torch.bfloat16 else dtype
    own = x.to(dtype).contiguous(memory_format=layout) if len(shape) == 4 else x.to(dtype)
    leaves = [leaf.requires_grad_() for leaf in (own, *(make(5, dtype=wide, device=DEVICE) for make in ONES_ZEROS))]
    running = tuple(make(5, dtype=wide, device=DEVICE) for make in reversed(ONES_ZEROS))
    out = layers.batch_norm_everywhere(*leaves, running, 2)
    found = [out, *torch.autograd.grad((out * outer.to(dtype)).sum(), leaves), *running]
    # a process has half of the images, and half of the gradients of what all share
    halves = [y[: len(x)], dx[: len(x)], *(gradient / 2 for gradient in of_parameters)]
    digits = 3e-2 if dtype == torch.bfloat16 else 1e-9
    for got, want in zip(found, [*halves, wanted.running_mean, wanted.running_var], strict=True):
        torch.testing.assert_close(got.double(), want, rtol=digits, atol=digits)
