"""Certificates: exact on linear models, the same however they are computed, and below every attack."""

import contextlib
import copy
import json
import math
from itertools import pairwise
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest
import torch
from digit_nets import zoo_digits
from forks import results_of
from scipy.special import betaln
from scipy.stats import binom
from torch import nn

from purify_fast import cli, frozen_copy, zoo
from purify_fast.attacks import PGD
from purify_fast.cli.certify import Certify
from purify_fast.defences import NoisyEnsemble
from purify_fast.evaluation import Certificates, certify, refute
from purify_fast.judge.certificates.certification import GROUP
from purify_fast.judge.certificates.noisy_draws import DependentDrawsError, Draws
from purify_fast.judge.certificates.sequences import answers, bounds, leads, log_evidence, looks, most_wrong

NORMAL = NormalDist()
SIGMA = 0.5
QUIET = {"sigma": SIGMA, "progress": False}


# -- the confidence sequence -------------------------------------------------------------------------------------------


def test_the_evidence_is_the_ratio_of_the_formula():
    right, draws = np.array([0.0, 3.0, 24.0, 700.0]), np.array([5.0, 10.0, 24.0, 1000.0])
    expected = betaln(right + 0.5, draws - right + 0.5) - betaln(0.5, 0.5)
    expected -= right * math.log(0.7) + (draws - right) * math.log(0.3)
    np.testing.assert_allclose(log_evidence(right, draws, 0.7), expected, rtol=1e-9, atol=1e-9)


def test_the_evidence_is_a_martingale_for_the_true_probability():
    """Its mean over the next draw is its value now: the step on which Ville's inequality rests."""
    for p, right, draws in ((0.7, 3, 10), (0.99, 50, 50), (0.5, 0, 7)):
        now, hit, miss = (
            math.exp(float(log_evidence(np.array([k]), np.array([n]), p)[0]))
            for k, n in ((float(right), float(draws)), (right + 1.0, draws + 1.0), (float(right), draws + 1.0))
        )
        assert p * hit + (1 - p) * miss == pytest.approx(now, rel=1e-9)
    assert float(log_evidence(np.zeros(1), np.zeros(1), 0.3)[0]) == pytest.approx(0, abs=1e-12)


def test_bounds_and_answers_agree():
    draws = np.full(41, 400.0)
    right = np.linspace(0, 400, 41)
    lower, upper = bounds(right, draws, 0.001)
    assert (lower <= right / draws).all() and (right / draws <= upper).all()
    assert (np.diff(lower) >= 0).all() and lower[0] == 0 and upper[-1] == 1
    for p in (0.1, 0.5, 0.84):
        found = answers(right, draws, p, 0.001)
        assert ((lower > p + 1e-9) <= (found == 1)).all() and ((found == 1) <= (lower >= p - 1e-9)).all()
        assert ((upper < p - 1e-9) <= (found == -1)).all() and ((found == -1) <= (upper <= p + 1e-9)).all()


def wrong_certificates(images: int, most: int, below: float = 0.0, seed: int = 0) -> float:
    """The share of images with a probability of the label ``below`` the threshold that ever get a certificate."""
    threshold, rng = NORMAL.cdf(1.0), np.random.default_rng(seed)
    right, certified = np.zeros(images), np.zeros(images, dtype=bool)
    for first, last in pairwise((0, *looks(most))):
        right += rng.binomial(last - first, threshold - below, images)
        certified |= answers(right, np.full(images, float(last)), threshold, 0.001) == 1
    return float(certified.mean())


def test_peeking_keeps_the_promise():
    """Images at the threshold itself are the worst case. Each is looked at after every batch."""
    share = wrong_certificates(100_000, 20_000)
    assert 0 < share <= 0.001


