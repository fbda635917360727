"""Precisions: "tf32" rounds float32 products on a GPU while a task is trained; "bfloat16" rounds products alone."""

from functools import partial

import pytest
import small_runs
import torch
from small_runs import SHAPE, arrest_task, atop_task, attack, batch, carso_task, classifier_task
from torch import nn

from purify_fast.training import FitConfig, fit


def float32_settings():
    return torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()


def carso(precision):
    return carso_task(kl_delay=0.0, precision=precision)


@pytest.mark.parametrize("make", [arrest_task, carso, atop_task, classifier_task])
def test_products_are_rounded_while_it_is_trained_if_asked(make):
    x = torch.randint(256, (16, *SHAPE), dtype=torch.uint8)
    before = float32_settings()
    for precision, expected in (("float32", (False, "highest")), ("tf32", (True, "high"))):
        noted = set()
        heard = small_runs.on_step(lambda _, noted=noted: noted.add(float32_settings()))
        task, config = make(precision=precision), FitConfig(epochs=1, batch_size=8)
        fit(task, x, torch.arange(16) % 10, config, callbacks=[heard], progress=False)
        assert noted == {expected}
        assert float32_settings() == before


@pytest.mark.parametrize(("fast", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
@pytest.mark.parametrize("make", [arrest_task, classifier_task])
def test_auto_computes_in_the_dtype_that_is_fast_on_the_device(make, fast, dtype, monkeypatch):
    monkeypatch.setattr("purify_fast.speed.precision.fast_bfloat16", lambda device: fast)
    assert make(precision="auto").dtype == dtype


def step(task):
    """Take a step. Return the task with its gradients, the loss, and the dtypes of its convolutions' outputs."""
    dtypes = set()
    for layer in task.model.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(lambda _, __, out: dtypes.add(out.dtype))
    if task.attacked is not None:
        # A copy is compared with its model in float32 when it is made.
        task.attacked.now(batch().x)
        dtypes.clear()
    loss, _ = task.training_step(batch())
    loss.backward()
    return task, loss.detach(), dtypes


CLASSIFIERS = [partial(classifier_task, attack=attack(eps=eps)) for eps in (0.0, 0.1)]


@pytest.mark.parametrize("make", [*CLASSIFIERS, arrest_task])
def test_products_are_rounded_and_weights_are_not(make):
    exact, loss, dtypes = step(make(precision="float32"))
    task, near, rounded = step(make(precision="bfloat16"))
    assert dtypes == {torch.float32} and rounded == {torch.bfloat16}
    assert near.dtype == torch.float32 and near.item() == pytest.approx(loss.item(), rel=0.01)
    for one, other in zip(task.model.parameters(), exact.model.parameters(), strict=True):
        assert one.dtype == one.grad.dtype == torch.float32
        assert torch.equal(one, other)
        assert nn.functional.cosine_similarity(one.grad.flatten(), other.grad.flatten(), 0) > 0.9
    assert task.describe() != exact.describe()
