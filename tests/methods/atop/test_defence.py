"""AToP's defence: the transforms as it uses them, aggregation, gradients, files."""

import pytest
import torch
from evaluating import evaluate
from small_models import Made, atop, images, lively
from torch import nn

import purify_fast
from purify_fast.attacks import PGD, BpdaModel
from purify_fast.evaluation import AttackSpec
from purify_fast.methods.atop import Atop, AtopConfig, AtopTask, SmallGenerator
from purify_fast.models.classifiers import SmallCNN
from purify_fast.training import Batch


def identity():
    """A purifier of a user's own: what it is given."""
    return Made(lambda self, image, mask: self.gain * image, gain=nn.Parameter(torch.ones(())))


def defence(*parts, **options):
    return atop(*parts, **options).eval()


@pytest.mark.parametrize("transform", ["rt1", "rt2"])
def test_what_reaches_the_classifier(transform):
    """Nothing is pasted back: of the identity, hidden blocks are mid-grey, the rest is what it was, noise and all."""
    made, x = defence(identity(), transform=transform, sigma=0.1), images()
    with made.fixed_noise(3):
        packed, owners = made.draw(x)
        purified = made.purify(x)
    hidden = packed[:, -1:] > 0
    assert purified.shape == (6, 1, 1, 16, 16) and hidden.float().mean() == 0.25
    assert (owners.flatten(2).sum(2) == 4).all()
    assert (purified[:, 0][hidden] == 0.5).all()
    kept, original = purified[:, 0][~hidden], x[~hidden]
    assert torch.equal(kept, original) if transform == "rt1" else 0.05 < (kept - original).std() < 0.1


def test_rt3_takes_each_block_from_the_pass_that_did_not_see_it():
    # the hole light, the rest dark
    painter = Made(lambda self, image, mask: torch.where(mask > 0, 0.5, -0.5).expand_as(image))
    made = defence(painter, transform="rt3", num_passes=4, samples=2)
    assert (made.purify(images()) == 0.75).all() and made.purify(images()).shape == (6, 2, 1, 16, 16)
    packed, _ = made.draw(images())
    assert len(packed) == 2 * 6 * 4 and torch.equal(packed[:, -1].view(12, 4, 16, 16).sum(1), torch.ones(12, 16, 16))


def test_shared_masks_are_one_for_the_batch():
    shared, own = defence(shared_mask=True), defence()
    masks = shared.draw(images())[1][0]
    assert (masks == masks[:1]).all()
    masks = own.draw(images())[1][0]
    assert not (masks == masks[:1]).all()


@pytest.mark.parametrize(("transform", "aggregation"), [("rt2", "mean"), ("rt3", "mean_softmax")])
def test_gradients_are_exact(transform, aggregation):
    """Finite differences of a whole defence in float64; its logits are float32, so the last step is done here too."""
    torch.manual_seed(0)
    made = defence(lively(SmallGenerator(1, 2), 3), transform=transform, sigma=0.05, samples=2, aggregation=aggregation)
    made.double().requires_grad_(False)
    x = (0.3 + 0.4 * images(2).double()).requires_grad_()  # the noise reaches no end of [0, 1]

    def whole(x):
        logits = made.classifier(made.purify(x).flatten(0, 1)).unflatten(0, (2, 2))
        return logits.mean(1) if aggregation == "mean" else torch.log_softmax(logits, -1).exp().mean(1).log()

    with made.fixed_noise(5):
        assert torch.autograd.gradcheck(whole, x, eps=1e-6, atol=1e-9, rtol=1e-5, fast_mode=True)
        exact = torch.autograd.grad(torch.log_softmax(whole(x), -1)[:, 3].sum(), x)[0]
        got = torch.autograd.grad(torch.log_softmax(made(x), -1)[:, 3].sum(), x)[0]
    assert exact.abs().max() > 1e-4
    torch.testing.assert_close(got, exact, rtol=1e-4, atol=1e-5 * exact.abs().max().item())


def test_saved_and_read_back(tmp_path):
    purifier = SmallGenerator(1, 2)
    made = defence(purifier, samples=2, transform="rt3", aggregation="mean_softmax")
    made.save(tmp_path)
    with pytest.raises(FileNotFoundError, match="classifier must be given"):
        purify_fast.load_defence(tmp_path)
    loaded = purify_fast.load_defence(tmp_path, made.classifier)
    assert isinstance(loaded, Atop) and loaded.arguments == made.arguments and not loaded.training
    with made.fixed_noise(1), loaded.fixed_noise(1):
        assert torch.equal(made(images()), loaded(images()))
    assert purify_fast.load_defence(tmp_path, made.classifier, purifier=purifier).arguments == made.arguments
    with pytest.raises(ValueError, match=r"holds .*, got .*'residual': True"):
        purify_fast.load_defence(tmp_path, made.classifier, purifier=SmallGenerator(1, width=2, residual=True))
    with pytest.raises(ValueError, match="classifier must have the weights"):
        purify_fast.load_defence(tmp_path, SmallCNN(width=4))


class Convolution(nn.Conv2d):
    """A purifier of a user's own, with tensors of several shapes."""

    def forward(self, image, mask):
        return super().forward(image).tanh()


def test_a_purifier_of_ones_own_is_saved_too_but_must_be_given_to_load(tmp_path):
    made = defence(Convolution(1, 1, 3, padding=1))
    made.save(tmp_path)
    with pytest.raises(ValueError, match=r"purifier must be given: .* of a Convolution"):
        purify_fast.load_defence(tmp_path, made.classifier)
    loaded = purify_fast.load_defence(tmp_path, made.classifier, purifier=Convolution(1, 1, 3, padding=1))
    assert torch.equal(loaded.purifier.module.weight, made.purifier.module.weight)
    with pytest.raises(ValueError, match=r"holds {'kind': 'Convolution', .*}, got {'kind': 'small_generator'"):
        purify_fast.load_defence(tmp_path, made.classifier, purifier=SmallGenerator(1, 2))


@pytest.mark.parametrize(
    ("size", "block"), [((256, 256), 32), ((32, 32), 4), ((28, 28), 4), ((12, 12), 1), ((30, 40), 5), ((24, 36), 3)]
)
def test_the_default_block_tiles_the_image(size, block):
    made = Atop(SmallCNN(1, image_size=size), identity(), (1, *size))
    assert made.block == made.arguments["block"] == block


def test_a_classifier_in_bfloat16_is_attacked_and_trained_with():
    made, y = defence(classifier=SmallCNN(width=4).bfloat16()), torch.arange(4)
    attacks = [AttackSpec(PGD(steps=2), through=other) for other in (BpdaModel.of(made), made.frozen_classifier, None)]
    report = evaluate(made, images(4), y, eps=0.1, attacks=attacks, eot_iter=1, progress=False)
    assert [row.kind for row in report.rows][1:4] == ["pgd"] * 3
    assert BpdaModel.of(made)(images(4)).dtype == torch.float32
    loss, _ = AtopTask(made, AtopConfig(cls_delay=0)).training_step(Batch(images(4), y, torch.arange(4), 0))
    loss.backward()
    assert loss.isfinite() and all(p.grad is None for p in made.classifier.parameters())
