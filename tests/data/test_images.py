"""Augmentation, and mean and standard deviation of the training images."""

import warnings

import pytest
import torch
from host_syncs import HostSyncs
from torch.nn import functional as F

from purify_fast.data import balanced_subset, batches, crop_flip, statistics

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
    assert not torch.equal(crop_flip(X, 2, IDS), out) and not torch.equal(crop_flip(X, 1, IDS, epoch=1), out)
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


# -- batches; and the balanced subset: every class has its share, in every first part of it too ------------------------


def sorted_by_class(sizes):
    y = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    x = torch.arange(len(y), dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 2, 2).contiguous()
    return x, y


@pytest.mark.parametrize("count", [1, 7, 20, 34, 1000])
def test_every_first_part_is_balanced(count):
    x, y = sorted_by_class([10, 30, 5, 12])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        chosen = balanced_subset(x, y, count, seed=3)
    assert len(chosen.x) == min(count, 57) == chosen.ids.unique().numel()
    assert torch.equal(chosen.x, x[chosen.ids]) and torch.equal(chosen.y, y[chosen.ids])
    for n in range(1, min(count, 20) + 1):
        counts = chosen.y[:n].bincount(minlength=4)
        assert int(counts.max() - counts.min()) <= 1
    if count >= 57:
        assert chosen.y.bincount().tolist() == [10, 30, 5, 12]


def test_a_function_of_the_seed():
    x, y = sorted_by_class([20, 20, 20])
    chosen = [balanced_subset(x, y, 30, seed).ids.tolist() for seed in (0, 0, 1, 2**40)]
    assert chosen[0] == chosen[1] and len({tuple(ids) for ids in chosen}) == 3
    # within a class, and among the classes, no image is preferred
    firsts = torch.tensor([balanced_subset(x, y, 3, seed).ids.tolist() for seed in range(200)])
    assert firsts.unique().numel() == 60 and (y[firsts[:, 0]].bincount() > 40).all()
    # the stream is numpy's frozen one
    assert chosen[0][:6] == [17, 25, 52, 2, 20, 54]


def test_a_missing_class_is_told():
    x, y = sorted_by_class([4, 0, 4])
    with pytest.warns(UserWarning, match=r"1 of 3 classes have no image among the 6 chosen images \(1\)"):
        balanced_subset(x, y, 6, 0)
    x, y = sorted_by_class([3] * 30)
    with pytest.warns(UserWarning, match=r"1 of 31 classes .*\(30\)"):
        balanced_subset(x, y, 30, 0, num_classes=31)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert balanced_subset(x, y, 30, 0).y.unique().numel() == 30


def test_batches_are_a_function_of_seed_and_epoch():
    def order(*args):
        return torch.cat(batches(100, 10, *args)).tolist()

    assert order(0, 3) == order(0, 3) and sorted(order(0, 3)) == list(range(100))
    assert len({tuple(order(s, e)) for s in (0, 1, 2**32) for e in (0, 1)}) == 6
    torch.manual_seed(1)
    before = torch.get_rng_state()
    assert order(5, 7) == order(5, 7) and torch.equal(before, torch.get_rng_state())


def test_the_order_is_frozen():
    """Runs resume on other machines: the permutation must never change."""
    assert torch.cat(batches(8, 4, 0, 0)).tolist() == [2, 6, 0, 4, 1, 3, 5, 7]


@pytest.mark.parametrize("n", [12, 14])
def test_ranks_take_every_third_image_of_each_batch(n):
    whole = batches(n, 6, 1, 2, drop_last=False)
    assert [len(batch) for batch in whole] == [6, 6, 2][: -(-n // 6)] and len(batches(n, 6, 1, 2)) == 2
    for rank in range(3):
        share = batches(n, 6, 1, 2, drop_last=False, rank=rank, world=3)
        assert [part.tolist() for part in share] == [batch[rank::3].tolist() for batch in whole]


SORTED, LABELS = sorted_by_class([2, 2])
GIVEN = {
    balanced_subset: {"x": SORTED, "y": LABELS, "count": 2, "seed": 0},
    batches: {"n": 20, "batch_size": 6, "seed": 0},
}


REFUSED = [
    (balanced_subset, {"count": 0}, "count must be at least 1, got 0"),
    (balanced_subset, {"seed": -1}, "seed must be at least 0, got -1"),
    (balanced_subset, {"num_classes": 1}, r"y must .* 0 to 0, got 0 to 1"),
    (balanced_subset, {"y": torch.zeros(3, dtype=torch.int64)}, "got 4 and 3"),
    (batches, {"epoch": 0, "n": 0}, "n must be"),
    (batches, {"epoch": 0, "batch_size": 21}, "batch_size must .* 20, got 21"),
    (batches, {"epoch": 0, "seed": -1}, "seed must be"),
    (batches, {"epoch": 0, "world": 4}, "multiple of 4"),
    (batches, {"epoch": 0, "rank": 2, "world": 2}, "rank must be"),
]


@pytest.mark.parametrize(("function", "options", "message"), REFUSED)
def test_refused(function, options, message):
    with pytest.raises(ValueError, match=message):
        function(**GIVEN[function] | options)
