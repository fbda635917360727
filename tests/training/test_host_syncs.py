"""What a training step and its attack wait for: on a GPU, each of these operators stops the host until it is done.

The operators are counted on the CPU as PyTorch dispatches them. A tensor made of Python numbers counts too, because it
is copied to the device, which waits.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import purify_fast
from purify_fast.data import crop_flip
from purify_fast.methods.arrest import ArrestConfig, ArrestTask
from purify_fast.methods.atop import Atop, AtopConfig, AtopTask, SmallGenerator
from purify_fast.methods.carso import Carso, CarsoConfig, CarsoTask
from purify_fast.models.classifiers import SmallCNN
from purify_fast.training import Batch
from purify_fast.training.attack import TrainingAttack

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE, EPS = (1, 16, 16), 0.1
PACKAGE = Path(purify_fast.__file__).parent
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "lift_fresh", "unique_dim", "_unique2"}


class Waits(TorchDispatchMode):
    """Counts what waits, by operator and by the file and function of the package that asks for it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[tuple[str, str, str]] = Counter()
        self.dispatched = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.dispatched += 1
        name = function._schema.name.removeprefix("aten::")
        masks = name in ("index", "index_put_", "_index_put_impl_") and any(
            isinstance(leaf, Tensor) and leaf.dtype in (torch.bool, torch.uint8) for leaf in tree_leaves(args[1])
        )
        if name in WAITING or masks:
            self.found[(name, *_place())] += 1
        return function(*args, **(kwargs or {}))


def _place() -> tuple[str, str]:
    """The innermost function of the package that is running."""
    frame = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(PACKAGE):
            return path.relative_to(PACKAGE).as_posix(), frame.f_code.co_name
        frame = frame.f_back
    return "elsewhere", ""


def batch() -> Batch:
    generator = torch.Generator().manual_seed(1)
    x = torch.rand((16, *SHAPE), generator=generator)
    return Batch(x, torch.arange(16) % 10, torch.arange(16), 7, 0, 10)


def arrest(**options) -> ArrestTask:
    attack = TrainingAttack(eps=EPS, steps=2, alpha=EPS / 2)
    return ArrestTask(SmallCNN(width=4), ArrestConfig(attack=attack, **options), SHAPE)


def carso(target: str) -> CarsoTask:
    made = Carso(SmallCNN(width=4), ["conv2", "hidden"], SHAPE, 8, 4, 2, decoder_width=2)
    return CarsoTask(made, CarsoConfig(attack_target=target, attack=TrainingAttack(eps=EPS, steps=2)))


def atop(target: str) -> AtopTask:
    made = Atop(SmallCNN(width=4), SmallGenerator(1, width=2), SHAPE, block=4, sigma=0.1)
    method, steps = ("fgsm", 10) if target == "classifier" else ("pgd", 2)
    attack = TrainingAttack(eps=EPS, steps=steps)
    return AtopTask(made, AtopConfig(attack_method=method, attack_target=target, attack=attack, cls_delay_epochs=0))


#: What waits, and why it may.
STEPS = {
    "ARREST": (arrest, {("nonzero", "methods/arrest/task.py", "inputs"): "only images that drifted are attacked"}),
    "ARREST, no replay": (lambda: arrest(replay=False), {}),
    "CARSO": (lambda: carso("classifier"), {}),
    "CARSO, pipeline": (lambda: carso("pipeline"), {}),
    "AToP": (lambda: atop("classifier"), {}),
    "AToP, pipeline": (lambda: atop("pipeline"), {}),
}


@pytest.mark.parametrize("name", STEPS)
def test_a_step_does_not_wait_for_the_device(name):
    torch.manual_seed(0)
    make, allowed = STEPS[name]
    task, step = make(), batch()
    task.model.train()
    task.training_step(step)[0].backward()  # what is made once is made
    with Waits() as waits:
        task.training_step(step)[0].backward()
    assert waits.dispatched > 100
    assert set(waits.found) <= set(allowed), waits.found


def test_augmentation_does_not_wait_for_the_device():
    step = batch()
    with Waits() as waits:
        crop_flip(step.x, 3, step.sample_ids, 2, True)
    assert not waits.found


def test_what_waits_is_counted():
    x = torch.arange(4.0)
    with Waits() as waits:
        x[x > 1], x.sum().item(), torch.tensor([3]), (x > 1).nonzero()
    assert {name for name, *_ in waits.found} >= {"_local_scalar_dense", "lift_fresh", "nonzero", "index"}
