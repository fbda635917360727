"""Rank layers for the representation by the information that each keeps about an attacked image. This is our method.

The paper leaves the choice open (arXiv 2306.06081, section 6). Per layer, with features f of clean and attacked images:

    probe = accuracy of a ridge classifier of features, fitted on f(x) of half the images, on f(x~) of the rest
    image = share of the clean images' variance explained in the same way
    drift = E |f(x~) - f(x)| / E |f(x) - f(x')|,  x' another image: 0 untouched, 1 as far as a stranger

The probe is fitted on clean features. An attack on the true label writes that label into the image, so a probe fitted
on attacked features would read the label there, and would almost always be right.
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
    """A layer's scores under attack, as the module's docstring defines them.

    Args:
        layer: the module's path.
        probe: accuracy of a linear probe, a share.
        image: share of the images' variance that is explained.
        drift: distance by which the attack moves the features, as a multiple of the distance to another image's.
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
    """Score each layer on images attacked on the classifier alone; the best probe first.

    Args:
        classifier: images ``[B, C, H, W]`` in [0, 1] to logits.
        layers: module paths.
        x: float32 ``[N, C, H, W]``, at least 4 images, not those the classifier was trained on.
        y: true labels, int64 ``[N]``.
        eps: radius of the PGD attack in image units.
        norm: norm of the attack.
        steps: steps of the attack.
        seed: seed of the attack.

    Raises:
        ValueError: unknown layers, or fewer than 4 images.
    """
    if len(x) < 4:
        raise ValueError(f"x must have at least 4 images, got {len(x)}")
    # Copy the classifier, so that no hooks stay on the caller's.
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
    """Predictions from each half of ``attacked`` by ridge regression on the other half of ``clean``, in dual form."""
    half = len(clean) // 2
    out = torch.empty_like(targets)
    for fit, score in ((slice(half), slice(half, None)), (slice(half, None), slice(half))):
        mean, std = clean[fit].mean(0), clean[fit].std(0)
        # Limit the scale from below: a pixel that is always black has a standard deviation of 0.
        std = std.clamp(min=1e-2 * float(std.max()) + 1e-12)
        a, b = (clean[fit] - mean) / std, (attacked[score] - mean) / std
        centre = targets[fit].mean(0)
        gram = a @ a.T / a.shape[1]
        gram.diagonal().add_(ridge)
        out[score] = b @ (a.T @ torch.linalg.solve(gram, targets[fit] - centre)) / a.shape[1] + centre
    return out
