"""Certificates: exact on linear models, the same however they are computed, and below every attack."""

import contextlib
import copy
import itertools
import json
import math
import re
import time
from itertools import pairwise
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest
import torch
from digit_nets import zoo_digits
from forks import results_of
from scipy.stats import beta, binom, norm
from torch import nn

from purify_fast import cli, frozen_copy, zoo
from purify_fast.attacks import PGD
from purify_fast.cli.certify import Certify
from purify_fast.defences import NoisyEnsemble
from purify_fast.evaluation import Certificates, certify, read_log, refute
from purify_fast.judge.certificates.certificates import (
    MOST,
    UNFINISHED,
    answers,
    boundary,
    leads,
    looks,
    most_wrong,
    spent,
)
from purify_fast.judge.certificates.certification import DependentDrawsError, Draws
from purify_fast.judge.estimates import lower_bounds
from purify_fast.ops.philox import Stream, philox, philox_key

NORMAL = NormalDist()
SIGMA = 0.5
QUIET = {"sigma": SIGMA, "progress": False}


# -- from counts to answers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.5, 0.001, 1e-9])
def test_bounds_for_a_fixed_number_are_those_of_clopper_and_pearson(alpha):
    for draws in (1, 13, 100, 100_000):
        right = np.unique(np.linspace(0, draws, 60).astype(np.int64))
        expected = np.where(right == 0, 0, beta.ppf(alpha, right, draws - right + 1))
        found = lower_bounds(np.stack([right, np.full(len(right), draws)], -1), alpha)
        np.testing.assert_allclose(found, expected, rtol=1e-9)
        assert (found <= expected * (1 + 1e-11)).all()
    assert lower_bounds(np.array([[0, 0]]), alpha) == 0


def crossing(threshold: float, alpha: float, most: int) -> float:
    """The probability that an image at the threshold ever has enough right draws: a draw at a time, without a cut."""
    mass, crossed, ends = np.ones(1), 0.0, dict(zip(looks(most), boundary(threshold, alpha, most), strict=True))
    for draw in range(1, most + 1):
        mass = np.append(mass * (1 - threshold), 0.0) + np.append(0.0, mass * threshold)
        if draw in ends:
            crossed, mass[ends[draw] :] = crossed + mass[ends[draw] :].sum(), 0.0
    return crossed


@pytest.mark.parametrize("alpha", [0.1, 0.001, 1e-6])
@pytest.mark.parametrize("threshold", [0.02, 0.5, 0.8413, 0.9772])
def test_the_looks_spend_no_more_than_alpha(threshold, alpha):
    """Nor much less than they may: a smaller number of right draws would be too few at some look."""
    allowed = spent(5000, threshold, alpha)
    assert 0.9 * allowed <= crossing(threshold, alpha, 5000) <= allowed and 0.5 * alpha < allowed < alpha


def simulated(probabilities, thresholds, most, alpha=0.001, seed=0):
    """Simulate tests of images with some probabilities: the first answers ``[N, thresholds]``, and the draws."""
    rng, n = np.random.default_rng(seed), len(probabilities)
    right, draws, first = np.zeros(n), np.zeros(n), np.zeros((n, len(thresholds)), dtype=np.int8)
    for start, last in pairwise((0, *looks(most))):
        open_ = (first == 0).any(1)
        if not open_.any():
            break
        right[open_] += rng.binomial(last - start, probabilities[open_])
        draws[open_] = last
        look = np.stack([right[open_], draws[open_]], -1)[:, None].repeat(len(thresholds), 1).astype(np.int64)
        now = answers(look, thresholds, alpha)
        first[open_] = np.where(first[open_] == 0, now, first[open_])
    return first, draws


def test_few_images_have_a_wrong_certificate_at_any_of_several_radii():
    thresholds = [NORMAL.cdf(radius / 0.5) for radius in (0.5, 0.1, 0.4, 0.45)]
    first, _ = simulated(np.full(50_000, thresholds[2]), thresholds, 2000)
    assert 0 < (first[:, [0, 2, 3]] == 1).any(1).mean() <= 0.001 and (first[:, 1] == -1).mean() <= 0.001
    assert (np.diff(first[:, np.argsort(thresholds)], axis=1) <= 0).all()


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
    for right, rival, decided in ((300, 500, -1), (500, 300, 1)):
        assert leads(np.array([right]), np.array([rival]), 9, 0.001) == decided


