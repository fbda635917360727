from importlib import import_module

import pytest
import torch
from op_cases import normal
from torch.nn import functional as F

from purify_fast.ops import aggregate, use_backend

pytestmark = pytest.mark.interpreter

op = import_module("purify_fast.ops.aggregate")


def with_margin(samples: int, margin: float, classes: int = 10, batch: int = 3) -> torch.Tensor:
    """The right class, 0, ahead by ``margin`` in every sample."""
    logits = torch.zeros(batch, samples, classes)
    logits[:, :, 0] = margin
    return logits.requires_grad_()


def test_published_example(backend):
    logits = torch.tensor([[[1.0, 0.0, -1.0], [0.5, 0.2, -0.3]]], dtype=torch.float64)

    def close(method, *expected, atol=1e-4):
        wanted = torch.tensor([expected], dtype=torch.float64)
        torch.testing.assert_close(aggregate(logits, method), wanted, rtol=0, atol=atol)

    sums = torch.tensor([[4.367003, 2.221403, 1.108698]]).double()
    torch.testing.assert_close(aggregate(logits, "lse").exp(), sums, rtol=0, atol=2e-6)
    p = torch.tensor([[0.865463, 0.101257, 0.033280]]).double()
    torch.testing.assert_close(aggregate(logits, "peel").exp(), p, rtol=0, atol=1e-6)
    close("peel_reference", 1.8614, -2.1833, -3.3689)
    close("mean", 0.75, 0.10, -0.65)
    close("mean_sigmoid", 0.7389, 0.0998, -0.6312)
    close("vote", 2, 0, 0)  # a true majority: both samples choose class 0
    second = torch.tensor([[[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]], dtype=torch.float64)
    expected = torch.tensor([[0.458847, 0.458847, 0.082305]]).double()
    torch.testing.assert_close(aggregate(second, "peel").exp(), expected, rtol=0, atol=1e-6)


def test_saturation_of_the_published_head(backend):
    """logit(P) is infinite and without gradient from a margin that every classifier reaches; log P is neither."""
    label = torch.zeros(1, dtype=torch.long)
    one = with_margin(8, 1.0, batch=1)
    assert aggregate(one.double(), "peel_reference")[0, 0].item() == pytest.approx(11.5490, abs=1e-4)
    assert aggregate(one, "peel_reference")[0, 0].item() == pytest.approx(11.5479, abs=2e-3)
    assert aggregate(one, "peel")[0, 0].item() == pytest.approx(-9.656e-6, abs=2e-7)  # float32: in steps of 1.2e-7
    assert aggregate(one.double(), "peel")[0, 0].item() == pytest.approx(-9.6453e-6, abs=1e-9)

    for margin, expected in ((2.0, -51.112), (3.0, -152.684)):
        logits = with_margin(8, margin, batch=1)
        published = aggregate(logits, "peel_reference")
        assert published[0, 0] == torch.inf
        loss = F.cross_entropy(published, label)
        assert loss.isnan() and torch.autograd.grad(loss, logits)[0].isnan().any()

        ours = aggregate(logits, "peel")
        assert ours[0, 1].item() == pytest.approx(expected, abs=1e-3)
        (gradient,) = torch.autograd.grad(F.nll_loss(ours, label + 1), logits)
        assert ours.isfinite().all() and gradient.isfinite().all() and gradient.abs().max() > 0


def dlr(logits: torch.Tensor) -> torch.Tensor:
    ordered = logits.sort(1, descending=True).values
    return -((logits[:, 0] - ordered[:, 1]) / (ordered[:, 0] - ordered[:, 2] + 1e-12)).sum()


LOSSES = {
    "ce": lambda q: F.cross_entropy(q, torch.zeros(len(q), dtype=torch.long), reduction="sum"),
    "dlr": dlr,
    "margin": lambda q: (q[:, 1:].amax(1) - q[:, 0]).sum(),
}


@pytest.mark.parametrize("samples", [1, 2, 3, 8, 17, 64])
@pytest.mark.parametrize("loss", LOSSES)
def test_default_head_can_be_attacked_at_any_margin(backend, samples, loss):
    for margin in (1, 2, 5, 10, 20, 40, 60, 80, 100):
        if loss == "ce" and margin > 80:
            continue  # float32 ends: exp(-100) is 0
        logits = with_margin(samples, float(margin))
        with torch.no_grad():
            logits += 0.1 * normal(3, samples, 10, seed=margin, dtype=torch.float32).clamp(-2, 2)
        q = aggregate(logits)
        assert q.isfinite().all()
        (gradient,) = torch.autograd.grad(LOSSES[loss](q), logits)
        assert gradient.isfinite().all(), margin
        assert (gradient.flatten(1).abs().amax(1) > 0).all(), margin


@pytest.mark.parametrize("scale", [1.0, 30.0, 1e2, 1e3])
def test_peel_is_finite_and_decides_as_lse(backend, scale):
    logits = normal(64, 8, 10, scale=scale, dtype=torch.float32).requires_grad_()
    log_p, q = aggregate(logits, "peel"), aggregate(logits, "lse")
    assert log_p.isfinite().all() and (log_p <= 0).all() and torch.equal(log_p.argmax(1), q.argmax(1))
    (gradient,) = torch.autograd.grad(log_p.sum(), logits)
    assert gradient.isfinite().all()


def test_vote_is_a_majority(backend):
    logits = normal(40, 9, 6, dtype=torch.float32, scale=3.0) - 50  # all negative: where the published count fails
    votes = aggregate(logits, "vote")
    assert torch.equal(votes.sum(1), torch.full((40,), 9.0))
    expected = torch.stack([torch.bincount(row, minlength=6) for row in logits.argmax(2)]).float()
    assert torch.equal(votes, expected)
    ties = torch.tensor([[[1.0, 2.0, 2.0], [0.0, 0.0, 0.0]]])
    assert torch.equal(aggregate(ties, "vote"), torch.tensor([[1.0, 1.0, 0.0]]))  # the first class, as argmax
    logits.requires_grad_()
    out = aggregate(logits, "vote")
    assert not out.requires_grad or not torch.autograd.grad(out.sum(), logits)[0].any()


def test_sigmoids_of_any_size_keep_their_digits_and_leave_their_neighbours_alone(backend):
    """A batch whose images need another number subtracted each; what is beside an image must not change its bits."""
    logits = normal(7, 8, 10, dtype=torch.float32, scale=3.0)
    logits[1] += 300
    logits[2] -= 300
    logits[3] -= 60
    logits[4, :, 3] += 45
    logits[5, 2] -= 500

    def both(x):
        x = x.clone().requires_grad_()
        out = aggregate(x, "mean_sigmoid")
        weights = torch.linspace(0.5, 1.5, out.shape[1], dtype=out.dtype)
        return out.detach(), torch.autograd.grad((out * weights).sum(), x)[0]

    value, gradient = both(logits)
    wanted = op.reference(logits.double(), op.METHODS.index("mean_sigmoid"))
    torch.testing.assert_close(value.double(), wanted, rtol=2e-6, atol=2e-6)
    with use_backend("reference"):
        slopes = both(logits.double())[1]
    torch.testing.assert_close(gradient.double(), slopes, rtol=2e-5, atol=1e-9)
    for i in range(len(logits)):
        alone = both(logits[i : i + 1])
        assert torch.equal(alone[0], value[i : i + 1]) and torch.equal(alone[1], gradient[i : i + 1])


@pytest.mark.parametrize("classes", [5, 100])
@pytest.mark.parametrize("value", [torch.inf, -torch.inf])
def test_infinite_logits_have_the_gradient_of_logsumexp(backend, value, classes):
    logits = normal(2, 4, classes, dtype=torch.float32, scale=3.0)
    logits[0, 1, 2] = value
    leaves = [logits.clone().requires_grad_() for _ in range(2)]
    (aggregate(leaves[0]).sum() + torch.logsumexp(leaves[1], 1).sum()).backward()
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad, equal_nan=True)
