"""Learning rates against those read off the official code."""

import pytest

from purify_fast.methods.carso.task import carso_published, carso_v1_published
from purify_fast.training.task import one_cycle


def test_the_published_rate_ends_near_its_floor_and_serves_short_runs():
    assert carso_published(10**6 - 1, 10**6, 1.0) == pytest.approx(1.25e-4, rel=0.02)
    for epochs in (1, 2, 3, 7, 8, 9):
        for schedule in (carso_published, carso_v1_published):
            assert all(0 < schedule(epoch, epochs, 1.0) <= 1 for epoch in range(epochs))


def test_one_cycle():
    assert [one_cycle(at, 1.0) for at in (0, 0.2, 1.0)] == pytest.approx([1 / 25, 1.0, 1e-3])
    rates = [one_cycle(i / 100, 1.0) for i in range(101)]
    assert max(rates) <= 1 and rates.index(max(rates)) == 20
