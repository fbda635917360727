import importlib

import pytest
import torch
from torch import nn

from purify_fast.attacks import (
    Ball,
    GradientHealth,
    cross_entropy,
    dlr,
    fgsm,
    frozen,
    input_gradient,
    margin,
    pgd,
    sample_in_ball,
)
from purify_fast.attacks.answers import drawn_once_per_call
from purify_fast.models.classifiers import SmallCNN
from purify_fast.ops import pgd_step

pytestmark = pytest.mark.usefixtures("one_thread")

EPS = 0.2


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return SmallCNN(in_channels=3, num_classes=5, image_size=(8, 8), width=4)


@pytest.fixture(scope="module")
def batch():
    g = torch.Generator().manual_seed(1)
    return torch.rand(9, 3, 8, 8, generator=g), torch.randint(0, 5, (9,), generator=g)


class Noisy(nn.Module):
    """Logit noise from torch's global generator."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x + 0.1 * torch.randn_like(x))


ORDERS = {"linf": torch.inf, "l2": 2, "l1": 1}
SCALES = {"linf": 1, "l2": 1, "l1": 20}  # of a radius, for attacks of like strength


@pytest.mark.parametrize("norm", ORDERS)
@pytest.mark.parametrize("loss", ["ce", "margin", "dlr"])
@pytest.mark.parametrize("keep_best", [False, True])
def test_stays_in_ball_and_box(model, batch, norm, loss, keep_best):
    x, y = batch
    eps = EPS * SCALES[norm]
    adversarial = pgd(model, x, y, eps=eps, steps=5, norm=norm, loss=loss, keep_best=keep_best)
    length = (adversarial - x).flatten(1).double().norm(p=ORDERS[norm], dim=1)
    assert adversarial.shape == x.shape and adversarial.dtype == x.dtype
    assert bool((length <= eps + 1e-6 * SCALES[norm]).all()) and bool((length > 0.5 * eps).all())
    assert float(adversarial.min()) >= 0 and float(adversarial.max()) <= 1


@pytest.mark.parametrize("norm", ORDERS)
def test_raises_the_loss(model, batch, norm):
    x, y = batch
    before = cross_entropy(model(x), y)
    weak, strong = (
        cross_entropy(model(pgd(model, x, y, eps=eps * SCALES[norm], steps=10, norm=norm)), y) for eps in (0.05, 0.3)
    )
    assert bool((weak > before).all()) and bool((strong > weak).all())


def test_other_box(model, batch):
    x, y = batch
    adversarial = pgd(model, x * 0.5 + 0.25, y, eps=0.5, steps=3, clip_min=0.25, clip_max=0.75)
    assert float(adversarial.min()) >= 0.25 and float(adversarial.max()) <= 0.75


def test_model_comes_back_as_it_was(model, batch):
    x, y = batch
    net = nn.Sequential(SmallCNN(3, 5, (8, 8), 4), nn.Dropout(), nn.Linear(5, 5))
    net[2].eval()
    net[0].conv1.weight.requires_grad_(False)
    x.requires_grad_(False)
    modes = [m.training for m in net.modules()]
    wants = [p.requires_grad for p in net.parameters()]
    rng = torch.get_rng_state()
    pgd(net, x, y, eps=EPS, steps=2)
    assert [m.training for m in net.modules()] == modes and modes[0]
    assert [p.requires_grad for p in net.parameters()] == wants and not wants[0]
    assert all(p.grad is None for p in net.parameters()) and not x.requires_grad
    assert torch.equal(rng, torch.get_rng_state())  # the start is Philox's
    with pytest.raises(RuntimeError), frozen(net):
        raise RuntimeError
    assert [m.training for m in net.modules()] == modes


@pytest.mark.parametrize("attack", ["fgsm", "pgd"])
def test_no_weight_gradients(batch, attack):
    """A frozen view: no parameter asks for a gradient during the forward pass, and no backward computes one."""
    x, y = batch
    seen, masks = [], []

    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, w):
            ctx.save_for_backward(x, w)
            return x * w

        @staticmethod
        def backward(ctx, g):
            masks.append(ctx.needs_input_grad)
            return g * ctx.saved_tensors[1], g * ctx.saved_tensors[0]

    class Probe(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.head = nn.Parameter(torch.ones(3, 8, 8)), nn.Linear(192, 5)

        def forward(self, x):
            seen.append((self.training, *(p.requires_grad for p in self.parameters())))
            return self.head(Square.apply(x, self.scale).flatten(1))

    net = Probe()
    run = {"fgsm": fgsm, "pgd": lambda *a, **k: pgd(*a, steps=3, keep_best=True, **k)}[attack]
    run(net, x, y, eps=EPS)
    assert seen and not any(any(s) for s in seen)
    assert masks and all(mask == (True, False) for mask in masks)
    assert all(p.grad is None for p in net.parameters()) and net.training


def test_plain_callable(model, batch):
    x, y = batch
    with frozen(model):
        assert torch.equal(pgd(lambda z: model(z), x, y, eps=EPS, steps=3), pgd(model, x, y, eps=EPS, steps=3))


def test_eot_is_the_explicit_mean(batch, model):
    """Folded draws give the gradient of the sum over draws; for a deterministic model, EOT changes nothing."""
    x, y = batch
    with frozen(model):
        one, value = input_gradient(model, x, y)
        for eot, chunk in ((4, None), (4, 9), (4, 20), (5, 1)):
            folded, mean = input_gradient(model, x, y, eot_iter=eot, max_forward_batch=chunk)
            assert torch.allclose(folded, eot * one, rtol=1e-4, atol=1e-6)
            assert torch.allclose(mean, value, rtol=1e-5)
    a, b = (pgd(model, x, y, eps=EPS, steps=4, eot_iter=e) for e in (1, 3))
    assert torch.allclose(a, b, atol=1e-5)


def test_eot_draws_differ(batch, model):
    """Under one seed, folded draws are the draws of an explicit loop over one noise tensor."""
    x, y = batch
    noisy = Noisy(model)
    torch.manual_seed(3)
    noise = torch.randn(4 * len(x), 3, 8, 8)
    with frozen(noisy):
        torch.manual_seed(3)
        folded, _ = input_gradient(noisy, x, y, eot_iter=4)
        leaf = x.clone().requires_grad_()
        loops = sum(cross_entropy(model(leaf + 0.1 * noise[9 * k : 9 * k + 9]), y).sum() for k in range(4))
        (explicit,) = torch.autograd.grad(loops, leaf)
    assert torch.allclose(folded, explicit, atol=1e-5)
    assert not torch.allclose(noise[:9], noise[9:18])


@pytest.mark.parametrize("chunk", [1, 9, 10, 18, 1000])
def test_chunk_bounds_the_batch_and_is_exact(batch, model, chunk):
    x, y = batch
    sizes = []

    def watched(z):
        sizes.append(len(z))
        return model(z)

    with frozen(model):
        got = pgd(watched, x, y, eps=EPS, steps=3, eot_iter=4, max_forward_batch=chunk, keep_best=True)
        want = pgd(model, x, y, eps=EPS, steps=3, eot_iter=4, keep_best=True)
    assert max(sizes) <= max(chunk, len(x))
    assert torch.allclose(got, want, atol=1e-5)


def test_per_sample_eps_and_alpha(batch, model):
    x, y = batch
    eps = torch.linspace(0, 0.3, 9)
    together = pgd(model, x, y, eps=eps, alpha=eps / 2, steps=4)
    assert torch.equal(together[0], x[0])
    for i in range(9):
        ids = torch.tensor([i])
        alone = pgd(
            model, x[i : i + 1], y[i : i + 1], eps=float(eps[i]), alpha=float(eps[i] / 2), steps=4, sample_ids=ids
        )
        assert torch.allclose(alone[0], together[i], atol=1e-5)


@pytest.mark.parametrize("norm", ORDERS)
def test_batch_splits_agree(batch, model, norm):
    x, y = batch
    ids = torch.arange(100, 109)
    whole = pgd(model, x, y, eps=EPS, steps=3, norm=norm, seed=7, sample_ids=ids)
    parts = [
        pgd(model, x[i], y[i], eps=EPS, steps=3, norm=norm, seed=7, sample_ids=ids[i])
        for i in (torch.arange(2), torch.arange(2, 9))
    ]
    assert torch.allclose(torch.cat(parts), whole, atol=1e-5)
    assert not torch.allclose(pgd(model, x, y, eps=EPS, steps=1, norm=norm, seed=8, sample_ids=ids), whole, atol=1e-3)


@pytest.mark.parametrize("norm", ORDERS)
def test_random_start_fills_the_ball(norm):
    n, size = 2000, 3
    x = torch.full((n, size), 0.5)
    d = sample_in_ball(x, Ball(torch.full((n,), 0.3), norm)) - x
    length = d.norm(p=ORDERS[norm], dim=1)
    assert float(length.max()) <= 0.3 + 1e-6
    # uniform in the ball: P(length < r) = (r / eps)^size
    for r in (0.15, 0.24):
        assert float((length < r).float().mean()) == pytest.approx((r / 0.3) ** size, abs=0.03)
    assert float(d.mean(0).abs().max()) < 0.02
    # and no direction is preferred: the mean of (d_i / length)^4 on the cube, the sphere and the octahedron
    wanted = {"linf": 7 / 15, "l2": 1 / 5, "l1": 1 / 15}[norm]
    assert float(((d / length[:, None]) ** 4).mean()) == pytest.approx(wanted, rel=0.06)


def best_linear(x, slope, eps):
    """The most that slope . (z - x) can be in the l1 ball and [0, 1]: the largest slopes first, until eps is spent."""
    room = torch.where(slope > 0, 1 - x, x)
    size, order = slope.abs().sort(1, descending=True)
    room = room.gather(1, order)
    return (size * (eps - (room.cumsum(1) - room)).clamp_min(0).minimum(room)).sum(1)


@pytest.mark.parametrize("eps", [1.0, 4.0, 12.0])
def test_l1_on_a_linear_model_is_nearly_the_best(eps):
    """The best in the ball and the box is known; noise and dense steps stay behind."""
    g = torch.Generator().manual_seed(0)
    slope, x = torch.randn(192, generator=g).expand(40, -1), torch.rand(40, 192, generator=g)
    y, best = torch.zeros(40, dtype=torch.int64), best_linear(x, slope, eps)

    def share(z):
        assert bool(((z - x).double().abs().sum(1) <= eps * (1 + 1e-6)).all()) and z.min() >= 0 and z.max() <= 1
        return ((z - x) * slope).sum(1) / best

    ours = share(pgd(lambda z: torch.stack([0 * z[:, 0], (z * slope[:1]).sum(1)], 1), x, y, eps=eps, norm="l1"))
    assert float(ours.min()) > 0.93 and float(ours.max()) < 1 + 1e-5
    assert float(share(sample_in_ball(x, Ball(torch.full((40,), eps), "l1"))).abs().max()) < 0.2
    dense = (x + eps * slope / slope.abs().sum(1, keepdim=True)).clamp(0, 1)
    assert float(share(dense).max()) < 0.7


def test_l1_beside_noise_dense_steps_and_autoattack(digits):
    """Robust accuracy of a trained network: below what noise and dense steps leave, not above the authors' APGD."""
    base = pytest.importorskip("pyautoattack.autopgd_base")
    net, x, y = digits
    steps = 30

    def accuracy(z):
        with torch.no_grad():
            return 100 * (net(z).argmax(1) == y).float().mean().item()

    for eps in (1.0, 2.0):
        radius = torch.full((len(x),), eps)
        noise = dense = sample_in_ball(x, Ball(radius, "l1"))
        for i in range(steps):
            with frozen(net):
                gradient, _ = input_gradient(net, dense, y)
            unit = gradient / gradient.flatten(1).abs().sum(1).clamp_min(1e-30).view(-1, 1, 1, 1)
            dense = dense + eps * 100 ** (-i / (steps - 1)) * unit
            dense = pgd_step(dense, torch.zeros_like(x), x, 0.0, eps, "l1")
        with torch.random.fork_rng([]):
            theirs = base.APGDAttack(net, n_iter=steps, norm="L1", eps=eps, loss="ce", device="cpu").perturb(x, y)
        found = pgd(net, x, y, eps=eps, steps=steps, norm="l1")
        assert float((found - x).flatten(1).double().abs().sum(1).max()) <= eps * (1 + 1e-6)
        assert float(found.min()) >= 0 and float(found.max()) <= 1
        ours = accuracy(found)
        assert accuracy(noise) > 90 and ours < accuracy(dense) - 4 and ours <= accuracy(theirs) + 1


