"""Compares the printed errors of random models with the spread of their numbers over images and draws.

Each model adds noise to a score, of which the true accuracy is known. Every evaluation has new images and new draws.
"""

from __future__ import annotations

import argparse
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from purify_fast.defences import MajorityVote, NoisyEnsemble
from purify_fast.evaluation import evaluate
from purify_fast.judge.show.text import markdown_table

from .. import kept, options

ROWS = "errors.json"
#: For each model: the standard deviations of the noise that images share, and of the noise of each image. "skewed" is
#: right in one call of five, and adds noise that images share.
KINDS = {
    "no draws": (0.0, 0.0),
    "each image draws": (0.0, 0.1),
    "all images share a draw": (0.1, 0.0),
    "both": (0.1, 0.03),
    "a shared draw inside a purifier": (0.1, 0.03),
    "a skewed shared draw": (0.03, 0.0),
}
SKEWED = "a skewed shared draw"
INSIDE = "a shared draw inside a purifier"
#: Numbers of votes in a prediction, and of predictions that are asked for. A model whose images share draws is judged
#: by 20, and a claim about it is tested with 50.
VOTES, JUDGES, JUDGES_OF_SHARED = (1, 5), (5, 20), (20, 50)
IMAGES, SEEDS, REACH = 100, 200, 0.2
#: A good draw of the skewed model raises the score by this number.
RAISED = 1.0


class Score(nn.Module):
    """Class 1 if the mean of the pixels is above a half, with noise."""

    def __init__(self, shared: float, own: float, skewed: bool = False):
        super().__init__()
        self.shared, self.own, self.skewed = shared, own, skewed

    def forward(self, x: Tensor) -> Tensor:
        score = 2 * (x.flatten(1).mean(1) - 0.5)
        if self.shared:
            score = score + self.shared * torch.randn(1)
        if self.own:
            score = score + self.own * torch.randn(len(x))
        if self.skewed:
            score = score + RAISED * (torch.rand(1) < 0.2)
        return torch.stack([-score, score], 1)


def model_of(kind: str, votes: int) -> nn.Module:
    """The model of a kind; the noise of a purifier stands before the classifier, whose draw images share."""
    shared, own = KINDS[kind]
    model: nn.Module = Score(shared, own, kind == SKEWED)
    if kind == INSIDE:
        # The mean of four pixels halves the noise, and the score doubles it.
        model = NoisyEnsemble(Score(shared, 0.0), own, samples=1, clamp=False)
    return model if votes == 1 else MajorityVote(model, votes)


def scores(rng: np.random.Generator, images: int) -> np.ndarray:
    """The scores of clean images; an attack lowers them by `REACH`."""
    return rng.normal(0.3, 0.1, images).clip(-0.6, 0.6)


def truth(kind: str, votes: int, images: int = 400_000) -> float:
    """The accuracy of a prediction after the attack, over all images and draws."""
    rng, (shared, own) = np.random.default_rng(1), KINDS[kind]
    attacked = scores(rng, images) - REACH
    right = np.zeros(images)
    # The votes of a purifier are draws of one call.
    common = shared * rng.normal(size=images) if kind == INSIDE else None
    for _ in range(votes):
        drawn = attacked + own * rng.normal(size=images)
        drawn += shared * rng.normal(size=images) if common is None else common
        right += drawn + RAISED * (rng.random(images) < 0.2) * (kind == SKEWED) > 0
    return float((2 * right > votes).mean())


def lower(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The strongest attack: lower the score of class 1."""
    return x - REACH / 2


def measure(kind: str, votes: int, judges: int, seeds: int) -> dict[str, Any]:
    """Evaluate a model with each seed, and compare the printed errors with the spread of the numbers."""
    true = truth(kind, votes)
    claim = 100 * (math.floor(1e4 * true) / 1e4)
    logging.getLogger("purify_fast").setLevel(logging.ERROR)
    means, errors, covered, verdicts = list[float](), list[float](), 0, list[str]()
    for seed in range(seeds):
        pixels = 0.5 + scores(np.random.default_rng(seed), IMAGES) / 2
        x = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 1, 1).repeat(1, 1, 2, 2)
        y = torch.ones(IMAGES, dtype=torch.int64)
        how: dict[str, Any] = {"eps": REACH / 2 + 1e-4, "attacks": [lower], "n_eval": judges, "claim": claim}
        report = evaluate(model_of(kind, votes), x, y, probes=False, progress=False, seed=seed, **how)
        row, test = report.headline, report.claim_test()
        means.append(row.mean)
        errors.append(row.mean_error)
        covered += row.mean_interval[0] <= true <= row.mean_interval[1]
        verdicts.append("" if test is None else test.verdict)
    spread = float(np.std(means, ddof=1))
    return {
        "kind": kind,
        "votes": votes,
        "asked": judges,
        "judges": row.n_eval,
        "seeds": seeds,
        "true": true,
        "mean": float(np.mean(means)),
        "spread": spread,
        "printed": float(np.sqrt(np.mean(np.square(errors)))),
        "covered": covered / seeds,
        "refuted": verdicts.count("refuted"),
        "tested": seeds - verdicts.count("not tested"),
    }


def key(row: dict[str, Any]) -> tuple[int, int, int]:
    """The place of a row in the file and in the table."""
    return list(KINDS).index(row["kind"]), row["votes"], row["asked"]


def table(results: Path) -> list[str]:
    """The lines of benchmarks/results/studies/errors.md."""
    head = ["model", "votes", "predictions", "true, %", "spread", "printed / spread"]
    head += ["95 % intervals that cover", "true claims refuted"]
    body = []
    for row in sorted(kept.rows_of(results / "studies" / ROWS), key=key):
        counts = [row["kind"], str(row["votes"]), str(row["judges"])]
        spread = [f"{100 * row['true']:.1f}", f"{100 * row['spread']:.1f}", f"{row['printed'] / row['spread']:.2f}"]
        refuted = f"{row['refuted']} of {row['tested']}" if row["tested"] else "not tested"
        body.append([*counts, *spread, f"{100 * row['covered']:.1f} %", refuted])
    return markdown_table(head, body)


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``python -m benchmarks errors``."""
    options.add_out(parser, "/studies")


def main(chosen: argparse.Namespace) -> str:
    """Measure the rows that are missing, and return the table."""
    out = options.out_of(chosen, chosen.quick, "studies")
    seeds = 4 if chosen.quick else SEEDS
    torch.set_num_threads(1)
    made = {(row["kind"], row["votes"], row["asked"], row["seeds"]) for row in kept.rows_of(out / ROWS)}
    for kind, (shared, own) in KINDS.items():
        for votes in VOTES:
            for judges in JUDGES_OF_SHARED if shared else JUDGES if own else JUDGES[:1]:
                if (kind, votes, judges, seeds) not in made:
                    row = measure(kind, votes, judges, seeds)
                    print(row, flush=True)
                    kept.put(out / ROWS, row, key)
    return "\n".join(table(out.parent))
