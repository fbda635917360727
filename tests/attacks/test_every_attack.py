"""What every attack keeps to: the ball and the box, the model and the generators as they were, batches of any size."""

import copy

import pytest
import torch
from direct import direct
from search_calls import apgd, fab_t, square, stadv
from torch import nn

from purify_fast import attacks
from purify_fast.attacks import GradientHealth, frozen, pgd
from purify_fast.models.classifiers import SmallCNN

ORDERS = {"linf": torch.inf, "l2": 2, "l1": 1}
#: Of a radius, for attacks of like strength.
SCALES = {"linf": 1, "l2": 1, "l1": 20}
EPS = 0.2
#: Attacks and options: a short run of each kind.
IN_A_BALL = {
    "pgd": (pgd, {"steps": 5}),
    "pgd, margin, best": (pgd, {"steps": 5, "loss": "margin", "keep_best": True}),
    "pgd, dlr": (pgd, {"steps": 5, "loss": "dlr"}),
    "pgd, left": (attacks.LeavingPGD, {"steps": 5, "look_every": 2}),
    "apgd": (apgd, {"steps": 7}),
    "apgd, dlr": (apgd, {"steps": 7, "loss": "dlr", "leave_when_fallen": False}),
    "apgd-t": (apgd, {"steps": 7, "loss": "dlr_targeted", "restarts": 2}),
    "fab-t": (fab_t, {"steps": 7}),
    "square": (square, {"n_queries": 60}),
}
EVERY = {**IN_A_BALL, "stadv": (stadv, {"steps": 4, "random_start": True})}


@pytest.fixture(scope="module")
def batch(model):
    x = torch.rand(9, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), frozen(model):
        return x, model(x).argmax(1)


def run(name, model, x, y, eps=EPS, **options):
    attack, own = EVERY[name]
    return direct(attack, model, x, y, **({} if attack is stadv else {"eps": eps}), **{**own, **options})


@pytest.mark.parametrize("norm", ORDERS)
@pytest.mark.parametrize("box", [(0.0, 1.0), (0.25, 0.75)])
@pytest.mark.parametrize("name", IN_A_BALL)
def test_it_stays_in_the_ball_and_the_box(model, batch, name, norm, box):
    x, y = batch[0].clamp(*box), batch[1]
    eps = torch.linspace(0, 2 * EPS * SCALES[norm], 9)
    found = run(name, model, x, y, eps=eps, norm=norm, clip_min=box[0], clip_max=box[1])
    length = (found - x).flatten(1).double().norm(p=ORDERS[norm], dim=1)
    assert found.shape == x.shape and found.dtype == x.dtype and bool((length <= eps * (1 + 1e-5) + 1e-6).all())
    # FAB finds no border here, and then returns the images themselves.
    assert torch.equal(found[1:], x[1:]) is (name == "fab-t")
    assert float(found.min()) >= box[0] and float(found.max()) <= box[1]


@pytest.mark.parametrize("name", EVERY)
def test_the_model_comes_back_and_no_generator_is_touched(batch, name):
    net = nn.Sequential(SmallCNN(3, 6, (8, 8), 4), nn.Dropout(), nn.Linear(6, 6))
    net[2].eval()
    net[0].conv1.weight.requires_grad_(False)
    seen = []
    net[0].register_forward_hook(lambda *_: seen.append((net.training, any(p.requires_grad for p in net.parameters()))))
    modes, wants = [m.training for m in net.modules()], [p.requires_grad for p in net.parameters()]
    state = torch.get_rng_state()
    with torch.no_grad():  # as an evaluation calls it
        run(name, net, *batch)
    assert seen and not any(any(one) for one in seen)
    assert [m.training for m in net.modules()] == modes and modes[0] and not batch[0].requires_grad
    assert [p.requires_grad for p in net.parameters()] == wants and all(p.grad is None for p in net.parameters())
    assert torch.equal(state, torch.get_rng_state())
    with pytest.raises(RuntimeError), frozen(net):
        raise RuntimeError
    assert [m.training for m in net.modules()] == modes
    assert run(name, net, batch[0][:0], batch[1][:0]).shape == (0, 3, 8, 8)


@pytest.mark.parametrize("name", EVERY)
def test_batches_and_passes_of_any_size_agree(model, batch, name):
    """In float64: in float32 a convolution rounds by the size of the batch, and by that a loss may seem to rise."""
    model, x, y = copy.deepcopy(model).double().eval(), batch[0].double(), batch[1]
    ids, sizes = torch.arange(100, 109), []

    def watched(z):
        sizes.append(len(z))
        return model(z)

    options = {"eps": 0.05, "seed": 7}
    whole = run(name, model, x, y, sample_ids=ids, **options)
    for parts in ((torch.arange(2), torch.arange(2, 9)), (torch.arange(9),)):
        found = [run(name, watched, x[i], y[i], sample_ids=ids[i], max_forward_batch=4, **options) for i in parts]
        assert max(sizes) <= 4 and torch.allclose(torch.cat(found), whole, atol=1e-7)
    # with draws that do not differ
    if name != "square":
        found = run(name, watched, x, y, sample_ids=ids, max_forward_batch=4, eot_iter=3, **options)
        assert max(sizes) <= 4 and torch.allclose(found, whole, atol=1e-5)
    # FAB begins at the images themselves.
    if name != "fab-t":
        assert not torch.allclose(run(name, model, x, y, sample_ids=ids, eps=0.05, seed=9), whole, atol=1e-4)