@pytest.mark.parametrize(("images", "alpha"), [(1, 0.001), (500, 0.001), (10_000, 0.001), (20, 0.3)])
def test_the_number_of_wrong_certificates_is_a_quantile(images, alpha):
    assert most_wrong(images, alpha) == binom.isf(alpha, images, alpha)


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
    assert made.decisions(0.5).tolist() == [-1, -1, 1, 1, -1, 1] and made.decisions(0.0).tolist() == [1, 1, 1, 1, -1, 1]
    assert (made.radius <= np.array([0.2, 0.45, 0.55, 1.0, 0.0, 1.0]) + 1e-9).all()
    assert (made.radius[[2, 3, 5]] >= 0.5).all() and made.radius[4] == 0
    # easy images need few draws, and images near the threshold many
    assert made.draws[5] < 200 < made.draws[1]
    assert made.between(0.5) == (0.5, 1.0) and made.sentence(0.5) == "at least 50.0 %"


def test_an_image_at_the_threshold_stays_undecided_and_one_without_a_class_is_wrong():
    made = certify(Halves(), margins(0.5), torch.tensor([1]), radius=0.5, draws=500, **QUIET)
    assert made.decisions(0.5).tolist() == [0] and made.draws.tolist() == [500]
    made = certify(lambda x: Halves()(x) * torch.nan, margins(1.0), torch.tensor([0]), radius=0.0, **QUIET)
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
    assert found.about["predicted_by"] == "FrozenCopy"
    assert counts(found) == counts(certify(changed, x, y, **how())) != counts(certify(model, x, y, **how()))


@pytest.fixture
def rows_drawn(monkeypatch):
    """The number of draws of each call, by the places of images."""
    made, counts_of = [], Draws.counts

    def recorded(self, job):
        made.append(len(job[0]) * (job[2] - job[1]))
        return counts_of(self, job)

    monkeypatch.setattr(Draws, "counts", recorded)
    return made


def test_another_question_draws_only_what_is_missing(tmp_path, digits, rows_drawn):
    model, x, y = digits[0], digits[1][:20], digits[2][:20]
    settings = QUIET | {"out": tmp_path, "draws": 1000}
    first = certify(model, x, y, **settings)
    assert sum(rows_drawn) == 20 * 1100
    rows_drawn.clear()
    for other in ({"alpha": 0.01}, {"radius": 0.25}, {"radius": [0.1, 0.3]}, {"draws": 500}):
        made, fresh = (certify(model, x, y, **settings | other | {"out": out}) for out in (tmp_path, None))
        assert counts(made) == counts(fresh) and made.decided.tolist() == fresh.decided.tolist()
        assert sum(rows_drawn) == int(fresh.draws.sum()) + 100 * len(x) * (not made.radii)
        rows_drawn.clear()
    for images in (certify(model, x, **settings), certify(model, x[9:20], y[9:20], index=range(9, 20), **settings)):
        assert set(images.right.tolist()) <= set(first.right.tolist()) and not rows_drawn
    assert certify(model, x, y, **settings | {"draws": 2000}).draws.tolist() == [2000] * 20
    assert sum(rows_drawn) == 20 * 1000
    rows_drawn.clear()
    # Damaged parts are drawn again.
    for part in (tmp_path / "rows").iterdir():
        part.write_bytes(b"cut")
    assert counts(certify(model, x, y, **settings)) == counts(first) and sum(rows_drawn) > 0
    rows_drawn.clear()
    # Other images with these indices have other draws.
    certify(model, x.flip(0), y.flip(0), **settings)
    assert sum(rows_drawn) > 15 * 1100


@pytest.mark.parametrize("asked", [{"radius": 0.25}, {}])
def test_a_run_ends_when_its_time_is_over_and_goes_on(tmp_path, digits, monkeypatch, rows_drawn, asked):
    """The clock counts the questions for the time, so a run makes two parts, whatever the machine is."""
    digits = digits[0], *(each[:16] for each in digits[1:])
    settings = QUIET | {"draws": 2000, "batch_size": 30} | asked
    whole, total = certify(*digits, **settings), sum(rows_drawn)
    rows_drawn.clear()
    runs = 0
    while True:
        runs, clock = runs + 1, itertools.count()
        with monkeypatch.context() as patch:
            patch.setattr(time, "monotonic", lambda clock=clock: next(clock))
            made = certify(*digits, out=tmp_path, seconds=3, **settings)
        notes = [note for note in made.notes if "unfinished" in note]
        if not notes:
            break
        unfinished = int((made.draws < whole.draws).sum())
        assert notes == [f"{unfinished} of 16 images are unfinished after 3 seconds"] and unfinished
        # What is not finished is not certified, and what is certified stays.
        assert (made.radius <= whole.radius).all() and "unfinished" in made.to_text()
    assert runs > 3 and counts(made) == counts(whole) and made.radius.tolist() == whole.radius.tolist()
    assert made.decided.tolist() == whole.decided.tolist() and sum(rows_drawn) == total


