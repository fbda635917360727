"""Features of a user's own classifier: by module path, cloned exactly where in-place layers would spoil them."""

import pytest
import torch
from fake_cuda import MODE
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.models import resnet18

from purify_fast import Carso
from purify_fast.models import layers
from purify_fast.models.classifiers import SmallCNN
from purify_fast.models.layers import BatchNorm1d, BatchNorm2d, LeakyReLU, Representation


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