@pytest.mark.parametrize("name", ["pgd", "apgd", "stadv"])
def test_health(model, batch, name):
    x, y = batch
    model.eval()
    good, nan, flat = (GradientHealth() for _ in range(3))
    run(name, model, x, y, eps=0.05, health=good)
    assert 0 < good.count("gradients") <= 7 * len(x) and good.count("images") == len(x) and good.reliable
    # sqrt has no finite slope at 0, and values there are fine
    still = {"smoothness": 0.0} if name == "stadv" else {}
    bad = lambda z: model(z) + (z - z).flatten(1).sum(1, keepdim=True).sqrt()  # noqa: E731
    found = run(name, bad, x, y, eps=0.05, health=nan, **still)
    assert nan.nonfinite == 1 and nan.unmoved == 1 and not nan.reliable and found.isfinite().all()
    run(name, lambda z: model(z.round()) + 0 * z.flatten(1)[:, :6], x, y, eps=0.001, health=flat)
    assert flat.zero == 1 and not flat.reliable
    # logits of NaN from the start: nothing to climb, nothing breaks
    assert run(name, lambda z: model(z) * torch.nan, x, y, eps=0.05).isfinite().all()


@pytest.mark.parametrize("attack", [pgd, apgd])
def test_a_point_is_not_kept_by_luck(attack):
    """Of many noisy values the highest is high by luck: the point returned must stand fresh draws."""

    def wild(x):  # the mean rises to 3 at z = 1, where the noise ends; lucky values far above 3 come before
        z = x.flatten(1).mean(1)
        return torch.stack([torch.zeros_like(z), 3 * z + 8 * (1 - z).detach() * torch.randn(len(x))], 1)

    torch.manual_seed(0)
    x, y = torch.full((200, 1, 2, 2), 0.5), torch.zeros(200, dtype=torch.int64)
    options = {"keep_best": True} if attack is pgd else {}
    found = attack(wild, x, y, eps=0.5, steps=20, eot_iter=4, loss="margin", **options)
    assert float((found.flatten(1).mean(1) > 0.9).float().mean()) > 0.7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["pgd", "apgd", "fab-t", "square"])
def test_other_precisions(dtype, name):
    x, weight = torch.rand(6, 1, 4, 4, dtype=dtype), torch.randn(16, 5, dtype=dtype)
    y = (x.flatten(1) @ weight).argmax(1)
    found = run(name, lambda z: z.flatten(1) @ weight, x, y, eps=0.5)
    fooled = (found.flatten(1) @ weight).argmax(1) != y
    assert found.dtype == dtype and bool(fooled.any() if name == "square" else fooled.all())


class Noisy(nn.Module):
    """Two classes apart by a number for each image, with noise on it; counts the images that it is asked about."""

    def __init__(self):
        super().__init__()
        self.asked = 0
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x):
        self.asked += len(x)
        height = self.weight * x.flatten(1).sum(1) - 2 + 0.02 * torch.randn(len(x))
        return torch.stack([height, torch.zeros_like(height)], 1)


def test_an_image_leaves_once_all_draws_of_a_step_are_wrong():
    # class 0 by 0.05, 0.5 and 5 in all: with a radius of 0.1 a pixel, of 10 pixels, the last one never falls
    x = torch.tensor([2.05, 2.5, 7.0])[:, None, None, None].expand(3, 1, 1, 10) / 10
    y, given = torch.zeros(3, dtype=torch.int64), {"eps": 0.1, "alpha": 0.01, "steps": 40, "eot_iter": 20}
    found, asked, health = {}, {}, {}
    for kind in (attacks.PGD, attacks.LeavingPGD):
        torch.manual_seed(0)
        model, health[kind] = Noisy().eval(), GradientHealth()
        found[kind] = direct(kind, model, x, y, random_start=False, health=health[kind], **given)
        asked[kind] = model.asked
    left = found[attacks.LeavingPGD]
    assert all((Noisy()(left[i : i + 1].expand(50, 1, 1, 10)).argmax(1) == (i != 2) * 1).all() for i in range(3))
    # no further steps than those until it is looked: 20 of 40 for two images
    assert asked[attacks.PGD] - asked[attacks.LeavingPGD] == 2 * 20 * 20
    gradients = [health[kind].count("gradients") for kind in (attacks.PGD, attacks.LeavingPGD)]
    assert gradients == [3 * 40, 3 * 20 + 20]
    torch.testing.assert_close(left[2], found[attacks.PGD][2])
    with pytest.raises(ValueError, match=r"keep_best must be True.*got False"):
        attacks.LeavingPGD(keep_best=False)
