"""TRADES and MART against plain loops, written from the papers; and what trainers expect of `fit`. The tests of a
step of `fit` follow."""

import copy
import dataclasses

import pytest
import small_runs
import torch
from small_models import Made, NotCopied, first_digits, images_and_labels
from small_runs import StopAt, Stopped, attack, carso_task, images, same
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from purify_fast.attacks.base import ball_around, normal_in_ball, sample_in_ball
from purify_fast.methods.arrest import ArrestConfig
from purify_fast.methods.atop import AtopConfig
from purify_fast.methods.carso import CarsoConfig
from purify_fast.methods.purifier_task import noise_of
from purify_fast.models.classifiers import SmallCNN
from purify_fast.speed.frozen_copy import AttackedCopy, FrozenCopy
from purify_fast.speed.graphs.compiled_step import compiled
from purify_fast.speed.watch import matrix_weights
from purify_fast.training import (
    Batch,
    ClassifierConfig,
    ClassifierTask,
    FitConfig,
    Lookahead,
    Task,
    TrainingAttack,
    fit,
)
from purify_fast.training.classifier import mart, trades
from purify_fast.training.loop import gradients, parts_of, train_step
from purify_fast.training.sources import InMemory, step_seed
from purify_fast.training.task import settings

EPS, ALPHA = 0.1, 0.04
ATTACK = TrainingAttack(EPS, 3, alpha=ALPHA)


def network():
    torch.manual_seed(0)
    convolution = nn.Conv2d(1, 4, 3, 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(4), nn.SiLU(), nn.Flatten(), nn.Linear(4 * 49, 10))


