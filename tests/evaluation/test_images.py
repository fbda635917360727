"""Images and labels of every form that `evaluate` takes, and those it refuses."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from purify_fast.attacks import PGD
from purify_fast.evaluation import evaluate

QUIET = {"eps": 0.1, "progress": False, "attacks": [PGD(steps=2)]}


@pytest.fixture
def trio():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(27, 4))
    return model, torch.rand(10, 3, 3, 3), torch.randint(0, 4, (10,))


def test_loaders_and_iterables_give_the_same_report(trio):
    model, x, y = trio
    plain = evaluate(model, x, y, **QUIET)
    indexed = [(x[:6], y[:6], torch.arange(6)), (x[6:], y[6:], torch.arange(6, 10))]
    levels = (x * 255).round().to(torch.uint8)
    for batches in (DataLoader(TensorDataset(x, y), batch_size=3), indexed, iter(indexed), (pair for pair in indexed)):
        report = evaluate(model, batches, **QUIET)
        for row, other in zip(report.rows, plain.rows, strict=True):
            assert row.attack == other.attack and row.data == other.data and np.array_equal(row.robust, other.robust)
    whole = evaluate(model, levels, y, **QUIET)
    parts = evaluate(model, DataLoader(TensorDataset(levels, y), batch_size=4), **QUIET)
    assert [row.data for row in whole.rows] == [row.data for row in parts.rows]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda x, y: (x.numpy(), y), TypeError, r"x must be a torch.Tensor, got numpy.ndarray: torch.as_tensor\(x\)"),
        (lambda x, y: (x, y.numpy()), TypeError, r"y must be a torch.Tensor, got numpy.ndarray: torch.as_tensor\(y\)"),
        (lambda x, y: (x, y.int()), ValueError, r"int64 \[N\] = \[10\], got torch.int32 \[10\]; y.long\(\) makes them"),
        (lambda x, y: (x, y.float()), ValueError, r"y must be int64 \[N\] = \[10\], got torch.float32 \[10\]$"),
        (lambda x, y: (x, None), TypeError, "without y, x must be an iterable of batches .*, got Tensor"),
        (lambda x, y: (x.numpy(), None), TypeError, "without y, x must be an iterable of batches .*, got ndarray"),
        (lambda x, y: (3, None), TypeError, "without y, x must be an iterable of batches .*, got int"),
        (lambda x, y: ([], None), ValueError, "no batch: a generator can be read only once"),
        (lambda x, y: ([x], None), TypeError, r"batch 0 must be \(images, labels\) .*, got Tensor"),
        (lambda x, y: ([(x, y), (x, y, y, y)], None), TypeError, "batch 1 must be .*, got 4 values"),
        (lambda x, y: ([(x, [1])], None), TypeError, "batch 0 must have tensors .*, got Tensor and list"),
        (lambda x, y: ([(x, y[:3])], None), ValueError, r"got \[10, 3, 3, 3\] and \[3\]"),
        (lambda x, y: ([(x, y), (x[:, :1], y)], None), ValueError, r"batch 1 has .* \[1, 3, 3\], the first has"),
        (lambda x, y: ([(x, y), (x.double(), y)], None), ValueError, "batch 1 has torch.float64 images"),
    ],
)
def test_errors(trio, change, error, message):
    model, x, y = trio
    x, y = change(x, y)
    with pytest.raises(error, match=message):
        evaluate(model, x, y, **QUIET)
