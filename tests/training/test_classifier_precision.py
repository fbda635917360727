"""A classifier that is trained in bfloat16 multiplies in it, and nothing else of the training is rounded."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from purify_fast.models.classifiers import SmallCNN
from purify_fast.training import Batch, ClassifierConfig, ClassifierTask
from purify_fast.training.config import TrainingAttack

pytestmark = pytest.mark.usefixtures("one_thread")


def step(precision: str, eps: float) -> tuple[ClassifierTask, torch.Tensor, set[torch.dtype]]:
    """One training step: the task with its gradients, the loss, and what its convolutions made."""
    torch.manual_seed(0)
    model = SmallCNN(width=4)
    attack = TrainingAttack(eps=eps, steps=2, relative_alpha=2.0)
    task = ClassifierTask(model, ClassifierConfig(attack=attack, precision=precision))
    made: set[torch.dtype] = set()
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(lambda _, __, out: made.add(out.dtype))
    batch = Batch(torch.rand(8, 1, 16, 16), torch.arange(8), torch.arange(8), seed=0, epoch=1, epochs=2)
    loss, _ = task.training_step(batch)
    loss.backward()
    return task, loss.detach(), made


@pytest.mark.parametrize("eps", [0.0, 0.1])
def test_products_are_rounded_and_weights_are_not(eps):
    exact, loss, made = step("float32", eps)
    task, near, rounded = step("bfloat16", eps)
    assert made == {torch.float32} and rounded == {torch.bfloat16}
    assert near.dtype == torch.float32 and near.item() == pytest.approx(loss.item(), rel=0.01)
    for one, other in zip(task.model.parameters(), exact.model.parameters(), strict=True):
        assert one.dtype == one.grad.dtype == torch.float32
        assert torch.equal(one, other)
        assert nn.functional.cosine_similarity(one.grad.flatten(), other.grad.flatten(), 0) > 0.9


def test_a_run_of_another_precision_is_told_apart():
    assert step("bfloat16", 0.0)[0].describe() != step("float32", 0.0)[0].describe()
