"""How far `torch.compile` gets through one whole training step of each method.

What is compiled are the models and their losses: they have no graph break, as `fullgraph=True` shows. The step around
them breaks where an attack freezes its model and asks for a gradient to the images, and where ARREST picks the images
to attack: these breaks are counted, and none may be elsewhere.
"""

from pathlib import Path

import pytest
import torch

import purify_fast
from purify_fast import data
from purify_fast.methods.arrest import ArrestConfig, ArrestTask
from purify_fast.methods.atop import Atop, AtopConfig, AtopTask, SmallGenerator
from purify_fast.methods.carso import Carso, CarsoConfig, CarsoTask
from purify_fast.models.classifiers import SmallCNN
from purify_fast.training import Batch
from purify_fast.training.attack import TrainingAttack

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = (1, 16, 16)
EPS = 0.1


def batch():
    digits = data.load_dataset("digits")
    return Batch(data.to_float(digits.x_train[:16]), digits.y_train[:16], torch.arange(16), 7, 0, 10)


def arrest(**options):
    return ArrestTask(
        SmallCNN(width=4), ArrestConfig(attack=TrainingAttack(eps=EPS, steps=2, alpha=EPS / 2), **options), SHAPE
    )


def carso(target):
    made = Carso(SmallCNN(width=4), ["conv2", "hidden"], SHAPE, 8, 4, 2, decoder_width=2)
    return CarsoTask(made, CarsoConfig(attack_target=target, attack=TrainingAttack(eps=EPS, steps=2)))


def atop(target):
    made = Atop(SmallCNN(width=4), SmallGenerator(1, width=2), SHAPE, block=4, sigma=0.1)
    method, steps = ("fgsm", 10) if target == "classifier" else ("pgd", 2)
    attack = TrainingAttack(eps=EPS, steps=steps)
    config = AtopConfig(attack_method=method, attack_target=target, attack=attack, cls_delay=0)
    return AtopTask(made, config)


slow = pytest.mark.slow
#: Of each method: how many breaks there are with PGD-2 (AToP's published attack: FGSM).
STEPS = [
    pytest.param(arrest, 14, id="ARREST"),
    pytest.param(lambda: arrest(replay=False), 8, id="ARREST, no replay"),
    pytest.param(lambda: carso("classifier"), 13, id="CARSO"),
    pytest.param(lambda: carso("pipeline"), 8, id="CARSO, pipeline", marks=slow),
    pytest.param(lambda: atop("classifier"), 5, id="AToP"),
    pytest.param(lambda: atop("pipeline"), 8, id="AToP, pipeline", marks=slow),
]


def where(reason):
    """(file below the package, function) of the innermost frame of a break."""
    frame = reason.user_stack[-1]
    return Path(frame.filename).relative_to(Path(purify_fast.__file__).parent).as_posix(), frame.name


@pytest.mark.parametrize(("make", "most"), STEPS)
def test_a_step_breaks_only_in_its_attack(make, most):
    torch.manual_seed(0)
    task, step = make(), batch()
    task.model.train()
    torch._dynamo.reset()
    losses = []
    found = torch._dynamo.explain(lambda step: losses.append(task.training_step(step)[0]))(step)
    assert 0 < found.graph_break_count <= most
    attacks = {(f"attacks/{name}.py", None) for name in ("frozen_model", "base", "objective", "answers", "pgd", "fgsm")}
    allowed = attacks | {("methods/arrest/task.py", "inputs")}
    for reason in found.break_reasons:
        file, function = where(reason)
        assert (file, None) in allowed or (file, function) in allowed, reason
    # the same step: a fused gradient near 0 may have another sign, which moves a pixel
    torch.testing.assert_close(losses[0], task.training_step(step)[0], rtol=2e-3, atol=0)
