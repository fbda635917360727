"""A step of `fit` is the step of a plain loop: its gradients, its rates, and what it reads of the model."""

import copy

import pytest
import torch
from small_models import Made
from small_runs import StopAt, Stopped, attack, carso_task, images, same
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from purify_fast.methods.purifier_task import noise_of
from purify_fast.speed.graphs.compiled_step import compiled
from purify_fast.speed.watch import matrix_weights
from purify_fast.training import Batch, ClassifierConfig, ClassifierTask, FitConfig, Lookahead, Task, fit
from purify_fast.training.loop import gradients, parts_of, train_step

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
