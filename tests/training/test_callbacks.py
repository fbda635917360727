"""Listeners to a training: foreign loggers, JSONL, the bar."""

import json

import pytest
from small_runs import StopAt, Stopped, images, on_step, task

from purify_fast.training import FitConfig, TrainingState, fit


class Structural:
    """One that does not know this package; it has the three methods."""

    def __init__(self):
        self.steps, self.epochs, self.ends = [], [], []
        self.on_step, self.on_epoch = self.steps.append, self.epochs.append

    def on_end(self, state):
        self.ends.append((state, state.task.model.training))


def test_what_a_callback_sees():
    seen = Structural()
    trained = task()
    last = fit(trained, *images(), FitConfig(2, 16), progress=False, callbacks=[seen])
    assert [(s.step, s.epoch, s.images) for s in seen.steps] == [(i + 1, i // 4, 16) for i in range(8)]
    assert all(isinstance(s, TrainingState) and s.total_steps == 8 and s.epochs == 2 for s in seen.steps)
    assert all(s.metrics["loss"].dim() == 0 and not s.metrics["loss"].requires_grad for s in seen.steps)
    for epoch, state in enumerate(seen.epochs):
        steps = [float(s.metrics["loss"]) for s in seen.steps[4 * epoch : 4 * epoch + 4]]
        assert state.metrics["loss"] == pytest.approx(sum(steps) / 4, rel=1e-5)
        assert state.images == 64 and state.images_per_second > 0 and state.step == 4 * epoch + 4
    ((end, training),) = seen.ends
    assert end.metrics == last and end.step == 8 and end.task is trained and not training
    with pytest.raises(AttributeError):
        end.step = 3


def test_the_jsonl_file_has_a_row_an_epoch_with_the_mean_metrics(tmp_path):
    last = fit(task(), *images(), FitConfig(2, 16), tmp_path, progress=False)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    times = ["images_per_second", "seconds", "peak_memory"]
    assert [list(row) for row in rows] == [["epoch", "step", "loss", "accuracy", "learning_rate", *times]] * 2
    assert [(row["epoch"], row["step"]) for row in rows] == [(0, 4), (1, 8)]
    assert {name: rows[-1][name] for name in last} == last


def test_the_log_has_the_time_and_the_memory(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("purify_fast.training.run.time.monotonic", lambda: clock[0])

    # each step takes a second, those of the second epoch two, and those of the third epoch three
    slow = on_step(lambda state: clock.__setitem__(0, clock[0] + state.epoch + 1))

    def rows():
        return [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]

    with pytest.raises(Stopped):
        fit(task(), *images(), FitConfig(3, 16), tmp_path, progress=False, callbacks=[slow, StopAt(7)])
    assert [row["seconds"] for row in rows()] == [4]
    clock[0] += 1000
    # The steps since the last checkpoint are taken again, and the time between the runs does not count.
    fit(task(), *images(), FitConfig(3, 16), tmp_path, progress=False, callbacks=[slow])
    assert [row["seconds"] for row in rows()] == [4, 12, 24]
    assert all(10**7 < row["peak_memory"] < 10**11 for row in rows())


def test_a_finished_run_calls_on_end_alone(tmp_path):
    last = fit(task(), *images(), FitConfig(1, 16), tmp_path, progress=False)
    seen = Structural()
    assert fit(task(), *images(), FitConfig(1, 16), tmp_path, progress=False, callbacks=[seen]) == last
    assert not seen.steps and not seen.epochs and seen.ends[0][0].metrics == last
