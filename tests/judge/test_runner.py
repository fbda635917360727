import logging
import math
import sys
import types
from unittest import mock

import numpy as np
import pytest
import torch
from evaluating import evaluate
from small_models import Made, Purifying
from torch import nn

from purify_fast.attacks import APGD, FGSM, PGD, AttackContext, BpdaModel, OriginalAutoAttack, StAdv
from purify_fast.defences import NoisyEnsemble, WithAggregation, WithFixedNoise, WithoutNoise
from purify_fast.evaluation import AttackSpec, lee_kim_2023
from purify_fast.judge.results.rows import Points
from purify_fast.models.classifiers import SmallCNN
from purify_fast.ops import aggregate
from purify_fast.speed import StepGraphs


class Linear(nn.Module):
    """A linear classifier on images of 3x16x16 and, around it, noise on the logits of K samples: fact 14's toy."""

    def __init__(self, scale=1.0, samples=8, noise=0.15, method="lse", classes=10):
        super().__init__()
        weight = torch.randn(classes, 768, generator=torch.Generator().manual_seed(0))
        self.weight = nn.Parameter(weight)
        self.scale, self.samples, self.noise, self.method = scale, samples, noise, method
        self._mode = None

    def clean(self, x):
        return self.scale * (x - 0.5).flatten(1) @ self.weight.T / (math.sqrt(768) * 0.2887)

    def sample_logits(self, x):
        logits = self.clean(x)
        shape = (len(x), self.samples, logits.shape[1])
        if self._mode is None:
            noise = torch.randn(shape)
        elif self._mode == "zero":
            noise = torch.zeros(shape)
        else:
            noise = torch.randn(shape[1:], generator=torch.Generator().manual_seed(self._mode)).expand(shape)
        return logits[:, None] + self.noise * noise

    def forward(self, x):
        return aggregate(self.sample_logits(x), self.method)

    def reconstruct(self, x):
        return x[:, None].expand(-1, self.samples, -1, -1, -1)

    def fixed_noise(self, seed):
        return mock.patch.object(self, "_mode", seed)

    def deterministic(self):
        return mock.patch.object(self, "_mode", "zero")


def plain(toy):
    """The same without noise."""
    return Made(lambda self, x: self.toy.clean(x), toy=toy)


EPS = 8 / 255
FAINT = 0.006  # breaks some of the images
QUIET = {"eps": EPS}


