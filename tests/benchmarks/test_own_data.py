"""The committed rows about data of a user's own, and how they are made."""

import sys
from argparse import Namespace

import pytest

from benchmarks import RESULTS, kept
from benchmarks.robustness import own_data
from benchmarks.speed import commands, reading
from purify_fast.evaluation import Report

WAITS = """
import pathlib, time
print("begun", flush=True)
time.sleep(0.2)
pathlib.Path("file").touch()
time.sleep({})
"""


def python(monkeypatch, code):
    """Every process of `called` runs this code."""
    start = commands.subprocess.Popen
    monkeypatch.setattr(commands.subprocess, "Popen", lambda words, **more: start([sys.executable, "-c", code], **more))


def test_a_process_is_killed_when_its_file_is_there(tmp_path, monkeypatch):
    python(monkeypatch, WAITS.format(600))
    text, seconds, memory = commands.called(["train"], str(tmp_path), kill_after=tmp_path / "file")
    assert text == "begun\n" and 0.2 <= seconds < 60 and memory > 1e6


def test_a_process_that_ends_before_its_file_is_there_is_an_error(tmp_path, monkeypatch):
    python(monkeypatch, WAITS.format(0))
    with pytest.raises(RuntimeError, match="purify-fast train ended with 0:\nbegun"):
        commands.called(["train"], str(tmp_path), kill_after=tmp_path / "other")


def test_the_memory_of_a_process_is_its_own(tmp_path, monkeypatch):
    here = bytearray(b"x") * (500 * 10**6)
    python(monkeypatch, "held = bytearray(b'x') * (300 * 10**6); import time; time.sleep(0.5); print('done')")
    text, seconds, memory = commands.called(["train"], str(tmp_path))
    assert text == "done\n" and 0.5 <= seconds < 60 and 3e8 < memory < 4e8 < len(here)


@pytest.mark.slow
def test_a_training_is_killed_resumed_compared_and_judged(tmp_path, monkeypatch):
    own_data.make_data(tmp_path, 20)
    row = own_data.trained("`.npz`, 5 classes, 32 x 32, gray", "ARREST", tmp_path)
    assert 0 < row["killed"] < own_data.STEPS and row["equal"] and 100 < row["MB"] < 10_000
    assert row["seconds"] > 1 and row["judging"] > 1
    report = Report.from_json((tmp_path / "run-14/evaluation/report.json").read_text())
    assert report.row("clean").n == 4
    words = own_data.words_of(own_data.KINDS["folder, 3 classes, 64 x 64"], "ARREST", "classifier", "out")
    assert words[:4] == ["train", "arrest", "--data", "small"] and words[-4:-2] == ["--size", "64"]


@pytest.mark.parametrize("what", list(reading.READINGS)[:6])
def test_images_are_read(what, tmp_path, one_thread, monkeypatch):
    monkeypatch.setattr(reading, "SIDE", 32)
    own_data.make_folder(tmp_path / "large", 4, 16, 4, 32)
    row = reading.measured(what, tmp_path / "large")
    # Rates and seconds are rounded.
    assert row["rate"] > 0 and 0 <= row["seconds"] < 60
    images, seconds = reading.READINGS[what](tmp_path / "large")
    assert images == (20 if "first start" in what else 16) and seconds > 0


@pytest.mark.slow
@pytest.mark.parametrize("choice", ["refuse", "skip"])
def test_a_broken_image_is_named(choice, tmp_path, monkeypatch):
    own_data.make_folder(tmp_path / "large", 10, 40, 10, 224)
    what = next(what for what in reading.READINGS if f"--broken {choice}" in what)
    row = reading.measured(what, tmp_path / "large")
    assert row["rate"] == 0 and row["seconds"] > 0
    monkeypatch.setattr(reading, "called", lambda words, place: ("nothing is said", 1.0, 1.0))
    with pytest.raises(RuntimeError, match=f"--broken {choice} .* printed:\nnothing is said"):
        reading.measured(what, tmp_path / "large")


def test_rows_that_are_there_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(own_data, "make_data", lambda *_: None)
    made = {"killed": 2, "seconds": 1.5, "MB": 900, "equal": False, "judging": 3.0}
    monkeypatch.setattr(own_data, "trained", lambda *_: dict(zip(("data", "method"), _[:2], strict=True)) | made)
    monkeypatch.setattr(reading, "measured", lambda *_: {"seconds": 4.0, "rate": 500.2})
    text = own_data.main(Namespace(out=tmp_path, quick=True))
    assert "| folder, 10 classes, 224 x 224 | AToP | step 2 of 6 | 1.5 | 900 | no | 3.0 |" in text
    assert "| a DataLoader, 2 workers | 4.0 | 500 |" in text
    monkeypatch.setattr(own_data, "trained", lambda *_: pytest.fail("measured again"))
    monkeypatch.setattr(reading, "measured", lambda *_: pytest.fail("measured again"))
    assert own_data.main(Namespace(out=tmp_path, quick=True)) == text


def test_the_committed_rows_fit_this_purpose():
    """Every row is there, every training was killed before its end and ended with the same weights."""
    rows = kept.rows_of(RESULTS / "cpu" / own_data.FILE)
    assert [(row["data"], row["method"]) for row in rows] == own_data.ROWS
    trainings = [row for row in rows if row["data"] != own_data.READING]
    assert len(trainings) == 16
    for row in trainings:
        assert 0 < row["killed"] < own_data.STEPS and row["equal"] and row["MB"] < 24_000, row
    rates = {row["method"]: row["rate"] for row in rows if row["data"] == own_data.READING}
    step = rates.pop("four training steps of a ResNet-18, 8 images each")
    # A training does not wait for its images: each way of reading is faster than the step.
    assert all(rate > step > 0 for what, rate in rates.items() if "broken" not in what)
