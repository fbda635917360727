"""Memory that ends at any operator of a capture changes nothing in a training, or its error ends the training."""

import random
import warnings

import numpy as np
import pytest
import torch
from captures import Rerun
from small_runs import arrest_task, atop_task, attack, batch, carso_task, classifier_task
from torch.utils._python_dispatch import TorchDispatchMode

from purify_fast.speed import StepGraphs
from purify_fast.training.captured_step import CapturedStep, NotRestored
from purify_fast.training.loop import train_step

#: The distance of two operators at which memory ends, and a larger one for a quick look and for long steps.
EVERY, SELDOM = 10, 97


class MemoryEnds(TorchDispatchMode):
    """Raises an error at one operator of a capture, or from there on at each operator that needs new memory."""

    def __init__(self, at: int, lasting: bool, monkeypatch: pytest.MonkeyPatch):
        super().__init__()
        self.at, self.lasting, self.count, self.active = at, lasting, 0, False
        make = CapturedStep.__init__

        def within(step, *given, **options):
            self.active = True
            try:
                make(step, *given, **options)
            finally:
                self.active = False

        monkeypatch.setattr(CapturedStep, "__init__", within)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if self.active:
            self.count += 1
            allocates = any(each.alias_info is None for each in function._schema.returns)
            if self.count == self.at or (self.lasting and 0 < self.at < self.count and allocates):
                raise torch.OutOfMemoryError("CUDA out of memory (a stand-in)")
        return function(*args, **(kwargs or {}))


def stepped(make, graphs: StepGraphs | None, ends: MemoryEnds | None) -> dict | None:
    """All that a training consists of after a step; None if an error left it."""
    task, given = make(), batch(1)
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    # There are gradients, moments and counts before the capture.
    train_step(task, batch(2))
    task.graphs = graphs
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if ends is None:
            train_step(task, given)
        else:
            try:
                with ends:
                    train_step(task, given)
            except NotRestored:
                return None
    optimizers = [one.state_dict() for one in task.optimizers.values()]
    return {
        "weights and buffers": dict(task.model.state_dict()),
        "gradients": [weight.grad for weight in task.model.parameters()],
        "modes": [part.training for part in task.model.modules()],
        "optimizers": optimizers,
        "generators": [torch.get_rng_state(), random.getstate(), torch.from_numpy(np.random.get_state()[1].copy())],
    }


def equal(one, other) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(value, other[name]) for name, value in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


TASKS = {
    "classifier": lambda: classifier_task(attack=attack(steps=1)),
    "ARREST": lambda: arrest_task(attack=attack(steps=1)),
    "CARSO": lambda: carso_task(attack=attack(steps=1)),
    "AToP, GAN": lambda: atop_task(gan_grad=True),
}
#: The distance of two operators, and the number of tests that share them. A capture has 1,700 to 7,200 operators.
POINTS = {"classifier": (EVERY, 4), "ARREST": (EVERY, 8), "CARSO": (SELDOM, 4), "AToP, GAN": (SELDOM, 6)}
SHARES = [(name, every, (part, parts)) for name, (every, parts) in POINTS.items() for part in range(parts)]


@pytest.mark.parametrize("lasting", [False, True], ids=["once", "from then on"])
@pytest.mark.parametrize(
    ("name", "every", "share"),
    [("classifier", SELDOM, (0, 1)), *(pytest.param(*each, marks=pytest.mark.slow) for each in SHARES)],
)
def test_a_capture_in_which_memory_ends_changes_nothing(name, every, share, lasting, monkeypatch):
    make = TASKS[name]
    wanted, left = stepped(make, None, None), 0

    def captured(at: int) -> tuple[dict | None, int]:
        with monkeypatch.context() as patch:
            ends = MemoryEnds(at, lasting, patch)
            return stepped(make, StepGraphs("always", capture=Rerun()), ends), ends.count

    found, whole = captured(0)
    assert equal(found, wanted) and whole > 20 * EVERY
    points = range(1, whole, every)[share[0] :: share[1]]
    for at in points:
        found, _ = captured(at)
        left += found is None
        for part in found or ():
            assert equal(found[part], wanted[part]), f"{part}, after an error at operator {at} of {whole}"
    assert left <= 2 + len(points) / 20, f"{left} of {len(points)} errors ended the training"
