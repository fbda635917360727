"""The gradient of an attack's loss, also of several draws and past a purifier; what a call runs beside the network."""

import contextlib
import importlib
import sys
from collections import Counter

import pytest
import torch
from direct import direct
from input_gradients import input_gradient
from small_models import Purifying
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from purify_fast import Carso, frozen_copy
from purify_fast.attacks import BpdaModel, GradientHealth, fgsm, frozen, pgd
from purify_fast.attacks.base import Ball, ball_around, normal_in_ball, sample_in_ball
from purify_fast.attacks.bpda import classifier_of
from purify_fast.attacks.objective import faults
from purify_fast.attacks.pgd import reference
from purify_fast.models.classifiers import SmallCNN
from purify_fast.ops import aggregate

EPS = 0.2


ORDERS = {"linf": torch.inf, "l2": 2, "l1": 1}


def test_eot_is_the_explicit_mean(batch, model):
    """Folded draws give the gradient of the sum over draws; for a deterministic model, EOT changes nothing."""
    x, y = batch
    with frozen(model):
        one, value = input_gradient(model, x, y)
        for eot, chunk in ((4, None), (4, 9), (4, 20), (5, 1)):
            folded, mean = input_gradient(model, x, y, eot_iter=eot, max_forward_batch=chunk)
            assert torch.allclose(folded, eot * one, rtol=1e-4, atol=1e-6) and torch.allclose(mean, value, rtol=1e-5)
    a, b = (pgd(model, x, y, eps=EPS, steps=4, eot_iter=e) for e in (1, 3))
    assert torch.allclose(a, b, atol=1e-5)


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


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.05), ("l2", 0.5)])
def test_points_of_a_normal_start_are_in_the_ball(norm, eps):
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
    found = (pgd(model, x, y, eps=0.3, alpha=0.6, steps=9, keep_best=k) for k in (True, False))
    kept, last = (F.cross_entropy(model(images), y, reduction="none") for images in found)
    assert bool((kept >= last - 1e-5).all()) and bool((kept > last).any())


HEALTH = [(0, 0, 0, True), (1, 0, 0, False), (0, 50, 0, True), (0, 51, 0, False), (0, 0, 10, True), (0, 0, 11, False)]


@pytest.mark.parametrize("nonfinite, zero, unmoved, reliable", HEALTH)
def test_health_counts_and_thresholds(nonfinite, zero, unmoved, reliable):
    g = torch.ones(1000, 2)
    g[:nonfinite, 0] = torch.inf
    g[1000 - zero :] = 0
    health = GradientHealth()
    bad, still, exempt = faults(g, None).sum(1)
    health.add(gradients=len(g) - exempt, nonfinite=bad, zero=still)
    start, end = torch.zeros(1000, 1), torch.ones(1000, 1)
    end[:unmoved] = 0
    health.see_move(start, end, torch.ones(1000, dtype=torch.bool))
    names = ("gradients", "nonfinite", "zero", "images", "unmoved")
    assert [health.count(name) for name in names] == [1000, nonfinite, zero, 1000, unmoved]
    assert health.reliable is reliable


def test_health_forgives_dlr_where_it_has_won():
    """DLR is 1, flat, once the true class is third: no fault of the model."""
    x = torch.rand(8, 1, 2, 2)

    def lost(z):
        v = z.flatten(1).mean(1)
        return torch.stack([v * 0, 1 + v, 2 + v], 1)

    health = GradientHealth()
    direct(pgd, lost, x, torch.zeros(8, dtype=torch.int64), eps=EPS, steps=3, loss="dlr", health=health)
    # Such gradients are neither faults nor gradients that were usable, so they do not count.
    assert health.count("gradients") == 0 and health.zero == 0 and health.reliable


