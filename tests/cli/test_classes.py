"""The names of classes: saved with a classifier, and compared with those of other images."""

import shutil

import pytest
from pictures import picture

import purify_fast
from purify_fast.training import load_classifier, save_classifier

pytestmark = pytest.mark.usefixtures("short_signs")

FEW = ["--device", "cpu", "--batch-size", "12", "--epochs", "1"]
CARSO = ["--cond-dim", "4", "--latent-dim", "2", "--decoder-width", "2", "--samples", "2", "--steps", "1"]
JUDGED = ["--images", "2", "--steps", "1", "--protocol", "fast", "--eps", "0.01", "--device", "cpu"]


def animals(folder, names):
    for part in ("train", "val"):
        for label, name in enumerate(names):
            for i in range(4):
                picture(folder / part / name / f"{i}.png", 10 * label + i, (12, 12))
    return folder


@pytest.fixture
def trained(run, tmp_path):
    folder = animals(tmp_path / "animals", ["ant", "bee", "fox"])
    words = ["--model", "small_cnn", "--width", "2", "--out", tmp_path / "run"]
    code, printed = run("train", "classifier", "--data", folder, *words, *FEW)
    assert code == 0, printed
    return folder


def test_labels_of_other_classes_are_refused(run, trained, tmp_path):
    model = load_classifier(tmp_path / "run")
    assert model.classes == ("ant", "bee", "fox")
    save_classifier(model, tmp_path / "again")
    assert load_classifier(tmp_path / "again").classes == ("ant", "bee", "fox")
    carso = ["train", "carso", "--classifier", tmp_path / "run", "--kl-delay", "0", *CARSO, *FEW]
    code, printed = run(*carso, "--data", trained, "--out", tmp_path / "carso")
    assert code == 0, printed
    assert purify_fast.load_defence(tmp_path / "carso").classifier.classes == ("ant", "bee", "fox")
    other = animals(tmp_path / "others", ["ant", "asp", "bee"])
    for words in (["evaluate", tmp_path / "run", *JUDGED], ["evaluate", tmp_path / "carso", *JUDGED], carso):
        code, printed = run(*words, "--data", other)
        assert code == 2 and "label 1 of the classes is 'bee' for the" in printed and "but 'asp' in" in printed
    # fewer classes, in the same order
    assert run("evaluate", tmp_path / "run", "--data", animals(tmp_path / "two", ["ant", "bee"]), *JUDGED)[0] == 0


def test_an_evaluation_needs_no_training_image(run, trained, tmp_path):
    for path in (trained / "train").rglob("*.png"):
        path.write_text("no image")
    shutil.rmtree(trained / ".purify_fast")
    assert run("evaluate", tmp_path / "run", "--data", trained, *JUDGED)[0] == 0
    shutil.rmtree(trained / "train")
    assert run("evaluate", tmp_path / "run", "--data", trained, *JUDGED)[0] == 0


def test_names_are_optional(tmp_path):
    save_classifier(purify_fast.zoo.load("digits-standard"), tmp_path / "without")
    assert load_classifier(tmp_path / "without").classes is None
