"""The sentences of the demonstration follow the numbers. `.ci/run` runs the demonstration."""

import numpy as np

from examples.demo.methods import ARREST_MODELS, AUTOATTACK, BASE, STANDARD
from examples.demo.setting import Budget
from examples.demo.ten_models import sentences
from purify_fast.evaluation import Report, Row

N = 8
COMPARED = (STANDARD, BASE, *ARREST_MODELS)


def report(model: str, **rows: int | list[int]) -> Report:
    """A report of rows of N images, of which so many were classified right; a list says which."""
    result = Report()
    for attack, right in {"clean": N, **rows}.items():
        robust = np.array([1] * right + [0] * (N - right) if isinstance(right, int) else right, dtype=bool)
        result.rows.append(Row(model, attack, "x", robust[None], seed=0, data="d"))
    return result


def test_a_sum_is_over_the_images_of_autoattack():
    # a sum needs one set of images: clean accuracy on all of them is another number
    few = {"clean": [1, 1, 1, 0, 1, 1, 1, 1], "worst": 2, AUTOATTACK: [1, 1, 0, 0]}
    lines = sentences("ARREST", {name: [report(name, **few)] for name in COMPARED}, Budget()).splitlines()
    parts = ("87.5 ± 11.7 % of the clean images", "Under PGD, its accuracy is 25.0 ± 15.3 %.")
    parts += ("Under AutoAttack, its accuracy is 50.0 ± 25.0 %", "On the 4 images of AutoAttack")
    assert all(part in each for each in lines[:4] for part in (*parts, "its sum is 125.0 and its NRR 60.0."))
