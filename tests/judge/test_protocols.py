"""Protocols by name: what each runs, what surrogates find that gradients do not, and clear answers."""

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from digit_nets import EPS, Gated, held_out, robust, standard, zoo_digits
from evaluating import evaluate
from small_models import Made, Purifying, labelled
from torch import nn

import purify_fast
from purify_fast import cli
from purify_fast.attacks import APGD, PGD, OriginalAutoAttack, checkpointed_steps
from purify_fast.attacks.base import ThreatModel
from purify_fast.defences import NoisyEnsemble
from purify_fast.evaluation import AttackSpec, EvaluateConfig
from purify_fast.judge.request.deadline import Subject
from purify_fast.judge.request.preparation import protocol_attacks
from purify_fast.judge.searches.model_tests import HEADS
from purify_fast.judge.surrogates.copies import surrogates

QUIET = {"eps": EPS}


def copies_and_absent(model, x):
    """The surrogates of a model, and the reasons why others are missing, by name."""
    with torch.no_grad():
        usable, absent = surrogates(model, x[:4], 10, ThreatModel("linf", EPS))
    return dict(usable), absent


def copies(model, x):
    return copies_and_absent(model, x)[0]


def names(model, x):
    return list(copies(model, x))


def test_surrogates_are_found_in_modules_objects_and_functions():
    x, _ = held_out()
    softened = ["a copy softened 10 times", "a copy softened 100 times"]
    assert names(Gated(), x) == ["standard alone", "robust alone", "all parts together", *softened]
    # a network without gates and thresholds has no softened copies, and one that only clamps has one
    first, second = standard(), robust()

    def average(images):
        return first(images) + second(images)

    class Holder:
        def __init__(self):
            self.inner = first

        def __call__(self, images):
            return 2 * self.inner(images)

    assert names(average, x) == ["first alone", "second alone", "all parts together"]
    assert names(Holder(), x) == ["inner alone"]
    noisy = names(NoisyEnsemble(first, 0.1, samples=4), x)
    kinds = ["straight-through copy", "copy without noise", "copy with fixed noise", "copy of fewer samples"]
    assert noisy == ["classifier alone", *(f"a {kind}" for kind in kinds)]
    # a clamp that is reached away from the images alone
    grey, clamped = torch.full_like(x, 0.5), lambda images: standard()(images.clamp(0.4, 0.6))
    assert names(clamped, grey) == ["a straight-through copy"]
    # what refuses to run, or has no gradient at all, is left out
    assert names(lambda images: torch.zeros(len(images), 10), x) == []


def detour():
    """Fewer levels, by NumPy."""
    return Made(lambda self, images: torch.from_numpy(np.round(images.numpy() * 4) / 4))


