"""Rows of reports and results of probes as tests write them, what alarms say of them, and all forms of a report."""

import numpy as np

from purify_fast.evaluation import Row
from purify_fast.judge.alarms.probes import Probes
from purify_fast.judge.alarms.signs import Evidence, findings
from purify_fast.judge.show.text import html_page

HEALTHY = {"gradients": 100, "nonfinite": 0, "zero": 0, "images": 4, "unmoved": 0}
MASKED = HEALTHY | {"zero": 99}


def row(attack="PGD", robust=(1, 0, 1, 1), **more):
    """The row of an attack with these outcomes, image by image."""
    robust = np.array(robust, dtype=bool)
    values = {"model": "m", "kind": "pgd", "health": HEALTHY}
    values |= {"seed": 3, "seconds": 1.5, "data": "d", "reliable": more.get("health") is not MASKED}
    values |= {"deterministic": False, "attacked": len(robust)}
    return Row(attack=attack, **{"right": robust[None]} | values | more)


def drawn(attack, right, wrong, n_eval=5, margins=None, **more):
    """The row of a random model: numbers of right judging draws of each image, and of wrong choosing draws of ten."""
    right, wrong = np.array(right), np.array(wrong) / 10
    margins = np.array(1 - 2 * wrong if margins is None else margins)
    # The images begin with different draws, so that the draws are about equally right.
    draws = (np.arange(n_eval)[:, None] + 2 * np.arange(len(right))) % n_eval < right
    return row(attack, draws[0], right=draws, wrong=wrong, margins=margins, **more)


def probed(n=64, **measured):
    """Return the probes of n images. Only the given values count against the model."""
    return Probes(**{"n": n, "steps": [], "cosine": 1.0, "fell": [0] * n} | measured)


def said(rows, probes=None):
    """The alarms' findings on rows and probes, by the name of the alarm."""
    return {finding.alarm: finding for finding in findings(Evidence(rows, probes))}


def forms(report):
    return report.to_text(), report.to_markdown(), html_page(report)