@pytest.mark.parametrize("threshold", [0.5, 0.8413, 0.9772])
def test_both_answers_together_are_wrong_for_few_images(threshold):
    """Images at the threshold itself: each answer is wrong. An image gets draws until the first answer."""
    rng, images, most = np.random.default_rng(1), 100_000, 2000
    right, open_, wrong = np.zeros(images), np.ones(images, dtype=bool), 0
    for first, last in pairwise((0, *looks(most))):
        right[open_] += rng.binomial(last - first, threshold, int(open_.sum()))
        known = open_ & (answers(right, np.full(images, float(last)), threshold, 0.001) != 0)
        wrong, open_ = wrong + int(known.sum()), open_ & ~known
    assert 0 < wrong <= 0.001 * images


@pytest.mark.parametrize("shares", [(0.4, 0.4, 0.2), (0.25, 0.25, 0.25, 0.25), (0.1, 0.1, 0.8)])
def test_a_class_that_is_not_more_frequent_seldom_beats_the_label(shares):
    """The label is class 0, and the strongest other class is chosen after each look."""
    rng, images, label = np.random.default_rng(2), 20_000, int(np.argmax(shares))
    seen, beaten = np.zeros((images, len(shares)), dtype=np.int64), np.zeros(images, dtype=bool)
    for first, last in pairwise((0, *looks(1000))):
        seen += rng.multinomial(last - first, shares, images)
        rivals = np.delete(seen, label, 1).max(1)
        beaten |= leads(seen[:, label], rivals, len(shares) - 1, 0.001) == -1
    assert beaten.mean() <= 0.001
    assert (
        leads(np.array([300]), np.array([500]), 9, 0.001) == -1 and leads(np.array([500]), np.array([300]), 9, 0.1) == 1
    )


@pytest.mark.parametrize(("images", "alpha"), [(1, 0.001), (500, 0.001), (10_000, 0.001), (20, 0.3)])
def test_the_number_of_wrong_certificates_is_a_quantile(images, alpha):
    assert most_wrong(images, alpha) == binom.isf(alpha, images, alpha)


@pytest.mark.slow
@pytest.mark.parametrize("below", [0.0, 0.001])
def test_peeking_keeps_the_promise_on_a_million_images(below):
    assert wrong_certificates(1_000_000, 100_000, below) <= 0.001


# -- linear models, whose answers are known ----------------------------------------------------------------------------


class Halves(nn.Module):
    """Decides by the sign of the mean pixel minus 1/2: the smoothed classifier has the radius |margin| exactly."""

    def __init__(self, pixels: int = 16):
        super().__init__()
        self.weight = nn.Parameter(torch.full((pixels,), pixels**-0.5))

    def forward(self, x):
        score = (x - 0.5).flatten(1) @ self.weight
        return torch.stack([-score, score], 1)


def margins(*values):
    """Images whose L2 distance from the border of `Halves` is the given number; class 1 on its positive side."""
    return torch.stack([torch.full((1, 4, 4), 0.5 + value / 4) for value in values])


def test_radii_are_those_of_the_exact_answer():
    x, y = margins(0.2, 0.45, 0.55, 1.0, -0.3, -1.0), torch.tensor([1, 1, 1, 1, 1, 0])
    made = certify(Halves(), x, y, radius=(0.0, 0.5), draws=20_000, **QUIET)
    assert made.decisions(0.5).tolist() == [-1, -1, 1, 1, -1, 1]
    assert made.decisions(0.0).tolist() == [1, 1, 1, 1, -1, 1]
    assert (made.radius <= np.array([0.2, 0.45, 0.55, 1.0, 0.0, 1.0]) + 1e-9).all()
    assert (made.radius[[2, 3, 5]] >= 0.5).all() and made.radius[4] == 0
    # easy images need few draws, and images near the threshold many
    assert made.draws[5] < 200 < made.draws[1]
    assert made.between(0.5) == (0.5, 1.0) and made.sentence(0.5) == "at least 50.0 %"


def test_an_image_at_the_threshold_stays_undecided():
    made = certify(Halves(), margins(0.5), torch.tensor([1]), radius=0.5, draws=500, **QUIET)
    assert made.decisions(0.5).tolist() == [0] and made.draws.tolist() == [500]