def test_fgsm_is_one_step(batch, model):
    x, y = batch
    with frozen(model):
        gradient, _ = input_gradient(model, x, y)
    assert torch.equal(fgsm(model, x, y, eps=EPS), (x + EPS * gradient.sign()).clamp(0, 1))
    step = EPS * gradient / gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    assert torch.allclose(fgsm(model, x, y, eps=EPS, norm="l2"), (x + step).clamp(0, 1), atol=1e-6)
    moved = fgsm(model, x, y, eps=EPS, norm="l1") != x
    assert moved.flatten(1).sum(1).tolist() == [19] * len(x)  # a tenth of 192


def test_keep_best_never_loses(batch, model):
    """With a step far too long the last iterate overshoots; the best seen does not."""
    x, y = batch
    kept, last = (
        cross_entropy(model(pgd(model, x, y, eps=0.3, alpha=0.6, steps=9, keep_best=k)), y) for k in (True, False)
    )
    assert bool((kept >= last - 1e-5).all()) and bool((kept > last + 1e-4).any())


def test_keep_best_is_not_luck():
    """Of many noisy values the highest is high by luck: the kept point must be judged again, by fresh draws."""

    def wild(x):  # the mean rises to 3 at z = 1, where the noise ends; lucky values far above 3 come before
        z = x.flatten(1).mean(1)
        return torch.stack([torch.zeros_like(z), 3 * z + 8 * (1 - z).detach() * torch.randn(len(x))], 1)

    torch.manual_seed(0)
    x, y = torch.full((200, 1, 2, 2), 0.5), torch.zeros(200, dtype=torch.int64)
    kept = pgd(wild, x, y, eps=0.5, steps=20, eot_iter=4, keep_best=True, loss="margin")
    assert float((kept.flatten(1).mean(1) > 0.9).float().mean()) > 0.7


