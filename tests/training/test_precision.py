"""Precisions: "tf32" rounds float32 products on a GPU while a task is trained; "bfloat16" rounds products alone."""

import pytest
import torch
from small_runs import (
    SHAPE,
    arrest_task,
    atop_task,
    attack,
    batch,
    carso_task,
    classifier_task,
    diffusion_task,
    on_step,
)
from torch import nn

from purify_fast.methods.carso import CarsoConfig
from purify_fast.training import FitConfig, fit

pytestmark = pytest.mark.usefixtures("one_thread")


def float32_settings():
    return torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()


def carso(precision):
    return carso_task(kl_delay=0.0, precision=precision)


@pytest.mark.parametrize("make", [arrest_task, carso, atop_task, classifier_task, diffusion_task])
def test_products_are_rounded_while_it_is_trained_if_asked(make):
    x = torch.randint(256, (16, *SHAPE), dtype=torch.uint8)
    before = float32_settings()
    for precision, expected in (("float32", (False, "highest")), ("tf32", (True, "high"))):
        noted = set()
        heard = on_step(lambda _, noted=noted: noted.add(float32_settings()))
        task, config = make(precision=precision), FitConfig(epochs=1, batch_size=8)
        fit(task, x, torch.arange(16) % 10, config, callbacks=[heard], progress=False)
        assert noted == {expected}
        assert float32_settings() == before


def test_joint_training_takes_it():
    assert CarsoConfig(joint=True, attack_target="pipeline", precision="tf32").precision == "tf32"


def step(precision, eps):
    """One step of a classifier's training: the task with its gradients, the loss, and what its convolutions put out."""
    task, dtypes = classifier_task(attack=attack(eps=eps), precision=precision), set()
    for layer in task.model.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(lambda _, __, out: dtypes.add(out.dtype))
    loss, _ = task.training_step(batch())
    loss.backward()
    return task, loss.detach(), dtypes


@pytest.mark.parametrize("eps", [0.0, 0.1])
def test_products_are_rounded_and_weights_are_not(eps):
    exact, loss, dtypes = step("float32", eps)
    task, near, rounded = step("bfloat16", eps)
    assert dtypes == {torch.float32} and rounded == {torch.bfloat16}
    assert near.dtype == torch.float32 and near.item() == pytest.approx(loss.item(), rel=0.01)
    for one, other in zip(task.model.parameters(), exact.model.parameters(), strict=True):
        assert one.dtype == one.grad.dtype == torch.float32
        assert torch.equal(one, other)
        assert nn.functional.cosine_similarity(one.grad.flatten(), other.grad.flatten(), 0) > 0.9
    assert task.describe() != exact.describe()