def test_two_processes_share_and_keep_the_draws(tmp_path, digits):
    def work():
        torch.set_num_threads(1)
        late = certify(*digits, seconds=1e-9, **QUIET)
        assert late.notes == ["50 of 50 images are unfinished after 1e-09 seconds"] and not late.draws.any()
        assert (late.tested == -1).all() and (late.predicted == UNFINISHED).all()
        made = certify(*digits, out=tmp_path / "kept", draws=300, **QUIET)
        return counts(made), made.predicted.tolist(), made.radius.tolist()

    made = certify(*digits, draws=300, **QUIET)
    assert results_of(tmp_path, 2, work) == [(counts(made), made.predicted.tolist(), made.radius.tolist())] * 2
    assert counts(certify(*digits, out=tmp_path / "kept", draws=300, **QUIET)) == counts(made)


def test_unfinished_images_are_no_abstentions(tmp_path):
    x, y = margins(0.4, 0.6, 1.0), torch.tensor([1, 1, 1])
    late, whole = certify(Halves(), x, y, draws=500, seconds=1e-9, **QUIET), certify(Halves(), x, y, draws=500, **QUIET)
    assert (late.predicted == UNFINISHED).all() and late.unfinished.all() and not whole.unfinished.any()
    for report in (late.to_text(), late.to_html()):
        assert re.search("raws of 3 (of 3 )?images go on", report)
        assert "abstains" not in report and "0.000" not in report
    assert 'class="card open"' in late.to_html() and 'class="card"' in whole.to_html()
    for question in (lambda: late.acr, lambda: late.accuracy_at([0.0])):
        with pytest.raises(ValueError, match="finish"):
            question()
    line = late.summary([0.25])
    assert (line["images"], line["L2 0.25"], line["ACR"], line["p_A 50 %"]) == ("3, 3 unfinished", "-", "-", "-")
    assert late.sentence(0.0) == "at least 0.0 %" and late.decisions(0.0).tolist() == [0, 0, 0]
    late.save(tmp_path)
    assert not len(read_log(tmp_path / "log.tsv")["idx"])
    whole.save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="has finished certificates, which 3 unfinished would replace"):
        late.save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before and len(before) == 4


def test_what_is_proved_of_an_unfinished_image_stays():
    """The first image is finished. The second is certified at the smaller radius, and its draws go on."""
    decided = np.array([[[100, 100], [200, 200]], [[100, 100], [0, 0]]])
    some = Certificates(np.array([200, 90]), np.array([200, 125]), 0.5, (0.25, 0.5), 0.001, decided=decided)
    assert some.unfinished.tolist() == [False, True] and some.predicted.tolist() == [-1, UNFINISHED]
    assert some.decisions(0.25).tolist() == [1, 1] and some.decisions(0.5).tolist() == [1, 0]
    assert some.log["idx"].tolist() == [0] and some.sentence(0.25) == "at least 100.0 %"
    assert Certificates.from_json(some.to_json()).unfinished.tolist() == [False, True]


# -- models whose draws would depend on each other ---------------------------------------------------------------------


class Own(NoisyEnsemble):
    draws_for_each_image = True


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


def test_defences_without_independent_draws_are_refused():
    x, y = margins(0.2, 1.0), torch.tensor([1, 1])
    noisy = lambda images: Halves()(images) + torch.randn(2)  # noqa: E731
    for model in (noisy, OneDraw(Halves(), 0.1), Centered(Halves(), 0.1)):
        with pytest.raises(ValueError, match="depend on the batch or the call"):
            certify(model, x, y, radius=0.1, **QUIET)
    with pytest.raises(ValueError, match="NoisyEnsemble does not promise it"):
        certify(NoisyEnsemble(Halves(), 0.1), x, y, radius=0.1, **QUIET)


