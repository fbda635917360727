"""Rank the layers that CARSO could read, by the information that their features have about an attacked image.

This is our own method, because CARSO's paper does not say how to choose layers (arXiv 2306.06081, section 6). Each
layer gets three scores. Here x is a clean image, x~ the same image after an attack, x' another image, and f(x) the
features of x. E is the mean over the images.

    probe = accuracy of a linear classifier of the features, fitted by ridge regression on f(x) of one half of the
            images, and tested on f(x~) of the other half
    image = share of the variance of the clean images that a linear regression on the features explains, fitted and
            tested in the same way
    drift = E |f(x~) - f(x)| / E |f(x) - f(x')|: 0 if the attack does not move the features, and 1 if it moves them by
            the distance between the features of two images

The probe is fitted on clean features, because an attack on the true label puts information about this label into the
image. A probe that is fitted on attacked features would use this information, and would almost always be right.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from purify_fast._tensors import first_tensor
from purify_fast._validation import NormName
from purify_fast.attacks import pgd
from purify_fast.models.representation import Representation


@dataclass(frozen=True)
class LayerScore:
    """The scores of a layer. The docstring of this module defines the scores.

    Args:
        layer: path of the layer's module.
        probe: accuracy of the linear probe, in [0, 1].
        image: share of the variance of the images that the features explain.
        drift: distance by which the attack moves the features, relative to the distance between two images.
        features: number of features.
    """

    layer: str
    probe: float
    image: float
    drift: float
    features: int


def rank_layers(
    classifier: nn.Module,
    layers: Sequence[str],
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    norm: NormName = "linf",
    steps: int = 20,
    seed: int = 0,
) -> list[LayerScore]:
    """Compute the scores of layers, by an attack on the classifier alone. The layer with the best probe comes first.

    Args:
        classifier: images ``[B, C, H, W]`` in [0, 1] to logits.
        layers: module paths of the layers.
        x: at least 4 images on which the classifier was not trained, float32 ``[N, C, H, W]``.
        y: true labels, int64 ``[N]``.
        eps: radius of the PGD attack in image units.
        norm: norm of the attack.
        steps: steps of the attack.
        seed: seed of the attack.

    Raises:
        ValueError: a layer is unknown.
    """
    # Copy the classifier, so that no hooks remain on the caller's model.
    classifier = copy.deepcopy(classifier).eval()
    read = Representation(classifier, tuple(layers), tuple(x.shape[1:]))  # type: ignore[arg-type]
    dtype = first_tensor(classifier).dtype
    attacked = pgd(classifier, x, y, eps=eps, norm=norm, steps=steps, seed=seed)
    with torch.no_grad():
        clean, moved = ([f.flatten(1).float() for f in read(part.to(dtype))] for part in (x, attacked))
    labels = F.one_hot(y, read.num_classes).double()
    pixels = x.flatten(1).double()
    scores = []
    for layer, before, after in zip(layers, clean, moved, strict=True):
        near = (after - before).norm(dim=1).mean()
        far = (before - before.roll(1, 0)).norm(dim=1).mean()
        predicted = _held_out(before.double(), after.double(), torch.cat([labels, pixels], 1))
        votes, images = predicted.split([labels.shape[1], pixels.shape[1]], 1)
        probe = (votes.argmax(1) == y).double().mean()
        error = (images - pixels).square().sum() / (pixels - pixels.mean(0)).square().sum()
        scores.append(LayerScore(layer, float(probe), float(1 - error), float(near / far), before.shape[1]))
    return sorted(scores, key=lambda score: -score.probe)


def _held_out(clean: Tensor, attacked: Tensor, targets: Tensor, ridge: float = 0.1) -> Tensor:
    """Predict targets by ridge regression in dual form.

    For each half of the images, the regression is fitted on the clean features of the other half, and evaluated on the
    attacked features of this half.
    """
    half = len(clean) // 2
    out = torch.empty_like(targets)
    for fit, score in ((slice(half), slice(half, None)), (slice(half, None), slice(half))):
        mean, std = clean[fit].mean(0), clean[fit].std(0)
        # Limit the standard deviation from below, because a pixel that is always black has a standard deviation of 0.
        std = std.clamp(min=1e-2 * float(std.max()) + 1e-12)
        a, b = (clean[fit] - mean) / std, (attacked[score] - mean) / std
        centre = targets[fit].mean(0)
        gram = a @ a.T / a.shape[1]
        gram.diagonal().add_(ridge)
        out[score] = b @ (a.T @ torch.linalg.solve(gram, targets[fit] - centre)) / a.shape[1] + centre
    return out
