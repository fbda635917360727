"""Networks whose convolutions compute what follows them: the same function in fewer passes over the maps."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cuda_launches import CudaLaunches
from small_models import answers
from small_models import with_random_norms as trained
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import resnet18

from purify_fast._processor import onednn_takes_bfloat16
from purify_fast.methods.diffusion import DiffusionPurifier
from purify_fast.models.classifiers import PreActResNet18, SmallCNN, WideResNet
from purify_fast.models.unet import UNet
from purify_fast.speed.folding import convolution_chains, kept_layouts
from purify_fast.speed.folding.batchnorm import fold_batchnorm
from purify_fast.speed.folding.convolution_chains import Chain, Step
from purify_fast.speed.folding.fused_networks import FusedForward, fuse_convolutions
from purify_fast.speed.folding.inference_copy import InferenceCopy

pytestmark = pytest.mark.usefixtures("one_thread")
SHAPE, HALF = (3, 16, 16), torch.bfloat16


@pytest.fixture(autouse=True)
def no_tiles(monkeypatch):
    """Most tests are about the operators of PyTorch, which a CPU with matrix tiles would hardly use."""
    monkeypatch.setattr("purify_fast.speed.folding.convolution_chains.has_tiles", lambda: False)


@pytest.fixture
def tiles(no_tiles, monkeypatch):
    """Pretend that the CPU has matrix tiles, and that no convolution is faster as a product of matrices."""
    if not onednn_takes_bfloat16():
        pytest.skip("oneDNN takes no bfloat16 without AVX512-BF16")
    monkeypatch.setattr("purify_fast.speed.folding.convolution_chains.has_tiles", lambda: True)
    monkeypatch.setattr("purify_fast.speed.folding.convolution_chains.is_faster", lambda *_: False)
    monkeypatch.setattr("purify_fast.speed.folding.unrolled.has_tiles", lambda: False)


def cifar_resnet18() -> nn.Module:
    model = resnet18(num_classes=10)
    model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    return model


def unet(width: int = 16) -> nn.Module:
    """A U-Net whose last layers are not zero."""
    model = UNet(3, width)
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.weight, std=(layer.in_channels * 9) ** -0.5)
    return model


class Residual(nn.Module):
    """A residual block in one of the ways in which people write them. All are a chain of two convolutions or more."""

    def __init__(self, way: str):
        super().__init__()
        self.way = way
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.third, self.norm = nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=way == "in place")

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.way == "in place":
            x = self.relu(x)
            out = self.second(x)
            out += x
            return self.relu(out).mean((2, 3))
        if self.way == "methods":
            x = x.relu()
            return x.add(self.second(x)).relu_().mean((2, 3))
        if self.way == "two normalizations":
            return (self.second(F.silu(self.norm(x))) + F.relu(x)).mean((2, 3))
        if self.way == "added to itself":
            return F.silu(x + self.second(F.pad(x, (1, 1, 1, 1))[:, :, 1:-1, 1:-1])).mean((2, 3))
        if self.way.startswith("zeros"):
            active = F.relu(self.second(x))
            measured = active if self.way == "zeros of its size" else x
            return F.relu(self.third(F.pad(active, (0, measured.shape[3] % 3, 1, 0)))).mean((2, 3))
        # The result of a step is used three times, and its sum once.
        active = F.relu(x)
        return torch.cat([self.second(active) + self.third(active), active * x], 1).mean((2, 3))


#: The ways, and the numbers of their convolutions and chains. A chain ends where anything else reads its maps.
WAYS = {
    "in place": (2, 1),
    "methods": (2, 1),
    "two normalizations": (2, 2),
    "added to itself": (2, 2),
    "zeros of its size": (3, 1),
    "zeros of another size": (3, 2),
    "uses": (3, 1),
}
#: The networks, and the numbers of their convolutions in chains, of chains, and of rewritten modules.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int, int, int]] = {
    "resnet18": (cifar_resnet18, 20, 1, 1),
    "resnet18 with pooling": (lambda: resnet18(num_classes=10), 20, 2, 1),
    "preact_resnet18": (lambda: PreActResNet18(width=8), 20, 1, 1),
    "wide_resnet silu": (lambda: WideResNet(16, 1), 15, 1, 1),
    "wide_resnet relu": (lambda: WideResNet(10, 2, activation="relu"), 10, 1, 1),
    "small_cnn": (lambda: SmallCNN(3, image_size=SHAPE[1:]), 4, 1, 1),
    "unet": (unet, 18, 14, 7),
} | {way: (lambda way=way: Residual(way), *numbers, 1) for way, numbers in WAYS.items()}


def prepared(model: nn.Module, shape: tuple[int, ...] = SHAPE) -> nn.Module:
    """Folded, frozen, and with convolutions in bfloat16."""
    trained(model).requires_grad_(False)
    if not isinstance(model, UNet):
        fold_batchnorm(model, torch.rand(4, *shape))
    return model.to(HALF).to(memory_format=torch.channels_last)


def example(model: nn.Module, batch: int = 4, shape: tuple[int, ...] = SHAPE) -> list[Tensor]:
    images = torch.rand((batch, *shape), generator=torch.Generator().manual_seed(1))
    return [images, torch.linspace(100, 900, batch)] if isinstance(model, UNet) else [images]


def chains(model: nn.Module) -> list[Chain]:
    graphs = [part.forward.graph for part in model.modules() if isinstance(part.forward, FusedForward)]
    return [chain for graph in graphs for chain in graph.children() if isinstance(chain, Chain)]


@pytest.fixture
def served(monkeypatch):
    """Chains run as on a CPU with matrix tiles, but by PyTorch's operators."""
    monkeypatch.setattr("purify_fast.speed.folding.fused_networks.onednn_serves", lambda _: True)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_rewritten_network_is_the_same_function(served, name):
    """It errs against float64 as the network itself does in bfloat16; the images may have another size."""
    torch.manual_seed(0)
    make, convolutions, number, modules = NETWORKS[name]
    model = prepared(make())
    exact, plain = copy.deepcopy(model).double(), copy.deepcopy(model)
    assert fuse_convolutions(model, *(one.to(HALF) for one in example(model))) == convolutions
    assert (len(chains(model)), sum(isinstance(m.forward, FusedForward) for m in model.modules())) == (number, modules)
    given = example(model, batch=3, shape=SHAPE if name in ("small_cnn", "unet") else (3, 21, 18))
    truth = answers(exact, *(one.to(HALF).double() for one in given))
    halves = [one.to(HALF) for one in given]
    for found, own, right in zip(answers(model, *halves), answers(plain, *halves), truth, strict=True):
        errors = [((one.double() - right).norm() / right.norm()).item() for one in (found, own)]
        assert found.dtype == own.dtype and found.shape == own.shape
        assert errors[0] <= 1.5 * errors[1] + 1e-3, errors
    with torch.no_grad():
        without = model(*halves)
    if all(chain.has_gradient for chain in chains(model)):
        assert torch.equal(without, answers(model, *halves)[0])


