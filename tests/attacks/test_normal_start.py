"""The normal random start of PGD: near the image, within the ball and the box, by seed and sample id alone."""

import pytest
import torch

from purify_fast.attacks.ball import ball_around, normal_in_ball

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.05), ("l2", 0.5)])
def test_points_are_normal_and_in_the_ball(norm, eps):
    x = torch.full((4, 3, 32, 32), 0.5)
    near = normal_in_ball(x, ball_around(x, 10 * eps, norm) if norm == "l2" else ball_around(x, eps, norm), 0.001)
    assert (near - x).std().item() == pytest.approx(0.001, rel=0.05) and abs((near - x).mean().item()) < 1e-4
    far = normal_in_ball(x, ball_around(x, eps, norm), 1.0)
    distance = (far - x).flatten(1)
    longest = distance.abs().amax(1) if norm == "linf" else distance.norm(dim=1)
    assert (longest <= eps * (1 + 1e-5)).all() and (longest > 0.9 * eps).all()
    assert far.min() >= 0 and far.max() <= 1
    ids = torch.arange(4)
    assert torch.equal(normal_in_ball(x[2:], ball_around(x[2:], eps, norm), 1.0, sample_ids=ids[2:]), far[2:])
    assert not torch.equal(normal_in_ball(x, ball_around(x, eps, norm), 1.0, seed=1), far)
