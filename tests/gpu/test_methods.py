"""CARSO and AToP on a device: logits and gradients to the images, against the CPU in float64."""

import copy

import pytest
import torch
from on_device import DEVICE
from small_models import images, lively, with_statistics
from torch import Tensor, nn

from purify_fast import frozen_copy
from purify_fast.methods.atop import Atop, SmallGenerator
from purify_fast.methods.carso import Carso
from purify_fast.models.classifiers import SmallCNN
from purify_fast.ops import REGISTRY, use_backend

pytestmark = pytest.mark.gpu
SHAPE = (1, 16, 16)
#: The kernel that computes each op on such a device.
SERVED = [set(op.available[DEVICE.type]) for op in REGISTRY.values() if DEVICE.type != "cuda" or op.launch is not None]
#: The measured default, and what every one of them has.
BACKENDS = [None, *sorted(set.intersection(*SERVED) - {"reference"})]


def carso() -> nn.Module:
    return with_statistics(Carso(SmallCNN(), ["conv1", "hidden"], SHAPE, 16, 4, 4, decoder_width=4).eval())


def atop(transform: str) -> nn.Module:
    options = {"block": 4, "sigma": 0.05, "samples": 2, "transform": transform}
    return Atop(SmallCNN(), lively(SmallGenerator(1, width=4), 2), SHAPE, **options).eval()


METHODS = {"CARSO": carso, "AToP rt2": lambda: atop("rt2"), "AToP rt3": lambda: atop("rt3")}


def answer(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Logits, and the gradient of a sum of them."""
    x = x.requires_grad_()
    with model.fixed_noise(3):
        logits = model(x)
    weights = torch.linspace(-1, 1, logits.numel()).view_as(logits).to(logits)
    return logits.detach(), torch.autograd.grad(logits, x, weights)[0]


def distance(actual: Tensor, golden: Tensor) -> float:
    assert torch.isfinite(actual).all()
    return float((actual.double().cpu() - golden.double()).norm() / golden.double().norm())


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_logits_and_input_gradients(method, backend):
    torch.manual_seed(0)
    made = METHODS[method]()
    with use_backend("reference"):
        golden = answer(copy.deepcopy(made).double(), images().double())
    with use_backend(backend):
        found = answer(copy.deepcopy(made).to(DEVICE), images().to(DEVICE))
    assert golden[1].norm() > 0
    for actual, exact in zip(found, golden, strict=True):
        assert distance(actual, exact) < 1e-4


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_logits_of_frozen_copies(method, backend):
    torch.manual_seed(0)
    made = METHODS[method]()
    with use_backend("reference"):
        golden = answer(made, images())
    with use_backend(backend):
        x = images().to(DEVICE)
        found = answer(frozen_copy(made.to(DEVICE), x, dtype=torch.bfloat16), x)
    assert distance(found[0], golden[0]) < 0.05  # bfloat16