def test_without_matrix_tiles_the_network_runs_as_it_was(monkeypatch):
    torch.manual_seed(0)
    model = prepared(PreActResNet18(width=8))
    plain, images = copy.deepcopy(model), torch.rand(3, *SHAPE).to(HALF)
    assert fuse_convolutions(model, images) == 20
    monkeypatch.setattr(Chain, "forward", lambda *_: pytest.fail("a chain ran"))
    assert all(map(torch.equal, answers(model, images), answers(plain, images)))
    classifier = PreActResNet18(width=8).eval()
    assert not any(isinstance(m.forward, FusedForward) for m in InferenceCopy(classifier, SHAPE).modules())


def test_inside_compiled_graphs_and_transforms_the_network_runs_as_it_was(served, monkeypatch):
    torch.manual_seed(0)
    model = prepared(SmallCNN(3, image_size=SHAPE[1:]))
    images = torch.rand(3, *SHAPE).to(HALF)
    assert fuse_convolutions(model, images) == 4
    wanted = type(model).forward(model, images)
    assert not torch.equal(answers(model, images)[1], answers(copy.deepcopy(model).float(), images.float())[1])
    monkeypatch.setattr(Chain, "forward", lambda *_: pytest.fail("a chain ran"))
    assert torch.equal(torch.compile(model, backend="eager", fullgraph=True)(images), wanted)
    torch.func.grad(lambda x: model(x).float().sum())(images)
    torch.func.jvp(model, (images,), (images,))


def test_the_copy_of_a_classifier_is_rewritten_and_refreshed(served):
    torch.manual_seed(0)
    classifier, images = trained(PreActResNet18(width=8)), torch.rand(3, *SHAPE)
    view = InferenceCopy(classifier, SHAPE, fine=True)
    assert len(chains(view.classifier)) == 1 and len(chains(view.classifier)[0].steps) == 19
    for other in (InferenceCopy(classifier, SHAPE, torch.float32), InferenceCopy(classifier, SHAPE, fold=False)):
        assert not chains(other) or other.dtype == HALF
    again = copy.deepcopy(view)
    assert any(chains(again)[0].steps[0].layer is module for module in again.classifier.modules())
    trained(classifier)
    before = view(images)
    view.refresh(classifier)
    exact = InferenceCopy(classifier, SHAPE, torch.float32)(images)
    after = view(images)
    assert (after - exact).norm() < 0.03 * exact.norm() < (before - exact).norm()
    torch.testing.assert_close(again(images), before, rtol=0, atol=0)


