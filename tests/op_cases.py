"""Cases of tests of operations."""

import math

import torch

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def cases(shapes, *ragged):
    """Pairs of a shape and a dtype: float32 with all shapes, the others with empty shapes and those named."""
    assert set(ragged) <= set(shapes)
    others = [shape for shape in shapes if shape in ragged or not math.prod(shape)]
    return [(shape, dtype) for dtype in DTYPES for shape in (shapes if dtype == torch.float32 else others)]
