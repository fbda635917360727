"""Attacks smoothed classifiers, and proves which of the attacked images they do not classify correctly."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..._hashes import digest, weights_fingerprint
from ..._tensors import per_image
from ...defences.stochastic import MajorityVote, NoisyEnsemble
from ..request.preparation import collect
from ..run.attack_run import Shards
from ..runner import evaluate
from ..show.report import Report
from .certificates import LARGEST, Certificates
from .certification import certify, steps_of

#: An attacked image is moved towards the image until its distance is this share below the radius, against rounding.
INSIDE = 1e-6


class _Smoothed(NoisyEnsemble):
    """The noisy model whose majority is attacked. Its class promises what an evaluation cannot see in a few draws."""

    draws_for_each_image = True


def refute(
    certificates: Certificates,
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    radius: float,
    votes: int = 10,
    draws: int = 100_000,
    batch_size: int = 1000,
    **settings: Any,
) -> tuple[Certificates, Report]:
    """Attack the smoothed classifier within an L2 radius, and add the images that fall to the certificates.

    `purify_fast.evaluation.evaluate` attacks the majority of ``votes`` noisy predictions. A fallen image counts as
    refuted only if confidence sequences prove that the model gives another class more often than the label there, with
    the probability ``alpha`` of an error for each image, because a vote of few draws may be wrong by chance. Without
    this proof, the answer is left open, even if the label has less than half of the draws.

    Args:
        certificates: the certificates of these images; they are not changed.
        model: the module that was certified.
        x: the images that were certified, ``[N, C, H, W]``.
        y: their labels, integers ``[N]``.
        radius: L2 radius of the attacks in image units, above 0.
        votes: number of predictions of which attacks and the first judgement take the majority.
        draws: largest number of draws of an attacked image.
        batch_size: largest number of noisy images in a forward pass of the proof.
        **settings: further keywords of `evaluate`, such as ``attacks``, ``steps``, ``out`` or ``name``. The default of
            ``protocol`` is "strong", that of ``seed`` is the seed of the certificates, and that of ``name`` says that
            the smoothed classifier is attacked. A ``config`` does not change these three.

    Returns:
        The certificates with `Certificates.refuted` at this radius, and the report of the attacks.

    Raises:
        ValueError: the images or the model are not those of the certificates, or a setting is not allowed.
        TypeError: a setting is one that this function sets itself.
    """
    sigma, alpha, about = certificates.sigma, certificates.alpha, certificates.about
    usual: dict[str, Any] = {"seed": int(about["seed"]), "name": f"{about['name']}, smoothed with sigma {sigma:g}"}
    settings = usual | ({} if "attacks" in settings else {"protocol": "strong"}) | settings
    images, labels, _ = collect(x, y)
    steps_of(sigma, (0.0,), alpha, draws, batch_size=batch_size)
    same = isinstance(model, nn.Module) and weights_fingerprint(model) == about["weights"]
    if not same or digest(images.cpu(), labels.cpu()) != about["data"]:
        raise ValueError("model, x and y must be the module, images and labels of the certificates, got others")
    majority = MajorityVote(_Smoothed(model, sigma, samples=1, clamp=False).eval(), votes)
    report = evaluate(majority, images, labels, eps=radius, norm="l2", n_eval=1, **settings)
    together = "config" not in settings or settings["config"].together
    with Shards(together) as shards:
        # Only the first process has the attacked images.
        number, points = shards.from_first(lambda: _points(report, images.cpu(), radius))
    wrong = np.zeros(len(labels), dtype=bool)
    if len(points):
        # Other draws than those of the certificates. An image may have several points, of which each may err.
        how: Any = {"draws": draws, "batch_size": batch_size, "together": together, "name": "attacked images"}
        how |= {"seed": (settings["seed"] + 1) % LARGEST, "progress": settings.get("progress", True)}
        alpha /= int(np.bincount(number).max())
        judged = certify(model, points, labels[number], sigma=sigma, radius=0.0, alpha=alpha, **how)
        wrong[number[judged.refuted[0.0]]] = True
    about = about | {"protocol": str(report.about.get("protocol", "own attacks")), "votes": str(votes)}
    return replace(certificates, refuted={**certificates.refuted, float(radius): wrong}, about=about), report


def _points(report: Report, x: Tensor, radius: float) -> tuple[NDArray[np.int64], Tensor]:
    """The images that are misclassified clean and the attacked images that fell, and their numbers before them."""
    adversarial: Any = report.adversarial
    wrong = np.flatnonzero(~report.rows[0].robust)
    number = np.concatenate([wrong, adversarial.indices])
    moved = torch.cat([x[wrong], torch.from_numpy(adversarial.images)]).double() - x[number].double()
    # An attack of a list may have a larger ball of its own.
    shrink = radius * (1 - INSIDE) / moved.flatten(1).norm(dim=1).clamp(min=radius * (1 - INSIDE))
    return number, (x[number] + moved * per_image(shrink, moved)).float()
