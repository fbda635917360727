import pytest
import search_calls
import torch
from small_models import images_and_labels, shuffled_digits
from torch.nn import functional as F

from purify_fast.attacks import base, fgsm, functions
from purify_fast.models.classifiers import SmallCNN

CHOSEN_SEED = base.chosen_seed


@pytest.fixture(scope="module")
def digits():
    """A small CNN, trained on FGSM examples for a few seconds, and 500 digits."""
    x, y = shuffled_digits()
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
    return images_and_labels(9, (3, 8, 8), 6)


@pytest.fixture(autouse=True)
def one_seed(request, monkeypatch):
    """Calls without a seed have the seed 0, except in the tests of these calls."""
    if request.path.name != "test_any_loop.py":
        for module in (base, functions, search_calls):
            monkeypatch.setattr(module, "chosen_seed", lambda seed: 0 if seed is None else CHOSEN_SEED(seed))
