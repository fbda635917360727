"""The dense products of a model decide whether a CPU computes its copy in bfloat16."""

import torch
from torch import nn

from purify_fast.speed.precision import PER_VALUE, PRODUCTS, is_dense


def test_dense_products_of_the_batch_and_per_computed_value_decide_but_not_the_number_of_weights():
    # One image of 8 x 8 has 4.7 million products and 6 thousand computed values. The model has 300 thousand weights.
    dense = nn.Sequential(nn.Conv2d(3, 128, 3, 2, 1), nn.Conv2d(128, 256, 3, 1, 1))
    products, values, weights = 16 * 256 * 128 * 9, 16 * (128 + 256), 256 * 128 * 9
    assert products / (values + weights) < PER_VALUE < products / values
    fewest = int(PRODUCTS // products) + 1
    assert is_dense(dense, torch.rand(fewest, 3, 8, 8)) and not is_dense(dense, torch.rand(fewest - 1, 3, 8, 8))
    in_groups = nn.Sequential(nn.Conv2d(3, 128, 3, 2, 1), nn.Conv2d(128, 256, 3, 1, 1, groups=64))
    assert not is_dense(in_groups, torch.rand(5000, 3, 8, 8))


def test_a_model_that_fails_is_not_dense():
    assert not is_dense(nn.Linear(5, 5), torch.rand(4, 3, 8, 8))
