"""What BatchNorm over several processes launches on CUDA, counted on fake tensors; its values: test_distributed.py."""

import pytest
import torch
import torch.distributed as dist
from cuda_launches import CudaLaunches
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch_functions import register

from purify_fast.models.layers import BatchNorm1d, BatchNorm2d


@pytest.fixture
def two_fake_processes():
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    with torch.library._scoped_library("aten", "IMPL") as library:
        register(library, "Meta")
        yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("layer", "shape", "dtype", "layout"),
    [
        (BatchNorm2d, (4, 8, 3, 3), torch.float32, torch.contiguous_format),
        (BatchNorm2d, (4, 8, 3, 3), torch.bfloat16, torch.channels_last),
        (BatchNorm1d, (4, 8), torch.float32, torch.contiguous_format),
    ],
)
def test_a_layer_on_cuda_is_five_operators_forward_and_four_backward(two_fake_processes, layer, shape, dtype, layout):
    """And one exchange each way. Before, it was 22 and 12."""
    with FakeTensorMode(), torch.device("cuda"):
        made = layer(8).train()
        x = torch.empty(shape, dtype=dtype).to(memory_format=layout).requires_grad_()
        with CudaLaunches() as forward:
            y = made(x)
        grad = torch.empty_like(y)
        with CudaLaunches() as backward, torch.no_grad():
            results = y.grad_fn.apply(grad)[:3]
    assert (y.device.type, y.dtype, y.stride()) == ("cuda", dtype, x.stride())
    assert [r.dtype for r in results] == [dtype, torch.float32, torch.float32] and results[0].stride() == x.stride()
    exchanges = forward.by_name.pop("_allgather_base_"), backward.by_name.pop("allreduce_")
    # every BatchNorm counts its batches, in one process too
    assert exchanges == (1, 1) and forward.by_name.pop("add_") == 1
    computed = "batch_norm_stats", "new_full", "cat", "batch_norm_gather_stats_with_counts", "batch_norm_elemt"
    assert forward.by_name == dict.fromkeys(computed, 1)
    computed = "batch_norm_backward_reduce", "cat", "_to_copy", "batch_norm_backward_elemt"
    assert backward.by_name == dict.fromkeys(computed, 1)
