"""The corners of the curves that the page of certificates draws."""

import numpy as np

from purify_fast.judge.certificates.certificates import Certificates


def test_the_curves_begin_with_all_images_and_step_where_one_ends():
    known = {"labels": np.ones(3, np.int64), "tested": np.ones(3, np.int64)}
    made = Certificates(np.array([1000, 700, 100]), np.full(3, 1000), sigma=0.5, radii=(), alpha=0.001, **known)
    made.refuted[0.25] = np.array([False, False, True])
    large, small, none = made.radius.tolist()
    drawn = made._shown(())["drawing"]
    most = drawn["most"]
    assert large > most > 0.25 > small > none == 0
    np.testing.assert_allclose(drawn["below"], [[(0, 2 / 3), (small, 2 / 3), (small, 1 / 3), (most, 1 / 3)]])
    assert made.between(0.25) == (1 / 3, 2 / 3)
    np.testing.assert_allclose(drawn["above"], [(0, 1), (0.25, 1), (0.25, 2 / 3), (most, 2 / 3)])