class Shaken(Halves):
    """Its threshold is drawn once for a call, and it has a class that does not exist."""

    def __init__(self, absent=-10.0):
        super().__init__()
        self.absent = absent

    def forward(self, x):
        logits = super().forward(x) + 0.4 * torch.randn(1) * torch.tensor([-1.0, 1.0])
        return torch.cat([logits, torch.full_like(logits[:, :1], self.absent)], 1)


@pytest.mark.parametrize("absent", [-10.0, -1e9, -torch.inf])
def test_a_draw_of_the_whole_call_is_refused(absent):
    """The named draws of a defence have one seed in all calls, but a draw inside its classifier has none."""
    x, y = margins(*[-0.02] * 20), torch.ones(20).long()
    for model in (Shaken(absent), Own(Shaken(absent), 0.1, samples=1).eval()):
        for seed in range(3):
            with pytest.raises(DependentDrawsError):
                certify(model, x, y, sigma=0.02, radius=0.0, draws=200, seed=seed, progress=False)


def test_a_run_neither_seeds_the_process_nor_depends_on_its_seed():
    model, x, y = Own(Halves(), 0.1, samples=1).eval(), margins(0.05, 0.1), torch.ones(2).long()
    made = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        made.append(counts(certify(model, x, y, draws=200, **QUIET)))
        assert torch.equal(torch.get_rng_state(), before)
    assert made[0] == made[1] == ([96, 109], [200, 200])


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
            if Worn.calls == 150:
                Worn.kept += len([*(tmp_path / "rows").iterdir()])
            return super().forward(x) * (1.0 if Worn.calls < 150 else -1.0)

    x, y = margins(*[-0.6] * 1000), torch.ones(1000).long()
    for _ in range(2):
        Worn.calls = 0
        with pytest.raises(DependentDrawsError):
            certify(Worn(), x, y, radius=0.5, out=tmp_path, batch_size=100, **QUIET)
        assert not [*(tmp_path / "rows").iterdir()]
    assert Worn.kept > 2


def test_the_callers_autocast_does_not_decide(digits):
    model, x, y = digits
    whole = certify(model, x, y, **how())
    with torch.autocast("cpu", torch.bfloat16):
        again = certify(model, x, y, **how())
    assert counts(again) == counts(whole) and again.about["precision"] == "float32"


def test_draws_are_named_by_the_index_in_the_data_set(digits):
    model, x, y = digits
    whole = certify(model, x, y, index=range(100, 150), **how())
    some = certify(model, x[30:35], y[30:35], index=torch.arange(130, 135), **how())
    assert some.right.tolist() == whole.right[30:35].tolist() and some.index.tolist() == [*range(130, 135)]
    assert counts(whole) != counts(certify(model, x, y, **how()))


def test_a_random_defence_is_random_even_if_it_seems_not():
    """The first image is far from the border, so its predictions are all alike."""

    class Hard(Own):
        draws_for_each_image = True

        def sample_logits(self, x):
            return super().sample_logits(x).sign()

    defence, x, y = Hard(Halves(), 0.1, samples=1).eval(), margins(2.0, *[-0.1] * 8), torch.ones(9).long()
    made = [certify(defence, x, y, sigma=0.1, radius=0.0, batch_size=size, progress=False) for size in (1, 1000)]
    assert counts(made[0]) == counts(made[1]) and made[0].certified(0.0).tolist() == [True] + [False] * 8


# -- attacks from above ------------------------------------------------------------------------------------------------


def test_attacks_refute_what_is_beyond_the_radius():
    x, y = margins(0.1, 0.3, 0.8, -0.4), torch.tensor([1, 1, 1, 1])
    model = Halves()
    made = certify(model, x, y, radius=(0.2, 0.5), draws=5000, **QUIET)
    for radius, fallen in ((0.2, [True, False, False, True]), (0.5, [True, True, False, True])):
        attacks = [PGD(steps=5)]
        made, report = refute(made, model, x, y, radius=radius, votes=51, draws=2000, attacks=attacks, progress=False)
        assert made.refuted[radius].tolist() == fallen and report.about["threat"].startswith("L2")
        assert report.model == "model, smoothed with sigma 0.5" and not made.contradictions(radius).size
    assert made.between(0.2) == (0.5, 0.5) and made.between(0.5) == (0.25, 0.25) and made.sentence(0.5) == "25.0 %"
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
    assert made.certified(card.eps).any() and made.refuted[radius].any() and not made.contradictions(radius).size


# -- largest radii, as papers report them ------------------------------------------------------------------------------


