"""BatchNorm over processes by PyTorch's CUDA functions, and what a refresh and an average launch, on a device."""

from collections.abc import Callable, Iterator

import pytest
import torch
from cuda_launches import CudaLaunches
from on_device import DEVICE
from torch import nn
from torch.nn import functional as F
from torch_functions import register

from purify_fast.models import PreActResNet18, layers
from purify_fast.speed.folding import batchnorm as folding
from purify_fast.speed.folding.inference_copy import InferenceCopy, convert_to_channels_last
from purify_fast.training import distributed

pytestmark = pytest.mark.gpu
ONES_ZEROS = (torch.ones, torch.zeros)


@pytest.fixture(autouse=True)
def as_on_cuda(monkeypatch) -> Iterator[None]:
    """On a CPU, stand-ins for the functions that PyTorch has on CUDA alone."""
    with torch.library._scoped_library("aten", "IMPL") as library:
        if DEVICE.type == "cpu":
            register(library, "CPU")
            monkeypatch.setattr(layers, "BY_TORCH", ("cpu",))
            monkeypatch.setattr(folding, "SPREAD_ON", ("cpu",))
        yield


def launches(call: Callable[[], object]) -> int:
    """How many kernels a call launches; on a CPU, as they are counted there."""
    call()
    if DEVICE.type == "cpu":
        with CudaLaunches() as counted:
            call()
        return counted.count
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    on_device = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return len([event for event in on_device if not event.name.startswith(("Memset", "Memcpy"))])


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


def test_a_refresh_is_at_most_ten_launches():
    torch.manual_seed(0)
    model = PreActResNet18().to(DEVICE)
    convert_to_channels_last(model, (3, 32, 32))
    view, exact = InferenceCopy(model, (3, 32, 32)), InferenceCopy(model, (3, 32, 32), torch.float32)
    with torch.no_grad():
        for tensor in (*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())):
            tensor.add_(0.01 * torch.rand_like(tensor))
    exact.refresh(model)
    x = torch.rand(8, 3, 32, 32, device=DEVICE)
    torch.testing.assert_close(exact(x), model.eval()(x), rtol=1e-3, atol=1e-3)
    assert launches(lambda: view.refresh(model)) <= 10


def test_an_average_is_three_launches(monkeypatch):
    monkeypatch.setattr(distributed, "processes", lambda: (0, 2))
    monkeypatch.setattr(distributed.dist, "all_reduce", lambda flat: None)
    model = PreActResNet18(width=16).to(DEVICE, memory_format=torch.channels_last)
    F.cross_entropy(model(torch.rand(4, 3, 32, 32, device=DEVICE)), torch.arange(4, device=DEVICE)).backward()
    gradients = [p.grad for p in model.parameters()]
    before = [gradient.clone() for gradient in gradients]
    distributed.average_(gradients)
    assert all(torch.equal(2 * mean, whole) for mean, whole in zip(gradients, before, strict=True))
    # the largest kernel that joins tensors takes 128 of them
    assert launches(lambda: distributed.average_(gradients)) <= 4
