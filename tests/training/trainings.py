"""Small trainings of every kind, by one process or by several together."""

import contextlib
import dataclasses
import importlib

import torch
import torch.distributed as dist
from captures import Rerun
from small_runs import atop_task, attack, carso_task, classifier_task
from torch import nn

from purify_fast.models.classifiers import SmallCNN
from purify_fast.models.layers import BatchNorm1d, BatchNorm2d
from purify_fast.speed import StepGraphs
from purify_fast.training import ClassifierConfig, ClassifierTask, FitConfig, fit
from purify_fast.training.distributed import from_first


def loop_of(batch=32):
    return FitConfig(2, batch, padding=1, flip=True, checkpoint_seconds=0)


def small_set():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (100, 1, 16, 16), generator=generator, dtype=torch.uint8), torch.arange(100) % 10


class OwnNorm(nn.BatchNorm2d):
    """A BatchNorm whose forward pass is the user's."""

    def forward(self, input):
        return super().forward(input)


def of_others():
    """A classifier with BatchNorms of torch and of timm, and with other settings than their defaults."""
    first: nn.Module = nn.ReLU()
    with contextlib.suppress(ImportError):
        first = importlib.import_module("timm.layers").BatchNormAct2d(3)
    second = nn.Conv2d(3, 3, 3, bias=False), nn.BatchNorm2d(3, eps=1e-2, momentum=0.3), nn.ReLU()
    return nn.Sequential(nn.Conv2d(1, 3, 3, bias=False), first, *second, nn.Flatten(), nn.Linear(432, 10))


# signs of gradients near 0 would differ by rounding
ATTACK = attack(norm="l2")
STANDARD = dataclasses.replace(ATTACK, relative_alpha=2.0, eps_warmup=0.2)
OWN = {"attack": ATTACK, "learning_rate": 1e-3}
TASKS = {
    "classifier": lambda: ClassifierTask(
        nn.Sequential(nn.Flatten(), nn.Linear(256, 12), nn.Mish(), BatchNorm1d(12), nn.Linear(12, 10)),
        ClassifierConfig(STANDARD),
    ),
    "convolutional": lambda: classifier_task(attack=STANDARD),
    "BatchNorms of others": lambda: ClassifierTask(of_others(), ClassifierConfig(STANDARD)),
    "atop pipeline": lambda: atop_task("pipeline", **OWN),
    "atop gan": lambda: atop_task(attack_method="pgd", gan_grad=True, discriminator_width=2, **OWN),
    "pipeline": lambda: carso_task("pipeline", train_samples=2, attack=ATTACK),
    "published": lambda: carso_task(reduction="sum", optimizer="radam_lookahead", kl_delay=0.0, **OWN),
}


def small_task(kind):
    torch.manual_seed(0)
    return TASKS[kind]()


def weights(kind, folder=None, batch=32):
    """Train; the weights, the last metrics and the number of steps it took."""
    task, steps = small_task(kind), []
    step = task.training_step
    task.training_step = lambda batch: steps.append(batch) or step(batch)
    if dist.is_initialized() and dist.get_rank() > 0:  # they are to start from the first one's
        for parameter in task.model.parameters():
            parameter.data.add_(1.0)
    last = fit(task, *small_set(), loop_of(batch), folder)
    kinds = [type(part) for part in task.model.modules()]
    return {"state": task.model.state_dict(), "last": last, "steps": len(steps), "kinds": kinds}


def captured(kind):
    """Train with attack steps that are captured, on a stand-in for graphs, and a validation after each epoch.

    Of the convolutional network's trainings, the second process captures nothing.
    """
    task, validated = small_task(kind), []
    validate = task.validate
    task.validate = lambda batch: validated.append(len(batch.x)) or validate(batch)
    capture = Rerun()
    if unable := kind == "convolutional" and dist.is_initialized() and dist.get_rank() == 1:
        capture.error = RuntimeError("operation not permitted")
    task.graphs = StepGraphs("always", capture=capture)
    last = fit(task, *small_set(), dataclasses.replace(loop_of(), epochs=3, validation_share=0.25))
    assert (task.graphs.captures > 0) != unable and bool(task.graphs.refusals) == unable
    return {"state": task.model.state_dict(), "last": last, "validated": validated}


def batchnorm(layer, shape, first, mean, dtype):
    """One forward and backward pass, the first process with ``first`` of the images, the second with the rest."""
    x, outer, made = batchnorm_inputs(layer, shape, mean, dtype)
    part = slice(None)
    if dist.is_initialized():
        part = slice(0, first) if dist.get_rank() == 0 else slice(first, None)
    x = x[part].requires_grad_()
    y = made.train()(x)
    (y * outer[part]).sum().backward()
    return [y.detach(), x.grad, made.weight.grad, made.bias.grad, made.running_mean, made.running_var]


def batchnorm_inputs(layer, shape, mean, dtype):
    generator = torch.Generator().manual_seed(0)
    x, outer = (torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(2))
    made = {"1d": BatchNorm1d, "2d": BatchNorm2d, "torch 1d": nn.BatchNorm1d, "torch 2d": nn.BatchNorm2d}[layer](3)
    made.weight.data, made.bias.data = torch.tensor([0.5, 2.0, -1.0]), torch.tensor([0.0, 1.0, 3.0])
    # the bfloat16 of an autocast, in which layers keep their float32
    return (x + mean).to(dtype), outer.to(dtype), made.to(torch.float32 if dtype == torch.bfloat16 else dtype)


def refusals():
    """What `fit` says to what it cannot train."""
    rank = dist.get_rank()
    x, y = small_set()

    def said(task, x=x, loop=None):
        try:
            fit(task, x, y, loop or loop_of())
        except (ValueError, FloatingPointError) as error:
            return f"{type(error).__name__}: {error}"

    users = nn.Sequential(OwnNorm(1), nn.Flatten(), nn.Linear(256, 10))
    return {
        "own batchnorm": said(ClassifierTask(users, ClassifierConfig())),
        "data": said(small_task("convolutional"), x + rank),
        "an image each": said(small_task("classifier"), loop=FitConfig(1, 2, steps_per_epoch=2)),
        "compiled": said(small_task("classifier"), loop=FitConfig(1, 32, compile=True)),
        "diverged": said(_Diverging(SmallCNN(width=2), ClassifierConfig())),
    }


class Unpicklable(Exception):
    """One that cannot be made anew from what it was pickled to."""

    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")


def first_fails():
    """What `from_first` raises in each process when the first one is interrupted, ends or fails."""

    def said(error):
        def make():
            raise error

        try:
            from_first(make)
        except BaseException as raised:
            return f"{type(raised).__name__}: {raised}"

    return [said(error) for error in (KeyboardInterrupt(), SystemExit(143), Unpicklable("a", "b"))]


class _Diverging(ClassifierTask):
    def training_step(self, batch):
        loss, metrics = super().training_step(batch)
        return loss * (float("nan") if dist.get_rank() == 1 else 1.0), metrics
