"""Within ``torch.inference_mode()`` no gradient is recorded: attacks say so, and an evaluation leaves that mode."""

import numpy as np
import pytest
import torch
from torch import nn

from purify_fast.attacks import APGD, FABT, PGD, StAdv, apgd, fab_t, fgsm, input_gradient, pgd, square, stadv
from purify_fast.evaluation import evaluate

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def trio():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(27, 4)).eval()
    x = torch.rand(12, 3, 3, 3)
    with torch.no_grad():
        return model, x, model(x).argmax(1)


@pytest.mark.parametrize("attack", [apgd, pgd, fab_t, fgsm, stadv, input_gradient])
def test_attacks_by_gradients_refuse_it(trio, attack):
    options = {} if attack in (stadv, input_gradient) else {"eps": 0.1}
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"torch.inference_mode\(\) records none"):
        attack(*trio, **options)
    with torch.no_grad():
        attack(*trio, **options)


def test_square_needs_none(trio):
    found = square(*trio, eps=0.2, n_queries=10)
    with torch.inference_mode():
        assert torch.equal(square(*trio, eps=0.2, n_queries=10), found)
    assert not torch.equal(found, trio[1])


@pytest.mark.parametrize("form", ["as they are", "bytes", "batches"])
def test_an_evaluation_finds_what_it_finds_outside(trio, form):
    model, x, y = trio

    def found():
        # made within the block, as a data loader's batches are
        images, labels = (x * 255).byte() if form == "bytes" else x.clone(), y.clone()
        given = ([(images[:5], labels[:5]), (images[5:], labels[5:])],) if form == "batches" else (images, labels)
        attacks = [APGD(), FABT(), PGD(), StAdv()]
        report = evaluate(model, *given, eps=0.1, steps=5, attacks=attacks, progress=False)
        return {row.attack: row.robust for row in report.rows}, [row.reliable for row in report.rows]

    outside = found()
    with torch.inference_mode():
        inside = found()
        assert torch.is_inference_mode_enabled()
    assert inside[1] == outside[1] and outside[0]["worst"].mean() < 0.5
    for attack, robust in outside[0].items():
        assert np.array_equal(inside[0][attack], robust)
