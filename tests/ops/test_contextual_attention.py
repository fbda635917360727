from importlib import import_module

import pytest
import torch
from op_cases import DTYPES, by_threads
from torch.nn import functional as F

from purify_fast.ops import contextual_attention, key_validity, use_backend
from purify_fast.ops.dispatch.gradient import SAVING_KERNELS

op = import_module("purify_fast.ops.contextual_attention")
# square; wider; higher; one row and one column of cells; one cell; no sample
SHAPES = ((2, 6, 16, 16), (2, 3, 8, 14), (3, 5, 18, 6), (2, 4, 2, 12), (2, 4, 12, 2), (2, 3, 2, 2), (0, 3, 4, 6))


def inputs(*shape: int, dtype=torch.float32, seed: int = 0, scale: float = 0.4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    features = (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)
    return features, torch.rand(shape[0], shape[2] * shape[3] // 4, generator=generator) > 0.3


def literal(features: torch.Tensor, valid: torch.Tensor, scale: float = 10.0) -> torch.Tensor:
    """One sample at a time, every patch built, the reorderings done; keys are rows."""
    results = []
    for x, v in zip(features, valid, strict=True):
        h, w = x.shape[1] // 2, x.shape[2] // 2
        values = F.unfold(x[None], 4, stride=2, padding=1)[0]
        queries = F.unfold(F.interpolate(x[None], scale_factor=0.5, mode="nearest"), 3, padding=1)[0]
        scores = (queries / queries.norm(dim=0, keepdim=True).clamp_min(1e-4)).T @ queries
        columns_first = torch.arange(h * w).view(h, w).T.flatten()
        for order in (torch.arange(h * w), columns_first):
            ordered = scores[order][:, order]
            padded = F.pad(ordered, (1, 1, 1, 1))
            fused = ordered + padded[:-2, :-2] + padded[2:, 2:]
            back = order.argsort()
            scores = fused[back][:, back]
        kept = v.to(x.dtype)[:, None]
        weights = kept * torch.softmax(scale * (kept * scores), 0)
        results.append(F.fold((values @ weights)[None], x.shape[1:], 4, stride=2, padding=1)[0] / 4)
    return torch.stack(results) if results else features.clone()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_literal_form(backend, shape):
    for dtype, tolerance, slope_tolerance in ((torch.float64, 1e-12, 1e-11), (torch.float32, 1e-6, 1e-4)):
        features, valid = inputs(*shape, dtype=dtype)
        leaf = features.requires_grad_()
        out, wanted = contextual_attention(leaf, valid), literal(leaf, valid)
        torch.testing.assert_close(out, wanted, rtol=0, atol=tolerance)
        grad = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=dtype)
        got, slopes = (torch.autograd.grad(y, leaf, grad)[0] for y in (out, wanted))
        torch.testing.assert_close(got, slopes, rtol=0, atol=slope_tolerance)


def test_another_scale(backend):
    features, valid = inputs(2, 3, 8, 6, dtype=torch.float64)
    for scale in (0.0, 1.0, 25.0):
        torch.testing.assert_close(contextual_attention(features, valid, scale), literal(features, valid, scale))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_types_have_wide_scores(backend, dtype):
    """The error is that of rounding the weights' sums and the result, whatever the size of the scores."""
    features, valid = inputs(2, 24, 16, 16, dtype=dtype, scale=1.0)
    out = contextual_attention(features, valid)
    wanted = literal(features.double(), valid)
    assert out.dtype == dtype and (out - wanted).abs().max() <= 4 * torch.finfo(dtype).eps * wanted.abs().max()


def test_zero_features_have_zero_gradients(backend):
    leaf = torch.zeros(2, 3, 8, 8, requires_grad=True)
    out = contextual_attention(leaf, torch.ones(2, 16, dtype=torch.bool))
    out.sum().backward()
    assert (out == 0).all() and leaf.grad.isfinite().all()


def test_non_finite_features_are_not_hidden(backend):
    features, valid = inputs(3, 4, 8, 8)
    valid[:] = True
    features[1, 2, 4, 4] = torch.nan  # a pixel of the keys
    features[2, 2, 5, 5] = torch.inf  # one of the values only
    out = contextual_attention(features, valid)
    assert out[0].isfinite().all() and out[1].isnan().all() and not out[2, 2].isfinite().all()
    valid[1] = False
    assert contextual_attention(features, valid)[1].isnan().all()


def whole(features: torch.Tensor, valid: torch.Tensor, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
    leaf = features.detach().requires_grad_()
    out = contextual_attention(leaf, valid)
    return out, *torch.autograd.grad(out, leaf, grad)


needs_whole = pytest.mark.skipif(not SAVING_KERNELS, reason="the kernels of the whole function are the extension's")


@needs_whole
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_threads_change_nothing_in_the_whole_function(last):
    """Many small samples, which threads share; and few large ones, whose rows they do."""

    def made(shape, dtype):
        features, valid = inputs(*shape, dtype=dtype)
        features = features.to(memory_format=torch.channels_last if last else torch.contiguous_format)
        with use_backend("cpp"):
            return whole(features, valid, inputs(*shape, dtype=dtype, seed=1)[0])

    every = [(s, d) for s in ((24, 16, 8, 8), (2, 16, 36, 28)) for d in (torch.float32, torch.bfloat16)]
    for one, two, three in zip(*by_threads(lambda: [made(*each) for each in every]), strict=True):
        assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(one, two, three, strict=True))


@needs_whole
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(9, 5, 8, 8), (2, 7, 12, 10), (1, 3, 2, 6)], ids=str)
def test_the_whole_function_and_its_op_alone(monkeypatch, within_budget, poisoned, shape, dtype):
    """In every layout and dtype as near to float64 as the products of PyTorch around the reference are."""
    for last in (False, True):
        memory_format = torch.channels_last if last else torch.contiguous_format
        features, valid = inputs(*shape, dtype=dtype)
        features, grad = features.to(memory_format=memory_format), inputs(*shape, dtype=dtype, seed=1)[0]
        with use_backend("reference"):
            golden, same = whole(features.double(), valid, grad.double()), whole(features, valid, grad)
        with use_backend("cpp"):
            served = whole(features, valid, grad)
            assert type(served[0].grad_fn)._forward_cls is op._whole.__self__
            assert torch.equal(served[0], contextual_attention(features, valid))
        for triple in zip(served, golden, same, strict=True):
            within_budget(*triple)
        monkeypatch.setattr(op, "may_save", lambda x: False)  # as with an extension that has only the op
        with use_backend("cpp"):
            alone = whole(features, valid, grad)
        monkeypatch.undo()
        for triple in zip(alone, golden, same, strict=True):
            within_budget(*triple)