def plain(objective, x, y, config, beta, dtype):
    """The weights after a plain loop."""
    model = network().to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=5e-4)
    source, task = InMemory(x, y, config, x.device), ClassifierTask(network(), ClassifierConfig())
    kl = nn.KLDivLoss(reduction="none")
    for step in range(config.epochs * source.steps):
        raw, labels, ids = list(source.epoch(step // source.steps, 0))[step % source.steps]
        clean, seeds = raw.to(dtype) / 255, {"seed": step_seed(config.seed, step), "sample_ids": ids}
        ball = ball_around(clean.float(), EPS)
        model.eval()
        with torch.no_grad():
            natural = F.softmax(model(clean), 1)
        if objective == "trades":
            point = normal_in_ball(clean.float(), ball, 0.001, **seeds).to(dtype)
        else:
            point = sample_in_ball(clean.float(), ball, **seeds).to(dtype)
        for _ in range(3):
            point.requires_grad_()
            if objective == "trades":
                loss = kl(F.log_softmax(model(point), 1), natural).sum()
            else:
                loss = F.cross_entropy(model(point), labels)
            (gradient,) = torch.autograd.grad(loss, point)
            point = point.detach() + ALPHA * gradient.sign()
            point = torch.min(torch.max(point, clean - EPS), clean + EPS).clamp(0, 1)
        model.train()
        logits, attacked = model(clean), model(point)
        p, q = F.softmax(logits, 1), F.softmax(attacked, 1)
        divergence = (p * (p.log() - q.log())).sum(1)
        if objective == "trades":
            loss = F.cross_entropy(logits, labels) + beta * divergence.mean()
        else:
            rows = torch.arange(len(labels))
            others = q.clone()
            others[rows, labels] = 0
            boosted = -q[rows, labels].log() - (1 - others.max(1).values).log()
            loss = (boosted + beta * divergence * (1 - p[rows, labels])).mean()
        optimizer.param_groups[0]["lr"] = task.learning_rate(step / (config.epochs * source.steps), 0, 1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


@pytest.mark.parametrize(("objective", "beta"), [("trades", 6.0), ("mart", 5.0)])
def test_twenty_steps_have_the_weights_of_a_plain_loop_of_the_paper(objective, beta):
    (x, y), config = first_digits(160), FitConfig(4, 32)
    exact, usual = (plain(objective, x, y, config, beta, dtype) for dtype in (torch.float64, torch.float32))
    made = ClassifierTask(network(), ClassifierConfig(attack=ATTACK, objective=objective))
    fit(made, x, y, config, progress=False)
    models = network(), exact, usual, made.model
    start, *ends = (nn.utils.parameters_to_vector(model.parameters()).double() for model in models)
    wanted, rounded, found = (end - start for end in ends)
    rounding = (rounded - wanted).norm()
    assert rounding < 5e-3 * wanted.norm() and (found - wanted).norm() < 4 * rounding


@pytest.mark.parametrize("loss", [trades, mart])
def test_the_gradient_is_finite_where_a_probability_is_0(loss):
    clean = torch.tensor([[120.0, 0, 1], [1, 2, 0]], requires_grad=True)
    attacked, y = torch.tensor([[60.0, 1, 0], [0.5, 1.5, 1]]), torch.tensor([0, 1])
    (gradient,) = torch.autograd.grad(loss(clean, attacked, y, 6.0), clean)
    exact = clean.detach().double().requires_grad_()
    (right,) = torch.autograd.grad(loss(exact, attacked.double(), y, 6.0), exact)
    torch.testing.assert_close(gradient, right.float(), rtol=1e-3, atol=1e-6)


# -- the attack of every training: eps, step and warm-up mean the same in all of them ----------------------------------
CONFIGS = (ClassifierConfig(), CarsoConfig(), AtopConfig(), ArrestConfig())


def test_a_step_follows_from_eps_unless_it_is_given():
    attack = TrainingAttack(eps=0.2, steps=10)
    assert attack.step_size(0.2) == pytest.approx(0.05) and attack.step_size(0.1) == pytest.approx(0.025)
    torch.testing.assert_close(attack.step_size(torch.tensor([0.1, 0.2])), torch.tensor([0.025, 0.05]))
    assert dataclasses.replace(attack, relative_alpha=2.0).step_size(0.2) == pytest.approx(0.04)
    # a given one is a constant, whatever the radius, as the published weak attacks have it
    assert dataclasses.replace(attack, alpha=0.03).step_size(0.1) == 0.03


@pytest.mark.parametrize("alpha", [None, 0.06])
def test_eps_and_step_rise_together(alpha):
    attack = TrainingAttack(eps=0.2, steps=10, alpha=alpha, eps_warmup=0.5)
    now = [attack.at_epoch(epoch, 8) for epoch in range(8)]
    assert [a.eps for a in now] == pytest.approx([0.05, 0.1, 0.15, 0.2, 0.2, 0.2, 0.2, 0.2])
    whole = attack.step_size(0.2)
    assert [a.step_size(a.eps) for a in now] == pytest.approx([whole * a.eps / 0.2 for a in now])
    assert all(a.eps_warmup == 0 and a.at_epoch(0, 8) == a for a in now)


OUT_OF_RANGE = [
    ({"eps": -0.1}, "eps must be at least 0, got -0.1"),
    ({"eps": 8.0}, r"at most 1 for linf, in image units, got 8.0: is 8/255 meant\?"),
    ({"norm": "l3"}, "norm must be one of linf, l2, l1, got 'l3'"),
    ({"alpha": 0.0}, "alpha must be above 0 and finite, got 0.0"),
    ({"alpha": 0.03}, "alpha must be at least eps / steps = 0.03333, got 0.03"),
    ({"relative_alpha": 0.9}, "alpha must be at least eps / steps = 0.03333, got 0.03"),
]


@pytest.mark.parametrize(("wrong", "message"), OUT_OF_RANGE)
def test_settings_out_of_range_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        TrainingAttack(**{"eps": 0.1, "steps": 3, **wrong})
    assert TrainingAttack(eps=3.0, steps=3, norm="l2")


def test_a_norm_is_read_as_others_write_it():
    attack = TrainingAttack(eps=0.1, steps=3, norm="L-inf")
    assert attack == TrainingAttack(eps=0.1, steps=3) and attack.norm == "linf"
    assert TrainingAttack(eps=3.0, steps=3, norm="L2").at_epoch(0, 2).norm == "l2"


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
def test_every_training_has_one_and_its_settings_are_a_flat_table(config):
    assert isinstance(config.attack, TrainingAttack)
    flat, names = settings(config), {field.name for field in dataclasses.fields(config)}
    attack = {field.name for field in dataclasses.fields(TrainingAttack)}
    assert not names & attack and flat.keys() == names - {"attack"} | attack and flat["eps"] == config.attack.eps


# -- trainings attack a frozen copy that has the weights of the moment, and train the model itself ---------------------
SHAPE = (1, 16, 16)


def task(objective):
    torch.manual_seed(0)
    attack = TrainingAttack(eps=0.1, steps=3)
    return ClassifierTask(SmallCNN(1, 10, SHAPE[1:], 8), ClassifierConfig(objective=objective, attack=attack))


def batch():
    return Batch(*images_and_labels(8, SHAPE, 10), torch.arange(8), 7, 0, 1)


@pytest.mark.parametrize("objective", [None, "trades", "mart"])
def test_every_step_attacks_the_present_weights(objective, monkeypatch):
    monkeypatch.setattr("purify_fast.speed.frozen_copy.FEWEST_WEIGHTS", 1)
    seen, original = [], TrainingAttack.run

    def run(self, model, *given, **options):
        seen.append((model, model(batch().x).detach()))
        return original(self, model, *given, **options)

    monkeypatch.setattr(TrainingAttack, "run", run)
    made = task(objective)
    for _ in range(3):
        made.train()
        with torch.no_grad():
            wanted = made.model.eval()(batch().x)
            made.train()
        loss, _ = made.training_step(batch())
        loss.backward()
        assert isinstance(seen[-1][0], FrozenCopy) and not torch.equal(seen[-1][1], wanted * 0)
        torch.testing.assert_close(seen[-1][1], wanted, rtol=1e-4, atol=1e-5)
        made.optimizer.step()
    assert len({id(model) for model, _ in seen}) == 1 and not torch.allclose(seen[0][1], seen[-1][1], atol=1e-4)


def test_small_models_and_models_without_a_copy_are_attacked_themselves():
    odd = NotCopied(lambda self, x: self.fc(x.flatten(1)), fc=nn.Linear(256, 1000))
    small, x = SmallCNN(1, 10, SHAPE[1:], 8), torch.rand(2, *SHAPE)
    assert AttackedCopy(small, torch.float32).now(x) is small
    assert AttackedCopy(small, torch.bfloat16).now(x).dtype == torch.bfloat16
    with pytest.warns(RuntimeWarning, match="NotCopied is attacked itself, .* no copies"):
        assert AttackedCopy(odd, torch.float32).now(x) is odd


def test_a_resumed_run_attacks_a_copy_of_the_form_in_its_checkpoint(tmp_path, monkeypatch):
    """The comparison depends on the weights, so the same run could choose another form later."""
    monkeypatch.setattr("purify_fast.speed.frozen_copy.FEWEST_WEIGHTS", 1)
    config, images = FitConfig(2, 16, checkpoint_seconds=0), small_runs.images()
    original = small_runs.task(attack=TrainingAttack(eps=0.1, steps=1))
    with pytest.raises(small_runs.Stopped):
        fit(original, *images, config, tmp_path, callbacks=[small_runs.StopAt(3)])
    assert original.attacked.decision == ["torch.float32", False]
    resumed = small_runs.task(attack=TrainingAttack(eps=0.1, steps=1))
    monkeypatch.setattr("purify_fast.speed.frozen_copy._compared", None)
    fit(resumed, *images, config, tmp_path)
    assert resumed.attacked.now(images[0][:1].float()).plain is False
    for decision in ("model", ["torch.bfloat16", True]):
        chosen = AttackedCopy(resumed.model, torch.bfloat16)
        chosen.decision = decision
        made = chosen.now(images[0][:1].float() / 255)
        assert made is resumed.model if decision == "model" else made.dtype == torch.bfloat16 and made.plain


# -- a step of `fit` against a plain loop ------------------------------------------------------------------------------
# A step of `fit` is the step of a plain loop: its gradients, its rates, and what it reads of the model.

X, Y = images()


class Own(Task):
    """A linear network with an optimizer of the caller's."""

    def __init__(self, optimizer, rate=0.5):
        torch.manual_seed(0)
        self.model, self.rate = nn.Sequential(nn.Flatten(), nn.Linear(64, 2)), rate
        self.optimizer = optimizer(self.model.parameters())

    def training_step(self, batch):
        return F.cross_entropy(self.model(batch.x), batch.y), {}

    def learning_rate(self, progress, epoch, epochs):
        return self.rate * (1 - progress)

    def describe(self):
        return {"task": "own"}


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_loss_that_is_a_sum_is_that_of_the_whole_batch_in_parts_too(reduction):
    found = []
    for parts in (1, 4):
        task = carso_task(reduction=reduction, kl_delay=0.0, adversarial_fraction=0.0, allow_no_adversarial=True)
        x = torch.rand((16, 1, 16, 16), generator=torch.Generator().manual_seed(0))
        ((_, metrics),) = gradients(task, Batch(x, torch.arange(16) % 10, torch.arange(16), 3), parts)
        weights = [weight.grad for weight in task.defence.parameters() if weight.grad is not None]
        found.append((metrics["loss"], *weights))
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-4)


def test_the_noise_of_a_part_is_that_of_its_images_in_the_whole_batch():
    defence, x = carso_task("pipeline").defence, torch.rand(9, 1, 16, 16)
    batch, found = Batch(x, torch.zeros(9).long(), torch.arange(9), 3), []
    for number in (1, 2):
        for part in parts_of(batch, number):
            torch.manual_seed(0)
            with noise_of(defence, part):
                found.append(defence.prior_latents(len(part.x), 2, x.device))
    whole, *parts = found
    assert torch.equal(torch.cat(parts), whole)


class Counted(nn.Module):
    """A parametrization that counts how often it is computed."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        return 2 * x


def test_weights_are_counted_without_computing_them():
    layer = parametrize.register_parametrization(nn.Linear(8, 4), "weight", Counted())
    model = nn.Sequential(nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3), layer)
    calls = layer.parametrizations.weight[0].calls
    assert matrix_weights(model) == 12 + 32 and layer.parametrizations.weight[0].calls == calls


def test_spectral_norm_moves_once_a_step():
    norms = []
    for radius in (0.0, 0.1):
        torch.manual_seed(0)
        layer = nn.utils.parametrizations.spectral_norm(nn.Linear(64, 2))
        task = ClassifierTask(nn.Sequential(nn.Flatten(), layer), ClassifierConfig(attack(eps=radius)))
        task.optimizer = torch.optim.SGD(task.model.parameters(), lr=0.0)
        task.learning_rate = lambda progress, epoch, epochs: 0.0
        fit(task, X, Y, FitConfig(1, 16), progress=False)
        norms.append(layer.parametrizations.weight[0]._u.clone())
    assert torch.equal(*norms)


@pytest.mark.parametrize("own", [0.9e-3, 1e-3, 1.1e-3])
def test_the_schedule_is_that_of_the_largest_rate(own):
    """Also if a group has the default rate of its optimizer's class by chance."""

    def groups(weights):
        weight, bias = weights
        return torch.optim.AdamW([{"params": weight, "lr": 0.01}, {"params": bias, "lr": own}])

    task = Own(groups)
    task.learning_rate = lambda progress, epoch, epochs: 0.01
    fit(task, X, Y, FitConfig(1, 16), progress=False)
    assert [group["lr"] for group in task.optimizer.param_groups] == pytest.approx([0.01, own])


class Clipped(torch.optim.Optimizer):
    """Clips gradients, and takes a step of another optimizer, whose groups are its own."""

    def __init__(self, inner):
        super().__init__(inner.param_groups, inner.defaults)
        self.inner, self.param_groups = inner, inner.param_groups

    def step(self, closure=None):
        for group in self.param_groups:
            nn.utils.clip_grad_norm_(group["params"], 1.0)
        return self.inner.step(closure)


INNER = {
    "SGD": lambda weights: torch.optim.SGD(weights, 0.5, momentum=0.9),
    "AdamW": lambda weights: torch.optim.AdamW(weights, 0.5),
}


@pytest.mark.parametrize("inner", INNER)
def test_an_optimizer_around_another_trains_by_the_schedule_and_is_resumed(inner, tmp_path):
    def run(folder=None, *callbacks):
        task = Own(lambda weights: Clipped(INNER[inner](weights)))
        fit(task, X, Y, FitConfig(2, 16, checkpoint_seconds=0), folder, progress=False, callbacks=callbacks)
        return task

    whole = run()
    assert whole.optimizer.inner.param_groups[0]["lr"] == pytest.approx(0.5 / 8)
    plain = Own(INNER[inner])

    def clips(*given):
        nn.utils.clip_grad_norm_(plain.model.parameters(), 1.0)

    plain.optimizer.register_step_pre_hook(clips)
    fit(plain, X, Y, FitConfig(2, 16), progress=False)
    with pytest.raises(Stopped):
        run(tmp_path, StopAt(6))
    for other in (plain, run(tmp_path)):
        assert all(map(torch.equal, whole.model.parameters(), other.model.parameters()))


class Apart(torch.optim.SGD):
    """Holds an optimizer whose groups are others."""

    def __init__(self, weights):
        weights = list(weights)
        super().__init__(weights, 0.1)
        self.inner = torch.optim.SGD(weights, 0.1)


class NeedsClosure(torch.optim.SGD):
    def step(self, closure=None):
        assert closure is not None, "this optimizer requires a closure"


UNSERVED = [
    (Apart, "optimizer Apart must share its param_groups with the SGD that it holds"),
    (torch.optim.LBFGS, "optimizer must take a step without a closure, but LBFGS says: .*closure"),
    (NeedsClosure, "but NeedsClosure says: this optimizer requires a closure"),
]


@pytest.mark.parametrize(("optimizer", "message"), UNSERVED)
def test_an_optimizer_that_cannot_be_served_is_named(optimizer, message, tmp_path):
    task = Own(optimizer)
    before = copy.deepcopy(task.model.state_dict())
    with pytest.raises((ValueError, TypeError), match=message):
        fit(task, X, Y, FitConfig(1, 16), tmp_path, progress=False)
    torch.testing.assert_close(task.model.state_dict(), before, rtol=0, atol=0)


class Averaging(torch.optim.SGD):
    """Predicts with the mean of its weights, as schedule-free optimizers do, and trains others."""

    def __init__(self, weights):
        super().__init__(list(weights), 0.5)
        self.means = [weight.detach().clone() for weight in self.param_groups[0]["params"]]
        self.param_groups[0] |= {"steps": 0, "training": False}

    def _swap(self, training):
        group = self.param_groups[0]
        if group["training"] != training:
            group["training"] = training
            for k, weight in enumerate(group["params"]):
                kept = weight.detach().clone()
                weight.data.copy_(self.means[k])
                self.means[k] = kept

    def train(self):
        self._swap(True)

    def eval(self):
        self._swap(False)

    def step(self, closure=None):
        assert self.param_groups[0]["training"]
        super().step(closure)
        group = self.param_groups[0]
        group["steps"] += 1
        for mean, weight in zip(self.means, group["params"], strict=True):
            mean.lerp_(weight.detach(), 1 / group["steps"])


@pytest.mark.parametrize("around", [lambda one: one, Lookahead])
def test_an_optimizer_with_modes_is_validated_and_ends_with_the_weights_to_predict_with(around):
    task, validated, trained = Own(lambda weights: around(Averaging(weights))), [], []
    task.validate = lambda batch: validated.append(task.model[1].weight.clone()) or {"loss": torch.zeros(())}
    step = task.training_step
    task.training_step = lambda batch: trained.append(task.model[1].weight.detach().clone()) or step(batch)
    fit(task, X, Y, FitConfig(2, 16, validation_share=0.25), progress=False)
    optimizer = getattr(task.optimizer, "inner", task.optimizer)
    assert len(trained) == 6 and len(validated) == 2
    assert not optimizer.param_groups[0]["training"] and torch.equal(validated[-1], task.model[1].weight)
    if optimizer is task.optimizer:
        # The mean of the weights after the steps, of which the last are the kept ones.
        torch.testing.assert_close(validated[-1], torch.stack([*trained[1:], optimizer.means[0]]).mean(0))


@pytest.mark.parametrize("enabled", [False, True])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_autocast_of_the_caller_decides_nothing(enabled, precision):
    """Also the weights are those of the moment, although the caller's autocast would keep converted ones."""
    tasks = []
    for _ in range(2):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Linear(8, 2))
        tasks.append(ClassifierTask(model, ClassifierConfig(precision=precision)))
    task, plain = tasks
    task.optimizer, plain.optimizer = (torch.optim.SGD(one.model.parameters(), 0.5) for one in tasks)
    task.learning_rate, seen, step = (lambda *given: 0.5), [], task.training_step
    task.training_step = lambda batch: seen.append(batch) or step(batch)
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        fit(task, X, Y, FitConfig(2, 16), progress=False)
    for batch in seen:
        train_step(plain, batch)
    assert same(task, plain)


def test_a_part_that_stays_in_float32_has_the_gradient_of_float32_when_it_is_compiled(monkeypatch):
    def forward(self, x):
        h = self.first(x)
        with torch.autocast("cpu", enabled=False):
            return self.last(h.float())

    torch.manual_seed(0)
    model, x = Made(forward, first=nn.Linear(8, 8), last=nn.Linear(8, 4)), torch.rand(4, 8)
    found = []
    for function in (model, compiled(model, backend="aot_eager")):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = function(x).square().sum()
        loss.backward()
        found.append(model.last.weight.grad)
    assert torch.equal(*found)


def test_a_mask_of_infinite_weights_is_no_divergence():
    def forward(self, x):
        return self.last((self.first(x.flatten(1)) + self.mask).softmax(1))

    model = Made(forward, first=nn.Linear(64, 4), last=nn.Linear(4, 2))
    model.mask = nn.Parameter(torch.tensor([0.0, 0.0, 0.0, -torch.inf]), requires_grad=False)
    fit(ClassifierTask(model, ClassifierConfig()), X, Y, FitConfig(1, 16), progress=False)
