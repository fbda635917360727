"""A new user's first mistakes: inputs of the wrong form, a radius of 0, probabilities, training mode. The tests of
models that write to their images follow."""

import functools
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from digit_nets import digits, standard, zoo_digits
from evaluating import evaluate
from input_gradients import input_gradient
from reports import forms
from search_calls import apgd, fab_t, square, stadv
from small_models import Made, labelled
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import purify_fast
from purify_fast.attacks import APGD, FABT, PGD, Square, StAdv, fgsm, pgd
from purify_fast.defences import MajorityVote, NoisyEnsemble, WithFixedNoise, WithoutNoise
from purify_fast.evaluation import AttackSpec, EvaluateConfig, certify

QUIET = {"eps": 0.1, "attacks": [PGD(steps=2)]}


@pytest.fixture
def trio():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.LazyLinear(4))
    x = torch.rand(10, 3, 6, 7)
    model(x)
    return model.eval(), x, torch.randint(0, 4, (10,))


REFUSED = [
    (lambda x, y: {"x": (255 * x).long()}, r"got torch.int64: if x is in 0..255, give x.byte\(\)"),
    (lambda x, y: {"y": y.tolist()}, "y must be .*, got list"),
    (lambda x, y: {"y": y > 1}, r"y must be integer labels \[N\] = \[10\], got torch.bool \[10\]"),
    (lambda x, y: {"x": 2 * x - 1}, r"x must be in \[0, 1\] .* values from -.* for normalized images"),
    (lambda x, y: {"x": x / 0 * 0}, r"x must be in \[0, 1\] and free of NaN, got values from nan"),
    (lambda x, y: {"x": x[:, 0]}, r"x must be .*, got \[10, 6, 7\]"),
    (lambda x, y: {"x": [(x, y)]}, "x must be .*, got list"),
    (lambda x, y: {"x": x[:0], "y": y[:0]}, "x must be .* with at least one image"),
    ({"y": torch.tensor([0, 4] * 5)}, "y must have class numbers from 0 to 3, got 4"),
    ({"eps": "8/255"}, "eps must be a number, such as 8 / 255, got '8/255'"),
    ({"eps": torch.full((10,), 0.1)}, r"eps must be a number, such as 8 / 255, got tensor\("),
    ({"eps": 0}, "eps must be above 0, got 0"),
    ({"eps": 12, "norm": "l2"}, r"eps must be at most 11.2\d* for l2, .* got 12: is 12/255 meant\?"),
    ({"attacks": [PGD(eps=12, norm="L2")]}, r"eps must be at most 11.2\d* for l2, .* got 12"),
    ({"norm": "l3"}, "norm must be"),
    ({"predict": "worst_of"}, "predict='worst_of' needs a random model"),
    ({"predict": "votes"}, "predict must be one of worst_of, got 'votes'"),
    ({"minutes": 0, "attacks": []}, "minutes must be above 0"),
    ({"protocol": "fast"}, "protocol and attacks .*got protocol='fast'"),
    ({"attacks": [PGD(), PGD(alpha=0.1)]}, "attacks must have different labels.*PGD-100 ce"),
    ({"attacks": ["pgd"]}, r"an attack must be an object of purify_fast.attacks, such as PGD\(\), .* got 'pgd'"),
    ({"attacks": PGD()}, "attacks must be a list, got PGD"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_what_cannot_be_meant_is_refused(trio, options, message):
    model, x, y = trio
    options = options if isinstance(options, dict) else options(x, y)
    with pytest.raises((TypeError, ValueError), match=message):
        evaluate(**{"model": model, "x": x, "y": y} | QUIET | options)


def test_values_outside_by_rounding_are_clamped_and_noted(trio):
    """As those of images that were normalized and brought back, which the error for normalized images advises."""
    model, x, y = trio
    x = (x - x.min()) / (x.max() - x.min())
    assert not any("rounding" in note for note in evaluate(model, x, y, **QUIET).notes)
    back = (x - 0.4465) / 0.2010 * 0.2010 + 0.4465
    back[:, 0, 0, 0] = torch.tensor([-9e-5, 1 + 9e-5]).repeat(5)
    whole = evaluate(model, back.clamp(0, 1), y, **QUIET)
    for images, labels in ((back, y), (back.numpy(), y)):
        report = evaluate(model, images, labels, **QUIET)
        assert [row.data for row in report.rows] == [row.data for row in whole.rows]
        note = "values of the images outside [0, 1] by rounding, by at most 9e-05, were clamped"
        assert report.notes[0] == note and note in " ".join(report.to_text().split())


def test_arrays_and_other_dtypes_are_converted(trio):
    """The report is that of float32 tensors."""
    model, x, y = trio
    levels = (x * 255).round().to(torch.uint8)
    x = levels.float() / 255
    plain = evaluate(model, x, y, **QUIET)
    reverse = x.numpy().astype(">f4")[::-1].copy()[::-1]
    reverse.flags.writeable = False
    for images, labels in ((x.double(), y.int()), (x.numpy(), y.numpy().astype(np.int16)), (reverse, y), (levels, y)):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            report = evaluate(model, images, labels, **QUIET)
        assert [row.data for row in report.rows] == [row.data for row in plain.rows]
        assert np.array_equal(report.row("worst").robust, plain.row("worst").robust)


def test_clean_images_need_no_radius(trio):
    assert evaluate(*trio, eps=0, attacks=[]).attacks == ["clean"]


def test_a_setting_is_a_keyword_and_an_unknown_one_is_named(trio):
    model, x, y = trio
    report = purify_fast.evaluate(model, x, y, eps=0.01, protocol="fast", steps=3, seed=2, progress=False)
    assert report.about["seed"] == "2" and "steps 3" in report.about["changed"]
    shared = EvaluateConfig("strong", steps=3, seed=2)
    again = purify_fast.evaluate(model, x, y, eps=0.01, config=shared, protocol="fast", progress=False)
    assert again.attacks == report.attacks and again.about["changed"] == report.about["changed"]
    with pytest.raises(TypeError, match="config must be an EvaluateConfig, got 'fast'"):
        purify_fast.evaluate(model, x, y, eps=0.01, config="fast")
    with pytest.raises(TypeError, match="unexpected keyword argument 'stepz'"):
        purify_fast.evaluate(model, x, y, eps=0.01, stepz=3)


def test_a_model_that_returns_probabilities_is_told_what_to_do(caplog):
    """Steps along a softmax's gradients find less than there is where it is sure: here logits are 4 times larger."""
    classifier, (x, y) = purify_fast.zoo.load("digits-pgd-at"), zoo_digits(40)
    settings = {"eps": 0.2, "attacks": [PGD(steps=20)]}

    def sure(x):
        return 4 * classifier(x)

    def softmax(x):
        return sure(x).softmax(1)

    masked = evaluate(softmax, x, y, **settings)
    finding = next(finding for finding in masked.findings if finding.alarm == "logits")
    assert finding.verdict == "unreliable" and not masked.headline.reliable
    assert "return the logits before the softmax" in finding.measured
    assert "returns probabilities, not logits" in caplog.text
    mended = evaluate(lambda x: classifier(x).softmax(1).clamp_min(1e-30).log(), x, y, **settings)
    assert next(f for f in mended.findings if f.alarm == "logits").verdict == "passed"
    assert mended.headline.accuracy < masked.headline.accuracy


@pytest.mark.parametrize("line", [[1, 0], [0.2, 0.9], [-0.1, 1.1], [1.2, -0.2], [float("nan"), 1.0]])
def test_logits_that_are_no_probabilities_pass_and_one_hot_rows_do_not(line, caplog):
    def model(x):
        return torch.tensor([line]).repeat(len(x), 1) + 0 * x.mean()

    report, one_hot = evaluate(model, torch.rand(4, 1, 3, 3), torch.zeros(4).long(), **QUIET), line == [1, 0]
    sign = next(finding for finding in report.findings if finding.alarm == "logits")
    assert sign.verdict == ("unreliable" if one_hot else "passed")
    assert ("one-hot rows" in sign.measured) == ("one-hot rows" in caplog.text) == one_hot


class Called(SimpleNamespace):
    """An object that is called, and is no module."""

    def __call__(self, x):
        return self.network(x)


def closure(network):
    return lambda x: network(x)


def reading(network):
    """A module whose forward pass reads a network that is no part of it."""
    return type("Reading", (nn.Module,), {"forward": lambda self, x: network(x)})()


def partly_trained(network):
    """The dropout of a Bayesian network, in a model in evaluation mode."""
    network.eval()[1].train()
    return network


TRAINING_MODES = [
    (closure, "Flatten, Dropout, Linear: they stayed so"),
    (lambda network: Called(network=network), "Flatten, Dropout, Linear: they stayed so"),
    (lambda network: functools.partial(nn.Module.__call__, network), "Flatten, Dropout, Linear: they stayed so"),
    (lambda network: reading(network).eval(), "Linear: no part of it is registered, so they were put into"),
    (lambda network: reading(functools.partial(network)).eval(), "so they were put into evaluation mode"),
    (partly_trained, "1 (Dropout): they were put into evaluation mode"),
    # A module is put into evaluation mode for its user.
    (nn.Module.train, None),
    (nn.Module.eval, None),
    (lambda network: closure(network.eval()), None),
]


@pytest.mark.parametrize(("make", "told"), TRAINING_MODES)
def test_modules_in_training_mode_are_told(make, told, caplog):
    network = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(16, 3))
    model, x, y = make(network), torch.rand(4, 1, 4, 4), torch.arange(4) % 3
    modes = [module.training for module in network.modules()]
    report = evaluate(model, x, y, **QUIET | {"attacks": []}, name="mine")
    notes = [note for note in report.notes if "training mode" in note]
    assert len(notes) == (told is not None) and modes == [module.training for module in network.modules()]
    assert all(note.startswith("mine has modules in training mode, ") and told in note for note in notes)
    assert ("training mode" in caplog.text) == bool(notes)


def test_modules_in_a_plain_list_are_judged_in_evaluation_mode():
    """A number by the statistics of batches would be another, and the statistics would change with each attack."""
    networks = [nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(16, 3)).train() for _ in range(5)]
    x, y = torch.rand(8, 1, 4, 4), torch.arange(8) % 3
    networks[0](x)
    before = [buffer.clone() for network in networks for buffer in network.buffers()]
    how = lambda self, x: sum(network(x) for network in self.nets)  # noqa: E731
    report = evaluate(Made(how, nets=[*networks]), x, y, **QUIET)
    assert not any("training mode" in note for note in report.notes)
    assert all(map(torch.equal, before, (buffer for network in networks for buffer in network.buffers())))
    assert all(network.training for network in networks)
    other = evaluate(Made(how, nets=nn.ModuleList(networks)), x, y, **QUIET)
    assert [row.accuracy for row in other.rows] == [row.accuracy for row in report.rows] and other.notes == report.notes


