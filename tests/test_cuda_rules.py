"""What this package computes, by the rules of CUDA (`cuda_rules`): nothing that only a CPU accepts."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from cuda_rules import cuda_rules
from denoisers import defence, trained_unet
from loading import module
from torch import Tensor, nn

from purify_fast.methods.atop import Atop, DeepFillGenerator, SmallGenerator
from purify_fast.methods.carso import Carso
from purify_fast.methods.diffusion import Process
from purify_fast.models import UNet
from purify_fast.models.classifiers import PreActResNet18, SmallCNN, WideResNet
from purify_fast.ops import REGISTRY, use_backend

sys.path.append(str(Path(__file__).parent / "training"))
import small_runs

pytestmark = pytest.mark.usefixtures("one_thread")
FUNCTIONS = module("ops", "contract").FUNCTIONS
every_attack = module("attacks", "every_attack")
FLOAT, HALF = torch.float32, torch.bfloat16


@pytest.fixture
def deterministic() -> Iterator[None]:
    """CUDA has more refusals where deterministic algorithms are asked for."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def as_on_cuda() -> Iterator[None]:
    with cuda_rules(), use_backend("reference"):
        yield


@pytest.mark.parametrize("name", REGISTRY)
def test_definitions(deterministic, name):
    op = REGISTRY[name]
    for example in op.examples:
        for dtype in example.dtypes:
            with cuda_rules():
                op.reference(*example.make(dtype, 0))


@pytest.mark.parametrize("dtype", [FLOAT, HALF, "autocast"], ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_and_gradients(deterministic, name, dtype):
    function = FUNCTIONS[name]
    with as_on_cuda(), torch.autocast("cpu", HALF, enabled=dtype == "autocast"):
        leaves = function.make(3, FLOAT if dtype == "autocast" else dtype)
        differentiated = [leaf.requires_grad_() for leaf in leaves[: function.gradients]]
        found = function.call(*leaves)
        outputs = [x for x in ((found,) if isinstance(found, Tensor) else found) if x.requires_grad]
        if differentiated:
            torch.autograd.grad(sum(x.sum() for x in outputs), differentiated)


IMAGES = (3, 16, 16)


def at_a_time(model: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: model(x, torch.tensor(10.0))


def filled(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """A generator with a mask: it fills a quarter of the image."""

    def call(x: Tensor) -> Tensor:
        mask = torch.zeros_like(x[:, :1])
        mask[..., :8, :8] = 1
        return model(torch.cat([x, torch.ones_like(mask), mask], 1), mask)

    return call


def own(model: nn.Module) -> Callable[[Tensor], Tensor]:
    return model


#: Models, and how each is called with images.
MODELS = {
    "SmallCNN": (lambda: SmallCNN(3, 10, IMAGES[1:], 4), own),
    "PreActResNet18": (lambda: PreActResNet18(width=2), own),
    "WideResNet": (lambda: WideResNet(10, 1), own),
    "UNet": (lambda: trained_unet(3, 16), at_a_time),
    "SmallGenerator": (lambda: SmallGenerator(3, width=4), filled),
    "DeepFillGenerator": (lambda: DeepFillGenerator(width=4), filled),
}
DEFENCES = {
    "CARSO": lambda: Carso(SmallCNN(3, 10, IMAGES[1:], 4), ["conv1", "hidden"], IMAGES, 8, 4, 2, decoder_width=2),
    "AToP": lambda: Atop(SmallCNN(3, 10, IMAGES[1:], 4), SmallGenerator(3, width=4), IMAGES, block=4, samples=2),
    "diffusion": lambda: defence(IMAGES, UNet(3, 16), Process(steps=2)),
}


def differentiate(call: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor) -> None:
    """Call a model, and differentiate with respect to the images and the weights."""
    out = call(x.requires_grad_())
    out = out if isinstance(out, Tensor) else out[-1]
    torch.autograd.grad(out.sum(), [x, *(p for p in model.parameters() if p.requires_grad)], allow_unused=True)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("dtype", [FLOAT, HALF, "autocast", "float32 normalization"], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_models(deterministic, name, dtype, mode):
    make, called = MODELS[name]
    model = make().train(mode == "train")
    x = torch.rand(2, *IMAGES, generator=torch.Generator().manual_seed(0))
    if dtype != "autocast":
        kind = HALF if dtype == "float32 normalization" else dtype
        model, x = model.to(kind), x.to(kind)
    if dtype == "float32 normalization":
        for layer in model.modules():
            if isinstance(layer, (nn.GroupNorm, nn.modules.batchnorm._BatchNorm)):
                layer.float()
    with as_on_cuda(), torch.autocast("cpu", HALF, enabled=dtype == "autocast"):
        differentiate(called(model), model, x)


@pytest.mark.parametrize("dtype", [FLOAT, "autocast"], ids=str)
@pytest.mark.parametrize("name", DEFENCES)
def test_defences(deterministic, name, dtype):
    model = DEFENCES[name]().eval()
    x = torch.rand(2, *IMAGES, generator=torch.Generator().manual_seed(0))
    with as_on_cuda(), model.fixed_noise(0), torch.autocast("cpu", HALF, enabled=dtype == "autocast"):
        differentiate(model, model, x)


#: Attacks, and those that search on a copy of the model also with a copy in bfloat16.
COPIED = [(name, {"precision": "bfloat16"}) for name in every_attack.IN_A_BALL if not name.startswith("pgd")]
ATTACKS = [(name, {}) for name in every_attack.IN_A_BALL] + COPIED


@pytest.mark.parametrize("norm", every_attack.ORDERS)
@pytest.mark.parametrize(("name", "options"), ATTACKS, ids=str)
def test_attacks(deterministic, name, options, norm):
    model = SmallCNN(3, 6, (8, 8), 4).eval()
    x = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with as_on_cuda():
        every_attack.run(name, model, x, torch.arange(5), norm=norm, **options)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["classifier", "arrest", "carso", "atop"])
def test_training_steps(deterministic, method, precision):
    task = getattr(small_runs, f"{method}_task")(precision=precision)
    with as_on_cuda():
        loss, _ = task.training_step(small_runs.batch())
        loss.backward()