def test_empty_batch(model):
    x = torch.empty(0, 3, 8, 8)
    assert pgd(model, x, torch.empty(0, dtype=torch.int64), eps=EPS).shape == x.shape


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(9, 3, 8, 8, dtype=torch.uint8)}, "floating point"),
        ({"y": torch.zeros(9)}, "y must be int64"),
        ({"y": torch.zeros(8, dtype=torch.int64)}, r"y must be int64 \[B\] = \[9\]"),
        ({"norm": "l3"}, "norm must be one of linf, l2, l1, got 'l3'"),
        ({"loss": "mse"}, "loss must be one of"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"eot_iter": 0}, "eot_iter must be at least 1"),
        ({"max_forward_batch": 0}, "max_forward_batch must be at least 1"),
        ({"eps": -0.1}, "eps must be at least 0"),
        ({"eps": float("nan")}, "eps must be at least 0"),
        ({"alpha": -0.1}, "alpha must be at least 0"),
        ({"eps": torch.zeros(3)}, r"eps must be a number or a tensor \[B\]"),
    ],
)
def test_errors(batch, model, change, message):
    arguments = {"x": batch[0], "y": batch[1], "eps": EPS} | change
    with pytest.raises(ValueError, match=message):
        pgd(model, arguments.pop("x"), arguments.pop("y"), **arguments)