class Bound(nn.Module):
    """A model that writes its logits into the same memory in every call."""

    def __init__(self):
        super().__init__()
        self.logits = torch.zeros(8, 3)

    def forward(self, x):
        return self.logits[: len(x)].copy_(x.flatten(1)[:, :3])


def test_a_model_returns_new_logits_in_each_call():
    """Logits of a batch would be overwritten by the next, and a random model would look like a deterministic one."""
    with pytest.raises(ValueError, match="new logits in each call"):
        evaluate(Bound(), torch.rand(8, 1, 4, 4), torch.zeros(8).long(), **QUIET)


@pytest.mark.parametrize("classes", [3, 1000])
@pytest.mark.parametrize("where", ["through", "base"])
def test_another_model_has_the_classes_of_the_judged_one(trio, classes, where):
    model, x, y = trio
    other = nn.Sequential(nn.Flatten(), nn.Linear(x[0].numel(), classes))
    how = {"attacks": [AttackSpec(PGD(), through=other)]} if where == "through" else {"base": other, "protocol": "fast"}
    with pytest.raises(ValueError, match=f"{where}.* must have the 4 classes of the model, got {classes}"):
        evaluate(model, x, y, eps=0.1, steps=1, **how)


def test_a_claim_that_no_row_tests_is_said(trio):
    model, x, y = trio
    report = evaluate(model, x, y, eps=0.05, attacks=[PGD(steps=1, eps=0.2, norm="linf")], claim=50)
    assert any("so the claim of 50 % is not tested" in note for note in report.notes)
    with pytest.raises(ValueError, match=r"within L-inf 0\.05, got none"):
        _ = report.headline


