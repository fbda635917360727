import math
from importlib import import_module

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from purify_fast.ops import attack_loss

pytestmark = pytest.mark.interpreter

op = import_module("purify_fast.ops.attack_loss")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NAN, INF = math.nan, math.inf


def formula(logits: Tensor, y: Tensor, t: Tensor, kind: str) -> Tensor:
    """The losses as they are published."""
    true = logits.gather(1, y[:, None])[:, 0]
    top = logits.topk(min(4, logits.shape[1]), 1).values
    if kind == "ce":
        return F.cross_entropy(logits, y, reduction="none")
    if kind.endswith("_targeted"):
        margin = logits.gather(1, t[:, None])[:, 0] - true
    else:
        margin = logits.scatter(1, y[:, None], -INF).amax(1) - true
    if kind == "scaled_margin":
        return margin / logits.detach().std(1, correction=0)
    width = {"dlr": lambda: top[:, 0] - top[:, 2], "dlr_targeted": lambda: top[:, 0] - (top[:, 2] + top[:, 3]) / 2}
    return margin / width[kind]() if kind in width else margin


def call(logits: Tensor, y: Tensor, t: Tensor, kind: str, toward: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    return attack_loss(logits, y, kind, targets=t if kind.endswith("_targeted") else None, toward=toward)


KINDS_AND_CLASSES = [(kind, n) for kind in op.KINDS for n in (op.FEWEST_CLASSES.get(kind, 2), 10, 1000)]


@pytest.mark.parametrize(("kind", "classes"), KINDS_AND_CLASSES)
def test_the_loss_its_derivative_and_the_decisions_are_those_of_the_published_formula(backend, kind, classes):
    generator = torch.Generator().manual_seed(classes)
    drawn = 3 * torch.randn(9, classes, generator=generator)
    y, t = (torch.randint(classes, (9,), generator=generator) for _ in range(2))
    drawn[:2] += 12 * F.one_hot(y[:2], classes)  # the model is sure
    for dtype in DTYPES:
        leaf = drawn.to(dtype).double().requires_grad_()
        wanted = formula(leaf, y, t, kind)
        (derivative,) = torch.autograd.grad(wanted.sum(), leaf)
        for toward, sign in ((False, 1), (True, -1)):
            gradient, loss, wrong = call(drawn.to(dtype), y, t, kind, toward)
            assert gradient.dtype == dtype and wrong.dtype == torch.float32
            few = 1e-10 if dtype == torch.float64 else 4e-6
            # In float16 the tangent begins at z = -6.8.
            some = slice(2 if dtype == torch.float16 and kind == "ce" else 0, None)
            torch.testing.assert_close(loss[some].double(), sign * wanted.detach()[some], rtol=few, atol=few)
            rounding = max(few, torch.finfo(dtype).eps)
            torch.testing.assert_close(gradient[some].double(), sign * derivative[some], rtol=rounding, atol=few)
            assert torch.equal(wrong.bool(), drawn.to(dtype).argmax(1) != y)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", op.KINDS)
def test_numbers_that_are_equal_or_not_finite(backend, kind, dtype):
    """As the definition: NaN, infinities, masked classes, ties, and a model that is sure beyond the last digit."""
    rows = [
        *([2, 2, 2, 2], [0, 1, 1, 1], [3, 1, 3, 0], [NAN, 1, 2, 3], [1, NAN, 0, 0], [INF, 1, 2, 3], [1, INF, INF, 0]),
        *([INF] * 4, [-INF] * 4, [-INF, 1, 0, 2], [1, -INF, -INF, -INF], [1, 0, -INF, -INF], [5, 3, 2, -INF]),
        *([100, 0, 1, -100], [1e4, -1e4, 0, 5], [INF, -INF, 0, 1], [7, 0, 0, 0]),
    ]
    logits = torch.tensor(rows, dtype=torch.float64).to(dtype).repeat_interleave(4, 0)
    y = torch.arange(4).repeat(len(rows))
    for t in (y, (y + 1) % 4, (y + 2) % 4):
        targets = (t,) if kind.endswith("_targeted") else ()
        both = torch.stack([y, *targets], 1) if targets else y
        wanted = op.reference(logits, both, op.KINDS.index(kind), False)
        error = 1e-2 if dtype.itemsize == 2 else 2e-6
        torch.testing.assert_close(call(logits, y, t, kind), wanted, equal_nan=True, rtol=error, atol=1e-6)


def test_a_model_that_is_sure_still_has_a_slope(backend):
    """With two classes, the loss is log(1 + exp z) of the difference z of the logits. Below z = -61.1 it is linear."""
    z = torch.tensor([-7.0, -20.0, -61.0, -80.0, -1e30])
    gradient, loss, wrong = attack_loss(torch.stack([torch.zeros(5), z], 1), torch.zeros(5, dtype=torch.int64))
    bounded = z.double().clamp_min(0.7 * math.log(2.0**-126))
    slope = bounded.sigmoid()
    torch.testing.assert_close(gradient.double(), torch.stack([-slope, slope], 1), rtol=2e-5, atol=0)
    wanted = F.softplus(bounded) + slope * (z.double() - bounded)
    torch.testing.assert_close(loss.double(), wanted, rtol=2e-5, atol=0)
    assert not wrong.any()


@pytest.mark.parametrize("label", [-1, -100, 10, 2**40])
@pytest.mark.parametrize("kind", ["ce", "dlr_targeted"])
def test_a_label_outside_of_the_classes_is_never_read(backend, kind, label):
    logits, y, t = torch.randn(3, 10), torch.tensor([0, 1, 2]), torch.tensor([5, 6, 7])
    before = call(logits, y, t, kind)
    (t if kind.endswith("_targeted") else y)[1] = label
    if backend != "triton":
        with pytest.raises(RuntimeError, match=rf"\b10\b.* {label}$" if backend == "cpp" else f" {label} is out of"):
            call(logits, y, t, kind)
        return
    for found, usual in zip(call(logits, y, t, kind), before, strict=True):
        assert torch.equal(found[::2], usual[::2])
    gradient, loss, wrong = call(logits, y, t, kind)
    assert gradient[1].isnan().all() and loss[1].isnan() and wrong[1] == 1
