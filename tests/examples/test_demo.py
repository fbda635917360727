"""The sentences and the tables of the demonstration follow the numbers. `.ci/run` runs the demonstration."""

import json
import time

import numpy as np
import pytest

from examples.demo import beside_zoo, ten_models
from examples.demo.methods import ARREST_MODELS, AUTOATTACK, BASE, STANDARD
from examples.demo.setting import Budget, Workspace, digits
from examples.demo.ten_models import sentences
from purify_fast.evaluation import Report, Row
from purify_fast.training import load_classifier

N = 8
COMPARED = (STANDARD, BASE, *ARREST_MODELS)


def report(model: str, **rows: int | list[int]) -> Report:
    """A report of rows of N images, of which so many were classified right; a list says which."""
    result = Report()
    for attack, right in {"clean": N, **rows}.items():
        robust = np.array([1] * right + [0] * (N - right) if isinstance(right, int) else right, dtype=bool)
        result.rows.append(Row(model, attack, "x", robust, n_eval=1, seed=0, data="d"))
    return result


def test_a_sum_is_over_the_images_of_autoattack():
    # a sum needs one set of images: clean accuracy on all of them is another number
    few = {"clean": [1, 1, 1, 0, 1, 1, 1, 1], "worst": 2, AUTOATTACK: [1, 1, 0, 0]}
    lines = sentences("ARREST", {name: [report(name, **few)] for name in COMPARED}, Budget()).splitlines()
    parts = ("87.5 ± 11.7 % of the clean images", "Under PGD, its accuracy is 25.0 ± 15.3 %.")
    parts += ("Under AutoAttack, its accuracy is 50.0 ± 25.0 %", "On the 4 images of AutoAttack")
    assert all(part in each for each in lines[:4] for part in (*parts, "its sum is 125.0 and its NRR 60.0."))


#: Tiny budgets. The numbers mean nothing.
TINY = Budget(
    images=60,
    standard_epochs=3,
    base_epochs=6,
    objective_epochs=3,
    pipeline_epochs=3,
    steps=8,
    eot=2,
    peel_steps=8,
    peel_images=30,
    autoattack_images=8,
    autoattack_steps=4,
    autoattack_queries=20,
    generator_epochs=2,
    atop_objective_epochs=2,
    atop_cls_delay=1,
    atop_pipeline_epochs=1,
    atop_steps=4,
    atop_images=20,
    arrest_epochs=2,
    arrest_carso_epochs=1,
)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_report_finds_every_row_that_its_workers_have_made(tmp_path, monkeypatch):
    reported, report_of = [], ten_models._report
    monkeypatch.setattr(ten_models, "_report", lambda *given: reported.append(time.time()) or report_of(*given))
    ten_models.run(Workspace(tmp_path, TINY, seed=0))
    rows = [row.stat().st_mtime for row in tmp_path.glob("*/rows/*")]
    assert len(rows) > 50 and max(rows) <= reported[0]


def test_a_network_is_trained_once_and_its_row_says_for_how_long(tmp_path, monkeypatch, capsys):
    def arrest(train):
        return demonstrated(lambda task, epochs, batch_size: train(task, 1, 640))

    demonstrated, *others = beside_zoo.METHODS["ARREST"]
    monkeypatch.setitem(beside_zoo.METHODS, "ARREST", beside_zoo.Method(arrest, *others))
    monkeypatch.setattr(beside_zoo, "IMAGES", 4)
    report = beside_zoo._trained(tmp_path, "ARREST", seed=0)
    log = tmp_path / "ARREST" / "training_1" / "log.jsonl"
    (line,) = log.read_text().splitlines()
    name, clean, *_ = beside_zoo._row(report)
    assert name == f"ARREST, trained here for {json.loads(line)['seconds']:.0f} s"
    right = load_classifier(tmp_path / "ARREST")(digits().x_test[:4] / 255).argmax(1) == digits().y_test[:4]
    assert clean.startswith(f"{100 * right.float().mean():.1f} ")
    assert "epoch 1 of 1" in capsys.readouterr().out
    again = beside_zoo._trained(tmp_path, "ARREST", seed=0)
    assert beside_zoo._row(again) == beside_zoo._row(report) and "epoch" not in capsys.readouterr().out