def test_a_prediction_without_a_class_is_wrong():
    class Broken(Halves):
        def forward(self, x):
            return super().forward(x) * torch.nan

    made = certify(lambda x: Broken()(x), margins(1.0), torch.tensor([0]), radius=0.0, **QUIET)
    assert made.decisions(0.0).tolist() == [-1]


# -- the same certificates ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits():
    return zoo.load("digits-standard"), *zoo_digits(50)


def counts(made):
    return made.right.tolist(), made.draws.tolist()


def how(draws=100):
    return {"radius": 0.25, "draws": draws, **QUIET}


def test_batches_do_not_matter(digits):
    whole = counts(certify(*digits, **how()))
    for size in (7, 40):
        assert counts(certify(*digits, batch_size=size, **how())) == whole
    assert counts(certify(*digits, seed=1, **how())) != whole


def test_a_frozen_copy_is_certified_with_the_weights_that_its_model_has_now(digits):
    model, x, y = digits
    changed = copy.deepcopy(model)
    made = frozen_copy(changed, x[:8], dtype=torch.float32)
    # Writes through `.data` are not seen by themselves.
    changed.head.bias.data[3] += 100.0
    found = certify(made, x, y, **how())
    assert counts(found) == counts(certify(changed, x, y, **how())) != counts(certify(model, x, y, **how()))


class Own(NoisyEnsemble):
    draws_for_each_image = True


def test_a_random_defence_gets_the_same_draws_in_other_batches(digits):
    model, x, y = digits
    defence = Own(model, 0.1, samples=2).eval()
    whole = counts(certify(defence, x[:40], y[:40], **how(64)))
    assert counts(certify(defence, x[:40], y[:40], batch_size=9, **how(64))) == whole


def test_a_purifier_is_certified_with_its_own_draws(digits):
    _, x, y = digits
    defence = zoo.load("digits-carso-objective")
    made = certify(defence, x[:6], y[:6], **how(64))
    assert counts(certify(defence, x[:6], y[:6], batch_size=5, **how(64))) == counts(made)
    assert 0 < made.right.sum() < made.draws.sum()


def test_two_processes_make_the_same_certificates(tmp_path, digits):
    def work():
        torch.set_num_threads(1)
        return counts(certify(*digits, **how()))

    assert results_of(tmp_path, 2, work) == [counts(certify(*digits, **how()))] * 2


