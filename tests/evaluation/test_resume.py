"""What is kept of an unfinished row, and how far an evaluation is: batches, lines of a log, the time left."""

import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import nn

from purify_fast.attacks import PGD
from purify_fast.evaluation import evaluate
from purify_fast.evaluation.keep import cache
from purify_fast.evaluation.progress import Progress

sys.path.insert(0, str(Path(__file__).parent))

from test_killed_anywhere import evaluated, plain

pytestmark = pytest.mark.usefixtures("one_thread")


def test_finished_batches_are_not_attacked_again(tmp_path, monkeypatch):
    seen, keep = [], cache.PartialRow.keep

    class Killed(Exception):
        pass

    def stop(self, ids, batch):
        keep(self, ids, batch)
        seen.append(len(ids))
        if len(seen) == 2:
            raise Killed

    monkeypatch.setattr(cache.PartialRow, "keep", stop)
    with pytest.raises(Killed):
        evaluated(tmp_path)
    first = len(seen)
    evaluated(tmp_path)
    whole = len(seen) - first
    evaluated(tmp_path / "other")
    assert len(seen) - first - whole == whole + 2


def test_a_damaged_batch_is_made_again(tmp_path, monkeypatch):
    whole = plain(evaluated(tmp_path / "whole"))
    monkeypatch.setattr(cache.PartialRow, "remove", lambda self: None)
    evaluated(tmp_path / "again")
    for path in (tmp_path / "again/rows").glob("*.safetensors"):
        path.unlink()
    for path in (tmp_path / "again/rows").glob("*.batches/*.safetensors"):
        path.write_bytes(path.read_bytes()[:100])
    assert plain(evaluated(tmp_path / "again")) == whole


@pytest.mark.parametrize("probes", [False, True])
def test_a_log_gets_plain_lines_with_the_rate_and_the_time_left(capsys, monkeypatch, probes):
    monkeypatch.setattr("purify_fast.evaluation.progress.LINE_EVERY", 0.0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    x = torch.rand(6, 1, 4, 4)
    with torch.no_grad():
        y = net(x).argmax(1)
    attacks = [PGD(steps=2)] if probes else [PGD(steps=2), PGD(steps=3)]
    evaluate(net, x, y, eps=0.01, attacks=attacks, name="mine", probes=probes)
    lines = capsys.readouterr().err.splitlines()
    assert any(line.startswith("mine: row 1 of 2, PGD-2 ce:") and "images/s" in line for line in lines)
    ends = [line for line in lines if "% of 6 images (" in line]
    assert "left at most" in ends[0] and ("last row" in ends[-1]) is not probes
    # the probes have lines, and a share of the time that is left
    assert (sum(line.startswith("mine: row 2 of 2, probes:") for line in lines) > 20) is probes
    assert not any("\r" in line or "\033" in line for line in lines)


def test_the_time_left_is_of_what_is_left():
    progress = Progress("mine", False, [100, None, 50])
    assert progress.left() == "time left not known yet"
    with mock.patch.object(Progress, "rate", lambda self: 10.0):
        with progress.row("first", 100):
            progress.count(60)
            assert progress.left() == "9 s left at most, and rows whose length is not known"
        progress.next_row()
        # kept by an earlier run
        progress.next_row()
        assert progress.left() == "5 s left at most"
        with progress.row("last", 50):
            progress.count(200)
            assert progress.left() == "0 s left at most"
        progress.next_row()
        assert progress.left() == "the last row"
