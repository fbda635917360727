"""Augmentation, and mean and standard deviation of the training images."""

import pytest
import torch
from host_syncs import HostSyncs
from torch.nn import functional as F

from purify_fast.data import crop_flip, statistics

X = torch.randint(0, 256, (64, 3, 7, 9), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
IDS = torch.arange(64)


def candidates(image, padding):
    """Every crop of the padded image, straight and mirrored."""
    padded = F.pad(image[None].float(), [padding] * 4)[0].to(image.dtype)
    h, w = image.shape[1:]
    out = []
    for i in range(2 * padding + 1):
        for j in range(2 * padding + 1):
            out += [padded[:, i : i + h, j : j + w], padded[:, i : i + h, j : j + w].flip(2)]
    return out


def test_is_a_crop_of_the_padded_image():
    out = crop_flip(X, 0, IDS, 2)
    assert out.dtype == X.dtype and out.shape == X.shape
    seen = set()
    for image, made in zip(X, out, strict=True):
        which = [k for k, c in enumerate(candidates(image, 2)) if torch.equal(c, made)]
        assert len(which) == 1
        seen.add(which[0])
    assert len(seen) > 25  # of 50: 64 uniform draws leave out 14 on average
    assert {k % 2 for k in seen} == {0, 1}


def test_a_function_of_seed_epoch_and_id():
    with HostSyncs() as waits:
        out = crop_flip(X, 1, IDS)
    assert not waits.counts
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    assert torch.equal(crop_flip(X[order], 1, IDS[order]), out[order])
    assert torch.equal(torch.cat([crop_flip(X[:5], 1, IDS[:5]), crop_flip(X[5:], 1, IDS[5:])]), out)
    assert not torch.equal(crop_flip(X, 2, IDS), out)
    assert not torch.equal(crop_flip(X, 1, IDS, epoch=1), out)
    assert torch.equal(crop_flip(X.float(), 1, IDS), out.float())
    assert torch.equal(crop_flip(X, 0, IDS, 0, flip=False), X)
    for arguments in ((X[0], 0, IDS), (X, 0, IDS[:3]), (X, 0, IDS, -1)):
        with pytest.raises(ValueError, match=r"\[B, C, H, W\]|sample_ids|padding"):
            crop_flip(*arguments)


def test_statistics_are_those_of_the_images_in_unit_range():
    x = torch.randint(0, 256, (20, 3, 5, 7), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    values = x.double().div(255).transpose(0, 1).flatten(1)
    mean, std = statistics(x)
    assert mean == pytest.approx(values.mean(1).tolist()) and std == pytest.approx(values.std(1, correction=0).tolist())
    # a constant channel can still be divided by
    assert statistics(torch.full((2, 1, 3, 3), 51, dtype=torch.uint8)) == ([pytest.approx(0.2)], [1 / 255])
    for wrong in (torch.rand(2, 1, 3, 3), torch.zeros(0, 1, 3, 3, dtype=torch.uint8)):
        with pytest.raises(ValueError, match=r"x must be uint8 \[N, C, H, W\] with at least one image"):
            statistics(wrong)