def test_the_default_step_falls_from_eps_to_a_hundredth(monkeypatch):
    module = importlib.import_module("purify_fast.attacks.pgd")  # the package's attribute is the function

    steps, shares = [], []
    original = module.STEP
    record = lambda *a, **b: steps.append(float(a[3][0])) or shares.append(a[8]) or original(*a, **b)  # noqa: E731
    monkeypatch.setattr(module, "STEP", record)
    model, x, y = torch.nn.Flatten(), torch.rand(2, 1, 2, 2), torch.tensor([0, 1])
    pgd(model, x, y, eps=0.5, steps=5, norm="l1")
    assert shares == pytest.approx([0.1 * 100 ** (-i / 4) for i in range(5)])
    steps.clear()
    pgd(model, x, y, eps=0.5, steps=5)
    assert steps == pytest.approx([0.5 * 100 ** (-i / 4) for i in range(5)])
    steps.clear()
    pgd(model, x, y, eps=0.5, steps=3, alpha=0.1)
    assert steps == pytest.approx([0.1] * 3)


def test_logits_that_do_not_depend_on_the_image_give_zero_gradients():
    x, y = torch.rand(3, 1, 2, 2), torch.tensor([0, 1, 2])
    gradient, value = input_gradient(lambda images: torch.eye(4)[: len(images)], x, y)
    assert gradient.shape == x.shape and gradient.abs().max() == 0 and value.shape == (3,)


# -- BPDA --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def forty():
    return torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def defence():
    """Rounds images to a few levels before a linear classifier, so its gradients are 0."""
    torch.manual_seed(1)
    return Purifying(nn.Sequential(nn.Flatten(), nn.Linear(64, 4)))


def labels(model, x):
    return model(x).argmax(1)


def test_the_gradient_is_the_classifiers_at_the_purified_image(defence, forty):
    y = labels(defence, forty)
    wrapped = BpdaModel.of(defence)
    with frozen(wrapped):
        got, value = input_gradient(wrapped, forty, y)
        want, at = input_gradient(defence.classifier, defence.purify(forty), y)
        assert torch.equal(got, want) and torch.equal(value, at) and got.abs().max() > 0
        assert torch.equal(wrapped(forty), defence(forty))
        assert input_gradient(defence, forty, y)[0].abs().max() == 0  # BPDA is for this case


@pytest.mark.parametrize("method", ["lse", "mean"])
def test_several_draws(forty, method):
    """K purified images: the logits are aggregated, and the gradient is the sum of those at each."""
    torch.manual_seed(2)
    classifier = SmallCNN(1, 4, (8, 8), 4).requires_grad_(False).eval()
    noise = 0.1 * torch.randn(3, 1, 8, 8)
    wrapped = BpdaModel(lambda x: (x[:, None] + noise).round(decimals=1), classifier, aggregation=method)
    y = torch.arange(40) % 4
    got, value = input_gradient(wrapped, forty, y)
    leaf = (forty[:, None] + noise).round(decimals=1).requires_grad_()
    logits = aggregate(classifier(leaf.flatten(0, 1)).unflatten(0, (40, 3)), method)
    each = nn.functional.cross_entropy(logits, y, reduction="none")
    torch.testing.assert_close(value, each.detach())
    torch.testing.assert_close(got, torch.autograd.grad(each.sum(), leaf)[0].sum(1))


def test_other_shapes_and_aggregations_are_refused(forty):
    wanted = r"purify must return images of the shape of x, \[40, 1, 8, 8\], .* got \[40, 1, 4, 4\]"
    with pytest.raises(ValueError, match=wanted):
        BpdaModel(nn.AvgPool2d(2), nn.Flatten())(forty)
    with pytest.raises(ValueError, match="aggregation must be one of lse"):
        BpdaModel(nn.AvgPool2d(2), nn.Flatten(), aggregation="max")
    with pytest.raises(TypeError, match=r"BPDA needs a defence with purify\(x\) and classifier, got Flatten"):
        BpdaModel.of(nn.Flatten())