JUDGED = [
    (lambda noisy: MajorityVote(noisy, 7), "judged by the majority vote of 7 draws"),
    (WithFixedNoise, "judged with fixed noise"),
    (WithoutNoise, "judged without noise"),
]


@pytest.mark.parametrize(("around", "told"), JUDGED)
def test_a_report_names_what_was_judged(trio, around, told):
    model, x, y = trio
    report = evaluate(around(NoisyEnsemble(model, 0.1, samples=1)), x, y, eps=0.1, attacks=[], n_eval=1)
    assert all(told in text for text in forms(report)) and told.removeprefix("judged ") in report.to_json()


def test_a_loader_is_taken_as_its_images(trio):
    model, x, y = trio
    batches = DataLoader(TensorDataset(x, y), batch_size=4)
    reports = [purify_fast.evaluate(model, *images, **QUIET, progress=False) for images in ((batches,), (x, y))]
    assert [row.robust.tolist() for row in reports[0].rows] == [row.robust.tolist() for row in reports[1].rows]
    how = {"sigma": 0.25, "radius": 0.0, "draws": 100, "progress": False}
    assert certify(model, batches, **how).right.tolist() == certify(model, x, y, **how).right.tolist()
    for wrong in ([x], [], [(x, y, y)]):
        with pytest.raises(ValueError, match=r"x without y must be a loader of batches \(images, labels\)"):
            purify_fast.evaluate(model, wrong, **QUIET)


def test_the_order_of_torchattacks_is_refused_with_its_cure(trio):
    with pytest.raises(TypeError, match=r"PGD\(steps=10\)\(model, x, y, eps=8 / 255\)"):
        PGD(trio[0], eps=8 / 255, alpha=2 / 255, steps=10)


