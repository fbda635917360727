import numpy
import torch

from purify_fast.kernels import philox as kernel


def test_cos_and_sin_to_one_ulp(ulps):
    """Every 8191th of the 2^24 angles, and those next to the multiples of a quarter turn."""
    import triton
    import triton.language as tl

    @triton.jit
    def both(angle_ptr, cos_ptr, sin_ptr, size, WIDTH: tl.constexpr):
        at = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
        cos, sin = kernel.cos_sin(tl.load(angle_ptr + at, mask=at < size, other=0.0))
        tl.store(cos_ptr + at, cos, mask=at < size)
        tl.store(sin_ptr + at, sin, mask=at < size)

    near = torch.cat([torch.arange(-3, 4) + quarter * 2**22 for quarter in range(5)]).clamp(0, 2**24 - 1)
    angle = torch.cat([torch.arange(0, 2**24, 8191), near]).float() * numpy.float32(2 * numpy.pi * 2**-24).item()
    cos, sin = torch.empty_like(angle), torch.empty_like(angle)
    both[(triton.cdiv(angle.numel(), 1024),)](angle, cos, sin, angle.numel(), WIDTH=1024)
    assert ulps(cos, angle.double().cos().float()) <= 2
    assert ulps(sin, angle.double().sin().float()) <= 2
