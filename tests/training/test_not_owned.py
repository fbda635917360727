"""A training follows what it does not own: generators of a model, images of a loader, changes by callbacks."""

import contextlib
import os
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small_models import Made
from small_runs import Listener, StopAt, Stopped, images, same
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from purify_fast.methods.arrest import ArrestConfig, ArrestTask
from purify_fast.training import ClassifierConfig, ClassifierTask, FitConfig, fit

X, Y = images()


def interrupted(make, folder, at=6, again=None, callbacks=(), **config):
    """The task of an undisturbed run, and that of a run that was stopped after a step and begun again."""
    found = []
    for place, stops in ((None, ()), (folder, (at,)), (folder, ())):
        task, x, y = make() if place is None or stops or again is None else again()
        stop = contextlib.suppress(Stopped) if stops else contextlib.nullcontext()
        with stop:
            loop, listeners = FitConfig(3, 16, checkpoint_seconds=0, **config), [*callbacks, *map(StopAt, stops)]
            fit(task, x, y, loop, place, progress=False, callbacks=listeners)
        found.append(task)
    return found[0], found[2]


DRAWS = {
    "torch.Generator": lambda self, h: torch.rand(h.shape, generator=self.kept[0]),
    "in an object": lambda self, h: self.kept[4].draws.random(),
    "numpy.random.Generator": lambda self, h: self.kept[1].random(),
    "random.Random": lambda self, h: self.kept[2].random(),
    "numpy.random.RandomState": lambda self, h: self.kept[3].random_sample(),
    "NumPy": lambda self, h: np.random.rand(),
    "random": lambda self, h: random.random(),
}


@pytest.mark.parametrize("source", DRAWS)
def test_a_model_draws_the_same_numbers_after_a_kill(source, tmp_path):
    def forward(self, x):
        h = self.first(x.flatten(1))
        h = h * DRAWS[source](self, h) if self.training else h
        drawn.append(h.detach())
        return self.last(h)

    def make():
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        kept = [torch.Generator().manual_seed(1), np.random.default_rng(1), random.Random(1), np.random.RandomState(1)]
        kept.append(SimpleNamespace(draws=random.Random(1)))
        model = Made(forward, first=nn.Linear(64, 8), last=nn.Linear(8, 2), kept=kept)
        return ClassifierTask(model, ClassifierConfig()), X, Y

    drawn = []
    whole, resumed = interrupted(make, tmp_path)
    assert same(whole, resumed)
    # The draws of two steps differ, and those of the caller go on.
    fit(make()[0], X[:16], Y[:16], FitConfig(2, 16), progress=False)
    assert not torch.equal(drawn[-1], drawn[-2])


def test_the_generators_of_the_caller_are_left_as_they_were():
    random.seed(3)
    np.random.seed(3)
    before = random.getstate(), np.random.get_state()[1].tobytes()
    fit(ClassifierTask(nn.Sequential(nn.Flatten(), nn.Linear(64, 2)), ClassifierConfig()), X, Y, FitConfig(1, 16), None)
    assert (random.getstate(), np.random.get_state()[1].tobytes()) == before


def counting():
    def forward(self, x):
        self.calls += 1
        return self.last(x.flatten(1)) * self.calls.clamp(max=20)

    torch.manual_seed(0)
    model = Made(forward, last=nn.Linear(64, 2))
    model.register_buffer("calls", torch.zeros(()))
    return ClassifierTask(model, ClassifierConfig()), X, Y


def test_checkpoints_and_a_resume_do_not_call_the_model(tmp_path):
    whole, resumed = interrupted(counting, tmp_path)
    assert same(whole, resumed) and int(whole.model.calls) == 12


def of(x, y, **options):
    """A classifier's training by a loader."""

    def make():
        torch.manual_seed(0)
        task = ClassifierTask(nn.Sequential(nn.Flatten(), nn.Linear(64, 2)), ClassifierConfig())
        return task, DataLoader(TensorDataset(x, y), 16, **options), None

    return make


def test_a_loader_of_other_images_or_labels_is_refused_at_a_resume(tmp_path):
    whole, resumed = interrupted(of(X, Y, shuffle=True), tmp_path / "same")
    assert same(whole, resumed)
    for name, other in {"images": of(255 - X, Y, shuffle=True), "labels": of(X, 1 - Y, shuffle=True)}.items():
        with pytest.raises(ValueError, match="holds a run with other images \\(the first batch of x\\)"):
            interrupted(of(X, Y, shuffle=True), tmp_path / name, again=other)


class Anew(TensorDataset):
    """Draws what nothing seeds."""

    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return x ^ os.urandom(1)[0] & 1, y


def test_a_loader_that_draws_anew_each_time_goes_on(tmp_path):
    def make():
        task, _, _ = of(X, Y)()
        return task, DataLoader(Anew(X, Y), 16), None

    interrupted(make, tmp_path)


def writing(modes):
    """A classifier that writes to its images in some modes."""

    def forward(self, x):
        if self.training in modes:
            x.mul_(2)
        return self.head(torch.relu(self.conv(x)).flatten(1))

    torch.manual_seed(0)
    return Made(forward, conv=nn.Conv2d(1, 2, 3), head=nn.Linear(72, 2))


def test_a_model_that_writes_to_its_images_is_refused():
    for modes in ((True,), (False,)):
        for make in (
            lambda model: ClassifierTask(model, ClassifierConfig()),
            lambda model: ArrestTask(model, ArrestConfig(distillation_weight=0, replay=False), (1, 8, 8)),
        ):
            with pytest.raises(ValueError, match="model must not write to its input"):
                fit(make(writing(modes)), X, Y, FitConfig(1, 16), progress=False)


def test_auxiliary_outputs_in_training_mode_are_named():
    def forward(self, x):
        out = self.last(x.flatten(1))
        return (out, out) if self.training else out

    with pytest.raises(ValueError, match=r"the model in training mode: .* it returned a tuple"):
        fit(ClassifierTask(Made(forward, last=nn.Linear(64, 2)), ClassifierConfig()), X, Y, FitConfig(1, 16), None)


class Unfreezes(Listener):
    """Unfreezes the first part of the model after the first epoch."""

    def on_epoch(self, state):
        if state.epoch == 0:
            state.task.model[0].requires_grad_(True).train()


@pytest.mark.parametrize("share", [0.0, 0.25])
def test_a_part_that_a_callback_unfreezes_trains_also_after_a_resume(share, tmp_path):
    def make():
        torch.manual_seed(0)
        backbone = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout(0.5)).eval().requires_grad_(False)
        task = ClassifierTask(nn.Sequential(backbone, nn.Flatten(), nn.Linear(72, 2)), ClassifierConfig())
        step = task.training_step
        task.training_step = lambda batch: modes.append([part.training for part in backbone]) or step(batch)
        return task, X, Y

    modes = []
    whole, resumed = interrupted(make, tmp_path, callbacks=[Unfreezes()], validation_share=share)
    steps = 4 - (share > 0)
    assert modes[: 2 * steps] == [[False] * 3] * steps + [[True] * 3] * steps and same(whole, resumed)
