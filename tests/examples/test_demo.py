"""The demonstration: its sentences follow the numbers, and its models are trained and attacked alike."""

from dataclasses import replace

import numpy as np
import pytest

from examples.demo import methods, sentences
from examples.demo.methods import ARREST_MODELS, AUTOATTACK, BASE, FOLDERS, STANDARD
from examples.demo.setting import LAYERS, QUICK, Budget, Workspace
from purify_fast.evaluation import Report, Row
from purify_fast.methods.carso import Carso
from purify_fast.training import save_classifier

N = 8
COMPARED = (STANDARD, BASE, *ARREST_MODELS)


def report(model: str, **rows: int | list[int]) -> Report:
    """A report of rows of N images, of which so many were classified right; a list says which."""
    result = Report()
    for attack, right in {"clean": N, **rows}.items():
        robust = np.array([1] * right + [0] * (N - right) if isinstance(right, int) else right, dtype=bool)
        result.rows.append(Row(model, attack, "x", "random", robust, 1, 0, 0.0, "d"))
    return result


def test_a_sum_is_over_the_images_of_autoattack():
    # a sum needs one set of images: clean accuracy on all of them is another number
    few = {"clean": [1, 1, 1, 0, 1, 1, 1, 1], "worst": 2, AUTOATTACK: [1, 1, 0, 0]}
    lines = sentences("ARREST", {name: report(name, **few) for name in COMPARED}, Budget()).splitlines()
    parts = ("87.5 ± 11.7 % of the clean images", "Under PGD, its accuracy is 25.0 ± 15.3 %.")
    parts += ("Under AutoAttack, its accuracy is 50.0 ± 25.0 %", "On the 4 images of AutoAttack")
    assert all(part in each for each in lines[:4] for part in (*parts, "its sum is 125.0 and its NRR 60.0."))


@pytest.mark.slow
def test_arrests_models_are_compared_under_the_same_attacks(tmp_path):
    pytest.importorskip("pyautoattack")
    few = {"images": 20, "standard_epochs": 2, "steps": 2, "eot": 2}
    few |= {"autoattack_images": 2, "autoattack_steps": 1, "autoattack_queries": 1}
    workspace = Workspace(tmp_path, replace(QUICK, **few), 0, progress=False)
    methods.train(workspace, STANDARD)
    for name in (BASE, methods.FINETUNED, methods.ARREST):
        save_classifier(methods.model(workspace, STANDARD), tmp_path / FOLDERS[name])
    defence = Carso(methods.model(workspace, STANDARD), LAYERS, (1, 16, 16), cond_dim=4, latent_dim=2, samples=2)
    folder = tmp_path / FOLDERS[methods.CARSO_ON_ARREST]
    defence.save(folder)
    save_classifier(defence.classifier, folder / "classifier")

    for name in (STANDARD, BASE):
        methods.attack(workspace, name)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("rows/*")}
    reports = {name: methods.attack(workspace, name, constant_step=False) for name in COMPARED}
    # nothing is attacked twice
    assert before.items() <= {path: path.stat().st_mtime_ns for path in tmp_path.rglob("rows/*")}.items()
    assert {path.parent for path in before} == {
        path.parent for name in (STANDARD, BASE) for path in (tmp_path / FOLDERS[name]).rglob("rows/*")
    }
    for name in COMPARED[:4]:
        assert reports[name].row("worst").settings["over"] == ["PGD-2 ce", "PGD-2 dlr"]
    assert all(reports[name].row(AUTOATTACK).n == 2 for name in COMPARED[1:])
    # a random defence is attacked as it is, too, and that counts
    row = reports[methods.CARSO_ON_ARREST].row("PGD-2 ce")
    assert row.variant == "random" and row.settings["target"] == "defence" and row.n == 20
    assert "PGD-2 ce" in reports[methods.CARSO_ON_ARREST].row("worst").settings["over"]