def test_losses_by_hand():
    logits = torch.tensor([[3.0, 1.0, 0.5], [1.0, 4.0, 2.0]], requires_grad=True)
    y = torch.tensor([0, 2])
    assert margin(logits, y).tolist() == [-2.0, 2.0]
    assert dlr(logits, y).tolist() == pytest.approx([-2 / 2.5, 2 / 3])
    assert cross_entropy(logits, y)[0].item() == pytest.approx(-3 + torch.logsumexp(logits[0], 0).item())
    with pytest.raises(ValueError, match="at least 3 classes"):
        dlr(logits[:, :2], y)


def test_health_counts():
    health = GradientHealth()
    assert health.reliable and health.count("gradients") == 0
    g = torch.ones(10, 3)
    g[0, 1], g[1, 2], g[2], g[3] = torch.nan, torch.inf, 0, 0
    health.see_gradient(g)
    health.see_gradient(torch.ones(10, 3))
    assert (health.count("gradients"), health.count("nonfinite"), health.count("zero")) == (20, 2, 2)
    assert (health.nonfinite, health.zero) == (0.1, 0.1) and not health.reliable
    x = torch.rand(10, 3)
    moved = x.clone()
    moved[4:] += 1
    health.see_move(x, moved, torch.arange(10) < 8)
    assert (health.count("images"), health.count("unmoved"), health.unmoved) == (8, 4, 0.5)


@pytest.mark.parametrize(
    "nonfinite, zero, unmoved, reliable",
    [(0, 0, 0, True), (1, 0, 0, False), (0, 50, 0, True), (0, 51, 0, False), (0, 0, 10, True), (0, 0, 11, False)],
)
def test_health_thresholds(nonfinite, zero, unmoved, reliable):
    g = torch.ones(1000, 2)
    g[:nonfinite, 0] = torch.nan
    g[1000 - zero :] = 0
    health = GradientHealth()
    health.see_gradient(g)
    start, end = torch.zeros(1000, 1), torch.ones(1000, 1)
    end[:unmoved] = 0
    health.see_move(start, end, torch.ones(1000, dtype=torch.bool))
    assert health.reliable is reliable


