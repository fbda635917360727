"""Where AToP's defence meets what others give it: other dtypes, wrapped modules, gradients taken late."""

import dataclasses

import pytest
import torch

import purify_fast
from purify_fast.attacks import BPDA, PGD, BpdaModel
from purify_fast.evaluation import AttackSpec, evaluate
from purify_fast.methods.atop import Atop, AtopConfig, AtopTask, MaskedAutoencoder, SmallGenerator
from purify_fast.methods.atop.losses import training_loss
from purify_fast.models.classifiers import SmallCNN
from purify_fast.training import Batch, fit
from purify_fast.training.config import TrainingAttack

SHAPE = (1, 16, 16)
pytestmark = pytest.mark.usefixtures("one_thread")


def configured(**options):
    """A config from its own settings and its attack's."""
    names = {field.name for field in dataclasses.fields(TrainingAttack)}
    attack = {name: options.pop(name) for name in names & options.keys()}
    return AtopConfig(attack=TrainingAttack(**{"eps": 8 / 255, "steps": 10, **attack}), **options)


def defence(classifier=None, purifier=None, **options):
    torch.manual_seed(0)
    purifier = SmallGenerator(1, width=2) if purifier is None else purifier
    return Atop(SmallCNN(width=4) if classifier is None else classifier, purifier, SHAPE, block=4, **options).eval()


def images(n=4):
    return torch.rand((n, *SHAPE), generator=torch.Generator().manual_seed(1))


def test_the_gradient_may_be_taken_when_the_noise_is_no_longer_fixed():
    made, x = defence(), images().requires_grad_()
    with made.fixed_noise(0):
        (within,) = torch.autograd.grad(made(x).sum(), x)
        first = made(x).sum()
    with made.fixed_noise(1):
        second = made(x).sum()
        (other,) = torch.autograd.grad(made(x).sum(), x)
    (after,) = torch.autograd.grad(first + second, x)
    assert within.abs().sum() > 0 and not torch.equal(within, other)
    torch.testing.assert_close(after, within + other)


def test_a_classifier_in_bfloat16_is_attacked_and_trained_with():
    made, y = defence(SmallCNN(width=4).bfloat16()), torch.arange(4)
    attacks = [BPDA(steps=2), AttackSpec(PGD(steps=2), target="classifier"), PGD(loss="ce", steps=2)]
    report = evaluate(made, images(), y, eps=0.1, attacks=attacks, eot_iter=1, progress=False)
    assert [row.kind for row in report.rows][1:4] == ["bpda", "pgd", "pgd"]
    assert BpdaModel.of(made)(images()).dtype == torch.float32
    loss, _ = training_loss(made, Batch(images(), y, torch.arange(4), 0), AtopConfig(cls_delay=0))
    loss.backward()
    assert loss.isfinite() and all(p.grad is None for p in made.classifier.parameters())


def test_another_purifier_than_the_saved_one_is_refused(tmp_path):
    classifier = SmallCNN(width=4)
    defence(classifier).save(tmp_path / "painting")
    with pytest.raises(ValueError, match=r"residual=False, width=2\), got .*residual=True, width=2\)"):
        purify_fast.load_defence(tmp_path / "painting", classifier, purifier=SmallGenerator(1, width=2, residual=True))
    same = purify_fast.load_defence(tmp_path / "painting", classifier, purifier=SmallGenerator(1, width=2))
    assert same.arguments == defence(classifier).arguments
    encoder = MaskedAutoencoder(SHAPE, width=8)
    defence(classifier, encoder).save(tmp_path / "encoder")
    purify_fast.load_defence(tmp_path / "encoder", classifier, purifier=MaskedAutoencoder(SHAPE, width=8))

    class Mine(torch.nn.Conv2d):
        def forward(self, image, mask):
            return super().forward(image).tanh()

    defence(classifier, Mine(1, 1, 3, padding=1)).save(tmp_path / "mine")
    with pytest.raises(ValueError, match=r"its tensors do not fit its arguments, or the module given"):
        purify_fast.load_defence(tmp_path / "mine", classifier, purifier=Mine(1, 1, 5, padding=2))


@pytest.mark.parametrize("wrap", [torch.nn.DataParallel, lambda m: torch.compile(m, backend="eager")])
def test_a_wrapped_purifier_is_refused(wrap):
    with pytest.raises(ValueError, match="purifier: unwrap it"):
        defence(purifier=wrap(SmallGenerator(1, width=2)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "l3"}, "norm must be one of linf, l2, l1, got 'l3'"),
        ({"steps": 7}, "steps and alpha go with attack_method='pgd', got 7 and None"),
        ({"attack_method": "none", "alpha": 0.1}, "steps and alpha go with attack_method='pgd', got 10 and 0.1"),
    ],
)
def test_settings_that_would_be_ignored(options, message):
    with pytest.raises(ValueError, match=message):
        configured(**options)


def test_a_seed_without_ids_is_refused():
    with pytest.raises(ValueError, match="give both or neither"):
        defence().draw(images(), seed=torch.zeros(1, dtype=torch.int64))


@pytest.mark.parametrize("transform", ["rt2", "rt3"])
def test_transformed_is_what_the_purifier_sees(transform):
    made, x = defence(transform=transform, samples=2), images()
    with made.fixed_noise(0):
        seen, (packed, _) = made.transformed(x), made.draw(x)
    assert seen.shape == (4, 2, *SHAPE) and not seen.requires_grad
    per = packed.unflatten(0, (2, 4, -1))
    assert torch.equal(2 * seen - 1, per[:, :, 0, :1].transpose(0, 1))
    hidden = per[:, :, 0, 2].transpose(0, 1) > 0
    assert (seen[:, :, 0][hidden] == 0.5).all() and hidden.float().mean() == 0.25


def test_fit_without_a_bar(capsys):
    made = defence()
    x, y = (images(8) * 255).to(torch.uint8), torch.arange(8) % 2
    task = AtopTask(made, AtopConfig(cls_delay=0))
    fit(task, x, y, purify_fast.training.FitConfig(1, 4), progress=False)
    assert capsys.readouterr().err == ""
