"""The classifiers: their published shapes, RobustBench's as an oracle, any image size, files. The tests of features
of a user's own classifier follow."""

import hashlib
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_cuda import MODE
from loading import module_at
from small_models import with_random_norms
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.models import resnet18

from purify_fast import Carso
from purify_fast.models import CLASSIFIERS, PreActResNet18, SmallCNN, WideResNet, build_classifier, layers
from purify_fast.models.layers import BatchNorm1d, BatchNorm2d, LeakyReLU, Representation
from purify_fast.training import load_classifier, save_classifier
from purify_fast.training.run import save_model


def digest(state):
    """The hash of the sorted names and shapes."""
    return hashlib.sha256(repr(sorted((name, tuple(t.shape)) for name, t in state.items())).encode()).hexdigest()


def parameters(module):
    return sum(p.numel() for p in module.parameters())


@pytest.fixture(scope="module")
def robustbench():
    """RobustBench's model file alone: its package imports much that its models do not need."""
    spec = importlib.util.find_spec("robustbench")
    if spec is None:
        pytest.skip("robustbench is not installed (pip install --no-deps robustbench)")
    path = Path(spec.submodule_search_locations[0]) / "model_zoo/architectures/dm_wide_resnet.py"
    return module_at(path)


@pytest.mark.parametrize(("classes", "count"), [(10, 36_479_194), (100, 36_536_884), (200, 36_600_984)])
def test_fact_1_parameters_of_wrn_28_10(classes, count):
    with torch.device("meta"):
        assert parameters(WideResNet(28, 10, classes)) == count


def test_names_and_shapes_are_robustbenchs():
    with torch.device("meta"):
        state = WideResNet().state_dict()
    assert len(state) == 155 and digest(state) == "3031a934b7011cec2f42b284f175c49d02cc9a994953b6c7b59dd8e70f4d8919"


@pytest.mark.parametrize(("depth", "width", "size"), [(10, 2, 32), (16, 1, 32), (28, 10, 32), (34, 1, 32), (10, 2, 64)])
def test_logits_equal_robustbenchs(robustbench, depth, width, size):
    """RobustBench pools 8 x 8 positions; at 64 pixels the same features are pooled over all of them."""
    torch.manual_seed(0)
    theirs = robustbench.DMWideResNet(7, depth, width, nn.SiLU, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
    with_random_norms(theirs)
    ours = WideResNet(depth, width, 7, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3)).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.rand(2, 3, size, size)
    with torch.no_grad():
        features = theirs.relu(theirs.batchnorm(theirs.layer(theirs.init_conv((x - theirs.mean) / theirs.std))))
        wanted = theirs(x) if size == 32 else theirs.logits(features.mean((2, 3)))
        torch.testing.assert_close(ours(x), wanted, rtol=1e-4, atol=1e-4)


def test_the_representation_is_26_layers_in_execution_order():
    model, ran = WideResNet(28, 1).eval(), []
    layers = model.representation_layers()
    for name, module in model.named_modules():
        if name in layers:
            module.register_forward_hook(lambda m, a, out, name=name: ran.append(name))
    model(torch.rand(1, 3, 32, 32))
    assert ran == layers and len(layers) == 26
    assert layers[8:11] == [f"layer.1.block.0.{part}" for part in ("conv_0", "conv_1", "shortcut")]
    assert layers[11] == "layer.1.block.1.conv_0" and "layer.0.block.0.shortcut" not in layers


MAKERS = {
    "wide_resnet": lambda c, size: WideResNet(10, 1, 4, in_channels=c, mean=0.5, std=0.5),
    "preact_resnet18": lambda c, size: PreActResNet18(4, c, width=4),
    "small_cnn": lambda c, size: SmallCNN(c, 4, size, 4),
}


@pytest.mark.parametrize("kind", [tuple, list, np.array, torch.tensor])
def test_statistics_of_any_kind(kind):
    model = WideResNet(10, 1, mean=kind([0.1, 0.2, 0.3]), std=np.float64(0.5))
    assert model.arguments["mean"] == pytest.approx([0.1, 0.2, 0.3]) and model.arguments["std"] == [0.5]
    assert model.normalize(torch.full((1, 3, 1, 1), 0.3)).flatten().tolist() == pytest.approx([0.4, 0.2, 0.0], abs=1e-6)
    assert not any("normalize" in name for name in model.state_dict())


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 17, 30), (3, 9, 64)])
def test_any_image_size(name, shape):
    model = MAKERS[name](shape[0], shape[1:])
    out = model.train()(torch.rand(3, *shape))
    assert out.shape == (3, 4) and out.isfinite().all()
    out.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_preact_resnet18_is_he_et_als():
    with torch.device("meta"):
        model = PreActResNet18()
    pairs = [(64, 128), (128, 256), (256, 512)]
    convolutions = 9 * (3 * 64 + 4 * 64**2 + sum(a * b + 3 * b * b for a, b in pairs)) + sum(a * b for a, b in pairs)
    norms = 2 * (4 * 64 + sum(a + 3 * b for a, b in pairs) + 512)  # two per block, on what comes in; the last one
    assert parameters(model) == convolutions + norms + 513 * 10 == 11_172_170
    assert sum(isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3) for m in model.modules()) == 17
    assert sum(isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1) for m in model.modules()) == 3


