"""The corners of the curves that the page of certificates draws."""

import numpy as np
import pytest

from purify_fast.judge.certificates.certificates import Certificates


def test_the_curves_begin_with_all_images_and_step_where_one_ends():
    made = Certificates(np.array([1000, 700, 100]), np.full(3, 1000), sigma=0.5, radii=(0.25,), alpha=0.001)
    made.refuted[0.25] = np.array([False, False, True])
    large, small, none = made.radius.tolist()
    most = 1.05 * 0.25
    assert large > most > small > none == 0
    drawn = made._drawing()
    assert drawn["most"] == pytest.approx(most)
    np.testing.assert_allclose(drawn["below"], [(0, 2 / 3), (small, 2 / 3), (small, 1 / 3), (most, 1 / 3)])
    upper = made.between(0.25)[1]
    assert 2 / 3 <= upper < 1
    np.testing.assert_allclose(drawn["above"], [(0, 1), (0.25, 1), (0.25, upper), (most, upper)])
