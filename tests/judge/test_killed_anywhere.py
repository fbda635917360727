"""An evaluation that is killed at any moment goes on with the identical report: in rows, surrogates, files, probes."""

import logging
import os
import re
import signal
import sys
from unittest import mock

import pytest
from evaluating import evaluate
from forks import together
from shards_work import kill_at_call, plain
from small_models import labelled

from purify_fast.attacks import APGD, PGD
from purify_fast.defences import NoisyEnsemble
from purify_fast.evaluation import AttackSpec
from purify_fast.judge.alarms import probes
from purify_fast.judge.surrogates.copies import Softened

#: The function during which the process is killed, and the number of the call.
MOMENTS = (
    # a batch of the second attack
    ("purify_fast.judge.run.attack_run.AttackRun.make", 4),
    # the arrays of a row are written, the row is not
    ("purify_fast.judge.run.cache.write_sealed", 3),
    # the softened copy was attacked in a row of its own
    ("purify_fast.judge.run.measure.Measure.judged", 3),
    # the probes before the attacks, then the answers after the attacks
    ("purify_fast.judge.alarms.probes._Short.robust", 4),
    ("purify_fast.judge.alarms.probes.sets_seed", 1),
)


def killed_at(name, number):
    """This process is killed when it calls a function for the first, second, ... time."""
    parts = name.split(".")
    depth = max(i for i in range(len(parts)) if ".".join(parts[:i]) in sys.modules)
    place = sys.modules[".".join(parts[:depth])]
    for part in parts[depth:-1]:
        place = getattr(place, part)
    kill_at_call(place, parts[-1], number)


def evaluated(out):
    """A random defence under attacks by its own gradients and by a softened copy's, with probes of a few steps."""
    net, x, y = labelled(12, classes=5)
    model = NoisyEnsemble(net, 0.2, samples=2)
    soft = AttackSpec(APGD(steps=3), through=Softened(model, 10.0), label="softened", survivors_only=True)
    attacks = [PGD(steps=2), PGD(steps=2, loss="dlr"), soft]
    short = {"STEPS": 2, "ITERATIONS": (1, 3), "DRAWS": (1, 2), "JUDGES": 3}
    options = {"eps": 0.03, "probes": True, "eot_iter": 2, "n_eval": 2, "batch_size": 6, "seed": 3}
    with mock.patch.multiple(probes, **short):
        return evaluate(model, x, y, attacks=attacks, out=out, **options)


@pytest.mark.slow
def test_killed_anywhere_the_report_is_the_same(tmp_path):
    for i, moment in enumerate(MOMENTS):
        done = together(tmp_path, 1, lambda i=i, at=moment: killed_at(*at) or evaluated(tmp_path / str(i)), None)
        assert done.codes == [-signal.SIGKILL], done.errors
    whole = plain(evaluated(tmp_path / "whole"))
    assert len(whole["findings"]) == 8 and any("through" in row["settings"] for row in whole["rows"])
    for i, moment in enumerate(MOMENTS):
        out = tmp_path / str(i)
        # the clean images come first, and each row and each probe is a file
        assert list((out / "rows").glob("*")), moment
        assert plain(evaluated(out)) == whole, moment


def few(out):
    with mock.patch.multiple(probes, STEPS=2, ITERATIONS=(1, 2)):
        return evaluate(*labelled(6), eps=0.1, attacks=[PGD(steps=2)], out=out, probes=True)


@pytest.mark.parametrize("kind", ["values", "arrays", "probes"])
def test_one_damaged_bit_of_a_kept_file_is_told_and_made_again(tmp_path, caplog, kind):
    first = few(tmp_path)
    paths = {path: ".values." in path.name for path in sorted((tmp_path / "rows").iterdir())}
    # the largest has the images of an attack
    path = max((path for path, of_probes in paths.items() if of_probes is (kind == "probes")), key=os.path.getsize)
    kept = path.read_bytes()
    damaged = bytearray(kept)
    # within the numbers: a file that can still be read
    damaged[-1 if kind == "arrays" else kept.rindex(b"0.") + 2] ^= 1
    path.write_bytes(damaged)
    with caplog.at_level(logging.WARNING, "purify_fast"):
        assert plain(few(tmp_path)) == plain(first)
    assert f"{path} is damaged: the checksum does not match the content" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, "purify_fast"):
        few(tmp_path)
    assert not caplog.text
    if kind == "probes":
        # of a row all but the time that it took
        assert path.read_bytes() == kept


def test_a_log_gets_plain_lines_with_the_rate(capsys, monkeypatch):
    for name in ("LINE_EVERY", "FIRST_LINE"):
        monkeypatch.setattr(f"purify_fast.judge.run.progress.{name}", 0.0)
    attacks = [PGD(steps=2), PGD(steps=3)]
    evaluate(*labelled(6), eps=0.01, attacks=attacks, name="mine", probes=True, progress=True)
    lines = capsys.readouterr().err.splitlines()
    # The probes come first, as rows of their own.
    numbers = [re.match(r"mine: row (\d+) of (\d+), PGD-2 ce:.* predictions/s", line) for line in lines]
    assert any(found and int(found[2]) == int(found[1]) + 1 > 4 for found in numbers)
    assert not any("\r" in line or "\033" in line for line in lines)
