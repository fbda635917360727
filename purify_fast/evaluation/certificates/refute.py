"""Attacks smoothed classifiers, and proves which of the attacked images they do not classify correctly."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...attacks.arguments import check_eps
from ...defences.stochastic import NoisyEnsemble
from ..request.preparation import collect
from ..run.shards import Shards
from ..runner import evaluate
from ..show.report import Report
from .certificates import Certificates
from .certify import certify


def refute(
    certificates: Certificates,
    model: torch.nn.Module,
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
    refuted only if a confidence sequence proves that the model's probability of its label is below 1/2 there, with the
    probability ``alpha`` of an error, because a vote of few draws may be wrong by chance.

    Args:
        certificates: the certificates of these images; they are not changed.
        model: the module that was certified.
        x: the images that were certified, ``[N, C, H, W]``.
        y: their labels, integers ``[N]``.
        radius: L2 radius of the attacks in image units, above 0.
        votes: number of predictions of which attacks and the first judgement take the majority.
        draws: largest number of draws of an attacked image.
        batch_size: largest number of noisy images in a forward pass of the proof.
        **settings: further keywords of `evaluate`, such as ``protocol="strong"``, ``out`` or ``name``.

    Returns:
        The certificates with `Certificates.refuted` at this radius, and the report of the attacks.

    Raises:
        ValueError: the images are not those of the certificates, or a setting is not allowed.
    """
    check_eps(radius, "l2")
    images, labels, _ = collect(x, y)
    if len(labels) != len(certificates.draws):
        raise ValueError(f"x must be the {len(certificates.draws)} images of the certificates, got {len(labels)}")
    smoothed = NoisyEnsemble(model, certificates.sigma, samples=1, clamp=False).eval()
    asked: dict[str, Any] = {"protocol": "strong", "seed": int(certificates.about["seed"])} | settings
    asked |= {"predict": "votes", "n_eval": votes, "keep": "all"}
    report = evaluate(smoothed, images, labels, eps=radius, norm="l2", **asked)
    together = asked.get("together", True)
    with Shards(together) as shards:
        # Only the first process has the attacked images.
        clean, number, adversarial = shards.from_first(lambda: _points(report, radius))
    points = torch.cat([images[clean].cpu(), adversarial.view(-1, *images.shape[1:])])
    number = np.concatenate([clean, number])
    wrong = np.zeros(len(labels), dtype=bool)
    if len(points):
        # Other draws than those of the certificates.
        how: dict[str, Any] = {"alpha": certificates.alpha, "draws": draws, "seed": asked["seed"] + 1}
        how |= {"batch_size": batch_size, "progress": asked.get("progress", True), "together": together}
        judged = certify(
            model, points, labels[number], sigma=certificates.sigma, radius=0.0, name="attacked images", **how
        )
        wrong[number[judged.decisions(0.0) == -1]] = True
    about = certificates.about | {"protocol": str(report.about.get("protocol", "own attacks")), "votes": str(votes)}
    return replace(certificates, refuted={**certificates.refuted, float(radius): wrong}, about=about), report


def _points(report: Report, radius: float) -> tuple[NDArray[np.int64], NDArray[np.int64], Tensor]:
    """The numbers of the images that are misclassified clean, those of images that fell, and the attacked images."""
    row = next(row for row in report.rows if row.kind == "clean" and row.deployed)
    clean, found = np.flatnonzero(~row.robust), report.witnesses
    if found is None:
        return clean, np.array([], dtype=np.int64), torch.empty(0)
    # An attack of a list may have a ball of its own.
    inside = [attack["norm"] == "l2" and attack["eps"] <= radius for attack in found.about["attacks"]]
    mine = torch.tensor(inside, device="cpu")[found.attacks]
    return clean, found.numbers[mine].numpy(), found.adversarial[mine]