def test_the_denoiser_of_a_diffusion_purifier_is_rewritten(served):
    torch.manual_seed(0)
    defence = DiffusionPurifier(unet(), SmallCNN(3, image_size=SHAPE[1:]), SHAPE, {"t_star": 0.1, "steps": 2}).eval()
    fast = defence.denoiser.bfloat16_copy(SHAPE)
    assert sum(len(chain.steps) for chain in chains(fast)) == 18 and not chains(defence)


class Other(nn.Module):
    """Some convolutions stay as they are. Each case says why."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind, self.conv = kind, nn.Conv2d(3, 8, 3, padding=1)
        options = {"groups": {"groups": 2}, "dilation": {"dilation": 2}, "circular": {"padding_mode": "circular"}}
        self.next = nn.Conv2d(8, 8, 3, padding=1, **options.get(kind, {}))
        self.seen = 0

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "branch" and x.mean() > 100:
            return x
        h = self.conv(x)
        if self.kind == "written later":
            out = self.next(h)
            h.mul_(2)
            return (out + h).mean((2, 3))
        if self.kind == "noise":
            h = h + torch.randn_like(h)
        return F.relu(self.next(h)).mean((2, 3))


@pytest.mark.parametrize(
    "kind, left",
    [
        ("groups", 1),
        ("dilation", 1),
        ("circular", 1),
        ("branch", 0),
        ("written later", 0),
        ("noise", 0),
        ("hook", 0),
        ("trained", 0),
    ],
)
def test_everything_else_is_left_as_it_is(served, kind, left):
    torch.manual_seed(0)
    model = Other(kind).eval().to(HALF).requires_grad_(kind == "trained")
    if kind == "hook":
        model.next.register_forward_hook(lambda *_: None)
    images = torch.rand(4, *SHAPE).to(HALF)
    plain = copy.deepcopy(model)
    assert fuse_convolutions(model, images) == left
    if left == 0:
        assert not any("forward" in vars(part) for part in model.modules())
    if kind != "noise":
        torch.testing.assert_close(model(images), plain(images), rtol=0.02, atol=0.02)


def test_parts_of_a_network_that_cannot_be_traced_are_rewritten(served):
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.ModuleList([Residual("methods"), Residual("in place")])

        def forward(self, x: Tensor) -> Tensor:
            return sum(part(x) for part in self.parts) if float(x.sum()) > 0 else x

    torch.manual_seed(0)
    model = Outer().eval().to(HALF).requires_grad_(False)
    images = torch.rand(4, *SHAPE).to(HALF)
    assert fuse_convolutions(model, images) == 4
    assert [isinstance(part.forward, FusedForward) for part in (model, *model.parts)] == [False, True, True]


@pytest.mark.parametrize("wrong", ["result", "gradient"])
def test_a_chain_that_computes_something_else_is_not_used(served, monkeypatch, wrong):
    own_run, own_add = Chain.run, convolution_chains._add
    if wrong == "result":
        monkeypatch.setattr(
            Chain, "run", lambda *given, **named: {n: one * 1.0001 for n, one in own_run(*given, **named).items()}
        )
    else:
        monkeypatch.setattr(convolution_chains, "_add", lambda grads, n, grad: own_add(grads, n, grad * 1.0001))
    model = prepared(Residual("in place"))
    assert fuse_convolutions(model, torch.rand(4, *SHAPE).to(HALF)) == 0


def test_a_second_derivative_and_changed_weights_are_errors(served):
    torch.manual_seed(0)
    model = prepared(Residual("in place"))
    leaf = torch.rand(4, *SHAPE).to(HALF).requires_grad_()
    assert fuse_convolutions(model, leaf.detach()) == 2
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(model(leaf).sum(), leaf, create_graph=True)
    out = model(leaf)
    model.second.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("name", ["resnet18", "two normalizations"])
def test_on_a_cpu_with_tiles_a_prediction_takes_one_call_of_onednn_for_a_convolution(name, tiles):
    model = prepared(NETWORKS[name][0]())
    given = [one.to(HALF) for one in example(model)]
    with torch.no_grad():
        wanted = model(*given)
    assert fuse_convolutions(model, *given) == NETWORKS[name][1]
    with torch.no_grad(), CudaLaunches() as calls:
        found = model(*given)
    fused = calls.by_name.get("_convolution_pointwise", 0)
    # A BatchNorm that is not folded has no such call.
    assert fused == NETWORKS[name][1] - (name == "two normalizations")
    if name == "resnet18":
        assert not {"relu", "relu_", "add", "add_"} & calls.by_name.keys()
    assert (found - wanted).float().norm() <= 0.02 * wanted.float().norm()


@pytest.mark.parametrize("name", NETWORKS)
def test_on_a_cpu_with_tiles_the_gradient_is_computed_in_place(name, tiles):
    """It errs as the network itself does. Networks with SiLU or BatchNorm in a step run as they were."""
    torch.manual_seed(0)
    model = prepared(NETWORKS[name][0]())
    exact, plain = copy.deepcopy(model).double(), copy.deepcopy(model)
    fuse_convolutions(model, *(one.to(HALF) for one in example(model)))
    halves = [one.to(HALF) for one in example(model, batch=3)]
    with CudaLaunches() as calls:
        found = answers(model, *halves)
    steps = [step for chain in chains(model) for step in chain.steps]
    fast = all(chain.has_gradient for chain in chains(model))
    # The gradient of a layer with stride 2 has another operator.
    strided = sum(step.layer.stride != (1, 1) for step in steps)
    if name not in WAYS:
        count = 2 * len(steps) - strided if fast else 0
        assert calls.by_name.get("_convolution_pointwise", 0) == count
    if name == "resnet18":
        assert strided == calls.by_name["convolution_backward"] == 6
        # The calls of oneDNN add the gradients of a block, except those of its layers with stride 2.
        assert calls.by_name["add_"] == 3 and "add" not in calls.by_name
    truth = answers(exact, *(one.double() for one in halves))
    for one, own, right in zip(found, answers(plain, *halves), truth, strict=True):
        errors = [((value.double() - right).norm() / right.norm()).item() for value in (one, own)]
        assert one.shape == own.shape and errors[0] <= 1.5 * errors[1] + 1e-3, errors


def test_packed_weights_follow_the_weights(tiles):
    """They are made once for weights that do not change, whatever the batch."""
    torch.manual_seed(0)
    classifier = trained(cifar_resnet18())
    view, exact = (InferenceCopy(classifier, SHAPE, dtype) for dtype in (HALF, torch.float32))
    images = torch.rand(5, *SHAPE)
    weight = chains(view.classifier)[0].steps[1].layer.weight
    for _ in range(2):
        trained(classifier)
        for copies in (view, exact):
            copies.refresh(classifier)
        found, right = ([torch.no_grad()(copies)(images), *answers(copies, images)] for copies in (view, exact))
        for one, other in zip(found, right, strict=True):
            assert (one - other).norm() < 0.25 * other.norm()
        layouts = kept_layouts._kept[weight][1]
        kept = dict(layouts)
        answers(view, images[:3])
        assert len(layouts) == 2 and all(layouts[name] is kept[name] for name in kept)


class Broadcast(nn.Module):
    """A convolution to which a map is added that is the same for all pixels."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 16, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.layer(x) + x.mean((1, 2, 3), keepdim=True))


