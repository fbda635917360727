"""A view of a classifier in training: after `refresh` it is the classifier of now, in evaluation mode."""

import copy

import pytest
import torch
from loading import module
from small_models import answers
from torch import nn
from torch.nn import functional as F

from purify_fast.models.classifiers import PreActResNet18, SmallCNN, build_classifier
from purify_fast.models.representation import Representation
from purify_fast.speed.folding.inference_copy import InferenceCopy
from purify_fast.speed.layout import convert_to_channels_last

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = (3, 16, 16)


class Unfoldable(nn.Module):
    """BatchNorms that stay, before the first layer and after a sum; one that folds; a parameter and a buffer."""

    def __init__(self):
        super().__init__()
        self.first, self.conv, self.after = nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.shortcut, self.joined = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False)
        self.scale, self.head = nn.Parameter(torch.ones(4, 1, 1)), nn.Linear(4, 5)
        self.register_buffer("shift", torch.zeros(4, 1, 1))

    def forward(self, x):
        x = self.first(x)
        out = self.joined(F.relu(self.after(self.conv(x))) + self.shortcut(x))
        return self.head((out * self.scale + self.shift).mean((2, 3)))


class Shared(nn.Module):
    """A layer under two names, and a weight of two layers."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.body = nn.Sequential(self.conv, self.norm, nn.ReLU())
        self.one, self.two = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
        self.two.weight = self.one.weight

    def forward(self, x):
        return self.two(F.relu(self.one(self.body(x)))).mean((2, 3))


MODELS = {
    "small_cnn": (lambda: SmallCNN(3, width=4), 0),
    "preact_resnet18": (lambda: PreActResNet18(width=4), 8),
    "wide_resnet": (lambda: build_classifier("wide_resnet", SHAPE, 10, width=1, depth=10), None),
    "fully_connected": (lambda: build_classifier("fully_connected", SHAPE, 10), 0),
    "unfoldable": (Unfoldable, 1),
    "shared": (Shared, 1),
    "all that folds": (module("speed", "folding").Net, 4),
}


def made(name):
    torch.manual_seed(0)
    return MODELS[name][0]()


def train(model, steps=3):
    """A few steps of training: other weights, and BatchNorm statistics far from what they were."""
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model.train()
    for _ in range(steps):
        x = 0.5 + 0.5 * torch.rand(8, *SHAPE, generator=generator)
        loss = F.cross_entropy(model(x), torch.arange(8) % 3)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.add_(0.2 * torch.rand(buffer.shape, generator=generator))


def apart(got, want):
    """Largest difference of each result, relative to its largest value."""
    return [((a - b).abs().max() / b.abs().max()).item() for a, b in zip(got, want, strict=True)]


@pytest.mark.parametrize("name", MODELS)
def test_after_training_and_refresh_the_view_is_the_classifier(name):
    model, x = made(name), torch.rand(8, *SHAPE, generator=torch.Generator().manual_seed(2))
    exact, fast = InferenceCopy(model, SHAPE, torch.float32), InferenceCopy(model, SHAPE)
    if MODELS[name][1] is not None:
        assert exact.folded == fast.folded == MODELS[name][1]
    first = answers(exact, x)
    train(model)
    assert all(torch.equal(a, b) for a, b in zip(answers(exact, x), first, strict=True))  # not before it is asked to
    # a second time too it starts from the classifier, not from the folded weights
    for view in (exact, exact, fast):
        view.refresh(model)
    assert model.training
    frozen = copy.deepcopy(model).eval()
    want = answers(frozen, x)
    assert min(apart(first, want)) > 1e-2  # the weights are others indeed
    assert max(apart(answers(exact, x), want)) < 1e-5
    assert apart(answers(fast, x), want)[0] < 0.05
    # a copy that was made before the training is that which is made now
    for view, dtype in ((exact, torch.float32), (fast, torch.bfloat16)):
        new = InferenceCopy(frozen, SHAPE, dtype)
        assert all(map(torch.equal, view.state_dict().values(), new.state_dict().values()))


def test_the_classifier_is_left_alone():
    """No parameter of it becomes the view's, loses its gradient or changes; it is trained as if there were no view."""
    model, other = made("preact_resnet18"), made("preact_resnet18")
    representation = Representation(model, ["act"], SHAPE)
    view = InferenceCopy(model, SHAPE)
    view.refresh(model)
    train(model)
    view.refresh(model)
    train(other)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))
    assert all(p.requires_grad for p in model.parameters()) and not any(p.requires_grad for p in view.parameters())
    assert not {id(p) for p in model.parameters()} & {id(p) for p in view.parameters()}
    assert not any(name.startswith("_source") for name, _ in view.named_modules())
    assert not any(m._forward_hooks for m in view.modules()) and representation(torch.rand(2, *SHAPE))[0].any()


def test_the_classifier_is_left_alone_while_a_layout_is_tried():
    """In training mode two grey images would enter BatchNorm's statistics."""
    for name in ("preact_resnet18", "unfoldable", "fully_connected"):  # the last flattens its images
        model = made(name).train()
        before = copy.deepcopy(model.state_dict())
        modes = [module.training for module in model.modules()]
        convert_to_channels_last(model, SHAPE)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        assert [module.training for module in model.modules()] == modes and any(modes)