def floored():
    """Fewer levels, by a function without a derivative."""
    return Made(lambda self, images: (images * 4 // 1) / 4)


def behind(first, how=lambda self, images: self.net(self.first(images))):
    return Made(how, first=first, net=standard())


def test_a_module_that_blocks_gradients_is_the_identity_backward():
    x, _ = held_out()
    for first, inner in ((detour(), "first"), (nn.Sequential(nn.Identity(), detour()), "first.1")):
        model = behind(first).eval()
        usable, absent = copies_and_absent(model, x)
        copy = usable[f"a copy whose {inner} is the identity backward"]
        leaf = x[:8].clone().requires_grad_()
        out = copy(leaf)
        with torch.no_grad():
            assert torch.equal(out, model(leaf)) and torch.equal(copy(leaf), out)
            rounded = first(leaf)
        got, point = torch.autograd.grad(out.square().sum(), leaf)[0], rounded.requires_grad_()
        assert torch.allclose(got, torch.autograd.grad(model.net(point).square().sum(), point)[0])
        assert "a straight-through copy" in absent
        assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())
    # of a layer that hands gradients on there is no such copy, and where another copy has the same gradients
    assert not any("identity" in name for name in names(behind(nn.ReLU()), x))
    assert names(behind(floored()), x) == ["net alone", "a straight-through copy"]


def test_a_purifier_without_gradients_is_the_identity_backward_too():
    model, (x, y) = Purifying(standard(), lambda images: (images * 4).round().detach() / 4), held_out(24)
    copy = copies(model, x)["a copy whose purifier is the identity backward"]
    attacks = [PGD(steps=5), AttackSpec(APGD(loss="margin", steps=10), through=copy)]
    report = evaluate(model, x, y, attacks=attacks, **QUIET)
    assert report.rows[1].accuracy > 0.5 > 2 * report.rows[2].accuracy and report.rows[1].health["zero"] > 0
    assert evaluate(model, x, y, attacks=attacks[:1], **QUIET).headline.reliable is False


def test_a_module_is_the_identity_in_a_checkpointed_loop_too():
    x, _ = held_out()

    def loop(self, images):
        return self.net(checkpointed_steps(lambda z, i: self.first(z), images, 2))

    leaf = x[:8].clone().requires_grad_()
    logits = copies(behind(detour(), loop).eval(), x)["a copy whose first is the identity backward"](leaf)
    assert (torch.autograd.grad(logits.square().sum(), leaf)[0].flatten(1).abs().amax(1) > 0).all()


def test_a_copy_that_there_is_not_is_told_with_its_reason():
    x, y = held_out()
    report = evaluate(lambda z: behind(detour())(z.detach()), x, y, attacks=[PGD(steps=2)], probes=True, **QUIET)
    found = next(finding for finding in report.findings if finding.alarm == "missed images")
    assert found.verdict == "noted" and "a straight-through copy" in found.measured
    assert "could not be made: its logits have no gradient to the images" in found.measured

    def refuses(images):
        if torch.overrides._get_current_function_mode_stack():
            raise OSError("no modes here")
        return standard()(images)

    _, absent = copies_and_absent(refuses, x)
    missing = ["a straight-through copy", "a copy softened 10 times", "a copy softened 100 times"]
    assert absent == dict.fromkeys(missing, "OSError: no modes here")


def test_copies_are_compared_image_by_image():
    """The gradient of the first image is large and constant. Those of the others are small and hidden."""
    x, _ = held_out()

    def model(images):
        large = (images[:, :1, :1, :1] > 0.9).float()
        return standard()(large * 1e4 * images + (1 - large) * (images * 4).round() / 4)

    x = x[:4].clone()
    x[:, 0, 0, 0] = torch.tensor([1.0, 0.0, 0.0, 0.0])
    assert "a straight-through copy" in names(model, x)


def test_a_function_without_a_derivative_can_be_evaluated():
    """PyTorch raises in the backward pass of a floor division: a gradient of zero, and counted as such."""
    report = evaluate(behind(floored()), *held_out(20), protocol="fast", steps=4, probes=True, **QUIET)
    own = [row for row in report.rows if row.kind == "apgd" and row.own_gradients]
    # where an image falls by a random start, a zero gradient is no fault
    before = next(i for i, row in enumerate(own) if not row.robust.all())
    standing = own[:before] + own[before + 1 :]
    assert standing and all(row.health["zero"] == row.health["gradients"] > 0 for row in standing)
    assert all(row.health["unmoved"] == row.health["images"] > 0 for row in own)
    verdicts = {finding.alarm: finding.verdict for finding in report.findings}
    assert verdicts["gradient health"] == "unreliable" and not report.headline.reliable


def test_an_attack_that_becomes_equal_to_another_runs_once():
    model, x, y = labelled(6, 2)
    dlr, margin = APGD(loss="dlr", steps=3), APGD(loss="margin", steps=3)
    once = evaluate(model, x, y, attacks=[margin], **QUIET)
    for attacks in ([dlr, margin], [margin, dlr], [dlr, AttackSpec(margin, survivors_only=True)]):
        report = evaluate(model, x, y, attacks=attacks, **QUIET)
        assert report.attacks == once.attacks
        assert np.array_equal(report.row("APGD-3 margin").robust, once.row("APGD-3 margin").robust)
    three = labelled(6, 3)
    assert evaluate(*three, attacks=[dlr, margin], **QUIET).attacks == ["clean", "APGD-3 dlr", "APGD-3 margin", "worst"]
    # attacks that differ in anything else, or in their images, are two: their names are the user's to choose
    for other in (APGD(loss="margin", steps=3, rho=0.5), AttackSpec(margin, seed=1), AttackSpec(margin, nearest=None)):
        both = [AttackSpec(dlr, survivors_only=True), other]
        with pytest.raises(ValueError, match="different labels, got twice APGD-3 margin"):
            evaluate(model, x, y, attacks=both, **QUIET)
    named = [AttackSpec(dlr, label="one"), AttackSpec(margin, label="two")]
    assert evaluate(model, x, y, attacks=named, **QUIET).attacks == ["clean", "one", "two", "worst"]


@pytest.mark.slow
def test_rand_and_official_on_a_random_model():
    pytest.importorskip("pyautoattack")
    noisy = NoisyEnsemble(robust(), 0.05, samples=2)
    rand = evaluate(noisy, *held_out(8), protocol="rand", steps=3, n_eval=2, **QUIET)
    assert [row.settings.get("eot_iter") for row in rand.rows] == [None, 20, 20, None]
    strong = evaluate(noisy, *held_out(4), protocol="strong", steps=2, eot_iter=2, n_eval=2, **QUIET)
    heads = [row.attack for row in strong.rows if "through the samples'" in row.attack]
    assert [name.rpartition(" ")[2] for name in heads] == list(HEADS)
    assert any("without noise" in row.attack for row in strong.rows)


def test_a_deterministic_model_gets_autoattack_standard():
    pytest.importorskip("pyautoattack")
    report = evaluate(standard(), *held_out(3), protocol="official", **QUIET)
    assert report.attacks == ["clean", "AutoAttack standard", "worst"]


def test_another_seed_is_another_row():
    attacks = [APGD(steps=3), AttackSpec(APGD(steps=3), seed=1, label="again")]
    report = evaluate(robust(), *held_out(30), attacks=attacks, **QUIET)
    first, again = report.row("APGD-3 ce"), report.row("again")
    assert again.settings["seed"] == 1 and not np.array_equal(first.margins, again.margins)


def test_a_defence_that_takes_gradients_itself_has_softened_copies():
    """As a purification that descends an energy does; the attacks judge points without gradients."""

    def descends(self, x):
        with torch.enable_grad():
            z = x if x.requires_grad else x.clone().requires_grad_()
            (step,) = torch.autograd.grad((z * z).sum() + z.sigmoid().sum(), z, create_graph=True)
        return self.layer((x - 0.01 * step).flatten(1))

    torch.manual_seed(0)
    model, x = Made(descends, layer=nn.Linear(16, 3)).eval(), torch.rand(8, 1, 4, 4)
    found, _ = surrogates(model, x, 3, ThreatModel("linf", EPS))
    assert [name for name, _ in found if "softened" in name]
    with torch.no_grad():
        assert not any(surrogate(x).requires_grad for _, surrogate in found)


STANDARD = [
    "APGD-10 margin",
    "APGD-T 30 margin",
    "APGD-30 ce",
    "APGD-T 30",
    "Square, 1000 queries",
    "FAB-T 100, all targets, from the 10 nearest",
    "APGD-T 30 margin, all targets x2, from the 10 nearest",
    "APGD-30 ce x20, from the 10 nearest",
    "Square, from the 10 nearest",
]


@pytest.mark.slow
def test_the_default_is_standard_with_its_signs(without_autoattack):
    model, base = purify_fast.zoo.load("digits-pgd-at"), purify_fast.zoo.load("digits-standard")
    report = evaluate(model, *zoo_digits(6), eps=0.1, steps=30, base=base)
    assert report.attacks == ["clean", *STANDARD, "transfer from the base", "worst"]
    assert report.about["protocol"] == "standard" and sum(f.verdict != "not asked" for f in report.findings) >= 6
    # before any work
    for missing in ({"protocol": "official"}, {"attacks": [OriginalAutoAttack()]}):
        with pytest.raises(ModuleNotFoundError, match=r"AutoAttack is not installed.*purify-fast\[eval\]"):
            evaluate(lambda x: pytest.fail("it was asked"), *zoo_digits(6), eps=0.1, **missing)


def test_the_command_without_options_asks_for_the_same(without_autoattack, tmp_path, monkeypatch, capsys):
    """The command asks for the protocol `standard` with its signs, and changes nothing else that decides the rows."""
    asked = []

    original = purify_fast.evaluation.evaluate

    def spy(model, x, y, **options):
        asked.append(options)
        return original(model, x, y, **options | {"attacks": [PGD(steps=1)], "probes": False})

    monkeypatch.setattr("purify_fast.evaluation.evaluate", spy)
    monkeypatch.chdir(tmp_path)
    words = ["evaluate", "zoo:digits-pgd-at", "--images", "4", "--steps", "30", "--device", "cpu"]
    assert cli.main(words) == 0, capsys.readouterr().err
    (options,) = asked
    assert options["config"] == EvaluateConfig(steps=30, dataset_name="digits") and options.get("attacks") is None
    assert (tmp_path / "runs/zoo/digits-pgd-at/evaluation/report.json").is_file()


BALL = ThreatModel("linf", 0.1)


def of(random: bool) -> SimpleNamespace:
    found = {BALL: ([(name, nn.Identity()) for name in "abc"], {})}
    subject = SimpleNamespace(is_random=random, votes=1, base_model=nn.Identity(), _surrogates=found)
    subject.surrogates = partial(Subject.surrogates, subject)
    return subject


ASKED_STEPS = [(None, [10, 60, None, 30]), (30, [10, 30, None, 30]), (5, [10, 5, None, 5])]


@pytest.mark.parametrize(("asked", "steps"), ASKED_STEPS)
def test_asked_steps_shorten_the_long_attacks_alone(asked, steps):
    """The first attack of a protocol keeps its ten steps, and an attack without a number takes the evaluation's."""
    assert [spec.attack.steps for spec in protocol_attacks("fast", of(False), BALL, steps=asked)[:4]] == steps


def test_a_base_is_transferred_from_by_every_protocol():
    base = nn.Identity()
    specs = protocol_attacks("rand", of(True), BALL, base=base)
    assert [(spec.label, spec.through) for spec in specs[-1:]] == [("transfer from the base", base)]
    assert [spec.attack.eot_iter for spec in specs[:-1]] == [20, 20]
