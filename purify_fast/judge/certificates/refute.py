"""Attacks smoothed classifiers, and proves which of the attacked images they do not classify correctly."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..._hashes import digest, weights_fingerprint
from ..._validation import Range, check_number
from ...defences.modes import MajorityVote, NoisyEnsemble
from ..request.config import EvaluateConfig
from ..request.preparation import collect
from ..run.attack_run import Shards
from ..runner import evaluate
from ..show.report import Report
from .certificates import Certificates
from .certification import certify, check_settings

#: What `refute` sets itself in its evaluation.
OWN = ("predict", "n_eval", "eps", "norm")
#: What a config for `refute` may not set: the former, and what has another default here than in `evaluate`.
UNSET = ("predict", "n_eval", "protocol", "seed")
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
            the smoothed classifier is attacked.

    Returns:
        The certificates with `Certificates.refuted` at this radius, and the report of the attacks.

    Raises:
        ValueError: the images or the model are not those of the certificates, or a setting is not allowed.
        TypeError: the model is no module, or a setting is one that this function sets itself.
    """
    asked: dict[str, Any] = {"seed": int(certificates.about["seed"]), **settings}
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a module, because attacks need it in a copy, got {type(model).__name__}")
    config = asked.get("config", EvaluateConfig())
    changed = [name for name in UNSET if getattr(config, name) != getattr(EvaluateConfig(), name)]
    if taken := [name for name in OWN if name in asked] + [f"config.{name}" for name in changed]:
        raise TypeError(f"refute sets {', '.join(taken)} itself, or takes it as a keyword: leave it out")
    images, labels, _ = collect(x, y)
    check_number("radius", radius)
    # A larger ball contains every image.
    Range(0, images[0].numel() ** 0.5, above=True).check("radius", radius)
    sigma, alpha = certificates.sigma, certificates.alpha
    check_settings(sigma, (0.0,), alpha, draws=draws, batch_size=batch_size, seed=asked["seed"], votes=votes)
    if digest(images.cpu(), labels.cpu()) != certificates.about["data"]:
        raise ValueError("x and y must be the images and labels of the certificates, got others")
    if weights_fingerprint(model) != certificates.about["weights"]:
        raise ValueError("model must have the weights of the model of the certificates, got others")
    if "attacks" not in asked:
        asked.setdefault("protocol", "strong")
    asked.setdefault("name", f"{certificates.about['name']}, smoothed with sigma {sigma:g}")
    together = config.together
    smoothed = _Smoothed(model, sigma, samples=1, clamp=False).eval()
    report = evaluate(MajorityVote(smoothed, votes), images, labels, eps=radius, norm="l2", n_eval=1, **asked)
    with Shards(together) as shards:
        # Only the first process has the attacked images.
        number, points = shards.from_first(lambda: _points(report, images.cpu(), radius))
    wrong = np.zeros(len(labels), dtype=bool)
    if len(points):
        # Other draws than those of the certificates. An image may have several points, of which each may err.
        how: dict[str, Any] = {"seed": (asked["seed"] + 1) % 2**31, "alpha": alpha / int(np.bincount(number).max())}
        how |= {"progress": asked.get("progress", True), "together": together, "draws": draws, "batch_size": batch_size}
        judged = certify(model, points, labels[number], sigma=sigma, radius=0.0, name="attacked images", **how)
        wrong[number[judged.refuted[0.0]]] = True
    about = certificates.about | {"protocol": str(report.about.get("protocol", "own attacks")), "votes": str(votes)}
    return replace(certificates, refuted={**certificates.refuted, float(radius): wrong}, about=about), report


def _points(report: Report, x: Tensor, radius: float) -> tuple[NDArray[np.int64], Tensor]:
    """The images that are misclassified clean and the attacked images that fell, and their numbers before them."""
    clean, found = next(row for row in report.rows if row.kind == "clean"), report.adversarial
    assert found is not None
    wrong = np.flatnonzero(~clean.robust)
    number = np.concatenate([wrong, found.indices])
    moved = torch.cat([x[wrong], torch.from_numpy(found.images)]).double() - x[number].double()
    # An attack of a list may have a larger ball of its own.
    length = moved.flatten(1).norm(dim=1).clamp(min=radius * (1 - INSIDE)).view(-1, 1, 1, 1)
    return number, (x[number] + moved * (radius * (1 - INSIDE) / length)).float()