def cohen(predict, noise, x, y, *, sigma, choosing, draws, alpha):
    """Certify image by image as algorithm CERTIFY of Cohen et al. (2019, section 3.2) says.

    Args:
        predict: noisy images to classes.
        noise: the place of an image, the first draw and the number of draws to standard normal noise.
        x: images.
        y: labels.
        sigma: standard deviation of the noise.
        choosing: n0, the draws that choose the class.
        draws: n, the draws that bound its probability.
        alpha: the probability of a wrong radius.

    Returns:
        For each image the predicted class, -1 to abstain, its radius, and whether it is the label.
    """
    lines = []
    for place, (image, label) in enumerate(zip(x, y.tolist(), strict=True)):
        chosen = predict(image + sigma * noise(place, MOST, choosing))
        top = int(torch.bincount(chosen).argmax())
        seen = predict(image + sigma * noise(place, 0, draws))
        right = int((seen == top).sum())
        lower = beta.ppf(alpha, right, draws - right + 1) if right else 0.0
        if lower < 0.5:
            lines.append((-1, 0.0, False))
        else:
            lines.append((top, sigma * NORMAL.inv_cdf(lower), top == label))
    return lines


def philox_noise(x, seed=0):
    key, pixels = philox_key(seed, torch.device("cpu")), x[0].numel()
    named = {"stream": Stream.SMOOTHING, "distribution": "normal"}

    def noise(place, first, count):
        made = philox(key, torch.tensor([place]), pixels, draws=count, first_draw=first, **named)
        return made.view(count, *x.shape[1:])

    return noise


@pytest.mark.parametrize("draws", [137, 1000])
def test_radii_are_those_of_cohen(digits, draws):
    model, x, y = digits[0], digits[1][:20], digits[2][:20].clone()
    y[3] = (y[3] + 1) % 10
    fixed = {"sigma": 0.7, "choosing": 50, "draws": draws, "alpha": 0.01}
    with torch.no_grad():
        lines = cohen(lambda images: model(images).argmax(1), philox_noise(x), x, y, **fixed)
    made = certify(model, x, y, progress=False, **fixed)
    predicted, radius, correct = map(np.array, zip(*lines, strict=True))
    assert made.predicted.tolist() == predicted.tolist() and -1 in predicted
    np.testing.assert_allclose(made.log["radius"], radius, rtol=1e-9)
    assert made.log["correct"].tolist() == correct.tolist() and 0 < correct.sum() < (predicted >= 0).sum()
    np.testing.assert_allclose(made.radius, radius * correct, rtol=1e-9)
    assert made.acr == pytest.approx((radius * correct).mean()) == made.radius.mean()
    for at in (0.0, 0.2, 0.5):
        expected = (correct & (radius >= at)).mean()
        assert made.accuracy_at([at]) == made.between(at)[0] == expected
    # A wrong class is certified, so its image cannot be.
    assert made.decisions(0.0)[3] == -1 or predicted[3] == -1


def exact_images(n):
    generator = np.random.default_rng(0)
    truth = np.abs(generator.normal(0, 0.5, n)).clip(0.01, 1.6)
    sides = np.where(generator.random(n) < 0.5, -1.0, 1.0)
    return margins(*(truth * sides).tolist()), torch.from_numpy((sides > 0).astype(np.int64)), truth


def test_few_of_many_radii_are_above_the_truth():
    """The smoothed classifier of `Halves` has known radii. A linear model on pixels within [0, 1]."""
    (x, y, truth), alpha = exact_images(10_000), 0.01
    made = certify(Halves(), x, y, draws=1000, alpha=alpha, batch_size=20_000, **QUIET)
    assert 0 < (made.log["radius"] > truth).mean() <= alpha
    bounds = beta.ppf(alpha, made.right, made.draws - made.right + 1)
    usual = SIGMA * norm.ppf(np.maximum(bounds, 0.5)) * (made.predicted == y.numpy())
    assert made.acr >= (1 - 1e-9) * usual.mean() and (made.draws == 1000).all()


def test_images_without_labels_have_classes_and_radii():
    x = margins(0.4, 0.001, -0.4)
    made, labeled = (certify(Halves(), x, y, draws=1000, **QUIET) for y in (None, torch.tensor([1, 1, 0])))
    assert made.predicted.tolist() == [1, -1, 0] == labeled.predicted.tolist()
    assert made.radius.tolist() == labeled.radius.tolist() and made.radius[1] == 0 < made.radius[0]
    asked = certify(Halves(), x, radius=0.2, draws=5000, **QUIET)
    assert asked.predicted.tolist() == [1, -1, 0] and asked.radius.tolist() == [0.2, 0.0, 0.2]
    for wrong in (made, asked):
        with pytest.raises(ValueError, match="acr needs labels, and the largest radii"):
            _ = wrong.acr


