from importlib import import_module

import pytest
import torch
from op_cases import doubled

from purify_fast.kernels import square_proposal as kernel

op = import_module("purify_fast.ops.square_proposal")
NORMS = op.NORMS
#: Images, proposals, edge of the windows; the last ones in several trips of a loop, with many channels or pixels.
SHAPES = (
    ((1, 1, 1, 1), 1, 1),
    ((3, 3, 32, 32), 2, 7),
    ((2, 5, 9, 13), 3, 9),
    ((2, 40, 12, 11), 1, 3),
    ((1, 2, 90, 60), 1, 11),
)


def inputs(shape: tuple, draws: int, edge: int, norm: int, dtype=torch.float32, share: float = 0.7) -> list:
    """Points that use a share of their radii; the first row has more than its ball allows."""
    generator = torch.Generator().manual_seed(0)
    clean, offset = (torch.rand(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    clean, offset = 0.3 + 0.4 * clean, 0.2 * (offset - 0.5)
    power = (torch.inf, 2, 1)[norm]
    eps = offset.flatten(1).norm(p=power, dim=1) / share
    eps[0] *= 0.5
    pattern = torch.randn(2, edge, edge, generator=generator)
    pattern = pattern / pattern.flatten(1).norm(p=power, dim=1)[:, None, None] if norm else None
    numbers = torch.rand(shape[0], draws, 5 + shape[1], generator=generator)
    images = (clean + offset).to(dtype), clean.to(dtype)
    return [*images, eps.float(), numbers, pattern, torch.tensor(edge), norm, 0.1, 0.9]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("shape", "draws", "edge"), SHAPES, ids=str)
@pytest.mark.parametrize("norm", [0, 1, 2], ids=NORMS)
def test_values(within_budget, poisoned, norm, shape, draws, edge, dtype):
    arguments = inputs(shape, draws, edge, norm, dtype)
    got, same = kernel.forward(*arguments), op.reference(*arguments)
    assert got.is_contiguous() and not torch.equal(got, arguments[0].repeat(draws, 1, 1, 1))
    if norm == 0 and dtype != torch.bfloat16:
        assert torch.equal(got, same)
    within_budget(got, op.reference(*doubled(arguments)), same)
    if norm:
        # Only the first rows and columns of a larger pattern are used.
        arguments[4] = torch.nn.functional.pad(arguments[4], (0, 3, 0, 3), value=9.0)
        assert torch.equal(kernel.forward(*arguments), got)