class Optionally(Broadcast):
    """A convolution to which a map is added in some calls."""

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        out = self.layer(x)
        return F.relu(out if skip is None else out + skip)


def test_an_added_map_has_the_shape_that_onednn_reads(served, monkeypatch):
    model = prepared(Broadcast())
    x = torch.rand(4, *SHAPE).to(HALF)
    with torch.no_grad():
        wanted = model(x)
    assert fuse_convolutions(model, x) == 1
    seen, plainly = list[Any](), Step.plainly

    def noted(step: Step, x: Tensor, added: Tensor | None, keep: bool) -> Any:
        result = plainly(step, x, added, keep)
        seen.append((added, result[0]))
        return result

    monkeypatch.setattr(Step, "plainly", noted)
    with torch.no_grad():
        assert torch.equal(model(x), wanted)
    added = [(added, out) for added, out in seen if added is not None]
    assert added and all(one.shape == out.shape and one.is_contiguous() for one, out in added)


def test_a_call_with_other_arguments_than_the_traced_ones_runs_the_module_as_it_was(served):
    model = prepared(Optionally())
    x, skip = torch.rand(4, *SHAPE).to(HALF), torch.rand(4, 16, 16, 16).to(HALF)
    with torch.no_grad():
        wanted = [model(x), model(x, skip)]
    assert fuse_convolutions(model, x, skip)
    with torch.no_grad():
        assert torch.equal(model(x), wanted[0])
        assert (model(x, skip) - wanted[1]).float().norm() <= 0.02 * wanted[1].float().norm()