def test_a_log_is_read_again(tmp_path, digits):
    made = certify(digits[0], digits[1][:9], digits[2][:9], draws=200, index=range(40, 49), **QUIET)
    made.save(tmp_path)
    log = read_log(tmp_path / "log.tsv")
    assert [*log] == [*made.log] and len(log) == 9
    for name, values in log.items():
        np.testing.assert_allclose(values, made.log[name], atol=1e-6 if name == "time" else 0)
    assert (log["radius"] * log["correct"]).mean() == made.acr and log["idx"].tolist() == [*range(40, 49)]
    # The file of another program has no counts.
    path, names = tmp_path / "cohen.tsv", "idx\tlabel\tpredict\tradius\tcorrect\ttime\n"
    path.write_text(f"{names}0\t3\t3\t0.75\t1\t1:00:02.5\n")
    read = read_log(path)
    assert read["time"].tolist() == [3602.5] and read["radius"].tolist() == [0.75] and len(read) == 6
    for text in ("idx\tlabel\n0\t3\n", path.read_text() + "21\t5\n", path.read_text().replace("0.75", "far")):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"cohen.tsv (must have lines with the columns|has a value)"):
            read_log(path)


# -- the report --------------------------------------------------------------------------------------------------------


def test_the_curves_begin_with_all_images_and_step_where_one_ends():
    made = Certificates(np.array([1000, 700, 100]), np.full(3, 1000), sigma=0.5, radii=(), alpha=0.001)
    made.refuted[0.25] = np.array([False, False, True])
    large, small, none = made.radius.tolist()
    assert large > small > none == 0
    drawn = made._shown()
    assert drawn["farthest"] == large
    np.testing.assert_allclose(drawn["below"], [(0, 2 / 3), (small, 1 / 3), (large, 0)])
    upper = made.between(0.25)[1]
    assert 2 / 3 <= upper < 1
    np.testing.assert_allclose(drawn["above"], [(0, 1), (0.25, upper)])


def test_nothing_is_told_about_a_radius_that_was_not_asked():
    """An attack may refute at a larger radius. That is no question about certificates."""
    right = np.array([1000, 0])
    some = Certificates(right, np.full(2, 1000), 0.5, (0.25,), 0.001, refuted={0.5: right == 0})
    for ask in (some.certified, some.decisions, some.between, some.sentence):
        with pytest.raises(ValueError, match=r"radius must be at most 0.25, the largest that certify got, got 0.5"):
            ask(0.5)
    for radius in (0.5, 0.1):
        with pytest.raises(ValueError, match="radii that certify got"):
            some.accuracy_at([0.25, radius])
    assert some.accuracy_at([0.25]) == 0.5 == some.between(0.1)[0]
    line = some.summary([0.1, 0.25, 0.5])
    assert [line[f"L2 {radius}"] for radius in (0.1, 0.25, 0.5)] == ["-", "50.00", "-"]
    assert some._shown()["above"] == [(0.0, 1.0), (0.5, 0.5)] and not some.contradictions(0.5).size
    some.refuted[0.25] = right > 0
    assert some.contradictions(0.25).tolist() == [0] == some.contradictions(0.5).tolist()


def test_a_report_names_no_attack_that_was_not_made():
    x, y = margins(0.45, -0.45), torch.tensor([1, 1])
    without, labeled = (certify(Halves(), x, labels, radius=0.0, **QUIET) for labels in (None, y))
    assert not without.refuted and without.sentence(0.0) == "at least 100.0 %"
    assert labeled.refuted[0.0].tolist() == [False, True] and labeled.sentence(0.0) == "50.0 %"
    words = (" ".join(report.split()) for report in (labeled.to_text(), labeled.to_html(), without.to_text()))
    assert not any(re.search("an attack found|by attacks|attacked from", report) for report in words)
    assert 'class="above"' in labeled.to_html() and 'class="above"' not in without.to_html()


def test_the_curve_ends_at_the_largest_radius_that_was_asked():
    """Beyond this radius nothing is known, so no share of 0 is drawn there."""
    made = Certificates(np.array([1000, 1000, 0]), np.full(3, 1000), 0.5, (0.25, 0.5), 0.001)
    shown = made._shown()
    assert shown["farthest"] == 0.5 and shown["below"] == [(0.0, 2 / 3)]