def test_an_interrupted_run_continues(tmp_path, digits, monkeypatch):
    whole, calls = counts(certify(*digits, **how())), []
    whole_counts = Draws.counts

    def killed(self, at, *rest):
        calls.append(int(at[0]) // GROUP)
        if len(calls) == limit:
            raise KeyboardInterrupt
        return whole_counts(self, at, *rest)

    monkeypatch.setattr(Draws, "counts", killed)
    limit = 13
    with pytest.raises(KeyboardInterrupt):
        certify(*digits, out=tmp_path, **how())
    done, limit = len(list((tmp_path / "rows").iterdir())), -1
    assert done >= 1
    calls.clear()
    assert counts(certify(*digits, out=tmp_path, **how())) == whole
    assert min(calls) >= done
    calls.clear()
    assert counts(certify(*digits, out=tmp_path, **how())) == whole and not calls
    # another question is not answered by these rows
    certify(*digits, out=tmp_path, **how() | {"radius": 0.1})
    assert calls


# -- models whose draws would depend on each other ---------------------------------------------------------------------


class OneDraw(Own):
    """Promises draws for each image, but takes them from a generator, in the order of the batch."""

    draws_for_each_image = True

    def sample_logits(self, x):
        flip = torch.where(torch.rand(len(x)) < 0.45, -1.0, 1.0)
        return (self.classifier(x) * flip[:, None])[:, None]


class Centered(Own):
    """A defence whose classifier subtracts the mean of the batch."""

    draws_for_each_image = True

    def sample_logits(self, x):
        return super().sample_logits(x - x.mean(0))


def test_models_without_independent_draws_are_refused():
    x, y, flips = margins(0.2, 1.0), torch.tensor([1, 1]), torch.Generator().manual_seed(0)

    def rare(images):
        return Halves()(images) * (-1.0 if torch.rand(1, generator=flips) < 0.45 else 1.0)

    noisy = lambda images: Halves()(images) + torch.randn(1)  # noqa: E731
    centered = lambda images: Halves()(images - images.mean(0))  # noqa: E731
    large = lambda images: Halves()(images - images.mean(0) * (len(images) > 100))  # noqa: E731
    for model in (noisy, centered, large, rare, OneDraw(Halves(), 0.1), Centered(Halves(), 0.1)):
        with pytest.raises(ValueError, match="depend on the batch or the call"):
            certify(model, x, y, radius=0.1, **QUIET)
    with pytest.raises(ValueError, match="NoisyEnsemble does not promise it"):
        certify(NoisyEnsemble(Halves(), 0.1), x, y, radius=0.1, **QUIET)


class Dependent:
    """Gives class 1 to images of `margins(-0.05)` with the probability 0.46, unless something else decides."""

    def __init__(self, kind, seed):
        self.kind, self.calls, self.chance = kind, 0, np.random.default_rng(seed)

    def __call__(self, x):
        self.calls += 1
        score, n = (x - 0.5).flatten(1).sum(1) / 4, len(x)
        lost = {
            "the last eighth of the places": torch.arange(n) >= n - n // 8,
            "every other place": torch.arange(n) % 2 == 1,
            "every third call": torch.full((n,), self.calls % 3 == 0),
            "the size of the batch": torch.full((n,), n > 40),
            "the rest of the batch": score > score.mean(),
            "the time": torch.full((n,), self.calls > 25),
            "NumPy, for a row": torch.from_numpy(self.chance.random(n) < 0.2),
            "NumPy, for one of 20 calls": torch.full((n,), bool(self.chance.random() < 0.05)),
        }[self.kind]
        return torch.stack([-score, torch.where(lost, 9.0, score)], 1)


KINDS = ["the last eighth of the places", "every other place", "every third call", "the size of the batch"]
KINDS += ["the rest of the batch", "the time", "NumPy, for a row", "NumPy, for one of 20 calls"]


@pytest.mark.parametrize("kind", KINDS)
def test_no_model_is_certified_by_what_is_not_in_the_image(kind):
    """Alone, no image has the label with more than one half: each certificate is wrong."""
    x, y, wrong, how = margins(*[-0.05] * 3), torch.ones(3).long(), 0, {"draws": 250, "batch_size": 96, **QUIET}
    for seed in range(100):
        with contextlib.suppress(DependentDrawsError):
            wrong += bool(certify(Dependent(kind, seed), x, y, radius=0.0, seed=seed, **how).certified(0.0).any())
    assert wrong <= 1


def test_a_refused_run_leaves_no_rows(tmp_path):
    class Worn(Halves):
        calls, kept = 0, 0

        def forward(self, x):
            Worn.calls += 1
            if Worn.calls == 40:
                Worn.kept += len([*(tmp_path / "rows").iterdir()])
            return super().forward(x) * (1.0 if Worn.calls < 40 else -1.0)

    x, y = margins(*[-0.6] * 1000), torch.ones(1000).long()
    for _ in range(2):
        Worn.calls = 0
        with pytest.raises(DependentDrawsError):
            certify(Worn(), x, y, radius=0.5, out=tmp_path, **QUIET)
        assert not [*(tmp_path / "rows").iterdir()]
    assert Worn.kept > 2


def rounding(model, shape):
    """Certify some images in batches of several sizes; the largest error must stay far below what is allowed."""
    x, y = torch.rand(3, *shape, generator=torch.Generator().manual_seed(0)), torch.zeros(3).long()
    found = [certify(model, x, y, radius=0.1, draws=40, batch_size=size, **QUIET) for size in (1, 2, 5, 33, 200)]
    assert all(counts(each) == counts(found[0]) for each in found)
    return found[0].about


def test_models_of_one_image_are_not_refused_in_any_batch():
    torch.manual_seed(0)
    linear = nn.Sequential(nn.Flatten(), nn.Linear(768, 10))
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(392, 10)
    ).eval()
    for model in (linear, network, lambda x: network.double()(x.double())):
        assert "float16" not in rounding(model, (3, 16, 16))["precision"]
    network.bfloat16()
    assert rounding(lambda x: network(x.bfloat16()), (3, 16, 16))["precision"] == "bfloat16 and float32"


