"""The device follows the images, whatever the default device is; "meta" has no numbers, so each use of it is found."""

import pytest
import torch
from evaluating import evaluate
from torch import nn

from purify_fast.attacks import APGD, PGD, Square
from purify_fast.attacks.relu_layers import affine_layers
from purify_fast.data.images import statistics
from purify_fast.methods.diffusion import Schedule


@pytest.fixture
def elsewhere():
    yield lambda: torch.set_default_device("meta")
    torch.set_default_device(None)


def test_an_evaluation(elsewhere):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))
    x = torch.rand(8, 1, 4, 4)
    y = model(x).argmax(1)
    attacks = [PGD(steps=3), APGD(steps=5), Square(n_queries=20)]
    options = {"eps": 0.1, "attacks": attacks, "progress": False}
    right = evaluate(model, x, y, **options)
    elsewhere()
    found = evaluate(model, x, y, **options)
    assert [row.accuracy for row in found.rows] == [row.accuracy for row in right.rows]


def test_tables_of_numbers(elsewhere):
    network, images = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), torch.rand(3, 1, 2, 2)
    shown = (255 * images).byte()
    results = []
    for default in (lambda: None, elsewhere):
        default()
        schedule = Schedule()
        numbers = [schedule.betas, schedule.times(0.3, 4), torch.tensor(statistics(shown), device="cpu")]
        results.append([*numbers, affine_layers(network, (1, 2, 2))[0].weight])
    for right, found in zip(*results, strict=True):
        assert torch.equal(right, found)
