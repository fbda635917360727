from importlib import import_module

import pytest
import torch

from purify_fast.kernels import representation_distance as kernel

op = import_module("purify_fast.ops.representation_distance")
KINDS = op.KINDS


def inputs(*shape: int, dtype=torch.float32, seed: int = 0) -> tuple:
    made = torch.randn(2, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return made[0].to(dtype), made[1].to(dtype)


@pytest.mark.parametrize("kind", range(4), ids=KINDS)
def test_more_layers_than_a_launch_takes_are_as_each_alone(poisoned, kind):
    kinds = ((5, torch.float32), (8193, torch.bfloat16), (0, torch.float32), (64, torch.float16))
    pairs = [inputs(2, size, dtype=dtype, seed=i) for i in range(5) for size, dtype in kinds]
    student, teacher = map(list, zip(*pairs, strict=True))
    grad = torch.linspace(-1, 2, 2 * len(pairs)).view(2, -1)
    whole, slopes = kernel.forward(student, teacher, kind)
    got = kernel.backward(grad, student, teacher, slopes)
    assert len(pairs) > kernel.LAYERS
    for layer, (u, v) in enumerate(pairs):
        alone, own = kernel.forward([u], [v], kind)
        assert torch.equal(alone[:, 0], whole[:, layer]) and torch.equal(own[:, 0], slopes[:, layer])
        assert torch.equal(kernel.backward(grad[:, layer : layer + 1], [u], [v], own)[0], got[layer])