# -- models that write to their images ---------------------------------------------------------------------------------
# Models that write to the images that they are given are refused, and the caller's images stay as they are.

BALL = {"eps": 0.1}
WRITES = "model must not write to its input"


@pytest.fixture(scope="module")
def trained():
    """The network is trained before a model asks for it, which may record no gradients."""
    return standard()


@pytest.fixture
def images():
    """Eight images and their labels. At the end the images are as they were."""
    x, y = (part[:8].clone() for part in digits()[2:])
    before = x.clone()
    yield x, y
    assert torch.equal(x, before)


def at_once(x):
    x.sub_(0.02)
    return standard()(x)


def without_gradients_only(x):
    if x.requires_grad:
        x = x.clone()
    x.sub_(0.02)
    return standard()(x)


def with_gradients_only(x):
    if x.requires_grad:
        with torch.no_grad():
            x.mul_(0.95)
    return standard()(x)


def unrecorded(x):
    """Scaling by hand as a quantiser does it, so that the gradient goes straight through."""
    x = x.contiguous()
    with torch.no_grad():
        x.mul_(7).round_().div_(7)
    return standard()(x)


def unwatched(self, x):
    return unrecorded(x)


def uncounted(x):
    """PyTorch does not count this write."""
    x.data.mul_(0.95)
    return standard()(x)


def through_numpy(x):
    x.detach().numpy()[:, :, :4] = 0
    return standard()(x)


ALL = [at_once, without_gradients_only, with_gradients_only, unrecorded, uncounted, through_numpy, Made(unwatched)]


@pytest.mark.usefixtures("trained")
@pytest.mark.parametrize("model", ALL)
def test_an_evaluation_refuses_them_before_any_attack(model, images):
    def never(model, x, y):
        raise AssertionError("an attack was begun")

    with pytest.raises(ValueError, match=WRITES):
        evaluate(model, *images, attacks=[never], **BALL)


@pytest.mark.usefixtures("trained")
def test_the_model_of_a_surrogate_is_refused_too(images):
    for given in ({"base": unrecorded}, {"attacks": [AttackSpec(PGD(steps=1), through=unrecorded)]}):
        with pytest.raises(ValueError, match=WRITES):
            evaluate(standard(), *images, **BALL, **given)


@pytest.mark.usefixtures("trained")
@pytest.mark.parametrize("model", [at_once, unrecorded])
@pytest.mark.parametrize("attack", [pgd, apgd, fab_t, square, fgsm, stadv])
def test_attacks_refuse_them(model, attack, images):
    options = {} if attack is stadv else {"eps": 0.1}
    more = {"n_queries": 3} if attack is square else {} if attack is fgsm else {"steps": 3}
    # PyTorch itself refuses a write to images whose gradient is recorded.
    with pytest.raises((ValueError, RuntimeError), match=f"{WRITES}|in-place operation"):
        attack(model, *images, **options, **more)


@pytest.mark.usefixtures("trained")
def test_models_that_cannot_be_differentiated_are_evaluated():
    x, y = (part[:8] for part in digits()[2:])

    def black_box(x):
        if x.requires_grad:
            raise RuntimeError("no gradients here")
        return standard()(x)

    found, open_box = (evaluate(m, x, y, attacks=[Square(n_queries=5)], **BALL) for m in (black_box, standard()))
    assert [row.accuracy for row in found.rows] == [row.accuracy for row in open_box.rows]


@pytest.fixture(scope="module")
def writing_trio():
    return labelled(12, classes=4)


@pytest.mark.usefixtures("trained")
@pytest.mark.parametrize("attack", [apgd, pgd, fab_t, fgsm, stadv, input_gradient])
def test_attacks_by_gradients_refuse_it(writing_trio, attack):
    options = {} if attack in (stadv, input_gradient) else {"eps": 0.1}
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"torch.inference_mode\(\)"):
        attack(*writing_trio, **options)
    with torch.no_grad():
        attack(*writing_trio, **options)


@pytest.mark.usefixtures("trained")
@pytest.mark.parametrize("form", ["as they are", "bytes"])
def test_an_evaluation_finds_what_it_finds_outside(writing_trio, form):
    model, x, y = writing_trio

    def found():
        # made within the block, as a data loader's images are
        images, labels = (x * 255).byte() if form == "bytes" else x.clone(), y.clone()
        report = evaluate(model, images, labels, eps=0.1, steps=5, attacks=[APGD(), FABT(), PGD(), StAdv()])
        return {row.attack: row.robust for row in report.rows}, [row.reliable for row in report.rows]

    outside = found()
    with torch.inference_mode():
        inside = found()
        assert torch.is_inference_mode_enabled()
    assert inside[1] == outside[1] and outside[0]["worst"].mean() < 0.5
    for attack, robust in outside[0].items():
        assert np.array_equal(inside[0][attack], robust)