def test_the_purifiers_module_is_frozen_too(forty):
    """The module of a method is named: no BatchNorm is in training mode under attack, and it comes back as it was."""

    class Normalising(Purifying):
        def __init__(self):
            super().__init__(nn.Sequential(nn.Flatten(), nn.Linear(64, 4)))
            self.norm = nn.BatchNorm2d(1)

        def purify(self, x):
            assert not self.training and not self.norm.weight.requires_grad
            return self.norm(x)

    model = Normalising()
    fgsm(BpdaModel(model.purify, model.classifier, modules=[model]), forty, torch.zeros(40, dtype=torch.int64), eps=0.1)
    assert model.training and model.norm.weight.requires_grad and model.norm.num_batches_tracked == 0


@pytest.mark.parametrize("mode", ["random", "fixed", "deterministic"])
@pytest.mark.parametrize("fast", [False, True])
def test_of_carso(forty, mode, fast):
    """Its forward pass is that of the defence, or of its copy, in every mode; x moves the purified image by itself."""
    torch.manual_seed(5)
    carso = Carso(SmallCNN(1, 4, (8, 8), 4), ["conv2"], (1, 8, 8), cond_dim=8, latent_dim=4, samples=3).eval()
    if fast:
        carso = frozen_copy(carso, forty, dtype=torch.bfloat16)
        assert classifier_of(carso) is carso.frozen_classifier
    contexts = {"fixed": lambda: carso.fixed_noise(3), "deterministic": carso.deterministic}
    wrapped = BpdaModel.of(carso)
    with contexts.get(mode, contextlib.nullcontext)(), frozen(wrapped):
        torch.manual_seed(6)
        want = carso(forty)
        torch.manual_seed(6)
        torch.testing.assert_close(wrapped(forty), want)
        gradient, _ = input_gradient(wrapped, forty, torch.zeros(40, dtype=torch.int64))
    assert gradient.isfinite().all() and (gradient != 0).flatten(1).any(1).all()


# -- functions and operators beside the network ------------------------------------------------------------------------
# Count the functions and operators that an attack runs beside the network, for a call and for a step.

#: Operators that launch nothing.
VIEWS = {"view", "_unsafe_view", "t", "detach", "alias", "expand", "unsqueeze", "squeeze", "transpose", "as_strided"}
VIEWS |= {"promote_types", "select", "slice", "split", "unbind"}
#: Comprehensions are functions of their own before Python 3.12.
INLINED = ("<listcomp>", "<dictcomp>", "<setcomp>")


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval()


def four_images() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(4)


def calls(run) -> Counter:
    """The functions of the package that a call passes, and how often."""
    found = Counter()

    def note(frame, event, argument):
        code = frame.f_code
        if event == "call" and "purify_fast" in code.co_filename and not code.co_name.endswith(INLINED):
            found[code] += 1

    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
    return found


class Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function._schema.name.partition("::")[2] not in VIEWS
        return function(*args, **(kwargs or {}))


def operators_of_a_step(attack) -> int:
    counts = []
    for steps in (5, 6):
        with Operators() as operators:
            attack(steps)
        counts.append(operators.count)
    return counts[1] - counts[0]


def test_a_plain_call_passes_few_functions(monkeypatch):
    # In a process in which something was compiled, an attack also looks for steps to compile.
    monkeypatch.delitem(sys.modules, "purify_fast.speed.graphs.compiled_step", raising=False)
    model, (x, y) = network(), four_images()
    run = lambda steps: pgd(model, x, y, 0.1, steps=steps, alpha=0.01)  # noqa: E731
    run(2)
    five, six = calls(lambda: run(5)), calls(lambda: run(6))
    assert len(five) <= 45 and sum(six.values()) - sum(five.values()) <= 10


@pytest.mark.parametrize("options", [{}, {"norm": "l2"}, {"alpha": None}], ids=["linf", "l2", "falling"])
def test_a_step_takes_few_operators(options):
    model, (x, y) = network().requires_grad_(False), four_images()
    how = {"alpha": 0.01, "random_start": False} | options
    ours = operators_of_a_step(lambda steps: pgd(model, x, y, 0.1, steps=steps, **how))
    assert ours <= 14
    if not options:
        assert ours <= operators_of_a_step(lambda n: reference(model, x, y, x, eps=0.1, alpha=0.01, steps=n)) + 3
