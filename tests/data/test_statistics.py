"""Mean and standard deviation of the training images."""

import pytest
import torch

from purify_fast.data import statistics


def test_they_are_those_of_the_images_in_unit_range():
    x = torch.randint(0, 256, (20, 3, 5, 7), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    values = x.double().div(255).transpose(0, 1).flatten(1)
    mean, std = statistics(x)
    assert mean == pytest.approx(values.mean(1).tolist()) and std == pytest.approx(values.std(1, correction=0).tolist())


def test_a_constant_channel_can_still_be_divided_by():
    assert statistics(torch.full((2, 1, 3, 3), 51, dtype=torch.uint8)) == ([pytest.approx(0.2)], [1 / 255])


@pytest.mark.parametrize("x", [torch.rand(2, 1, 3, 3), torch.zeros(0, 1, 3, 3, dtype=torch.uint8)])
def test_what_are_no_images_is_refused(x):
    with pytest.raises(ValueError, match=r"x must be uint8 \[N, C, H, W\] with at least one image"):
        statistics(x)