def toy_data(model, n=128):
    x = torch.rand(n, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    return x, model.clean(x).argmax(1)


@pytest.fixture(scope="module")
def toy():
    model = Linear(scale=2.0)
    return model, *toy_data(model)


@pytest.mark.parametrize("scale, saturated", [(0.5, 0.02), (2, 0.75), (32, 1)])
def test_fact_14_through_the_published_head(scale, saturated):
    """The apparent robustness is the share of images whose gradient is NaN; the report must say so."""
    model = Linear(scale, method="peel_reference")
    x, y = toy_data(model)
    report = evaluate(model, x, y, steps=30, eot_iter=5, n_eval=1, attacks=[PGD()], **QUIET)
    row = report.row("PGD-30 ce")
    share = row.health["nonfinite"] / row.health["gradients"]
    assert row.accuracy == pytest.approx(saturated, abs=0.15)
    assert row.accuracy <= share + 0.1 and not row.reliable and not report.headline.reliable
    # judged by the same decisions, attacked through logsumexp: nothing is left
    model.method = "lse"
    attacks = [AttackSpec(PGD(), through=WithAggregation(model, "peel_reference"), label="through PeeL"), PGD()]
    head = evaluate(model, x, y, steps=30, eot_iter=5, n_eval=1, attacks=attacks, **QUIET)
    assert not head.row("through PeeL").reliable
    assert head.headline.accuracy <= 0.01 and head.headline.reliable and head.row("worst").reliable
    row = head.row("PGD-30 ce")
    assert row.accuracy <= 0.01 and row.settings["eot_iter"] == 5 and row.reliable and row.health["nonfinite"] == 0


#: Two losses on the model.
PGD_ROWS = [PGD(), PGD(loss="dlr")]


@pytest.fixture(scope="module")
def full(toy):
    """Rows of every kind, cheaply."""
    model, x, y = toy
    attacks = [
        *PGD_ROWS,
        AttackSpec(PGD(), through=WithoutNoise(model)),
        AttackSpec(OriginalAutoAttack(steps=5, n_queries=20), through=WithFixedNoise(model)),
        AttackSpec(OriginalAutoAttack(version="rand", steps=5, eot_iter=2), max_images=40),
        AttackSpec(PGD(), through=plain(model), label="transfer from the base"),
        FGSM(),
        AttackSpec(PGD(loss="margin", restarts=2), through=WithAggregation(model, "mean")),
    ]
    return evaluate(model, x, y, steps=5, eot_iter=2, n_eval=3, attacks=attacks, name="toy", eps=FAINT)


def test_rows(full):
    assert full.attacks[:4] == ["clean", "PGD-5 ce", "PGD-5 dlr", "PGD-5 ce through WithoutNoise"]
    assert full.attacks[-2:] == ["worst", "worst, first 40"] and len(full.attacks) == 11
    clean = full.row("clean")
    assert clean.accuracy > 0.8 and clean.n == 128 and clean.health is None
    for row in full.rows:
        assert row.n == len(row.robust) and row.seed == 0 and row.seconds >= 0 and row.n_eval == 3
        assert row.standard_error == pytest.approx(math.sqrt(row.accuracy * (1 - row.accuracy) / row.n))
        if row.is_attack:
            assert row.accuracy <= row.mean and row.health["gradients"] > 0 and row.reliable
            # another aggregation of the samples makes no other model
            own = row.settings.get("through") in (None, "WithAggregation")
            assert row.settings["eot_iter"] == (2 if own else 1) and row.transferred == (not own)
            assert row.attacked == (clean.wrong < 1)[: row.n].sum()
            # noise that is the same in every call is none for AutoAttack's own check
            assert not any("random" in warning for warning in row.warnings)


def test_worst_is_per_image(full):
    names = [row.attack for row in full.rows if row.kind != "worst" and row.n == 128]
    rows = [full.row(name) for name in names]
    worst = Points.worst(rows, 128)
    assert np.array_equal(worst.wrong, np.max([row.wrong for row in rows], 0))
    assert np.array_equal(full.row("worst").right, worst.right)
    # an attack on fewer images neither lowers nor raises the row over all of them
    few = full.row("worst, first 40")
    rows.append(full.row("AutoAttack rand, 5 steps, first 40"))
    assert np.array_equal(few.right, Points.worst(rows, 40).right)
    assert few.n == 40 and {*few.settings["over"]} - {*full.row("worst").settings["over"]} == {rows[-1].attack}
    assert full.headline is full.row("worst")


def test_what_a_model_lacks_is_said(toy, caplog):
    """A deterministic model gets one draw and one prediction, and no note on what would be the same."""
    model, x, y = toy
    attacks = [PGD(), StAdv(steps=2), OriginalAutoAttack(version="rand")]
    report = evaluate(plain(model), x, y, steps=3, eot_iter=4, n_eval=4, attacks=attacks, name="m", **QUIET)
    assert all(row.n_eval == 1 for row in report.rows) and report.row("PGD-3 ce").settings["eot_iter"] == 1
    assert report.row("clean").accuracy == 1 and len(report.notes) == 1
    assert report.notes[0].endswith("was left out: the model is deterministic")
    report = evaluate(plain(model), x, y, attacks=attacks[2:], name="m", **QUIET)
    assert report.notes[1:] == ["m: no attack ran, so this report does not say how robust the model is"]
    assert report.notes[0].startswith("m: AutoAttack rand") and "no attack ran" in caplog.text
    assert evaluate(plain(model), x, y, attacks=[], name="m", **QUIET).notes == []
    model.eval()
    for mode, method in ((WithFixedNoise, "fixed_noise"), (WithoutNoise, "deterministic")):
        with pytest.raises(TypeError, match=rf"model must have a method {method}\(.*\), got function"):
            mode(lambda z: model(z))


def test_nothing_leaks(toy):
    model, x, y = toy
    model.train()
    model.weight.requires_grad_(True)
    logger = logging.getLogger("auto-attack")
    before = torch.get_rng_state(), model.weight.clone(), x.clone(), logger.level, logger.propagate, sys.gettrace()
    attacks = [PGD(), AttackSpec(OriginalAutoAttack(steps=2, n_queries=2), through=WithFixedNoise(model))]
    np_state = np.random.get_state()[1].tolist()
    evaluate(model, x, y, steps=2, attacks=attacks, **QUIET)
    assert torch.equal(before[0], torch.get_rng_state()) and np.random.get_state()[1].tolist() == np_state
    assert torch.equal(before[1], model.weight) and torch.equal(before[2], x)
    assert (logger.level, logger.propagate, sys.gettrace()) == before[3:] and not logger.handlers
    assert model.training and model.weight.requires_grad and model.weight.grad is None and model._mode is None


def test_reproducible_and_seeded(toy):
    model, x, y = toy
    common = {"steps": 3, "eps": FAINT}
    attacks = [PGD(eot_iter=2), PGD(loss="dlr")]
    run = [evaluate(model, x, y, attacks=attacks, seed=s, **common) for s in (0, 0, 1)]
    pictures = [r.row("PGD-3 dlr").examples.adversarial for r in run]
    masks = [np.concatenate([r.robust for r in report.rows]) for report in run]
    assert np.array_equal(masks[0], masks[1]) and not np.array_equal(masks[0], masks[2])
    assert np.array_equal(pictures[0], pictures[1]) and not np.array_equal(pictures[0], pictures[2])
    # a row does not depend on which rows came before it
    alone = evaluate(model, x, y, attacks=attacks[1:], **common).row("PGD-3 dlr")
    assert np.array_equal(alone.robust, run[0].row("PGD-3 dlr").robust)
    assert np.array_equal(alone.examples.adversarial, pictures[0])


def test_batches_do_not_matter(toy):
    model, x, y = toy
    common = {"steps": 1, "eps": FAINT, "attacks": [PGD()]}
    for mode in (WithFixedNoise, WithoutNoise):
        one, other = (evaluate(mode(model), x, y, batch_size=b, **common) for b in (128, 3))
        a, b = one.row("PGD-1 ce"), other.row("PGD-1 ce")
        assert np.array_equal(a.robust, b.robust) and 0 < a.accuracy < 1
        assert np.abs(a.examples.adversarial - b.examples.adversarial).max() < 1e-6


def test_survivors(toy):
    model, x, y = toy
    attacks = [PGD(), *(AttackSpec(PGD(loss=loss), survivors_only=True) for loss in ("dlr", "margin"))]
    attacks += [AttackSpec(PGD(), through=WithoutNoise(model), survivors_only=True)]
    attacks.append(AttackSpec(PGD(steps=2), label="all again"))
    report = evaluate(model, x, y, steps=1, attacks=attacks, n_eval=2, **QUIET)
    first, second, third = (report.row(f"PGD-1 {loss}") for loss in ("ce", "dlr", "margin"))
    # what all choosing draws misclassify has fallen, and every image keeps its draws
    assert second.attacked == (first.wrong < 1).sum() < first.attacked
    assert (second.wrong >= first.wrong).all() and (third.wrong >= second.wrong).all() and second.n == first.n == len(x)
    again = report.row("all again")
    assert again.attacked == first.attacked
    tried = report.row("PGD-1 ce through WithoutNoise")
    assert tried.attacked == (third.wrong < 1).sum() and (tried.wrong >= third.wrong).all()
    assert np.array_equal(report.row("worst").wrong, np.maximum(tried.wrong, again.wrong))
    assert f"{len(x)} ({second.attacked})" in report.to_markdown()


@pytest.mark.parametrize("classes", [2, 4])
def test_autoattack_with_few_classes(classes):
    pytest.importorskip("pyautoattack")
    model = plain(Linear(scale=1.0, classes=classes))
    x, y = toy_data(model.toy, 12)
    if classes == 4:
        row = evaluate(model, x, y, eps=0.1, attacks=[OriginalAutoAttack(steps=10, n_queries=50)]).rows[1]
        assert row.accuracy <= 0.1 and row.warnings == []
        return
    for how in ({"attacks": [OriginalAutoAttack()]}, {"protocol": "official"}):
        with pytest.raises(ValueError, match=f"at least 4 classes, got {classes}: use protocol stand"):
            evaluate(model, x, y, eps=0.1, **how)
    with pytest.raises(ValueError, match="rand needs at least 3 classes, got 2"):
        OriginalAutoAttack(version="rand").run(model, x, y, AttackContext(eps=0.1, num_classes=2))


def test_the_other_package(without_autoattack, monkeypatch, toy):
    """fra31's `autoattack` has `bs`, prints unless told otherwise, and returns the images alone."""
    model, x, y = toy
    asked = {}

    class Other:
        def __init__(self, model, eps=0.3, verbose=True, attacks_to_run=(), version="other", **others):
            assert version == "standard"
            self.eps, self.verbose = eps, verbose
            self.apgd, self.apgd_targeted, self.fab, self.square = (types.SimpleNamespace() for _ in range(4))

        def run_standard_evaluation(self, x_orig, y_orig, bs=250):
            assert not self.verbose
            asked.update(bs=bs, targets=self.fab.n_target_classes, steps=self.apgd.n_iter)
            return (x_orig + 2 * self.eps).clamp(0, 1)  # leaves the ball: must be brought back

    with pytest.raises(ModuleNotFoundError, match=r"purify-fast\[eval\]"):
        evaluate(plain(model), x, y, attacks=[OriginalAutoAttack()], **QUIET)
    monkeypatch.setitem(sys.modules, "autoattack", types.SimpleNamespace(AutoAttack=Other))
    row = evaluate(plain(model), x, y, attacks=[OriginalAutoAttack()], batch_size=33, **QUIET).rows[1]
    assert asked == {"bs": 33, "targets": 9, "steps": 100}
    assert np.abs(row.examples.adversarial - row.examples.clean).max() == pytest.approx(EPS, abs=1e-6)


@pytest.fixture(scope="module")
def shattered():
    """A randomised defence with one purified image per prediction, rounded: no gradient gets through."""
    torch.manual_seed(0)
    classifier = nn.Sequential(nn.Flatten(), nn.Linear(768, 10))
    classifier[1].weight.data *= 10
    model = Purifying(classifier, lambda x: ((x + 0.02 * torch.randn_like(x)) * 16).round() / 16)
    x = torch.rand(64, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    return model, x, model.classifier(x).argmax(1)


@pytest.fixture(scope="module")
def unseen(shattered):
    model, x, y = shattered
    straight = BpdaModel.of(model)
    attacks = [
        PGD(),
        AttackSpec(PGD(), through=straight, label="BPDA"),
        AttackSpec(PGD(), through=model.classifier, label="cheap"),
        AttackSpec(PGD(norm="l2", eps=1.0), through=straight, label="BPDA"),
        AttackSpec(PGD(loss="dlr", norm="l2", eps=1.0), through=straight, label="BPDA in L2 1", survivors_only=True),
        AttackSpec(StAdv(), through=model.classifier),
    ]
    return evaluate(model, x, y, attacks=attacks, steps=8, eot_iter=3, n_eval=2, name="d", eps=FAINT)


def test_unseen_rows(unseen):
    rows = [unseen.row(label) for label in unseen.attacks]
    _, pgd, bpda, cheap, _, other, _, stadv, _ = rows
    assert [row.threat for row in rows] == [None] * 5 + ["L2 1", "L2 1", "flow 0.05", "L2 1"]
    assert (other.attack, stadv.attack) == ("BPDA, L2 1", "StAdv-8 margin through Sequential, flow 0.05")
    assert not pgd.reliable and pgd.health["zero"] > 0
    assert bpda.reliable and bpda.settings["through"] == "BpdaModel" and bpda.accuracy < pgd.accuracy - 0.2
    assert bpda.settings["eot_iter"] == 3 and cheap.settings["eot_iter"] == 1
    assert (stadv.settings["eps"], stadv.settings["norm"], stadv.settings["loss"]) == (0.05, "flow", "margin")
    assert all(row.health["gradients"] == 8 * row.attacked for row in (bpda, stadv)) and stadv.reliable


def test_other_threat_models_stay_out_of_the_headline_and_the_worst(unseen):
    of = {label: unseen.row(label).robust for label in unseen.attacks}
    # with what was made on the classifier alone, without another ball
    assert np.array_equal(of["worst"], of["PGD-8 ce"] & of["BPDA"] & of[unseen.attacks[3]])
    assert np.array_equal(of["worst, L2 1"], of["BPDA, L2 1"] & of["BPDA in L2 1"])
    assert of["worst, L2 1"].mean() < of["worst"].mean()
    # Survivors of one threat model are not spared by another.
    first, second = unseen.row("BPDA, L2 1"), unseen.row("BPDA in L2 1")
    assert second.attacked == (first.share_wrong < 1).sum() < first.attacked
    assert unseen.headline.threat is None and unseen.headline.accuracy == of["worst"].mean()
    lowest = unseen.lowest
    assert set(lowest) == {None, "L2 1", "flow 0.05"} and lowest["L2 1"].accuracy == of["worst, L2 1"].mean()


def test_the_attack_of_lee_and_kim():
    spec, other = lee_kim_2023(), lee_kim_2023(4 / 255)
    settings = spec.attack.settings(AttackContext(eps=0.1))
    wanted = {"steps": 200, "eot_iter": 20, "random_start": False, "norm": "linf", "eps": 8 / 255, "loss": "ce"}
    assert settings | wanted == settings
    assert [each.attack.alpha for each in (spec, other)] == [pytest.approx(0.007), pytest.approx(0.0035)]
    assert spec.label == "PGD-200 ce + EOT (Lee & Kim 2023)" and other.attack.eps == 4 / 255


def test_attacks_are_kept_by_what_they_do_and_not_by_their_names(tmp_path, shattered):
    model, x, y = shattered
    settings = {"steps": 2, "out": tmp_path, "n_eval": 1, "eps": FAINT}

    def run(*attacks, **change):
        report = evaluate(model, x[:8], y[:8], attacks=attacks, **settings | change)
        rows = [row.to_dict() for row in report.rows[1 : 1 + len(attacks)]]
        # The clean row is not counted.
        return rows, len(list(tmp_path.glob("rows/*.safetensors"))) - 1

    # They differ in one thing each: no row of one is taken for another's. All means of a single draw answer the same.
    straight = [BpdaModel.of(model, aggregation) for aggregation in (None, "mean")]
    attacks = [PGD(), PGD(random_start=False), PGD(eps=0.01), StAdv(), StAdv(smoothness=0.0)]
    pairs = [(attack, None) for attack in attacks] + [(PGD(), other) for other in (model.classifier, straight[0])]
    plans = [AttackSpec(attack, through=other, label=str(i)) for i, (attack, other) in enumerate(pairs)]
    first, count = run(*plans)
    assert count == len(plans) and run(*plans) == (first, count)
    # the same attack by another name, and from a report whose own ball it is, is the same row
    [named], count = run(AttackSpec(PGD(), through=straight[1], label="by another name"))
    assert named["attack"] == "by another name" and count == len(plans)
    [other], _ = run(PGD(), eps=0.01)
    [again], count = run(PGD(eps=0.01), eps=0.01)
    assert (other["attack"], other["threat"], count) == ("PGD-2 ce", None, len(plans)) and again == other


def test_an_evaluation_hands_captured_steps_to_its_attacks(rerun, monkeypatch):
    made = []

    def graphs(mode, cudnn_benchmark):
        made.append(StepGraphs(mode, rerun, cudnn_benchmark))
        return made[-1]

    monkeypatch.setattr("purify_fast.speed.graphs.graphed_loop.StepGraphs", graphs)
    torch.manual_seed(0)
    model, x = SmallCNN(width=4).eval(), torch.rand(12, 1, 16, 16)
    y = model(x).argmax(1)
    rows = []
    for mode in ("off", "auto", "always"):
        options = {"eps": 0.05, "batch_size": 8, "cuda_graphs": mode}
        found = evaluate(model, x, y, attacks=[PGD(steps=25), APGD(steps=25)], **options)
        rows.append([row.robust.tolist() for row in found.rows])
        # of each attack two batches, the last one smaller; of APGD perhaps more, when images leave
        assert rerun.recorded == 0 if mode == "off" else rerun.recorded >= 3
        # The header says what was captured. Nothing is known of it where nothing may be captured.
        assert found.about.get("captured") == (None if mode == "off" else f"{rerun.recorded} captured")
        rerun.recorded = 0
    assert rows[0] == rows[1] == rows[2] and [one.mode for one in made] == ["off", "auto", "always"]
    # The setting of cuDNN holds inside captures.
    assert {one.cudnn_benchmark for one in made} == {"off"}


def test_another_default_device_changes_nothing():
    """Devices follow the images; the numbers of a report are on the CPU."""
    model, x = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).eval(), torch.rand(6, 1, 4, 4)
    with torch.no_grad():
        y = model(x).argmax(1)
    for judged in (
        model,
        WithFixedNoise(NoisyEnsemble(model, 0.1, samples=2), 3),
        NoisyEnsemble(model, 0.1, samples=2),
    ):
        how = {"eps": 0.05, "attacks": [PGD(steps=2)], "claim": 20.0, "probes": False}
        with torch.device("meta"):
            report = evaluate(judged, x, y, **how)
        assert report.headline.right.shape[1] == 6 and report.claim_test() is not None
        if judged is model:
            assert report.headline.robust.tolist() == evaluate(judged, x, y, **how).headline.robust.tolist()
