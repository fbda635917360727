import pytest
import torch
from torch.nn import functional as F

from purify_fast.attacks import base, fgsm
from purify_fast.data.datasets import small_digits
from purify_fast.models.classifiers import SmallCNN


@pytest.fixture(scope="module")
def digits(one_thread):
    """A small CNN, trained on FGSM examples for a few seconds, and 500 digits."""
    x, y = small_digits()
    x = x.float() / 16
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        net = SmallCNN(1, 10, (8, 8), 6)
        optimiser = torch.optim.Adam(net.parameters(), 8e-3)
        for _ in range(5):
            for a, b in zip(x[200:].split(64), y[200:].split(64), strict=True):
                a = fgsm(net, a, b, eps=0.1)
                optimiser.zero_grad()
                F.cross_entropy(net(a), b).backward()
                optimiser.step()
    return net.eval(), x[:500], y[:500]


@pytest.fixture(scope="module")
def model():
    """A network of six classes that was not trained."""
    torch.manual_seed(0)
    return SmallCNN(in_channels=3, num_classes=6, image_size=(8, 8), width=4)


@pytest.fixture(scope="module")
def batch():
    """Nine images and random labels."""
    g = torch.Generator().manual_seed(1)
    return torch.rand(9, 3, 8, 8, generator=g), torch.randint(0, 6, (9,), generator=g)


@pytest.fixture(autouse=True)
def one_seed(request, monkeypatch):
    """Calls without a seed have the seed 0, except in the tests of these calls."""
    if request.path.name != "test_any_loop.py":
        monkeypatch.setattr(base, "drawn_seed", lambda generator=None: 0)