def test_bounds_are_rounded_outwards():
    """Shares between two decimals: a lower bound is rounded down, and an upper bound up."""
    for good, n in ((9_996, 10_000), (41_055, 100_000), (2, 3), (1, 3), (299_999, 300_000)):
        right = np.array([1000] * good + [0] * (n - good))
        made = Certificates(right, np.full(n, 1000), sigma=0.5, radii=(0.5,), alpha=0.001)
        made.refuted[0.5] = right == 0
        low, high = (float(re.findall(r"[\d.]+", made.sentence(0.5))[place]) for place in (0, -1))
        assert low <= 100 * good / n <= high and high - low < 0.02
        assert made._numbers(0.5)[1] == max(0, good - most_wrong(n, 0.001))


def test_an_answer_stays_at_later_looks():
    """The first look certifies the smaller radius. The later draws, which the larger one needs, are worse."""
    look, last = [64, 64], [90, 125]
    made = Certificates(np.array([90]), np.array([125]), 0.5, (0.25, 0.5), 0.001, decided=np.array([[look, last]]))
    without = Certificates(np.array([90]), np.array([125]), 0.5, (0.25, 0.5), 0.001)
    assert made.decisions(0.25) == 1 and made.radius == 0.25 and made.decisions(0.2) == 1
    assert without.decisions(0.25) == 0 and without.radius < 0.25
    assert Certificates.from_json(made.to_json()).decisions(0.25) == 1


def test_no_probability_is_proved_where_no_radius_is():
    """The first image is certified at both radii, the second at none, and the third has another class."""
    classes = {"labels": np.array([1, 1, 2]), "tested": np.array([1, 1, 1])}
    made = Certificates(np.array([1000, 500, 1000]), np.full(3, 1000), 0.5, (0.25, 0.5), 0.001, **classes)
    assert made.radius.tolist() == [0.5, 0, 0] and made.predicted.tolist() == [1, -1, 1]
    assert made.probability.tolist() == [NORMAL.cdf(1.0), 0, 0]


WRONG_COUNTS = [
    ("right", [1], "all input arrays must have the same shape"),
    ("right", [1.5, 0], "Cannot cast array data"),
    ("labels", [1], "cannot reshape array of size 1"),
    ("index", [7, 7], "index must be another number in .* for each image"),
    ("index", [7, 2**31], "index must be another number in .* for each image"),
    ("decided", [[[24, 24]], [[25, 24]]], "right and draws must be counts of draws"),
    ("sigma", -1, "sigma must be in .0, 4. in image units, for images in .0, 1., got -1"),
    ("alpha", 5, "alpha must be in .0, 0.5., got 5"),
    ("radii", [-0.5], "each of radii must be at least 0"),
    ("refuted", {"0.25": [True]}, "cannot reshape array"),
    ("format", 9, "format 4"),
]


@pytest.mark.parametrize(("name", "value", "message"), WRONG_COUNTS)
def test_a_file_with_other_counts_is_refused(name, value, message):
    """Each of these values would give wrong answers."""
    made = Certificates(np.array([99, 5]), np.array([100, 100]), sigma=0.5, radii=(0.25,), alpha=0.001)
    content = json.loads(made.to_json())
    with pytest.raises((TypeError, ValueError), match=message):
        Certificates.from_json(json.dumps(content | {name: value}))
    del content["decided"]
    with pytest.raises(KeyError, match="decided"):
        Certificates.from_json(json.dumps(content))


def test_the_command_writes_a_report(tmp_path, capsys):
    words = ["certify", "zoo:digits-standard", "--sigma", "0.25", "--radius", "0.25", "--images", "6"]
    words += ["--draws", "100", "--attack", "fast", "--votes", "3", "--out", str(tmp_path)]
    assert cli.main(words) == 0 and "between" in capsys.readouterr().out and (tmp_path / "certificates.html").exists()
    saved = (tmp_path / "certificates.json").read_text()
    made = Certificates.from_json(saved)
    assert made.refuted.keys() == {0.25} and json.loads(made.to_json()) == json.loads(saved)
    assert cli.main([*words, "--one-shot"]) == 2
    assert "--one-shot needs a model with a method one_shot(sigma)" in capsys.readouterr().err


