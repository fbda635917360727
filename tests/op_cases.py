"""Cases of tests of operations."""

import math

import torch

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def cases(shapes):
    """Pairs of a shape and a dtype: float32 with all shapes, the others with the two largest of a ragged size.

    A kernel has one code for all dtypes, except for loads and stores, and for what is left behind whole vectors.
    """
    ragged = sorted((shape for shape in shapes if math.prod(shape) % 16), key=math.prod)[-2:]
    return [(shape, dtype) for dtype in DTYPES for shape in (shapes if dtype == torch.float32 else ragged)]
