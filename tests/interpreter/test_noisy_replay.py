from __future__ import annotations

from importlib import import_module

import pytest
import torch

from purify_fast.kernels import noisy_replay as kernel
from purify_fast.ops import Stream

op = import_module("purify_fast.ops.noisy_replay")
SEED = torch.tensor([-987654321])
SHAPES = ((1, 1), (3, 1, 16, 16), (2, 3, 33, 31), (2, 2500))


def inputs(*shape: int, dtype=torch.float32) -> tuple:
    made = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    drift = torch.linspace(1, 0, shape[0])
    eps, ids = torch.linspace(0.02, 0.3, shape[0]), torch.arange(shape[0]) * 3 - 1
    return made[0], made[1], drift, torch.tensor(0.4), eps, SEED, ids


def test_the_stream_is_the_ops():
    assert int(Stream.REPLAY_NOISE) == kernel.REPLAY_NOISE


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bit_exact(poisoned, shape, dtype):
    arguments = inputs(*shape, dtype=dtype)
    got, wanted = kernel.forward(*arguments, 0.1, 0.9), op.reference(*arguments, 0.1, 0.9)
    assert got.is_contiguous() and got.dtype == dtype
    if dtype == torch.bfloat16:
        torch.testing.assert_close(got, wanted, rtol=2**-7, atol=0)  # the interpreter truncates
    else:
        assert torch.equal(got, wanted)


def test_the_test_is_strict_and_nan_stays():
    x, adv, _, _, eps, seed, ids = inputs(5, 40)
    drift = torch.tensor([0.25, torch.nan, 0.25 + 2**-20, torch.inf, 1.0])
    x[3:, 3], adv[0, 5], eps[4] = torch.nan, torch.nan, torch.nan
    out = kernel.forward(x, adv, drift, torch.tensor(0.25), eps, seed, ids, 0.0, 1.0)
    assert torch.equal(out[1], adv[1]) and torch.equal(out[0].isnan(), adv[0].isnan())
    assert not torch.equal(out[2], adv[2]) and out[2].isfinite().all()
    assert out[3].isnan().nonzero().flatten().tolist() == [3] and out[4].isnan().all()
    out = kernel.forward(x[:3], adv[:3], drift[:3], torch.tensor(torch.nan), eps[:3], seed, ids[:3], 0.0, 1.0)
    assert torch.equal(out[1:], adv[1:3])


def test_splits_layouts_and_empty():
    x, adv, drift, tau, eps, seed, ids = inputs(5, 4, 9, 7)
    whole = kernel.forward(x, adv, drift, tau, eps, seed, ids, 0.0, 1.0)
    for cut in (slice(0, 2), slice(2, 5)):
        part = kernel.forward(x[cut], adv[cut], drift[cut], tau, eps[cut], seed, ids[cut], 0.0, 1.0)
        assert torch.equal(part, whole[cut])
    strided = kernel.forward(
        x.to(memory_format=torch.channels_last), adv.to(memory_format=torch.channels_last),
        drift.repeat_interleave(2)[::2], tau, eps, seed, ids.repeat_interleave(2)[::2], 0.0, 1.0,
    )  # fmt: skip
    assert torch.equal(strided, whole)
    assert kernel.forward(x[:0], adv[:0], drift[:0], tau, eps[:0], seed, ids[:0], 0.0, 1.0).shape == (0, 4, 9, 7)