def test_health_of_attacks(batch, model):
    x, y = batch
    good, nan, flat = GradientHealth(), GradientHealth(), GradientHealth()
    y = model(x).argmax(1)
    pgd(model, x, y, eps=EPS, steps=4, health=good)
    assert good.count("gradients") == 4 * len(x) and good.count("images") == len(x)
    assert good.reliable and good.unmoved == 0
    # sqrt has no finite slope at 0, and values there are fine
    pgd(lambda z: model(z) + (z - z).flatten(1).sum(1, keepdim=True).sqrt(), x, y, eps=EPS, steps=4, health=nan)
    assert nan.nonfinite == 1 and nan.unmoved == 1 and not nan.reliable
    pgd(lambda z: model(z.round()) + 0 * z.flatten(1)[:, :5], x, y, eps=0.01, steps=4, health=flat)
    assert flat.zero == 1 and not flat.reliable


def test_health_forgives_dlr_where_it_has_won():
    """DLR is 1, flat, once the true class is third: no fault of the model."""
    x = torch.rand(8, 1, 2, 2)

    def lost(z):
        v = z.flatten(1).mean(1)
        return torch.stack([v * 0, 1 + v, 2 + v], 1)

    health = GradientHealth()
    pgd(lost, x, torch.zeros(8, dtype=torch.int64), eps=EPS, steps=3, loss="dlr", health=health)
    assert health.count("gradients") == 24 and health.zero == 0 and health.reliable


def test_the_default_step_falls_from_eps_to_a_hundredth(monkeypatch):
    module = importlib.import_module("purify_fast.attacks.pgd")  # the package's attribute is the function

    steps, shares = [], []
    original = module.pgd_step
    record = lambda *a, **b: steps.append(float(a[3][0])) or shares.append(b["density"]) or original(*a, **b)  # noqa: E731
    monkeypatch.setattr(module, "pgd_step", record)
    model, x, y = torch.nn.Flatten(), torch.rand(2, 1, 2, 2), torch.tensor([0, 1])
    module.pgd(model, x, y, eps=0.5, steps=5, norm="l1")
    assert shares == pytest.approx([0.1 * 100 ** (-i / 4) for i in range(5)])
    steps.clear()
    module.pgd(model, x, y, eps=0.5, steps=5)
    assert steps == pytest.approx([0.5 * 100 ** (-i / 4) for i in range(5)])
    steps.clear()
    module.pgd(model, x, y, eps=0.5, steps=3, alpha=0.1)
    assert steps == pytest.approx([0.1] * 3)


def test_logits_that_do_not_depend_on_the_image_give_zero_gradients():
    x, y = torch.rand(3, 1, 2, 2), torch.tensor([0, 1, 2])
    gradient, value = input_gradient(lambda images: torch.eye(4)[: len(images)], x, y)
    assert gradient.shape == x.shape and gradient.abs().max() == 0 and value.shape == (3,)


def test_a_method_is_attacked_with_its_module_frozen():
    class Doubled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.head = torch.nn.BatchNorm2d(1), torch.nn.Linear(4, 3)

        def logits(self, x):
            assert not self.training and not self.head.weight.requires_grad
            return 2 * self.head(self.norm(x).flatten(1))

    model = Doubled().train()
    with frozen(model):
        pgd(model.logits, torch.rand(3, 1, 2, 2), torch.tensor([0, 1, 2]), eps=0.1, steps=2)
    assert model.training and model.head.weight.requires_grad and model.norm.num_batches_tracked == 0


@pytest.mark.parametrize("chunk", [1, 3, 8])
def test_no_pass_is_larger_than_chunk(chunk):
    sizes = []

    def model(x):
        sizes.append(len(x))
        return x.flatten(1)

    x, y = torch.rand(7, 1, 2, 2), torch.arange(7) % 4
    whole = input_gradient(model, x, y, eot_iter=4)
    sizes.clear()
    drawn_once_per_call(model, x, 4, chunk)
    tried = sum(sizes)
    sizes.clear()
    parts = input_gradient(model, x, y, eot_iter=4, max_forward_batch=chunk)
    assert max(sizes) <= chunk and sum(sizes) == 28 + tried and tried <= 24
    torch.testing.assert_close(parts, whole)


def test_keep_best_prefers_a_fooled_iterate_to_a_higher_loss():
    from purify_fast.attacks.search import better_of

    x, other = torch.zeros(3, 1), torch.ones(3, 1)
    score, better = torch.tensor([[0.0, 1.0, 1.0], [9.0, 1.0, 1.0]]), torch.tensor([[1.0, 0.0, 1.0], [1.0, 9.0, 2.0]])
    assert better_of(x, score, other, better)[0].flatten().tolist() == [1, 0, 1]
