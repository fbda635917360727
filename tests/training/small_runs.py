"""Trainings of a second, which several files of tests share: images, tasks, one run."""

import torch
from small_models import atop, carso, images_and_labels

from purify_fast.methods.arrest import ArrestConfig, ArrestTask
from purify_fast.methods.atop import AtopConfig, AtopTask
from purify_fast.methods.carso import CarsoConfig, CarsoTask
from purify_fast.models import SmallCNN
from purify_fast.training import Batch, ClassifierConfig, ClassifierTask, FitConfig, TrainingAttack, fit


def images(n=64):
    """Images of two classes, 8 x 8."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (n, 1, 8, 8), dtype=torch.uint8, generator=generator), torch.arange(n) % 2


def task(width=2, **options):
    """The training of a classifier, from the same weights each time."""
    torch.manual_seed(0)
    return ClassifierTask(SmallCNN(1, 2, (8, 8), width), ClassifierConfig(**options))


def same(one, other):
    """Tell whether two tasks, models or dicts of tensors are equal."""
    models = (getattr(each, "model", each) for each in (one, other))
    one, other = (each if isinstance(each, dict) else each.state_dict() for each in models)
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def train(folder, epochs=3, **options):
    """The weights after so many epochs of four steps."""
    made = task()
    fit(made, *images(), FitConfig(epochs, 16, **options), folder, progress=False)
    return made.model.state_dict()


SHAPE, EPS = (1, 16, 16), 0.1


def batch(seed=1, n=16, device="cpu"):
    """Images in [0, 1], with labels of ten classes."""
    x, y = images_and_labels(n, SHAPE, 10, seed)
    return Batch(*(each.to(device) for each in (x, y, torch.arange(n) + 50 * seed)), seed, 0, 10)


def attack(**options):
    """PGD of two steps."""
    return TrainingAttack(**{"eps": EPS, "steps": 2, **options})


def classifier_task(**options):
    torch.manual_seed(0)
    return ClassifierTask(SmallCNN(width=4), ClassifierConfig(**options))


def arrest_task(device="cpu", network=SmallCNN, **options):
    torch.manual_seed(0)
    return ArrestTask(network(width=4).to(device), ArrestConfig(**{"attack": attack(), **options}), SHAPE)


def carso_task(target="classifier", device="cpu", **options):
    return CarsoTask(carso(device), CarsoConfig(attack_target=target, **{"attack": attack(), **options}))


def atop_task(target="classifier", steps=2, device="cpu", **options):
    """With FGSM against the classifier, as published, and PGD against the pipeline."""
    method, steps = ("fgsm", 10) if target == "classifier" else ("pgd", steps)
    settings = {"attack_method": method, "attack_target": target, "attack": attack(steps=steps), "cls_delay": 0}
    return AtopTask(atop(sigma=0.1).to(device), AtopConfig(**(settings | options)))


class Listener:
    """Hears of a training and does nothing; it need not be a `Callback`."""

    def on_step(self, state):
        pass

    def on_epoch(self, state):
        pass

    def on_end(self, state):
        pass


def on_step(call):
    """A listener that calls a function after each step."""
    made = Listener()
    made.on_step = call
    return made


class Stopped(Exception):
    pass


class StopAt(Listener):
    """Ends a training after a step of it, before that is in a checkpoint."""

    def __init__(self, step):
        self.step = step

    def on_step(self, state):
        if state.step == self.step:
            raise Stopped
