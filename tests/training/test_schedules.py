"""Learning rates against those read off the official code."""

import pytest

from purify_fast.methods.carso.config import carso_published, carso_v1_published
from purify_fast.training.schedules import one_cycle

LONG = {0: 5e-9, 1: 0.00256, 12: 0.03072, 25: 0.064, 50: 0.064, 51: 0.0635734, 125: 0.0320040, 199: 4.34613e-4}


@pytest.mark.parametrize(
    ("epochs", "peak", "rates"),
    [(200, 0.064, LONG), (250, 0.0128, {31: 0.0128, 62: 0.0128, 63: 0.0127319, 249: 6.9677e-5})],
)
def test_fact_8_learning_rates(epochs, peak, rates):
    for epoch, rate in rates.items():
        assert carso_published(epoch, epochs, peak) == pytest.approx(rate, rel=1e-5), epoch


def test_the_published_rate_ends_near_its_floor_and_serves_short_runs():
    assert carso_published(10**6 - 1, 10**6, 1.0) == pytest.approx(1.25e-4, rel=0.02)
    for epochs in (1, 2, 3, 7, 8, 9):
        rates = [carso_published(epoch, epochs, 1.0) for epoch in range(epochs)]
        assert all(0 < rate <= 1 for rate in rates)


def test_the_first_versions_rate_is_a_triangle():
    peak, low = 0.04608, 5e-9
    rates = [carso_v1_published(epoch, 150, peak) for epoch in range(150)]
    assert rates[0] == low and rates[50] == peak == max(rates)
    assert rates[25] == pytest.approx((peak + low) / 2)
    assert rates[100] == pytest.approx((peak + low) / 2)
    assert rates[149] == pytest.approx(low + (peak - low) / 100)
    assert all(rate > 0 for epochs in (1, 2, 3) for rate in [carso_v1_published(e, epochs, 1.0) for e in range(epochs)])


def test_one_cycle():
    assert [one_cycle(at, 1.0) for at in (0, 0.2, 1.0)] == pytest.approx([1 / 25, 1.0, 1e-3])
    rates = [one_cycle(i / 100, 1.0) for i in range(101)]
    assert max(rates) <= 1 and rates.index(max(rates)) == 20