def test_the_command_takes_a_part_of_the_data_set(tmp_path, capsys):
    words = ["certify", "zoo:digits-standard", "--sigma", "0.25", "--draws", "100", "--out", str(tmp_path / "a")]
    assert cli.main([*words, "--start", "10", "--max", "40", "--skip", "7"]) == 0
    assert read_log(tmp_path / "a" / "log.tsv")["idx"].tolist() == [14, 21, 28, 35]
    printed = capsys.readouterr().out
    assert "indices 14 to 35 in steps of 7" in printed
    assert len(re.findall(r"^digits-standard \(digits\)  0.25", printed, re.M)) == 1
    assert cli.main([*words[:6], "--start", "900", "--out", str(tmp_path / "c")]) == 2
    assert "--skip, --start and --max must leave an image" in capsys.readouterr().err


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


WRONG_SETTINGS = [
    ({"sigma": math.inf}, "sigma must be in .0, 4. in image units"),
    ({"alpha": 0.99}, "alpha must be in"),
    ({"radius": -0.1}, "each of radii must be at least 0 and finite, got -0.1"),
    ({"radius": []}, "radius must be a number or at least one number"),
    ({"radius": 2.0}, "draws must be more, or radius smaller: 100000 cannot prove the radius 2.0 at sigma"),
    ({"radius": True}, "each of radii must be a number, got True"),
    ({"draws": 500.0}, "draws must be a whole number"),
    ({"batch_size": True}, "batch_size must be a whole number"),
    ({"draws": 5, "radius": 0.0}, "draws must be more, .* 5 cannot prove the radius 0.0"),
    ({"choosing": 0}, "choosing must be at least 1"),
    # The draws that choose a class have the numbers from here on.
    ({"draws": 2**27}, "draws must be in"),
    ({"seed": -1}, "seed must be in"),
    ({"seconds": 0}, "seconds must be above 0, got 0"),
    ({"draws": None}, "draws must be a number, got None"),
    ({"y": torch.tensor([1, 2])}, "y must have class numbers from 0 to 1, got 2"),
    ({"index": [3, 3]}, "index must be another number in .* for each image"),
]


@pytest.mark.parametrize(("settings", "message"), WRONG_SETTINGS)
def test_settings_are_checked(settings, message):
    usual = {"model": Halves(), "x": margins(1.0, 1.0), "y": torch.tensor([1, 1]), "sigma": 0.5, "radius": 0.5}
    with pytest.raises((TypeError, ValueError), match=message):
        certify(**usual | settings)


def test_refute_checks_what_it_gets_before_it_attacks():
    x, y, model = margins(0.2, 1.0), torch.tensor([1, 1]), Halves()
    made = certify(model, x, y, radius=torch.tensor([0.1]), **QUIET)
    other = Halves()
    torch.nn.init.ones_(other.weight)
    for message, changes in (
        ("model, x and y must be", {"model": lambda images: model(images)}),
        ("model, x and y must be", {"model": other}),
        ("model, x and y must be", {"x": x.flip(0)}),
        ("eps must be", {"radius": 9.0}),
        ("multiple values for keyword argument 'n_eval'", {"n_eval": 3}),
        ("draws must be a whole number", {"draws": 1.5}),
        ("draws must be at least 1", {"votes": 0}),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            refute(made, **{"model": model, "x": x, "y": y, "radius": 0.5, "progress": False} | changes)


def test_what_an_attack_finds_in_a_larger_ball_is_moved_into_this_ball():
    """The attack breaks all images, but only the first within the radius, and the proof is for the moved images."""
    x, y, model = margins(0.1, 0.8), torch.tensor([1, 1]), Halves()
    made = certify(model, x, y, radius=0.2, **QUIET)
    made, report = refute(made, model, x, y, radius=0.2, attacks=[PGD(steps=20, eps=2.0)], votes=51, progress=False)
    assert len(report.adversarial) == 2
    assert made.refuted[0.2].tolist() == [True, False] and not made.contradictions(0.2).size


def test_hard_labels_can_be_refuted():
    """All few votes of an image agree, and the logits have no slope."""

    class Hard(Halves):
        def forward(self, x):
            return super().forward(x).sign()

    x, y, model = margins(2.0, -2.0), torch.tensor([1, 1]), Hard()
    made = certify(model, x, y, radius=0.1, **QUIET)
    made, _ = refute(made, model, x, y, radius=0.1, attacks=[PGD(steps=1)], votes=3, progress=False)
    assert made.refuted[0.1].tolist() == [False, True] and made.between(0.1) == (0.5, 0.5)
