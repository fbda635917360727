"""The holes of DeepFillv2's training: their sizes, that they are drawn by image, and the training with them."""

import pytest
import torch

from purify_fast.methods.atop import Atop, AtopConfig, AtopTask, SmallGenerator
from purify_fast.methods.atop.masks import free_form_masks, hide_free_form
from purify_fast.models import build_classifier
from purify_fast.training import FitConfig, fit

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_box_and_strokes_are_hidden_and_depend_on_seed_and_image_alone():
    ids = torch.arange(24)
    masks = free_form_masks((256, 256), torch.tensor([0]), ids)
    assert masks.shape == (24, 1, 256, 256) and set(masks.unique().tolist()) == {0.0, 1.0}
    share = masks.mean((1, 2, 3))
    # the box alone is 96 x 96 to 128 x 128 of 256 x 256; strokes come on top, and never all of the image
    assert share.min() >= 96 * 96 / 256**2 and 0.25 < share.mean() < 0.7 and share.max() < 1
    # some rows hold the box: 96 hidden pixels side by side
    longest = masks[:, 0].unfold(2, 96, 1).amin(3).amax((1, 2))
    assert longest.min() == 1
    assert torch.equal(free_form_masks((256, 256), torch.tensor([0]), ids[5:7]), masks[5:7])
    assert not torch.equal(free_form_masks((256, 256), torch.tensor([1]), ids), masks)


def test_the_strokes_lie_outside_of_the_box_too():
    """Without strokes a mask would be one rectangle: as large as the box around it."""
    masks = free_form_masks((64, 64), torch.tensor([3]), torch.arange(16))[:, 0]
    rows, cols = masks.amax(2).sum(1), masks.amax(1).sum(1)
    assert (masks.sum((1, 2)) < rows * cols).float().mean() > 0.9


def test_what_is_seen_has_no_noise_and_zero_in_the_hole():
    x = torch.rand(3, 3, 32, 32)
    packed, owners = hide_free_form(x, torch.tensor([0]), torch.arange(3))
    mask = packed[:, 4:]
    assert packed.shape == (3, 5, 32, 32) and owners.shape[:2] == (1, 3)
    assert torch.equal(packed[:, :3], (2 * x - 1) * (1 - mask)) and (packed[:, 3] == 1).all()
    shared, _ = hide_free_form(x, torch.tensor([0]), torch.arange(3), shared=True)
    assert torch.equal(shared[0, 4], shared[2, 4]) and not torch.equal(packed[0, 4], packed[2, 4])


@pytest.mark.parametrize("transform", ["rt2", "rt3"])
def test_a_generator_is_trained_with_them(transform):
    torch.manual_seed(0)
    classifier = build_classifier("small_cnn", (3, 16, 16), 10, width=2)
    defence = Atop(classifier, SmallGenerator(3, width=4), (3, 16, 16), transform=transform)
    task = AtopTask(defence, AtopConfig.pretraining(masks="free_form", discriminator_width=2))
    before = [p.clone() for p in defence.purifier.parameters()]
    x = (255 * torch.rand(8, 3, 16, 16)).to(torch.uint8)
    last = fit(task, x, torch.zeros(8, dtype=torch.int64), FitConfig(1, 4), progress=False)
    assert last["loss"] == last["loss"] and {"discriminator", "reconstruction"} <= set(last)
    assert any(not torch.equal(one, other) for one, other in zip(before, defence.purifier.parameters(), strict=True))


def test_free_form_masks_are_for_pre_training():
    with pytest.raises(ValueError, match="masks 'free_form' is for pre-training"):
        AtopConfig(masks="free_form")
