"""Every form of `fused_convolution` in the interpreter, against the definition in float64, with exact products."""

from importlib import import_module

import pytest
import torch
from torch import Tensor

from purify_fast.kernels import fused_convolution as kernel
from purify_fast.ops.dispatch.examples import double

op = import_module("purify_fast.ops.fused_convolution")
pytestmark = pytest.mark.usefixtures("bfloat16_of_a_gpu")
#: Settings as in the examples of the op: maps of one pixel and of one row, numbers of channels from 1 to 640 that fill
#: a tile and that do not, strides that leave pixels out, and zeros on one side only.
LAYERS = (
    ((2, 1, 1, 64), 64, (3, 3), (1, 1), (1, 1, 1, 1), op.RELU, "ba"),
    ((2, 1, 5, 8), 24, (3, 3), (2, 2), (1, 1, 1, 1), op.SILU, "bank"),
    ((1, 5, 3, 640), 640, (1, 1), (1, 1), (0, 0, 0, 0), op.RELU, "bn"),
    ((1, 4, 4, 160), 320, (3, 3), (2, 2), (0, 1, 0, 1), op.SILU, "ak"),
    ((2, 7, 6, 17), 33, (3, 3), (1, 1), (1, 1, 1, 1), op.RELU, "b"),
    ((2, 6, 7, 1), 1, (3, 3), (2, 2), (2, 0, 1, 2), op.NONE, "ba"),
    ((3, 9, 8, 3), 16, (3, 2), (2, 1), (1, 1, 0, 1), op.RELU, "bk"),
    ((2, 6, 5, 96), 80, (1, 1), (2, 2), (0, 0, 0, 0), op.NONE, "b"),
)


@pytest.fixture(autouse=True)
def tiles(monkeypatch):
    """Those of bfloat16 for float32 too: there the interpreter runs fewer programs, and the same ones."""
    own = kernel.tiles
    monkeypatch.setattr(
        kernel, "tiles", lambda columns, channels, _, most: own(columns, channels, torch.bfloat16, most)
    )


def error(got: Tensor, golden: Tensor) -> float:
    assert got.shape == golden.shape
    return float((got.double() - golden).norm() / golden.norm()) if got.numel() else 0.0


@pytest.mark.parametrize("setting", LAYERS, ids=str)
def test_every_form_with_exact_products(poisoned, setting):
    given = op._arguments(*setting, torch.float32, 0)
    for got, golden in zip(kernel.forward(*given), op.reference(*double(given)), strict=True):
        assert error(got, golden) < 2e-6
    given = op._arguments_backward(*setting, torch.float32, 1)
    assert error(kernel.backward(*given), op.reference_backward(*double(given))) < 2e-6


def test_one_sample_has_the_same_bits_in_every_batch_and_part(monkeypatch):
    setting = ((3, 6, 7, 32), 48, (3, 3), (2, 2), (1, 1, 1, 1), op.RELU, "ba")
    forward, backward = (make(*setting, torch.bfloat16, 0) for make in (op._arguments, op._arguments_backward))
    whole, slopes = kernel.forward(*forward)[0], kernel.backward(*backward)
    one = [x[1:2] if i in (0, 3) else x for i, x in enumerate(forward)]
    assert torch.equal(kernel.forward(*one)[0], whole[1:2])
    one = [x[1:2] if i in (0, 4, 5) else x for i, x in enumerate(backward)]
    assert torch.equal(kernel.backward(*one), slopes[1:2])
    monkeypatch.setattr(kernel, "MOST", 2 * 6 * 7 * 32)
    assert len(kernel._parts(forward[0])) == 2
    assert torch.equal(kernel.forward(*forward)[0], whole) and torch.equal(kernel.backward(*backward), slopes)
    monkeypatch.setattr(kernel, "MOST", 100)
    with pytest.raises(ValueError, match="a map must have at most 100 elements per sample, got 1344"):
        kernel.forward(*forward)


def spread(x: Tensor) -> Tensor:
    """The same numbers, with foreign ones between them."""
    return torch.stack([x, torch.full_like(x, 1e4)], -1)[..., 0]


def test_layouts_and_empty_batches():
    setting = ((3, 6, 7, 32), 48, (3, 3), (1, 1), (1, 1, 1, 1), op.RELU, "ban")
    given = op._arguments(*setting, torch.bfloat16, 0)
    wanted = kernel.forward(*given)[0]
    moved = [
        x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1) if i in (0, 1, 3) else x for i, x in enumerate(given)
    ]
    moved[2], moved[4] = spread(given[2]), [spread(x) for x in given[4]]
    assert not moved[0].is_contiguous() and torch.equal(kernel.forward(*moved)[0], wanted)
    backward = op._arguments_backward(*setting, torch.bfloat16, 0)
    moved = [[spread(x) for x in one] if isinstance(one, list) and i == 6 else one for i, one in enumerate(backward)]
    assert torch.equal(kernel.backward(*moved), kernel.backward(*backward))
    none = [x[:0] if i in (0, 3) else x for i, x in enumerate(given)]
    assert kernel.forward(*none)[0].shape == (0, 6, 7, 48)


def test_nan_is_not_hidden():
    """A NaN reaches the pixels that see it, through ReLU too, and the gradient of an activation of NaN is not 0."""
    setting = ((1, 5, 5, 32), 32, (3, 3), (1, 1), (1, 1, 1, 1), op.RELU, "")
    x, *rest = op._arguments(*setting, torch.bfloat16, 0)
    x[0, 2, 2, 7] = torch.nan
    out = kernel.forward(x, *rest)[0]
    assert out[0, 1:4, 1:4].isnan().all() and out[0, 0].isfinite().all()
    given = list(op._arguments_backward(*setting, torch.bfloat16, 0))
    given[5] = torch.full_like(given[5], torch.nan)
    found, wanted = kernel.backward(*given), op.reference_backward(*given)
    torch.testing.assert_close(found, wanted, rtol=0.02, atol=0.02)
