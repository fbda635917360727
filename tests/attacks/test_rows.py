"""The attacks as rows of an evaluation: their names, costs and settings, and what they run."""

import re

import numpy as np
import pytest
import torch
from search_calls import apgd, square, stadv
from small_models import Made, Purifying
from torch import nn

from purify_fast.attacks import APGD, FABT, FGSM, PGD, OriginalAutoAttack, Square, StAdv, pgd
from purify_fast.attacks.base import AttackContext, Ball
from purify_fast.attacks.objective import Objective, margin
from purify_fast.judge.run.measure import Progress, counted_model
from purify_fast.judge.searches.engine import ActiveSet, Judge, JudgeContext, nearest_borders
from purify_fast.models.classifiers import SmallCNN

EPS = 0.05
EVERY = [PGD, APGD, FGSM, StAdv, OriginalAutoAttack]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Purifying(SmallCNN(in_channels=3, num_classes=6, image_size=(8, 8), width=4)).eval()


def context(**options):
    return JudgeContext(**{"num_classes": 6, "eps": EPS, "steps": 5, "eot_iter": 3, "draws_differ": False} | options)


PASSES = [
    (PGD(), [(7, 5), (22, 15)]),
    (PGD(restarts=3), [(24, 15), (75, 45)]),
    (FGSM(), [(2, 1), (4, 3)]),
    (StAdv(), [(7, 5), (22, 15)]),
    (StAdv(restarts=2), [(16, 10), (50, 30)]),
]


@pytest.mark.parametrize(("attack", "passes"), PASSES)
def test_an_attack_makes_no_further_passes(model, batch, attack, passes):
    """The forward passes and gradients of each image, on a deterministic and on a random model."""
    counts = []
    for draws_differ in (False, True):
        progress = Progress()
        counter = counted_model(attack.target(model), progress)
        attack.search(counter, *batch, context(draws_differ=draws_differ, counts_health=True))
        counts.append((counter.counted().forwards / len(batch[0]), counter.counted().gradients / len(batch[0])))
    assert counts == passes


VAIN_SEARCHES = [
    (APGD(restarts=2), 13),
    (APGD(loss="dlr"), 8),
    (APGD(loss="dlr_targeted", n_target_classes=2), 19),
    (Square(n_queries=70, restarts=2), 145),
]