@pytest.mark.slow
def test_a_resnet_is_not_refused_in_any_batch():
    torch.manual_seed(0)
    network = pytest.importorskip("torchvision").models.resnet18(num_classes=10).eval()
    assert rounding(network, (3, 32, 32))["precision"] == "float32"


def test_the_callers_autocast_does_not_decide(digits):
    model, x, y = digits
    whole = certify(model, x, y, **how())
    with torch.autocast("cpu", torch.bfloat16):
        again = certify(model, x, y, **how())
    assert counts(again) == counts(whole) and again.about["precision"] == "float32"
    assert again.about["predicted_by"] == "SmallCNN" and "purify_fast" in again.about["version"]
    copied = certify(frozen_copy(model, x[:8], dtype=torch.float32), x, y, **how())
    assert copied.about["predicted_by"] == "FrozenCopy" and counts(copied) == counts(whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_modules_of_another_dtype_are_refused_with_the_cure(dtype):
    with pytest.raises(ValueError, match=rf"must take float32 images, but this Halves is in {dtype}: give model.float"):
        certify(Halves().to(dtype), margins(1.0), torch.tensor([1]), radius=0.5, **QUIET)


def test_draws_are_named_by_the_index_in_the_data_set(digits):
    model, x, y = digits
    whole = certify(model, x, y, index=range(100, 150), **how())
    some = certify(model, x[30:35], y[30:35], index=torch.arange(130, 135), **how())
    assert some.right.tolist() == whole.right[30:35].tolist() and some.index.tolist() == [*range(130, 135)]
    assert counts(whole) != counts(certify(model, x, y, **how()))
    with pytest.raises(ValueError, match="index must be another number for each image"):
        certify(model, x[:2], y[:2], index=[3, 3], **how())


def test_a_random_defence_is_random_even_if_it_seems_not():
    """The first image is far from the border, so its predictions are all alike."""

    class Hard(Own):
        draws_for_each_image = True

        def sample_logits(self, x):
            return super().sample_logits(x).sign()

    defence, x, y = Hard(Halves(), 0.1, samples=1).eval(), margins(2.0, *[-0.1] * 8), torch.ones(9).long()
    made = [certify(defence, x, y, sigma=0.1, radius=0.0, batch_size=size, progress=False) for size in (1, 1000)]
    assert counts(made[0]) == counts(made[1])
    assert made[0].certified(0.0).tolist() == [True] + [False] * 8


def test_a_model_that_changes_is_refused():
    calls = []

    def worn(images):
        calls.append(1)
        return Halves()(images) * (1.0 if len(calls) < 30 else -1.0)

    with pytest.raises(ValueError, match="or have changed: 16 of 16 rows"):
        certify(worn, margins(0.6, 0.6), torch.tensor([1, 1]), radius=0.5, **QUIET)


# -- attacks from above ------------------------------------------------------------------------------------------------


def test_attacks_refute_what_is_beyond_the_radius():
    x, y = margins(0.1, 0.3, 0.8, -0.4), torch.tensor([1, 1, 1, 1])
    model = Halves()
    made = certify(model, x, y, radius=(0.2, 0.5), draws=5000, **QUIET)
    for radius, fallen in ((0.2, [True, False, False, True]), (0.5, [True, True, False, True])):
        attacks = [PGD(steps=5)]
        made, report = refute(made, model, x, y, radius=radius, votes=51, draws=2000, attacks=attacks, progress=False)
        assert made.refuted[radius].tolist() == fallen
        assert report.about["threat"].startswith("L2")
        assert not made.contradictions(radius).size
    assert made.between(0.2) == (0.5, 0.5) and made.between(0.5) == (0.25, 0.25)
    assert made.sentence(0.5) == "between 25.0 and 25.0 %"
    # A wrong certificate is found: here the counts of the last image are those of the first.
    made.right[0], made.draws[0], made.decided[0] = made.right[2], made.draws[2], made.decided[2]
    assert made.contradictions(0.5).tolist() == [0] and "Contradiction" in made.to_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in zoo.list() if zoo.card(name).sigma is not None])