@needs_whole
def test_backward_under_autocast_computes_in_the_features_dtype():
    features, valid = inputs(2, 6, 8, 12)
    with use_backend("cpp"):
        expected = whole(features, valid, features)
        with torch.autocast("cpu", torch.bfloat16):
            got = whole(features, valid, features)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def by_hand(mask: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Cell by cell: whether any pixel of its 3x3 cells is missing."""
    (h, w), (rows, columns) = size, mask.shape[2:]
    missing = torch.zeros(len(mask), h, w, dtype=torch.bool)
    for y in range(h):
        for x in range(w):
            ends = -(-(y + 1) * rows // h), -(-(x + 1) * columns // w)
            cell = mask[:, 0, y * rows // h : ends[0], x * columns // w : ends[1]]
            missing[:, y, x] = (cell != 0).flatten(1).any(1)
    padded = F.pad(missing, (1, 1, 1, 1))
    near = [padded[:, dy : dy + h, dx : dx + w] for dy in range(3) for dx in range(3)]
    return ~torch.stack(near).any(0).flatten(1)


RESOLUTIONS = [
    ((256, 256), 32, (32, 32)),  # where sampling every eighth pixel is right
    ((32, 32), 4, (4, 4)),  # blocks smaller than a cell: sampling would see one block in four
    ((32, 32), 4, (5, 3)),  # cells that are no whole number of pixels
    ((64, 96), 8, (8, 12)),
    ((8, 8), 1, (32, 32)),  # a map of the blocks, finer cells
]


@pytest.mark.parametrize(("pixels", "side", "size"), RESOLUTIONS)
def test_validity_at_any_resolution(pixels, side, size):
    generator = torch.Generator().manual_seed(0)
    coarse = (torch.rand(20, 1, pixels[0] // side, pixels[1] // side, generator=generator) < 0.1).float()
    mask = coarse.repeat_interleave(side, 2).repeat_interleave(side, 3)
    valid = key_validity(mask, size)
    assert valid.dtype == torch.bool and valid.shape == (20, size[0] * size[1])
    assert torch.equal(valid, by_hand(mask, size)) and 0 < valid.float().mean() < 1
    assert torch.equal(key_validity(mask.bool(), size), valid)
    assert torch.equal(key_validity(mask.bfloat16(), size), valid)
    # half of each side is missing: the published number
    mask = torch.zeros(1, 1, 256, 256)
    mask[:, :, :128, :128] = 1
    assert key_validity(mask, (32, 32)).sum() == 735
