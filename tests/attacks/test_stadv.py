import importlib

import pytest
import torch
from search_calls import stadv
from small_models import images_and_labels
from torch import nn
from torch.nn import functional as F

from purify_fast import data, zoo
from purify_fast.judge.searches.stadv import flow_loss, warp


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(288, 32), nn.SiLU(), nn.Linear(32, 5))
    with torch.no_grad():
        for layer in (net[1], net[3]):
            layer.weight *= 5  # logits as far apart as a trained one's
    return net


@pytest.fixture(scope="module")
def batch():
    return images_and_labels(9, (3, 8, 12), 5)


class Flows:
    """Remembers what is warped by what."""

    def __init__(self, monkeypatch):
        module = importlib.import_module("purify_fast.judge.searches.stadv")  # the package's attribute is the function
        self.seen: list[torch.Tensor] = []
        original = module.warp
        monkeypatch.setattr(module, "warp", lambda x, flow: self.seen.append(flow.detach()) or original(x, flow))


@pytest.mark.parametrize("shape", [(3, 8, 12), (1, 7, 5), (2, 1, 6), (2, 6, 1), (1, 1, 1)])
def test_warp_is_bilinear_sampling(shape):
    torch.manual_seed(2)
    x, flow = torch.rand(4, *shape).double(), 0.6 * torch.randn(4, 2, *shape[1:]).double()
    identity = torch.eye(2, 3).double().expand(4, -1, -1)
    grid = F.affine_grid(identity, list(x.shape), align_corners=False) + flow.permute(0, 2, 3, 1)
    want = F.grid_sample(x, grid, padding_mode="border", align_corners=False)
    torch.testing.assert_close(warp(x, flow), want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_zero_flow_is_exactly_the_image_and_no_flow_leaves_its_range(dtype):
    x = torch.rand(5, 3, 9, 7).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    assert torch.equal(warp(x, torch.zeros(5, 2, 9, 7, dtype=wide)), x)
    moved = warp(x, 2 * torch.randn(5, 2, 9, 7, dtype=wide))
    assert moved.dtype == dtype and moved.min() >= x.min() and moved.max() <= x.max()
    ones = warp(torch.ones_like(x), torch.randn(5, 2, 9, 7, dtype=wide))
    assert torch.equal(ones, torch.ones_like(x))


def test_warp_gradient():
    torch.manual_seed(3)
    x, flow = torch.rand(2, 2, 4, 5).double(), (0.1 * torch.randn(2, 2, 4, 5)).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda f: warp(x, f), flow, eps=1e-7, atol=1e-5)


def test_flow_loss_by_hand():
    flow = torch.zeros(2, 2, 2, 3)
    flow[1, 0, 0, 1], flow[1, 1, 0, 1] = 3.0, 4.0  # one pixel moves by 5; it has three neighbours
    assert flow_loss(flow).tolist() == pytest.approx([0, 2 * 3 * 5], rel=1e-4)
    still = torch.ones(1, 2, 4, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(flow_loss(still).sum(), still)
    assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize(
    "options", [{}, {"random_start": True}, {"smoothness": 0.0}, {"keep_best": True, "eot_iter": 2}]
)
@pytest.mark.parametrize("loss", ["margin", "ce", "dlr"])
def test_the_bound_on_the_flow_holds(model, batch, monkeypatch, options, loss):
    x, y = batch
    flows = Flows(monkeypatch)
    adversarial = stadv(model, x, y, eps=0.07, steps=12, loss=loss, **options)
    largest = max(float(flow.abs().max()) for flow in flows.seen)
    assert 0.06 < largest <= 0.07 * (1 + 1e-6)
    assert adversarial.shape == x.shape and adversarial.dtype == x.dtype
    assert adversarial.min() >= x.min() >= 0 and adversarial.max() <= x.max() <= 1
    assert not torch.equal(adversarial, x)


def test_a_bound_per_image(model, batch, monkeypatch):
    x, y = batch
    flows = Flows(monkeypatch)
    eps = torch.linspace(0, 0.1, 9)
    adversarial = stadv(model, x, y, eps=eps, steps=12)
    largest = torch.stack([flow.abs().amax((1, 2, 3)) for flow in flows.seen]).amax(0)
    torch.testing.assert_close(largest, eps)
    assert torch.equal(adversarial[0], x[0])


@pytest.mark.parametrize("still", [{"eps": 0.0}, {"rate": 0.0}, {"eps": 0.0, "random_start": True}])
def test_without_room_or_steps_the_image_stays(model, batch, still):
    assert torch.equal(stadv(model, *batch, **still), batch[0])


def test_first_step_is_adams(model, batch, monkeypatch):
    """From no flow, where the smoothness has no slope, Adam's first step is the rate times the gradient's sign."""
    x, y = batch
    flows = Flows(monkeypatch)
    stadv(model, x, y, steps=1, rate=0.013)
    leaf = torch.zeros(9, 2, 8, 12, requires_grad=True)
    logits = model(warp(x, leaf))
    others = logits.masked_fill(F.one_hot(y, 5).bool(), -torch.inf).amax(1)
    (gradient,) = torch.autograd.grad((others - logits.gather(1, y[:, None])[:, 0]).sum(), leaf)
    clear = gradient.abs() > 1e-6
    assert clear.float().mean() > 0.9
    torch.testing.assert_close(flows.seen[-1][clear], (0.013 * gradient.sign())[clear], atol=1e-7, rtol=1e-5)


def test_fools_a_trained_classifier():
    """Digits of 16 x 16: 0.05 is 0.4 of a pixel, 0.1 is 0.8."""
    net, digits = zoo.load("digits-standard").eval(), data.load_dataset("digits")
    x, y = data.to_float(digits.x_test[:100]), digits.y_test[:100]

    def accuracy(images):
        return float((net(images).argmax(1) == y).float().mean())

    left = [accuracy(stadv(net, x, y, eps=eps, keep_best=True)) for eps in (0.02, 0.05, 0.1)]
    noise = accuracy(stadv(net, x, y, eps=0.1, rate=0.0, random_start=True))  # a flow that means nothing
    assert accuracy(x) > 0.9 and noise > 0.8
    assert left[0] > left[1] > left[2] and left[1] < 0.6 and left[2] < 0.1
