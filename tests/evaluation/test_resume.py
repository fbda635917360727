"""An evaluation that is killed goes on at its last finished batch and writes the same report."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import nn

from purify_fast.attacks import APGD, PGD
from purify_fast.defences.noisy_ensemble import NoisyEnsemble
from purify_fast.evaluation import AttackSpec, evaluate
from purify_fast.evaluation.keep import cache
from purify_fast.evaluation.progress import Progress

pytestmark = pytest.mark.usefixtures("one_thread")

CHILD = """
import os, signal, sys
sys.path.insert(0, {here!r})
import torch
torch.set_num_threads(1)
from purify_fast.evaluation.keep import cache
from test_resume import evaluated
kept, keep = [], cache.PartialRow.keep

def kill_after(self, ids, batch):
    keep(self, ids, batch)
    kept.append(ids)
    if len(kept) == {after}:
        os.kill(os.getpid(), signal.SIGKILL)

cache.PartialRow.keep = kill_after
evaluated({out!r})
"""


def evaluated(out):
    """A random defence, whose draws depend on where the generator is, in batches of 8."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Flatten(), nn.Linear(48, 5))
        x = torch.rand(24, 3, 4, 4)
    model = NoisyEnsemble(net, 0.2, samples=2)
    with torch.no_grad():
        y = net(x).argmax(1)
    attacks = [PGD(steps=3), AttackSpec(APGD(steps=5), survivors_only=True), PGD(steps=2, loss="dlr")]
    return evaluate(
        model, x, y, eps=0.05, attacks=attacks, eot_iter=2, n_eval=3, batch_size=8, seed=3, out=out, progress=False
    )


def plain(report):
    content = json.loads(report.to_json())
    for row in content["rows"]:
        del row["seconds"]
    return content


@pytest.mark.parametrize("after", [2, 5])
def test_a_killed_evaluation_goes_on_with_the_same_result(tmp_path, after):
    whole = plain(evaluated(tmp_path / "whole"))
    out = tmp_path / "killed"
    code = CHILD.format(here=str(Path(__file__).parent), after=after, out=str(out))
    environ = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr
    left = list((out / "rows").glob("*.batches/*.safetensors"))
    # the batches of the row that was not finished
    assert len(left) == 2
    assert plain(evaluated(out)) == whole
    assert not list((out / "rows").glob("*.batches"))


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


def test_another_radius_does_not_overwrite_a_report(tmp_path):
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    x, y = torch.rand(6, 1, 4, 4), torch.zeros(6).long()
    first, second = (
        evaluate(net, x, y, eps=eps, attacks=[PGD(steps=1)], out=tmp_path, progress=False) for eps in (0.1, 0.2)
    )
    first.save(tmp_path)
    first.save(tmp_path)
    second.save(tmp_path)
    kept = json.loads((tmp_path / "earlier, L-inf 0.1" / "report.json").read_text())
    assert kept["about"]["threat"] == "L-inf 0.1" and (tmp_path / "earlier, L-inf 0.1" / "report.md").is_file()
    assert json.loads((tmp_path / "report.json").read_text())["about"]["threat"] == "L-inf 0.2"


def test_a_log_gets_plain_lines_with_the_rate_and_the_time_left(capsys, monkeypatch):
    monkeypatch.setattr("purify_fast.evaluation.progress.LINE_EVERY", 0.0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    x = torch.rand(6, 1, 4, 4)
    with torch.no_grad():
        y = net(x).argmax(1)
    evaluate(net, x, y, eps=0.01, attacks=[PGD(steps=2), PGD(steps=3)], name="mine", progress=True)
    lines = capsys.readouterr().err.splitlines()
    assert any(line.startswith("mine: row 1 of 2, PGD-2 ce:") and "images/s" in line for line in lines)
    ends = [line for line in lines if "% of 6 images (" in line]
    assert len(ends) == 2 and "left at most" in ends[0] and "the last row" in ends[1]
    assert not any("\r" in line or "\033" in line for line in lines)


def test_the_probes_have_lines_and_a_share_of_the_time_left(capsys, monkeypatch):
    monkeypatch.setattr("purify_fast.evaluation.progress.LINE_EVERY", 0.0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    x = torch.rand(6, 1, 4, 4)
    with torch.no_grad():
        y = net(x).argmax(1)
    evaluate(net, x, y, eps=0.01, attacks=[PGD(steps=2)], name="mine", probes=True)
    lines = capsys.readouterr().err.splitlines()
    (end,) = [line for line in lines if "% of 6 images (" in line]
    assert "left at most" in end and "last row" not in end
    assert sum(line.startswith("mine: row 2 of 2, probes:") and "images/s" in line for line in lines) > 20


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
