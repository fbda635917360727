"""Robust accuracy against minutes: what a training reports, which rows are kept, the table and the picture."""

import argparse
import json

import pytest
import torch

from benchmarks import __main__ as program
from benchmarks.robustness import minutes
from benchmarks.robustness.studies import Job
from benchmarks.robustness.studies.cifar10.study import EPS, Training
from purify_fast.data import DataSet

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def few_images(monkeypatch):
    """Images of ten shades in place of CIFAR-10's."""

    def made(count):
        y = torch.arange(count) % 10
        noise = torch.randint(0, 9, (count, 3, 32, 32), generator=torch.Generator().manual_seed(count))
        return (noise + 24 * y[:, None, None, None]).to(torch.uint8), y

    data = DataSet(*made(384), *made(40), name="cifar10", num_classes=10)
    monkeypatch.setattr(minutes, "images_of", lambda job: data)
    monkeypatch.setattr(minutes, "held_out", lambda job, count: made(20))


@pytest.mark.parametrize(("form", "passes", "epochs"), [("N-FGSM", 2, 2), ("Free-4", 4, 1)])
def test_a_training_is_timed_by_its_steps_and_judged(tmp_path, few_images, short_signs, form, passes, epochs):
    settings = {"form": form, "passes": passes, "budget": Training(width=2), "images": 2, "data": "", "device": "cpu"}
    job = Job(f"{form} {passes}", 0, minutes.train, settings=settings)
    result = minutes.train(job, tmp_path, tmp_path)
    assert result["epochs"] == epochs and 0 <= result["standard"] <= result["clean"] <= 1
    # three steps of 128 images in an epoch
    assert result["minutes_of_training"] == pytest.approx(epochs * 3 * result["seconds_per_step"] / 60)
    assert 0.001 < result["seconds_per_step"] < 30
    # of a run that goes on behind its training the time is known
    assert minutes.train(job, tmp_path, tmp_path)["seconds_per_step"] == result["seconds_per_step"]


def test_forms_are_those_of_their_papers():
    configs = {name: minutes.configuration(form) for name, form in minutes.FORMS.items()}
    assert configs["FGSM-RS"].attack.alpha == pytest.approx(10 / 255) and configs["FGSM-RS"].adversarial == "pgd"
    assert {name: config.adversarial for name, config in configs.items() if config.adversarial != "pgd"} == {
        "N-FGSM": "n_fgsm", "NuAT": "nuat", "Free-4": "free",
    }  # fmt: skip
    assert all(config.attack.eps == EPS for config in configs.values())


def row(form, passes, standard, device="a CPU", width=16):
    return {
        "form": form, "passes": passes, "minutes_of_training": passes * 2.5, "clean": 0.7, "standard": standard,
        "reliable": True, "device": device, "width": width, "images": 1000,
    }  # fmt: skip


def test_rows_of_other_machines_and_widths_stay(tmp_path, monkeypatch):
    path = tmp_path / minutes.FILE
    path.write_text(json.dumps([row("PGD-5", 4, 0.1), row("PGD-5", 4, 0.2, width=64), row("PGD-5", 8, 0.3)]))
    monkeypatch.setattr(minutes, "run", lambda jobs, *_: [row(**{"form": "PGD-5", "passes": 4, "standard": 0.25})])
    chosen = argparse.Namespace(
        forms=["PGD-5"], passes=[4], width=16, images=4, data="", device="cpu", workers=1, runs=tmp_path, out=tmp_path
    )
    minutes.main(chosen)
    assert [each["standard"] for each in json.loads(path.read_text())] == [0.25, 0.3, 0.2]
    (tmp_path / "studies").mkdir()
    path.rename(tmp_path / "studies" / minutes.FILE)
    lines = minutes.table(tmp_path)
    assert lines[0] == "width 16, 1000 images, a CPU; width 64, 1000 images, a CPU."
    assert "| PGD-5 | 4 | 10 | 70.0 | 25.0 |" in lines


def test_the_picture_has_a_curve_for_each_form(tmp_path):
    pytest.importorskip("matplotlib")
    assert minutes.picture([row(form, passes, 0.3) for form in minutes.FORMS for passes in (4, 8)], tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 5000


def test_passes_that_the_free_form_cannot_have_are_refused(capsys):
    with pytest.raises(SystemExit):
        program.main(["minutes", "--passes", "6"])
    assert "--passes must be multiples of 4, got 6" in capsys.readouterr().err
