"""Rows of reports as tests write them, and a report in all of its forms."""

import numpy as np

from purify_fast.evaluation import Row
from purify_fast.evaluation.show.page import html_page

HEALTHY = {"gradients": 100, "nonfinite": 0, "zero": 0, "images": 4, "unmoved": 0}
MASKED = HEALTHY | {"zero": 99}


def row(attack="PGD", robust=(1, 0, 1, 1), **more):
    """The row of an attack with these outcomes, image by image."""
    robust = np.array(robust, dtype=bool)
    share = float(robust.mean()) if len(robust) else 0.0
    values = {"model": "m", "kind": "pgd", "variant": "random", "health": HEALTHY, "mean": share, "worst": share}
    values |= {"n_eval": 1, "seed": 3, "seconds": 1.5, "data": "d", "reliable": more.get("health") is not MASKED}
    values |= {"deterministic": False, "attacked": len(robust), "settings": {"target": "defence"}}
    more |= {"settings": {"target": "defence"} | more.get("settings", {})}
    return Row(attack=attack, robust=robust, **values | more)


def forms(report):
    return report.to_text(color=False), report.to_markdown(), html_page(report)