def test_no_attack_takes_back_a_certificate_of_the_zoo(name):
    """The permanent check of certificates by attacks, and of attacks by certificates, image by image."""
    card = zoo.card(name)
    if card.data != "digits":
        pytest.skip("the images of this model are not in the package")
    model, (x, y) = zoo.load(name), zoo_digits(24)
    radius = 3 * card.eps
    made = certify(model, x, y, sigma=card.sigma, radius=(card.eps, radius), progress=False)
    made, _ = refute(made, model, x, y, radius=radius, votes=5, protocol="strong", steps=20, progress=False)
    assert made.certified(card.eps).any() and made.refuted[radius].any()
    assert not made.contradictions(radius).size


# -- the report --------------------------------------------------------------------------------------------------------


def test_a_report_is_read_again(tmp_path, digits):
    made = certify(*digits, **how())
    made.refuted[0.25] = made.decisions(0.25) == -1
    made.save(tmp_path)
    text = (tmp_path / "certificates.json").read_text()
    again = Certificates.from_json(text)
    assert counts(again) == counts(made) and again.radii == made.radii
    assert again.refuted[0.25].tolist() == made.refuted[0.25].tolist()
    assert again.to_html() == (tmp_path / "certificates.html").read_text() and "between" in again.to_html()
    assert (tmp_path / "certificates.txt").read_text().rstrip() == made.to_text()
    with pytest.raises(ValueError, match="format 2"):
        Certificates.from_json(json.dumps(json.loads(text) | {"format": 9}))


def test_bounds_are_rounded_outwards():
    """Shares between two decimals: a lower bound is rounded down, and an upper bound up."""
    for good, n in ((9_996, 10_000), (41_055, 100_000), (2, 3), (1, 3), (299_999, 300_000)):
        right = np.array([1000] * good + [0] * (n - good))
        made = Certificates(right, np.full(n, 1000), sigma=0.5, radii=(0.5,), alpha=0.001)
        made.refuted[0.5] = right == 0
        low, high = (float(each) for each in made.sentence(0.5).removesuffix(" %").split()[1::2])
        assert low <= 100 * good / n <= high and high - low < 0.02
        assert made.at_least(0.5) == (max(0, good - most_wrong(n, 0.001))) / n


def test_an_answer_stays_at_later_looks():
    """The first look certifies the smaller radius. The later draws, which the larger one needs, are worse."""
    look, last = [60, 60], [90, 120]
    made = Certificates(np.array([90]), np.array([120]), 0.5, (0.25, 0.5), 0.001, decided=np.array([[look, last]]))
    without = Certificates(np.array([90]), np.array([120]), 0.5, (0.25, 0.5), 0.001)
    assert made.decisions(0.25) == 1 and made.radius == 0.25 and made.decisions(0.2) == 1
    assert without.decisions(0.25) == 0 and without.radius < 0.25
    assert Certificates.from_json(made.to_json()).decisions(0.25) == 1


