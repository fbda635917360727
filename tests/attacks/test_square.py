"""Square: what a query launches on a GPU, and which of its points are judged."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from purify_fast.attacks import square
from purify_fast.ops.dispatch import registry
from purify_fast.ops.dispatch.tune import Launches

pytestmark = pytest.mark.usefixtures("one_thread")
NORMS = ("linf", "l2", "l1")


class Noting(nn.Module):
    """Notes what was launched before each of its calls, and how many images each asks about; it launches nothing."""

    def __init__(self, launches: Launches):
        super().__init__()
        self.launches, self.calls = launches, []
        self.weight = nn.Parameter(torch.randn(192, 10, generator=torch.Generator().manual_seed(0)))

    def forward(self, x):
        self.calls.append((self.launches.count, len(x)))
        with _disable_current_modes():
            return x.flatten(1) @ self.weight


@pytest.mark.parametrize("give_up", [False, True])
@pytest.mark.parametrize("norm, eps", zip(NORMS, (1e-4, 1e-3, 5e-3), strict=True), ids=NORMS)
def test_a_query_is_at_most_twelve_launches(norm, eps, give_up, monkeypatch):
    """Besides the model, with all that is done every few queries; the kernels serve, as on a GPU."""
    monkeypatch.setattr(registry.Op, "plain", lambda *given: False)
    launches, x = Launches(), torch.rand(16, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    model = Noting(launches)
    y = model(x).argmax(1)
    with launches:
        square(model, x, y, eps=eps, norm=norm, n_queries=1400, give_up=give_up)
    counts = {}
    for together in (1, 8):
        # without the first calls, which judge the clean images and the beginning
        rounds = [count for count, images in model.calls if images == 16 * together][5:46]
        assert len(rounds) == 41, "an image has fallen"
        counts[together] = (rounds[-1] - rounds[0]) / 40
    # one of the operators, `promote_types`, launches nothing
    assert counts[1] - 1 <= 11 and counts[8] - 1 <= 12, counts


def test_a_point_on_the_border_is_judged_once():
    """A tie is no success to the count of the search's own draws, but the model may see it otherwise."""
    sizes = []

    class Tied(nn.Module):
        def forward(self, x):
            sizes.append(len(x))
            # clean images are right; later all logits are the same, and the first class, which is the true one, wins
            return torch.stack([(x.flatten(1).std(1) < 1e-3).float(), torch.zeros(len(x))], 1)

    x = torch.full((6, 1, 8, 8), 0.5)
    found = square(Tied(), x, torch.zeros(6, dtype=torch.int64), eps=0.1, n_queries=60)
    # the clean images, the beginning, the points of the beginning, 60 proposals, and the last judgement
    assert sizes == [6] * (3 + 60 + 1) and not torch.equal(found, x)