@pytest.mark.parametrize(("attack", "expected"), VAIN_SEARCHES)
def test_a_search_without_success_makes_no_further_passes(batch, attack, expected):
    x, y = batch
    passes = []

    def never_fooled(z):
        passes.append(len(z))
        # several targets may stand in one batch
        return 9 * nn.functional.one_hot(y.repeat(-(-len(z) // len(y)))[: len(z)], 6) + z.flatten(1)[:, :6]

    attack.search(never_fooled, x, y, context(counts_health=True))
    assert sum(passes) == len(x) * expected


def test_of_the_restarts_each_image_keeps_its_worst(model, batch):
    x, y = batch
    several = PGD(random_start=False, restarts=3), StAdv(restarts=3)
    for attack, alone, radius in zip(several, (pgd, stadv), ({"eps": EPS}, {}), strict=True):
        options = {"steps": 5, "keep_best": True, **radius}
        runs = [alone(model, x, y, random_start=run > 0, seed=run, **options) for run in range(3)]
        found = attack.search(model, x, y, context()).images
        with torch.no_grad():
            got, *each = (margin(model(images), y) for images in (found, *runs))
        assert torch.equal(got, torch.stack(each).amax(0)) and not torch.equal(each[0], each[1])


def test_settings_are_plain_and_say_what_was_decided():
    told = context(num_classes=3, draws_differ=True)
    wanted = {"loss": "dlr", "steps": 5, "alpha": None, "random_start": True, "start_std": None, "keep_best": True}
    wanted |= {"restarts": 1, "precision": "auto", "eot_iter": 3, "eps": EPS, "norm": "linf"}
    assert PGD(loss="dlr").settings(told) == wanted
    targeted = APGD(loss="dlr_targeted", eps=0.5, norm="L2").settings(told)
    assert (targeted["loss"], targeted["n_target_classes"], targeted["norm"]) == ("margin", None, "l2")
    assert APGD(loss="dlr_targeted").settings(context())["n_target_classes"] == 5
    auto = OriginalAutoAttack(version="rand").settings(told)
    assert (auto["steps"], auto["eot_iter"]) == (100, 20)
    assert StAdv().settings(told)["norm"] == "flow" and StAdv().threat_model(told) == ("flow", 0.05)
    for attack in EVERY:
        assert attack().draws(context()) == 1


@pytest.mark.parametrize(("attack", "revision"), [(PGD, "4"), (FGSM, "3"), (StAdv, "3")])
def test_a_revision_stands_for_which_images_share_a_pass(attack, revision, model, batch):
    """A random model draws once for each pass. Where other images share one, the revision has to rise as well."""
    sizes = set()
    with model.classifier.register_forward_pre_hook(lambda _, given: sizes.add(len(given[0]))):
        told = context(max_forward_batch=4, eot_iter=1, steps=1, draws_differ=True)
        attack().search(attack().target(model), *batch, told)
    assert (attack().revision(), sizes) == (revision, {3})


WRONG_OPTIONS = [
    (PGD, {"loss": "dlr_targeted"}, "loss must be one of ce, margin, scaled_margin, dlr, got 'dlr_targeted'"),
    (FGSM, {"norm": "l2"}, "eps must be given with norm='l2'"),
    (PGD, {"eps": 8.0, "norm": "linf"}, r"at most 1 for linf, in image units, got 8.0: is 8/255 meant\?"),
    (PGD, {"eps": -1.0}, "eps must be at least 0, got -1.0"),
    (PGD, {"alpha": -0.1}, "alpha must be at least 0"),
    (OriginalAutoAttack, {"version": "plus"}, "version must be one of standard, rand, got 'plus'"),
]


@pytest.mark.parametrize(("attack", "options", "message"), WRONG_OPTIONS)
def test_wrong_options(attack, options, message):
    with pytest.raises(ValueError, match=message):
        attack(**options)


@pytest.mark.parametrize("eps", ["8/255", [0.1], torch.tensor([0.1]), True], ids=str)
def test_the_radius_of_an_attack_is_a_number(eps):
    for attack in (PGD, APGD, StAdv) if not isinstance(eps, torch.Tensor) else (PGD, APGD):
        with pytest.raises(TypeError, match=f"eps must be a number, such as 8 / 255.*, got {re.escape(repr(eps)[:6])}"):
            attack(eps=eps)
    # one radius for each image stays allowed where it is documented
    assert PGD(eps=np.float32(0.5)).eps == 0.5 and StAdv(eps=torch.tensor([0.1]))


EARLY_ENDS = [
    (APGD(give_up=True), {"steps": 50}, True),
    (APGD(), {"steps": 50}, False),
    (APGD(give_up=True), {"steps": 49}, False),
    (APGD(give_up=True), {"steps": 50, "norm": "l1"}, False),
    (FABT(give_up=True), {"steps": 5, "norm": "l1"}, True),
    (FABT(give_up=True, steps=20), {"steps": 100}, False),
    (Square(give_up=True), {}, True),
    (Square(give_up=True, n_queries=500), {}, False),
    (Square(give_up=True), {"eot_iter": 4}, False),
    (Square(), {}, False),
]


@pytest.mark.parametrize(("attack", "context", "early"), EARLY_ENDS)
def test_an_attack_tells_whether_it_may_end_early(attack, context, early):
    assert attack.may_end_early(AttackContext(eps=0.1, num_classes=10, **context)) is early


@pytest.mark.parametrize("attack", [pgd, square])
def test_a_strangers_mistakes(model, batch, attack):
    x, y = batch
    for change, kind, message in (
        ({"eps": 8}, ValueError, r"eps must be at most 1 for linf, in image units, got 8: is 8/255 meant\?"),
        ({"x": x.numpy()}, TypeError, "x must be a tensor, got ndarray"),
        ({"y": np.zeros(9)}, TypeError, "y must be a torch.Tensor, got ndarray"),
        ({"y": y.int()}, ValueError, r"y must be int64 \[B\] = \[9\], got torch.int32 \[9\]"),
        ({"x": 255 * x}, ValueError, r"= \[0, 1\], got .*: divide images in 0..255 by 255"),
        ({"eps": 14, "norm": "l2"}, ValueError, r"eps must be at most 13.8\d* for l2, .* got 14: is 14/255 meant\?"),
        ({"eps": 200, "norm": "l1"}, ValueError, "eps must be at most 192 for l1, .* got 200"),
        ({"x": x / 0}, ValueError, r"x must be in \[clip_min, clip_max\] = \[0, 1\]"),
        ({"y": y - 100}, ValueError, r"y must have class numbers of at least 0, got -\d+"),
        ({"norm": "Linfinity"}, ValueError, "norm must be one of linf, l2.*, got 'Linfinity'"),
        ({"x": (255 * x).byte()}, ValueError, "x must be floating point"),
        ({"eps": float("nan")}, ValueError, "must be at least 0, got nan"),
        ({"eps": torch.zeros(3)}, ValueError, r"must be a number or a tensor \[B\]"),
        ({"eps": np.zeros(9)}, TypeError, r"eps must be .*, got array"),
        ({"eot_iter": 0}, ValueError, "eot_iter must be at least 1"),
    ):
        with pytest.raises(kind, match=message):
            attack(model, **{"x": x, "y": y, "eps": EPS} | change)
    with pytest.raises(ValueError, match="max_forward_batch must be at least 1"):
        AttackContext(max_forward_batch=0)
    # pixels from 0 to 255 have an eps in the same unit
    assert attack(model, 255 * x, y, eps=8, clip_max=255).max() > 1


def nameless_where_unsure(value):
    """A classifier whose output is NaN, or an infinity for every class, where the largest logit hardly leads."""

    def how(self, x):
        logits = 8 * self.net(x - 0.5)
        first, second = logits.topk(2, 1).values.unbind(1)
        return torch.where(((first - second) < 0.8)[:, None], value, logits)

    torch.manual_seed(0)
    return Made(how, net=nn.Sequential(nn.Flatten(), nn.Linear(64, 3, bias=False)))


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=["NaN", "infinity"])
@pytest.mark.parametrize("attack", [PGD, StAdv])
def test_a_further_restart_takes_no_success_away(attack, value):
    """Where a prediction names no class the attack has won, although its margin is not a number."""
    model = nameless_where_unsure(value).eval()
    x = torch.rand(48, 1, 8, 8)
    with torch.no_grad():
        y = model(x).argmax(1)
        sure = model(x).isfinite().all(1)
    x, y = x[sure], y[sure]
    assert len(x) > 20 and bool((y == 0).any()), "argmax of a row of NaN is class 0"
    judged = []
    for restarts in (1, 2, 4):
        search = attack(loss="margin", steps=4, restarts=restarts).search
        judged.append(failed(model, search(model, x, y, context(eps=0.01, num_classes=3)).images, y))
    one, two, four = judged
    assert bool(one.any()) and not bool((one & ~two).any()) and not bool((two & ~four).any())


@pytest.mark.parametrize("run", [pgd, apgd, square])
def test_a_nameless_point_is_the_best_of_a_run(run):
    """Whatever the label: the largest of a row of NaN is the first, which may be the image's class."""
    model = nameless_where_unsure(torch.nan).eval()
    x = torch.rand(200, 1, 8, 8)
    with torch.no_grad():
        logits = model(x)
    y = logits.argmax(1)
    first = logits.isfinite().all(1) & (y == 0)
    x, y = x[first], y[first]
    amount = {pgd: {"steps": 8, "keep_best": True}, apgd: {"steps": 8}, square: {"n_queries": 200}}[run]
    found = [run(model, x, y, eps=0.2, seed=seed, **amount) for seed in (0, 1)]
    assert all(bool(failed(model, each, y).all()) for each in found)


def failed(model, x, y):
    """As an evaluation judges: another class, or none."""
    with torch.no_grad():
        logits = model(x)
    return (logits.argmax(1) != y) | ~logits.isfinite().all(1)


@pytest.mark.parametrize("norm, dual", [("linf", 1), ("l2", 2), ("l1", torch.inf)])
def test_of_a_linear_model_the_borders_are_where_the_formula_says(norm, dual):
    linear = nn.Linear(12, 5)
    x = torch.rand(40, 12)
    y = linear(x).argmax(1)
    active = ActiveSet(x, y, Ball(torch.full((40,), 0.1), norm), Judge(linear), JudgeContext())
    active.judge_clean_images()
    nearest = nearest_borders(active, Objective(linear, "dlr_targeted", 1, None), 3)
    differences = linear(x).gather(1, y[:, None]) - linear(x)
    slopes = (linear.weight[y][:, None] - linear.weight).norm(p=dual, dim=2)
    classes = (differences / slopes).scatter(1, y[:, None], torch.inf).argsort(dim=1)
    assert torch.equal(torch.stack(nearest, 1), classes[:, :3])


def test_an_attack_says_of_how_many_images_no_search_came_nearer():
    def stuck_or_weak(z):
        """The images whose first pixel is light never come nearer to a border."""
        level = 30 * (z[:, 0, 1:].mean((1, 2)) - 0.55)
        second = torch.where(z[:, 0, 0, 0] > 0.5, 0.9, level)
        return torch.stack([torch.ones_like(level), second, -torch.ones_like(level)], 1)

    x, y = torch.full((24, 1, 4, 4), 0.5), torch.zeros(24, dtype=torch.int64)
    x[:, 0, 0, 0] = torch.where(torch.arange(24) < 8, 0.9, 0.1)
    attack = Square(n_queries=1200, give_up=True, precision="float32")
    found = attack.run(stuck_or_weak, x, y, AttackContext(eps=0.1))
    assert (stuck_or_weak(found.images).argmax(1) != 0).tolist() == [False] * 8 + [True] * 16 and found.gave_up == 8
