"""The losses that attacks raise, compared with float64, and attacks on models that are sure."""

import inspect
import itertools
import warnings

import pytest
import torch
from direct import direct
from search_calls import apgd, fab_t, square, stadv
from torch import nn
from torch.nn import functional as F

from purify_fast import attacks
from purify_fast.attacks import PGD, GradientHealth, JudgeContext, OriginalAutoAttack, attacked_model, fgsm, frozen, pgd
from purify_fast.autoattack import AutoAttack
from purify_fast.judge.searches.model_tests import check_model
from purify_fast.ops import attack_loss, use_backend
from purify_fast.training import Batch, TrainingAttack

#: Below this loss the exact form replaces the usual one.
SURE = {torch.float32: 2**-8, torch.float64: 2.0**-37, torch.bfloat16: 2**-8, torch.float16: 2**-8}


def sure_logits(classes, dtype=torch.float32, margins=(0, 200)):
    """Random logits of 802 images, whose true class is ahead of the second by margins in even steps."""
    margin, g = torch.linspace(*margins, 802), torch.Generator().manual_seed(classes)
    logits, y = 3 * torch.randn(802, classes, generator=g), torch.randint(0, classes, (802,), generator=g)
    rows = torch.arange(802)
    logits[rows, y] = -torch.inf
    logits[rows, y] = logits.amax(1) + margin
    return logits.to(dtype), y


def with_gradient(kind, logits, y, targets=None):
    gradient, loss, _ = attack_loss(logits, y, kind, targets=targets)
    return loss, gradient


def usual(logits, y):
    return F.cross_entropy(logits, y, reduction="none")


def usual_with_gradient(logits, y):
    leaf = logits.detach().requires_grad_()
    value = usual(leaf, y)
    return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]


def in_float64(logits, y):
    """The loss and its gradient, and the logsumexp of the other classes minus the true logit, in float64."""
    leaf = logits.double().requires_grad_()
    z = leaf.scatter(1, y[:, None], -torch.inf).logsumexp(1) - leaf.gather(1, y[:, None])[:, 0]
    value = F.softplus(z)
    return value.detach(), torch.autograd.grad(value.sum(), leaf)[0], z.detach()


def relative(found, wanted):
    return (found.double() - wanted).norm(dim=1) / wanted.norm(dim=1)


PRECISIONS = [
    (torch.float32, 61, 1e-4),
    # the gradient is rounded to the dtype of the logits
    (torch.bfloat16, 61, 4e-3),
    (torch.float16, 6.8, 2e-3),
    (torch.float64, 495, 1e-4),
]


@pytest.mark.parametrize("classes", [2, 3, 10, 1000])
@pytest.mark.parametrize(("dtype", "lowest", "rounding"), PRECISIONS)
def test_the_cross_entropy_of_a_sure_model_is_that_of_float64(classes, dtype, lowest, rounding):
    logits, y = sure_logits(classes, dtype)
    loss, gradient = with_gradient("ce", logits, y)
    value, exact, z = in_float64(logits, y)
    assert loss.dtype == torch.promote_types(dtype, torch.float32) and gradient.dtype == dtype
    seen = z > -lowest
    # The usual formula adds the classes up to a number near 1, whose distance to 1 is the loss, at least SURE. Each
    # addition errs by at most half an eps. The order of the additions depends on the processor's instructions.
    summed = usual(logits.to(loss.dtype), y) >= SURE[loss.dtype]
    sums = summed * classes * torch.finfo(loss.dtype).eps / 2 / SURE[loss.dtype]
    assert seen.sum() > 5 and ((loss.double() / value - 1).abs() < min(rounding, 1e-4) + sums)[seen].all()
    assert (relative(gradient, exact) < rounding + sums)[seen].all()
    # further down the size stays, so that no gradient vanishes, and the direction is right
    units = (each / each.norm(dim=1, keepdim=True) for each in (gradient.double(), exact))
    assert (relative(*units) < rounding + sums).all()
    assert gradient.double().norm(dim=1).min() > torch.finfo(dtype).tiny ** 0.8
    # a smaller margin has a higher loss, everywhere
    rises = loss[z.argsort()].diff()
    assert (rises >= 0).all() and (rises > 0).float().mean() > (0.99 if dtype == torch.float32 else 0.3)