@pytest.mark.parametrize("name", MAKERS)
def test_every_classifier_is_saved_and_loaded(name, tmp_path):
    model = with_random_norms(MAKERS[name](1, (12, 20)))
    save_classifier(model, tmp_path)
    loaded, x = load_classifier(tmp_path), torch.rand(2, 1, 12, 20)
    assert type(loaded) is CLASSIFIERS[name] and loaded.arguments == model.arguments and not loaded.training
    assert torch.equal(loaded(x), model(x))


def test_what_is_no_classifier_of_ours_is_neither_saved_nor_loaded(tmp_path):
    with pytest.raises(ValueError, match="model must be one of SmallCNN, PreActResNet18, WideResNet"):
        save_classifier(nn.Linear(2, 2), tmp_path)
    save_model(tmp_path, "Carso", {}, {})
    with pytest.raises(ValueError, match="holds a 'Carso', not a classifier"):
        load_classifier(tmp_path)


def test_build_classifier():
    wide = build_classifier("wide_resnet", (1, 16, 24), 3, width=2, depth=10, mean=[0.2], std=[0.4])
    sizes = {"depth": 10, "width": 2, "num_classes": 3, "in_channels": 1}
    assert wide.arguments == {**sizes, "mean": [0.2], "std": [0.4], "activation": "silu"}
    assert build_classifier("small_cnn", (3, 16, 24), 3).arguments["image_size"] == [16, 24]
    assert build_classifier("preact_resnet18", (3, 16, 24), 3, width=8).arguments["width"] == 8
    with pytest.raises(ValueError, match=r"name must be one of small_cnn, .* got 'resnet'"):
        build_classifier("resnet", (1, 16, 16), 3)
    with pytest.raises(ValueError, match=r"depth must.* small_cnn.* 10$"):
        build_classifier("small_cnn", (1, 16, 16), 3, depth=10)


REFUSED = [
    (lambda: WideResNet(12), "depth must be 6 n"),
    (lambda: WideResNet(4), "at least 10, got 4"),
    (lambda: WideResNet(10, 0), "width must be at least 1"),
    (lambda: WideResNet(10, 1, 1), "num_classes must be at least 2"),
    (lambda: WideResNet(10, 1, mean=(0.5, 0.5)), "mean needs 1 or 3 numbers, got 2"),
    (lambda: WideResNet(10, 1, std=(0.5, 0.5, 0.0)), "std must be above 0"),
    (lambda: PreActResNet18(1), "num_classes must be at least 2"),
]


@pytest.mark.parametrize(("make", "message"), REFUSED)
def test_arguments_that_make_no_network_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# -- features of a user's own classifier -------------------------------------------------------------------------------
# Features of a user's own classifier: by module path, cloned exactly where in-place layers would spoil them.


def small_resnet():
    torch.manual_seed(0)
    model = resnet18(num_classes=10).eval()  # its ReLUs and shortcuts work in place
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -1, 1)
            nn.init.uniform_(module.weight, 0.5, 2)
    return model


LAYERS = ["conv1", "bn1", "layer1.0.bn2", "layer1.0", "layer2.0.downsample", "layer3.1.conv2", "avgpool", "fc"]


def cloned_truth(model, layers, x):
    outputs, modules = {}, dict(model.named_modules())
    for name in layers:
        modules[name].register_forward_hook(lambda m, a, out, name=name: outputs.__setitem__(name, out.clone()))
    model(x)
    for name in layers:
        modules[name]._forward_hooks.clear()
    return [outputs[name] for name in layers]


def test_in_place_layers_equal_cloned_truth():
    model, x = small_resnet(), torch.rand(3, 3, 32, 32)
    truth = cloned_truth(model, LAYERS, x)
    representation = Representation(model, LAYERS, (3, 32, 32))
    for name, got, want in zip(LAYERS, representation(x), truth, strict=True):
        assert torch.equal(got, want), name
    spoiled = dict(zip(LAYERS, representation.overwritten, strict=True))
    # bn2 is added to in place, bn1 goes through an in-place ReLU; the convolutions before them are left alone
    assert spoiled["bn1"] and spoiled["layer1.0.bn2"]
    assert not spoiled["conv1"] and not spoiled["layer3.1.conv2"] and not spoiled["fc"]


def test_gradients_flow_and_match():
    model = small_resnet().requires_grad_(False)
    layers = ["bn1", "layer1.0.bn2"]
    x = torch.rand(2, 3, 32, 32, requires_grad=True)
    truth = torch.autograd.grad(sum(t.square().sum() for t in cloned_truth(model, layers, x)), x)[0]
    representation = Representation(model, layers, (3, 32, 32))
    got = torch.autograd.grad(sum(t.square().sum() for t in representation(x)), x)[0]
    torch.testing.assert_close(got, truth)


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.block, self.head, self.reentrant = nn.Sequential(nn.Linear(4, 3), nn.ReLU()), nn.Linear(3, 2), reentrant

    def forward(self, x):
        return self.head(checkpoint(self.block, x.flatten(1), use_reentrant=self.reentrant))


