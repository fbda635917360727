"""What a model returns, where an attack is called without an evaluation; and models that refuse a batch."""

import warnings

import pytest
import torch

from purify_fast.attacks import PGD, attacked_model, pgd
from purify_fast.judge.searches.model_tests import check_model

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


@pytest.mark.parametrize(
    ("made", "images", "got"),
    [
        (lambda z: z.squeeze(), 9, r"\[6\] for B = 1"),
        (lambda z: z.squeeze(), 1, r"\[6\] for B = 1"),
        # as many images as classes hide no transposed logits
        (lambda z: z.T, 6, r"\[6, 1\] for B = 1"),
    ],
)
def test_a_model_is_tried_on_a_single_image_too(model, batch, made, images, got):
    with pytest.raises(ValueError, match=got):
        check_model(lambda z: made(model(z)), batch[0][:images])
    with pytest.raises(ValueError, match=r"must return 6 logits for each image, got 3"):
        check_model(lambda z: model(z)[:, : 6 if len(z) > 1 else 3], batch[0])