def test_infinite_logits_and_nan_are_as_in_the_usual_formula():
    values = (-torch.inf, -1e38, -100.0, 0.0, 3.0, 100.0, 1e38, torch.inf, torch.nan)
    logits = torch.tensor(list(itertools.product(values, repeat=3)))
    y = torch.zeros(len(logits), dtype=torch.int64)
    with use_backend("reference"):
        (loss, gradient), (before, slope) = with_gradient("ce", logits, y), usual_with_gradient(logits, y)
    # the only exact losses: the true class is far ahead of another finite class
    exact = logits[:, 0].isfinite() & (logits[:, 1:].amax(1).isfinite()) & (before == 0)
    assert 20 < exact.sum() < 100 and (loss[exact] < 0).all() and gradient[exact].any(1).all()
    assert torch.equal(loss[~exact].nan_to_num(7.0), before[~exact].nan_to_num(7.0))
    assert torch.equal(gradient[~exact].nan_to_num(7.0), slope[~exact].nan_to_num(7.0))
    assert loss[exact].isfinite().all() and gradient[exact].isfinite().all()
    assert before.isnan().sum() > 200 and gradient.isnan().any(1).sum() > 200


class Sure(nn.Module):
    """A linear classifier of four classes, of which the first is ahead by about a margin on gray images."""

    def __init__(self, margin):
        super().__init__()
        weight = torch.randn(4, 48, generator=torch.Generator().manual_seed(3))
        self.register_buffer("weight", weight)
        self.register_buffer("bias", torch.tensor([margin, 0.0, 0.0, 0.0]) - 0.5 * weight.sum(1))

    def forward(self, x):
        return F.linear(x.flatten(1), self.weight, self.bias)


ATTACKS = {
    "FGSM": lambda model, x, y: fgsm(model, x, y, eps=0.02),
    "PGD": lambda model, x, y: pgd(model, x, y, eps=0.02, steps=3, random_start=False, keep_best=True),
    "PGD, l2": lambda model, x, y: pgd(model, x, y, eps=0.02, steps=3, norm="l2", random_start=False),
    "APGD": lambda model, x, y: apgd(model, x, y, eps=0.02, steps=5),
    "training": lambda model, x, y: TrainingAttack(eps=0.02, steps=2, random_start=False).run(
        model, Batch(x, y, torch.arange(len(x)), 0)
    ),
}


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("margin", [20.0, 50.0, 150.0])
def test_an_attack_on_a_sure_model_finds_what_it_finds_in_float64(name, margin):
    x = 0.5 + 0.01 * torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(5))
    y = torch.zeros(6, dtype=torch.int64)
    found, wanted = (ATTACKS[name](Sure(margin).to(dtype), x.to(dtype), y) for dtype in (torch.float32, torch.float64))
    assert torch.allclose(found.double(), wanted, atol=1e-5) and not torch.equal(found, x)
    if name == "FGSM":
        # with the formula of float32 alone, the steps follow the wrong classes but not the true class
        leaf = x.clone().requires_grad_()
        blind = torch.autograd.grad(usual(Sure(margin)(leaf), y).sum(), leaf)[0].sign()
        assert (blind == (found - x).sign()).float().mean() < 0.9


def test_gradients_of_the_packages_autoattack_are_counted_by_its_own_formula():
    """AutoAttack's own cross-entropy has no gradient on a model that is sure, so its result stays unreliable."""
    pytest.importorskip("pyautoattack")
    x = 0.5 + 0.01 * torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(5))
    y, model = torch.zeros(5, dtype=torch.int64), Sure(150.0)
    for batch_size in (None, 2):
        context = JudgeContext(eps=0.02, num_classes=4, batch_size=batch_size)
        health = OriginalAutoAttack(steps=2, n_queries=2).search(model, x, y, context).health
        assert health.zero == 1 and not health.reliable, batch_size
    own = GradientHealth()
    with frozen(model):
        direct(apgd, model, x, y, eps=0.02, steps=2, health=own)
    assert own.zero == 0 and own.reliable


# -- the attacks as functions: their arguments and their defaults ------------------------------------------------------


FUNCTIONS = [attacks.pgd, attacks.fgsm]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_signature_names_every_keyword_with_its_type_and_default(function):
    first, *others = inspect.signature(function).parameters.values()
    keywords = [each for each in others if each.kind is each.KEYWORD_ONLY]
    assert [each.name for each in (first, *others[:3])] == ["model", "x", "y", "eps"]
    assert others[3:] == keywords and 0 < len(keywords) <= 14
    assert all(each.default is not each.empty and each.annotation is not each.empty for each in keywords)