def test_close_radii_and_their_order_are_kept():
    radii = (0.5, 0.1 + 0.2, 0.3)
    made = Certificates(np.array([99, 60]), np.array([100, 100]), sigma=0.5, radii=radii, alpha=0.001)
    assert [*json.loads(made.to_json())["accuracy"]] == [str(radius) for radius in radii]
    assert made.sentence(0.5) in made.to_html() and "within L2 0.5," in made.to_html()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("right", [101, 0], "right must be from 0 to the draws, at most 134217728, got 101"),
        ("right", [-1, 0], "right must be from 0"),
        ("right", [1.0, 0], "right must be whole numbers"),
        ("right", [True, 0], "right must be whole numbers"),
        ("right", [1], "draws must be int64 .1., got int64 .2."),
        ("right", [[1], 0], "right must be whole numbers"),
        ("right", [2**70, 0], "right must be whole numbers"),
        ("draws", [100, 2**40], "right must be from 0 to the draws, at most 134217728, got 5"),
        ("draws", None, "draws must be whole numbers"),
        ("index", [7, 7], "index must be another number for each image"),
        ("index", [-1, 7], "index must be in"),
        ("decided", [[[24, 24]], [[25, 24]]], "decided must be right draws and draws of a look, some"),
        ("decided", [[[24, 24]], [[20, 24]]], "decided must be right draws and draws of a look, some"),
        ("decided", [[24, 24]], "decided must be int64"),
        ("sigma", -1, "sigma must be above 0 and finite, got -1"),
        ("sigma", "wide", "sigma must be a number"),
        ("alpha", 5, "alpha must be in .0, 1., got 5"),
        ("radii", [-0.5], "each of radii must be at least 0"),
        ("radii", [], "decided must be int64 .2, 0, 2."),
        ("radii", 3, "radii must be a list of numbers, got 3"),
        ("refuted", {"0.25": [True]}, "refuted.0.25. must be bool .2."),
        ("refuted", {"0.25": [1, 0]}, "refuted must be lists of true and false by radius"),
        ("refuted", {"far": [True, False]}, "refuted must be lists"),
        ("refuted", {"-1": [True, False]}, "each radius of refuted must be at least 0"),
        ("about", {"name": 3}, "about must be texts by name"),
        ("notes", [3], "notes must be a list of texts"),
        ("more", 1, "too few or too many are .'more'."),
    ],
)
def test_a_file_is_checked_field_by_field(name, value, message):
    made = Certificates(np.array([99, 5]), np.array([100, 100]), sigma=0.5, radii=(0.25,), alpha=0.001)
    content = json.loads(made.to_json())
    with pytest.raises(ValueError, match=message):
        Certificates.from_json(json.dumps(content | {name: value}))
    del content["sigma"]
    with pytest.raises(ValueError, match=r"too few or too many are .'sigma'."):
        Certificates.from_json(json.dumps(content))


def test_the_command_writes_a_report(tmp_path, capsys):
    words = ["certify", "zoo:digits-standard", "--sigma", "0.25", "--radius", "0.25", "--images", "6"]
    words += ["--draws", "100", "--attack", "fast", "--votes", "3", "--out", str(tmp_path)]
    assert cli.main(words) == 0
    printed = capsys.readouterr().out
    assert "between" in printed and "certificates.html" in printed
    assert Certificates.from_json((tmp_path / "certificates.json").read_text()).refuted.keys() == {0.25}
    assert cli.main([*words, "--one-shot"]) == 2
    assert "--one-shot needs a model with a method one_shot(sigma)" in capsys.readouterr().err


def test_the_command_takes_the_noise_of_the_training(tmp_path):
    assert Certify(folder=Path("zoo:digits-smoothed")).noise() == (0.25, "the card of digits-smoothed")
    assert Certify(folder=Path("zoo:digits-smoothed"), sigma=0.5).noise() == (0.5, "--sigma")
    (tmp_path / "run.yaml").write_text("noise: 0.125\n")
    assert Certify(folder=tmp_path).noise() == (0.125, str(tmp_path / "run.yaml"))
    with pytest.raises(ValueError, match="--sigma must be given"):
        Certify(folder=Path("zoo:digits-standard")).noise()


