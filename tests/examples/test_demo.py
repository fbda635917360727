"""The sentences and the tables of the demonstration follow the numbers. `.ci/run` runs the demonstration."""

import json

import numpy as np

from examples.demo import beside_zoo
from examples.demo.methods import ARREST_MODELS, AUTOATTACK, BASE, STANDARD
from examples.demo.setting import Budget, digits
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
        result.rows.append(Row(model, attack, "x", robust[None], seed=0, data="d"))
    return result


def test_a_sum_is_over_the_images_of_autoattack():
    # a sum needs one set of images: clean accuracy on all of them is another number
    few = {"clean": [1, 1, 1, 0, 1, 1, 1, 1], "worst": 2, AUTOATTACK: [1, 1, 0, 0]}
    lines = sentences("ARREST", {name: [report(name, **few)] for name in COMPARED}, Budget()).splitlines()
    parts = ("87.5 ± 11.7 % of the clean images", "Under PGD, its accuracy is 25.0 ± 15.3 %.")
    parts += ("Under AutoAttack, its accuracy is 50.0 ± 25.0 %", "On the 4 images of AutoAttack")
    assert all(part in each for each in lines[:4] for part in (*parts, "its sum is 125.0 and its NRR 60.0."))


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