def test_a_function_runs_its_class_with_its_defaults(model):
    x = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    y, options = model(x).argmax(1), {"eps": 0.1, "seed": 3}
    for function in FUNCTIONS:
        how = {"eps": 0.1} if function is attacks.fgsm else options
        assert torch.equal(function(model, x, y, **how), direct(function, model, x, y, **how)), function
    assert not torch.equal(attacks.pgd(model, x, y, **options), attacks.pgd(model, x, y, **options, steps=1))


# -- what a model returns, where an attack is called without an evaluation; and models that refuse a batch -------------


BAD = {
    "one logit": (lambda z: z[:, :1], ValueError, r"at least two classes .* \[(\d), 1\] for B = \1$"),
    "class": (lambda z: z.argmax(1), ValueError, r"floating-point .* got torch.int64 \[(\d)\] for B = \1$"),
    "tuple": (lambda z: (z, None), TypeError, r"must return a torch.Tensor of logits \[B, classes\], got tuple: "),
    "mapping": (lambda z: {"logits": z}, TypeError, "got dict: give a module whose forward returns the logits in it$"),
    "whole numbers": (lambda z: (9 * z).int(), ValueError, "floating-point .* got torch.int32 "),
    "transposed": (lambda z: z.T, ValueError, r"got torch.float32 \[6, (\d)\] for B = \1$"),
}


@pytest.mark.parametrize(("change", "error", "message"), BAD.values(), ids=BAD)
def test_an_attack_refuses_an_output_that_is_not_logits(model, batch, change, error, message):
    with pytest.raises(error, match=message):
        pgd(lambda x: change(model(x)), *batch, eps=0.1, steps=2)


def test_nan_and_probabilities_are_warned_of(model, batch):
    """They are seen in the first output; each text is shown once by default."""
    x, y = batch
    with pytest.warns(UserWarning, match="returns NaN for some images: an attack cannot move them"):
        PGD(steps=2)(lambda z: model(z) / (torch.arange(len(z)) > 0)[:, None] - torch.inf, x, y, eps=0.1)
    with pytest.warns(UserWarning, match="returns probabilities, not logits: return the logits before the softmax"):
        pgd(lambda z: model(z).softmax(1), x, y, eps=0.1, steps=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pgd(model, x, y, eps=0.1, steps=2)
        # the rest of an attack is not read, and neither is a model outside of an attack
        calls = iter(range(9))
        pgd(lambda z: model(z) if next(calls) == 0 else model(z) + torch.nan, x, y, eps=0.1, steps=2)
        attacked_model.logits_of(lambda z: model(z).softmax(1), x)


WRONG_SHAPES = [
    (lambda z: z.squeeze(), 9, r"\[6\] for B = 1"),
    (lambda z: z.squeeze(), 1, r"\[6\] for B = 1"),
    # as many images as classes hide no transposed logits
    (lambda z: z.T, 6, r"\[6, 1\] for B = 1"),
]


@pytest.mark.parametrize(("made", "images", "got"), WRONG_SHAPES)
def test_a_model_is_tried_on_a_single_image_too(model, batch, made, images, got):
    with pytest.raises(ValueError, match=got):
        check_model(lambda z: made(model(z)), batch[0][:images])
    with pytest.raises(ValueError, match=r"must return 6 logits for each image, got 3"):
        check_model(lambda z: model(z)[:, : 6 if len(z) > 1 else 3], batch[0])


# -- arguments that are tensors, labels and losses are refused by name before any work ---------------------------------


FEW = {fgsm: {}, square: {"n_queries": 5}, pgd: {"steps": 2}, apgd: {"steps": 2}, fab_t: {"steps": 2}}


@pytest.fixture
def made():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Flatten(), nn.Linear(48, 4)).eval(), torch.rand(6, 3, 4, 4)
    return model, x, model(x).argmax(1)


@pytest.mark.parametrize("attack", FEW)
@pytest.mark.parametrize("eps", [8.0, -0.1, float("nan")])
def test_a_radius_for_each_image_is_checked_as_a_number_is(made, attack, eps):
    with pytest.raises(ValueError, match="eps must be at least 0 and at most the range's width"):
        attack(*made, torch.full((6,), eps), **FEW[attack])