def test_a_purifier_of_one_step_is_certified():
    model, (x, y) = zoo.load("digits-diffpure").one_shot(0.1), zoo_digits(20)
    made = certify(model, x, y, sigma=0.1, radius=0.05, draws=100, progress=False)
    assert made.certified(0.05).mean() > 0.7
    with pytest.raises(ValueError, match="sigma must be above 0 and at most"):
        zoo.load("digits-diffpure").one_shot(1e6)


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sigma": 0.0}, "sigma must be above 0"),
        ({"sigma": math.inf}, "sigma must be above 0 and finite"),
        ({"alpha": 1.0}, "alpha must be in"),
        ({"radius": -0.1}, "radius must be at least 0"),
        ({"radius": []}, "radius must be a number or at least one number"),
        ({"radius": 2.0}, "radius must be at most 1.8237, which 100000 right draws"),
        ({"radius": [0.1, None]}, "radius must be a number"),
        ({"radius": True}, "radius must be a number"),
        ({"seed": 1.5}, "seed must be a whole number"),
        ({"draws": None}, "draws must be a whole number"),
        ({"draws": 0}, "draws must be in"),
        ({"draws": 5, "radius": 0.0}, r"draws must be in \[13, 134217728\], got 5"),
        ({"draws": 2**28}, "draws must be in"),
        ({"seed": -1}, "seed must be in"),
        ({"batch_size": 0}, "batch_size must be"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises((TypeError, ValueError), match=message):
        certify(Halves(), margins(1.0), torch.tensor([1]), **{"sigma": 0.5, "radius": 0.5} | settings)


def test_models_and_labels_are_checked():
    with pytest.raises(TypeError, match="model must be a module or a function"):
        certify(None, margins(1.0), torch.tensor([1]), radius=0.5, **QUIET)
    with pytest.raises(ValueError, match="y must have class numbers from 0 to 1, got 2"):
        certify(Halves(), margins(1.0), torch.tensor([2]), radius=0.5, **QUIET)


def test_refute_checks_what_it_gets_before_it_attacks():
    x, y, model = margins(0.2, 1.0), torch.tensor([1, 1]), Halves()
    made = certify(model, x, y, radius=torch.tensor([0.1]), **QUIET)
    other = Halves()
    torch.nn.init.ones_(other.weight)
    for error, message, changes in (
        (TypeError, "model must be a module", {"model": lambda images: model(images)}),
        (ValueError, "model must have the weights", {"model": other}),
        (ValueError, "x and y must be the images", {"x": x.flip(0)}),
        (ValueError, "radius must be", {"radius": 9.0}),
        (TypeError, "refute sets n_eval itself", {"n_eval": 3}),
        (TypeError, "draws must be a whole number", {"draws": 1.5}),
        (ValueError, "votes must be at least 1", {"votes": 0}),
    ):
        given = {"model": model, "x": x, "y": y, "radius": 0.5} | changes
        with pytest.raises(error, match=message):
            refute(made, given.pop("model"), given.pop("x"), given.pop("y"), progress=False, **given)


def test_hard_labels_can_be_refuted():
    """All few votes of an image agree, and the logits have no slope."""

    class Hard(Halves):
        def forward(self, x):
            return super().forward(x).sign()

    x, y, model = margins(2.0, -2.0), torch.tensor([1, 1]), Hard()
    made = certify(model, x, y, radius=0.1, **QUIET)
    made, _ = refute(made, model, x, y, radius=0.1, attacks=[PGD(steps=1)], votes=3, progress=False)
    assert made.refuted[0.1].tolist() == [False, True] and made.between(0.1) == (0.5, 0.5)