def test_layers_inside_a_reentrant_checkpoint_are_refused():
    """PyTorch runs them without gradients. Without gradients, and outside, nothing is lost."""
    x = torch.rand(3, 1, 2, 2, requires_grad=True)
    reader = Representation(Checkpointed(True), ["head", "block.0"], (1, 2, 2))
    with pytest.raises(ValueError, match=r"layers: the output of 'block.0' has no gradient.* use_reentrant=False"):
        reader(x)
    with torch.no_grad():
        assert len(reader(x)) == 2
    # The last layer's output is that of the checkpoint, which has a gradient.
    for reentrant, layer in ((True, "head"), (True, "block.1"), (False, "block.0")):
        assert Representation(Checkpointed(reentrant), [layer], (1, 2, 2))(x)[0].requires_grad


def test_nothing_is_read_outside_a_call_and_mode_is_kept():
    model = SmallCNN().train()
    representation = Representation(model, ["conv1"], (1, 16, 16))
    assert model.training
    for call in (model, representation):
        call(torch.rand(2, 1, 16, 16))
        assert not representation.outputs


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.unused, self.pair = nn.Conv2d(1, 1, 3, padding=1), nn.Linear(1, 1), nn.LSTM(4, 4)
        self.tokens, self.volume, self.first = nn.Linear(16, 4), nn.Identity(), nn.Identity()

    def forward(self, x):
        x = self.conv(self.conv(x))
        self.pair(x[0, 0, :, :4])
        self.volume(x[:, None])
        return self.first(self.tokens(x[:, 0]).transpose(0, 1)).mean(0)


UNREADABLE = [
    ([], "at least one"),
    (["conv", "conv"], "each once"),
    (["convv"], "no module 'convv', its modules are conv, unused"),
    (["conv"], "'conv' must run once.* 2 times"),
    (["unused"], "'unused' must run once.* 0 times"),
    (["pair"], "output of 'pair' must be"),
    (["volume"], r"output of 'volume'.* \[2, 1, 1, 16, 16\]$"),
    (["first"], r"output of 'first'.* \[16, 2, 4\]$"),
]


@pytest.mark.parametrize(("layers", "message"), UNREADABLE)
def test_layers_that_cannot_be_read(layers, message):
    with pytest.raises(ValueError, match=message):
        Representation(Twice(), layers, (1, 16, 16))


def test_layers_as_a_text_and_a_single_logit_are_refused():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.LazyLinear(1))
    net(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match=r"layers must be .* 'layer1': write \['layer1'\]"):
        Representation(net, "layer1", (3, 8, 8))
    with pytest.raises(ValueError, match=r"layers must be .* '0': write \['0'\]"):
        Carso(net, "0", (3, 8, 8))
    with pytest.raises(ValueError, match="at least two classes"):
        Representation(net, ["0"], (3, 8, 8))


# -- the literal layers are torch's, and what they are there for: a dynamic compile that does not start over -----------
@pytest.mark.parametrize("training", [False, True])
def test_they_compute_what_torchs_do(training):
    pairs = (BatchNorm2d(4), nn.BatchNorm2d(4)), (BatchNorm1d(4), nn.BatchNorm1d(4))
    for (literal, plain), shape in zip(pairs, ((5, 4, 3, 2), (5, 4)), strict=True):
        x = torch.randn(shape)
        out = [layer.train(training)(x) for layer in (literal, plain)]
        assert torch.equal(*out) and literal.state_dict().keys() == plain.state_dict().keys()
        assert all(torch.equal(literal.state_dict()[name], value) for name, value in plain.state_dict().items())
    x = torch.randn(7)
    assert torch.equal(LeakyReLU()(x), nn.LeakyReLU(0.2)(x))


def test_on_cuda_the_statistics_of_all_processes_are_those_of_torchs_function(monkeypatch):
    """The function has a kernel on CUDA only."""
    layer, seen = BatchNorm2d(4).train(), []
    with MODE:
        x = torch.empty(2, 4, 3, 3, device="cuda")
    apply = staticmethod(lambda *given: seen.extend(given) or given[0])
    monkeypatch.setattr(layers, "SyncBatchNorm", type("SyncBatchNorm", (), {"apply": apply}))
    monkeypatch.setattr(layers, "processes", lambda: (0, 2))
    assert layer(x) is x and layer.num_batches_tracked == 1
    wanted = x, layer.weight, layer.bias, layer.running_mean, layer.running_var
    assert all(one is other for one, other in zip(seen[:5], wanted, strict=True))
    assert seen[5:] == [layer.eps, layer.momentum, torch.distributed.group.WORLD, 2]