def test_a_radius_and_a_range_for_each_channel_are_compared(made):
    model, x, y = made
    std = torch.tensor([0.25, 0.24, 0.26]).view(3, 1, 1)
    box = {"clip_min": 0 / std, "clip_max": 1 / std, "steps": 2}
    assert ((pgd(model, x / std, y, (8 / 255) / std, **box) - x / std) * std).abs().max() <= 8 / 255 + 1e-6
    for eps in (8 / std, 8.0):
        with pytest.raises(ValueError, match="eps must be at least 0 and at most the range's width, got"):
            pgd(model, x / std, y, eps, **box)
    with pytest.raises(ValueError, match="clip_max must be above clip_min"):
        pgd(model, x, y, 0.1, clip_min=torch.ones(3, 1, 1), clip_max=torch.zeros(3, 1, 1))
    with pytest.raises(ValueError, match="alpha must be at least 0"):
        PGD(alpha=torch.tensor([0.1, -0.1]))
    # an l2 ball may be wider than a pixel's range
    assert pgd(model, x, y, torch.full((6,), 5.0), norm="l2", steps=2).shape == x.shape
    with pytest.raises(ValueError, match="eps must be"):
        pgd(model, x, y, torch.full((6,), 7.0), norm="l2", steps=2)


def two_classes(x):
    return x.flatten(1)[:, :2]


CHANNELS, OWN = torch.full((3, 1, 1), 0.05), lambda logits, y: logits[:, 0]
#: Attacks, what they are given, and the words of the error.
REFUSED = [
    *((attack, {"y": torch.full((6,), 4)}, "y must have class numbers from 0 to 3, got 4") for attack in FEW),
    (pgd, {"y": None}, "y is missing"),
    (pgd, {"y": torch.zeros(3, 5), "loss": OWN}, "y must have a row for each of the 6 images"),
    (pgd, {"y": None, "targeted": torch.zeros(6).long(), "loss": "nonsense"}, "targeted needs a loss among"),
    (pgd, {"eps": torch.ones(2, 1, 1)}, "eps must be a number"),
    (pgd, {"model": two_classes, "loss": "dlr"}, "at least 3 classes, got a model with 2: use the loss 'margin'"),
    (pgd, {"eps": CHANNELS, "norm": "l2", "random_start": False}, "norm must be linf"),
    (apgd, {"eps": CHANNELS}, "eps, clip_min and clip_max must be numbers"),
    (pgd, {"mode": "train"}, "mode must be one of eval, keep"),
    (pgd, {"loss": OWN, "stop_when_fallen": True}, "stop_when_fallen must be False"),
    (square, {"x": torch.rand(6, 5)}, r"x must be images \[B, C, H, W\] for Square, got \[6, 5\]"),
    (stadv, {"x": torch.rand(6, 12)}, r"x must be images \[B, C, H, W\], got \[6, 12\]"),
    (stadv, {"eps": torch.zeros(3)}, r"eps must be a number or a tensor \[B\] = \[6\]"),
]


@pytest.mark.parametrize(("attack", "change", "message"), REFUSED)
def test_wrong_arguments_are_named(made, attack, change, message):
    model, x, y = made
    with pytest.raises((TypeError, ValueError), match=message):
        attack(**{"model": model, "x": x, "y": y % 2, "eps": 0.1, **FEW.get(attack, {}), **change})


def test_targets_that_no_class_has_are_refused(made):
    model, x, y = made
    wrong = {"from 0 to 3, got 4": torch.full((6,), 4), "of at least 0, got -100": torch.full((6,), -100)}
    wrong |= {"torch.int32": y.int(), r"torch.int64 \[6, 1\]": y[:, None], "torch.float32": torch.eye(4)[y]}
    for message, targeted in wrong.items():
        with pytest.raises(ValueError, match=f"targeted must .*{message}"):
            pgd(model, x, None, 0.1, targeted=targeted)
    # the labels of a loss of one's own are free
    assert pgd(model, x, torch.full((6,), 9), 0.1, loss=lambda logits, _: logits[:, 0], steps=2).shape == x.shape


@pytest.mark.parametrize("label", [4, -1])
def test_the_drop_in_class_refuses_them_too(made, label):
    model, x, _ = made
    judge = AutoAttack(model, eps=0.1, version="custom", attacks_to_run=["apgd-ce"], verbose=False)
    with pytest.raises(ValueError, match=f"y must have class numbers from 0 to 3, got {label}"):
        judge.run_standard_evaluation(x, torch.full((6,), label))


@pytest.mark.parametrize(("attack", "options"), [(apgd, {}), (pgd, {}), (pgd, {"keep_best": True})])
@pytest.mark.parametrize("images", [6, 2])
def test_a_mean_over_the_batch_is_no_loss(made, attack, options, images):
    model, x, y = made
    with pytest.raises(ValueError, match=r"the loss must be a value for each image, \[B\] = .*reduction=\"none\""):
        attack(model, x[:images], y[:images], 0.01, loss=F.cross_entropy, steps=3, **options)
